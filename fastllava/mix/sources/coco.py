"""Names of COCO's images: annotations have numbers, the folders of 2017 have files of twelve digits."""


def coco_file(image_id: int) -> str:
    """The file of an image of train2017; those of train2014 are there under the same number."""
    return f"{image_id:012d}.jpg"

"""Pixels of a tower that squeezes the whole image into its square, against transformers' own processor on Pillow."""

import numpy as np
import pytest
from PIL import Image

from fastllava.batch import ImageSpec
from fastllava.data.images import load_image
from fastllava.data.pixels import tower_pixels

HALF = (0.5, 0.5, 0.5)
SIZES = [(384, 384), (640, 480), (31, 200), (500, 7), (9, 9), (1000, 999)]


def picture(width, height):
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3)).astype(np.uint8))


def theirs(size, resample):
    """transformers' processor of SigLIP on Pillow, whose name depends on its version, without scaling: uint8 of one picture."""
    try:
        from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as Processor
    except ImportError:
        from transformers import SiglipImageProcessor as Processor
    processor = Processor(size={"height": size, "width": size}, resample=resample, do_rescale=False, do_normalize=False)
    return lambda image: np.asarray(processor(image, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize(("resample", "number"), [("bicubic", 3), ("bilinear", 2)])
@pytest.mark.parametrize("size", [224, 384])
def test_they_are_siglips(resample, number, size):
    spec = ImageSpec(size, 1, HALF, HALF, crops=False, resample=resample)
    process = theirs(size, number)
    for width, height in SIZES:
        image = picture(width, height)
        found, expected = tower_pixels(image, "square", spec), process(image)
        assert found.dtype == np.uint8
        assert np.array_equal(found, expected), (width, height)


@pytest.mark.parametrize(("resample", "number"), [("bicubic", 3), ("bilinear", 2)])
def test_padded_they_are_siglips_of_the_padded_square(resample, number):
    spec, process = ImageSpec(56, 1, HALF, HALF, crops=False, resample=resample), theirs(56, number)
    for width, height in SIZES:
        image, side = picture(width, height), max(width, height)
        square = Image.new("RGB", (side, side), (127, 127, 127))
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        assert np.array_equal(tower_pixels(image, "pad", spec), process(square)), (width, height)


def test_the_file_of_an_image_is_squeezed_and_that_of_clip_is_cut(tmp_path, make_data):
    """A picture of three stripes: the outer two are in the square of one, and not in that of the other."""
    stripes = np.repeat(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8), 40, axis=1)
    Image.fromarray(np.repeat(stripes, 40, axis=0)).save(tmp_path / "stripes.png")
    whole, cut = (
        load_image(tmp_path / "stripes.png", "square", ImageSpec(24, 1, HALF, HALF, crops=crops), make_data([])).transpose(1, 2, 0)
        for crops in (False, True)
    )
    assert whole[12, 0].tolist() == [255, 0, 0]
    assert whole[12, 23].tolist() == [0, 0, 255]
    assert (cut[:, 2:22] == [0, 255, 0]).all()

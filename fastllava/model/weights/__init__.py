"""A model's weights and the files around them: read from and written to every layout this field uses."""

from fastllava.model.weights.read import Origin, load_llava, read_image_spec, read_origin

__all__ = ["Origin", "load_llava", "read_image_spec", "read_origin"]

"""A model's weights and the files around them: read from and written to every layout this field uses."""

from fastllava.model.weights.adapter_writing import write_lora
from fastllava.model.weights.adapters import read_adapter
from fastllava.model.weights.config_files import projector_config
from fastllava.model.weights.read import Origin, load_llava, projector_file, read_image_spec, read_origin
from fastllava.model.weights.write import disk_tensors, write_checkpoint, write_projector

__all__ = [
    "Origin",
    "disk_tensors",
    "load_llava",
    "projector_config",
    "projector_file",
    "read_adapter",
    "read_image_spec",
    "read_origin",
    "write_checkpoint",
    "write_lora",
    "write_projector",
]

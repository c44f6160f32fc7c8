"""The steps of splice in plain PyTorch, on any device: forward is the reference."""

from fastllava_kernels._device.plain import embedding_gradient, gather_rows

from .reference import splice

__all__ = ["embedding_gradient", "gather_rows", "splice"]

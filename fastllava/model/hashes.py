"""A hash of a weight, by which it is known again."""

import hashlib

import torch
from torch import Tensor


def hashed(tensor: Tensor) -> str:
    """SHA-256 of a tensor on the CPU: its dtype, shape and bits."""
    plain = tensor.detach().contiguous()
    digest = hashlib.sha256(f"{plain.dtype} {list(plain.shape)}\n".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())  # pyright: ignore[reportArgumentType] (an array is a buffer)
    return digest.hexdigest()

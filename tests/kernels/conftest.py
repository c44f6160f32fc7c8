"""What tests of several rooms' kernels need."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="session")
def vast() -> Iterator[Tensor]:
    """fp16, 2**32 numbers and 64 more, in memory that is reserved and, but for a page or two, not used."""
    if torch.cuda.is_available():
        pytest.skip("reserves memory that a GPU would have to have")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    size = (4 * 2**30 + 64) * 2
    # PROT_READ | PROT_WRITE; MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
    address = libc.mmap(None, size, 3, 0x4022, -1, 0)
    assert address not in (None, ctypes.c_void_p(-1).value), "mmap"
    try:
        yield torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.float16)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))

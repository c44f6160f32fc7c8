"""Matrix products that keep their fp32 sums: the accumulator is not rounded to the inputs' dtype."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def mm32(a_MK: Tensor, b_KN: Tensor, out: Tensor | None = None, accumulate: bool = False) -> Tensor:
    """Compute `a @ b`, fp32 [M, N], of inputs in one dtype (fp64 stays fp64), into `out` when given, added to it when `accumulate`.

    On a GPU, and on tensors without data, which stand for one's, the library's product with an fp32 result; elsewhere the product of
    the inputs in fp32.
    """
    if (a_MK.is_cuda or isinstance(a_MK, FakeTensor)) and a_MK.dtype in (torch.bfloat16, torch.float16):
        if accumulate and out is not None:
            return torch.addmm(out, a_MK, b_KN, out_dtype=torch.float32, out=out)
        if out is not None:
            return torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=out)
        return torch.mm(a_MK, b_KN, out_dtype=torch.float32)
    wide = torch.promote_types(a_MK.dtype, torch.float32)
    a, b = a_MK.to(wide), b_KN.to(wide)
    if out is None:
        return a @ b
    return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)

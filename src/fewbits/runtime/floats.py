"""Products with float weights as they are stored, no copy of them: bound by memory where rows are few."""

from __future__ import annotations

import torch

from fewbits import _native
from fewbits.errors import FewbitsError
from fewbits.instructions import threads
from fewbits.qtensor import QTensor
from fewbits.runtime.interleaved import scale_name
from fewbits.runtime.reference import Kernel, Prepared, _Weight

# rows of activations; for more, torch is as quick, with the weight in their type
FEW = {torch.float32: 16, torch.float16: 32, torch.bfloat16: 32}


class _Stored(_Weight):
    def weight(self) -> torch.Tensor:
        return self.planes["data"]

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, columns = self.shape
        if x.shape[-1] != columns:
            raise FewbitsError(f"activations of {x.shape[-1]} columns, a weight of {columns}")
        flat = x.detach().reshape(-1, columns)
        weight = self.weight()
        if weight.device.type != "cpu" or len(flat) > FEW[weight.dtype]:
            return super().matmul(x, bias)
        out = torch.empty(len(flat), rows)
        _native.multiply_floats(weight.view(torch.uint8), scale_name(weight.dtype), flat.float().contiguous(), out,
                                None if bias is None else bias.detach().float().contiguous(), threads())
        return out.view(*x.shape[:-1], rows).to(x.dtype)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return super().rows(ids).to(self.dtype)


class Floats(Kernel):
    """Activations and sums in float32, weights in what they are stored in."""

    name = "floats"

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        if q.codec.family != "float":
            return f"{q.codec.name} is no plain float"
        if len(q.shape) != 2 or 0 in q.shape[1:]:
            return f"{list(q.shape)} is no matrix"
        return None if q.order is None else "an order of columns"

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        return _Stored(q, dtype)

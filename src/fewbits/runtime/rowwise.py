"""Products of int8 weights and activations rounded to int8, a scale a row: integers until the very end.

`w8a8` rounds activations as its files say: by a scale for each token, or by the layer's own. `int8` is LLM.int8()
(Dettmers et al., 2022) to the letter; the native kernel is quicker there, and rounds finer.
"""

from __future__ import annotations

import torch

from fewbits.codecs.affine import Int8
from fewbits.codecs.w8a8 import SPAN, TOP, W8A8
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.cpu import OUTLIER, far_columns
from fewbits.runtime.reference import Kernel, Prepared, _Decode
from fewbits.runtime.triton.available import unavailable


class _Rowwise(_Decode):
    """Of `int8`, columns of activations that reach `outliers` are multiplied in floating point; None or 0: none are."""

    outliers: float | None = OUTLIER

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        rows, columns = self.shape
        if x.shape[-1] != columns:
            raise FewbitsError(f"activations of {x.shape[-1]} columns, a weight of {columns}")
        flat = x.detach().reshape(-1, columns).float()
        far = far_columns(flat, None if isinstance(self.codec, W8A8) else self.outliers)
        codes, scales = self._rounded(flat.index_fill(1, far, 0.0) if len(far) else flat)
        weight, by_row = self.planes["codes"], self._by_row()
        sums = torch._int_mm(codes, weight.t())  # int32 [n, out]
        if "zeros" in self.planes:
            sums = sums - codes.sum(1, dtype=torch.int32)[:, None] * self.planes["zeros"].view(-1)
        out = sums.float().mul_(scales).mul_(by_row)
        if len(far):
            out.addmm_(flat[:, far], (weight[:, far].float() * by_row[:, None]).t())
        if bias is not None:
            out += bias.detach().float()
        return out.view(*x.shape[:-1], rows).to(x.dtype)

    def _by_row(self) -> torch.Tensor:
        """Scales of the weight `[out]`."""
        if isinstance(self.codec, W8A8):
            return self.planes["scales"].float().view(-1)
        return self.planes["absmax"].view(-1) * Int8.STEP

    def _rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """int8 codes of `x` `[n, in]`, and their scales `[n, 1]` or `[1]`."""
        if "inputs" in self.planes:
            scales = self.planes["inputs"][0]
        else:
            scales = x.abs().amax(1, keepdim=True) / (SPAN if isinstance(self.codec, W8A8) else TOP)
        codes = (x / scales).nan_to_num_(0.0).round_().clamp_(-1 - TOP, TOP)  # 0 / 0 where all of a row is zero
        return codes.to(torch.int8), scales


class Rowwise(Kernel):
    """Activations rounded to int8, a scale a row of them or one for all; weights as they are."""

    name = "rowwise"

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        if device.type != "cpu" and (reason := unavailable(device)):
            return reason
        if not isinstance(q.codec, (Int8, W8A8)):
            return f"{q.codec.name} has no scale for each row alone, or not of 8 bits"
        return None if len(q.shape) == 2 and 0 not in q.shape else f"{list(q.shape)} is no matrix"

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        if q.device.type == "cpu":
            return _Rowwise(q, dtype)
        from fewbits.runtime.triton.rowwise import Tiled

        return Tiled(q, dtype)

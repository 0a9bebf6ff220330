"""The kernel for GPUs: weights of few bits, activations as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from fewbits.codecs.base import Codec, Params, Planes, Shape, units
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor
from fewbits.runtime.reference import Kernel, Prepared
from fewbits.runtime.triton import layout
from fewbits.runtime.triton.available import unavailable

COUNTERS = 1 << 14  # of tiles whose columns several programs share
TYPES = (torch.float16, torch.bfloat16, torch.float32)


class OnGpu:
    """A prepared weight `[out, in]`, or a stack of them `[experts, out, in]`."""

    def __init__(self, codec: Codec, shape: Shape, dtype: torch.dtype, found: layout.Layout, planes: Planes,
                 order: torch.Tensor | None, kept: Params | None):
        from fewbits.runtime.triton import ops
        from fewbits.runtime.triton.weight import Weight

        self.codec, self.shape, self.dtype, self.layout, self.order, self.kept = codec, shape, dtype, found, order, kept
        device = planes["words"].device
        self.planes = planes | {"arrived": torch.zeros(COUNTERS, dtype=torch.int32, device=device)}
        self._weight = Weight(found, tuple(shape), self.planes)
        self._ops, self._spelling = ops, ops.spelled(self._weight)

    @classmethod
    def of(cls, q: QTensor, dtype: torch.dtype) -> OnGpu:
        found, planes, kept = layout.pack(q)
        return cls(q.codec, q.shape, dtype, found, planes, q.order, kept)

    def __reduce__(self) -> tuple[object, ...]:
        return OnGpu.of, (self.q.to(self.device), self.dtype)

    @property
    def device(self) -> torch.device:
        return self.planes["words"].device

    @property
    def q(self) -> QTensor:
        """Made again on the CPU: codes from the kernels' words, parameters as they were."""
        if self.kept is None:
            raise FewbitsError("several weights side by side are no tensor of their codec any more")
        codes = layout.unpack(self.layout, self.planes, self.shape).cpu()
        order = None if self.order is None else self.order.cpu()
        return QTensor(self.codec, self.shape, self.codec.pack(codes, self.kept, self.shape), order)

    def matmul(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if len(self.shape) != 2:
            raise FewbitsError(f"a stack of {self.shape[0]} matrices needs the expert of every row", "use grouped()")
        self._check(x, self.shape[-1])
        x = self._ordered(x)
        if not _launched(x):
            return self._ops.product(x, list(self.planes.values()), bias, self._spelling)
        found = self._weight.multiply(x.reshape(-1, x.shape[-1]).contiguous(), bias)
        return found.view(*x.shape[:-1], found.shape[-1])

    def grouped(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Every row of `x` `[n, in]` times the matrix of its expert, `experts` (int64) `[n]`: `[n, out]`."""
        self._check(x, self.shape[-1])
        if len(self.shape) != 3 or experts.shape != x.shape[:1]:
            raise FewbitsError(f"experts {list(experts.shape)} for {list(x.shape)} activations", "one for each row")
        return self._ops.grouped(self._ordered(x), experts, list(self.planes.values()), self._spelling)

    def grad_input(self, g: torch.Tensor) -> torch.Tensor:
        self._check(g, self.shape[-2])
        found = self._ops.product_gradient(g, list(self.planes.values()), self._spelling)
        return found if self.order is None else found.index_select(-1, torch.argsort(self.order))

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        found = self._ops.rows(ids, list(self.planes.values()), self._spelling, self.dtype)
        return found if self.order is None else found.index_select(-1, torch.argsort(self.order))

    def _ordered(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.order is None else x.index_select(-1, self.order)

    def _check(self, x: torch.Tensor, columns: int) -> None:
        if x.dtype not in TYPES:
            raise FewbitsError(f"activations of {x.dtype}", "float16, bfloat16 or float32")
        if x.shape[-1] != columns:
            raise FewbitsError(f"{x.shape[-1]} columns, for a weight {list(self.shape)}")


def _launched(x: torch.Tensor) -> bool:
    """Whether a product is a launch and nothing else: torch's ways around operators take longer than small products."""
    watched = torch.is_grad_enabled() and x.requires_grad or torch.compiler.is_compiling()
    return type(x) is torch.Tensor and not x.is_meta and not watched


def side_by_side(parts: Sequence[OnGpu]) -> OnGpu | None:
    """One matrix of the rows of several, which must not be stacks; None where their layouts differ."""
    first = parts[0]
    alike = [(p.layout, p.shape[-1], p.order is None) for p in parts]
    if len(set(alike)) > 1 or first.order is not None or any(len(p.shape) != 2 for p in parts):
        return None
    tables = [p.planes["levels"] for p in parts] if first.layout.levels == "table" else []
    if not all(torch.equal(table, tables[0]) for table in tables):
        return None

    def joined(name: str) -> torch.Tensor:
        planes = [p.planes[name] for p in parts]
        if name == "row" or name == "levels" and first.layout.levels == "rows":
            return torch.cat(planes)
        if name == "levels":
            return planes[0]
        whole = torch.cat([plane[:, :p.shape[0]] for plane, p in zip(planes, parts, strict=True)], 1)
        return F.pad(whole, (0, -whole.shape[1] % layout.ALIGNED))

    shape = (sum(p.shape[0] for p in parts), first.shape[-1])
    planes = {name: joined(name) for name in first.planes if name != "arrived"}
    return OnGpu(first.codec, shape, first.dtype, first.layout, planes, None, None)


class Triton(Kernel):
    """Weights are decoded where they are multiplied; activations and their type stay as they are."""

    name = "triton"

    def supports(self, q: QTensor, device: torch.device) -> str | None:
        return unavailable(device) or layout.unfit(q)

    def offers(self, device: torch.device) -> bool:
        return device.type != "cpu"  # where it would be interpreted, which is slow

    def prepare(self, q: QTensor, dtype: torch.dtype) -> Prepared:
        return OnGpu.of(q, dtype)

    def nbytes(self, codec: Codec, shape: Shape, dtype: torch.dtype) -> int:
        outs = units(shape[-2], layout.ALIGNED) * layout.ALIGNED * math.prod(shape[:-2])
        return math.ceil(outs * layout.row_bytes(codec, shape[-1])) + 4 * COUNTERS

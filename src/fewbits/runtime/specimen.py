"""Random weights of any codec, to measure and to check kernels on."""

from __future__ import annotations

import math

import torch

from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import Float
from fewbits.qtensor import QTensor

WHOLE = ("nested_absmax", "offset")  # parameters that units share
SPREAD = 0.02  # of the values, roughly: what models begin with


def random_weight(codec: Codec, shape: Shape, device: torch.device | None = None) -> QTensor:
    """Random codes under scales that differ from unit to unit by up to three times."""
    device = device or torch.device("cpu")
    if isinstance(codec, Float):
        return QTensor(codec, shape, {name: (torch.randn(size, device=device) * SPREAD).to(codec.dtype)
                                      for name, (_, size) in codec.planes(shape).items()})
    planes = {}
    for name, (kind, size) in codec.planes(shape).items():
        dtype = getattr(torch, kind)
        low, high = (-127, 128) if kind == "int8" else (0, 256)
        planes[name] = (torch.rand(size, device=device).to(dtype) if dtype.is_floating_point
                        else torch.randint(low, high, size, dtype=dtype, device=device))
    codes, params = QTensor(codec, shape, planes).unpack()
    params = {k: _random(k, v) if v.is_floating_point() else v for k, v in params.items()}
    if "exponent" in params:
        params["exponent"] = params["exponent"] % 2 + 126
    return _narrowed(codec, shape, codes, params)


def copies(q: QTensor, count: int) -> list[QTensor]:
    """The same weight again and again, each in memory of its own."""
    return [QTensor(q.codec, q.shape, {k: p.clone() for k, p in q.planes.items()}, q.order) for _ in range(count)]


def _random(name: str, param: torch.Tensor) -> torch.Tensor:
    if name in WHOLE:
        return torch.ones_like(param)
    return torch.randn_like(param) if name == "levels" else torch.rand_like(param) + 0.5


def _narrowed(codec: Codec, shape: Shape, codes: torch.Tensor, params: dict[str, torch.Tensor]) -> QTensor:
    """With scales by which values spread as they do in models."""
    q = QTensor.pack(codec, shape, codes, params)
    rows = min(64, len(next(iter(q.planes.values()))))
    part = q.part(slice(rows)) if codec.rows_apart(shape) else q
    factor = SPREAD / max(float(part.dequantize().std()), 1e-30)
    power = round(math.log2(factor))
    params = {k: v * factor if v.is_floating_point() else v for k, v in params.items()}
    if "exponent" in params:
        params["exponent"] = params["exponent"] + power
    return QTensor.pack(codec, shape, codes, params)

"""W8A8: int8 weights with a scale a row, met by activations that are rounded to int8 as well.

The weights are those of `int8-row`; what is said of the activations is part of the format, because files say it and
every engine obeys. `w8a8` finds a scale for each token when it comes by, `w8a8-static` has one a layer, found by
calibration and stored with the weight: in each of its rows, so that rows can be split and stacked like any others.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from fewbits.codecs.affine import IntK
from fewbits.codecs.base import Codec, Grid, Params, Planes, Shape
from fewbits.lazy import torch

TOP = 127  # the largest code of an activation; the smallest is -128
SPAN = 127.5  # largest magnitudes over scales, as compressed-tensors and llm-compressor divide


@dataclass(frozen=True)
class W8A8(Codec):
    """`scale * (code - zero)`, codes -128 … 127, kept here as code + 128."""

    static: bool = False  # one scale of the activations, stored; else one a token, found as it comes by
    symmetric: bool = True
    scale_kind: str = "F16"
    family: ClassVar[str] = "w8a8"
    settled: ClassVar[bool] = True
    linear: ClassVar[tuple[str, ...]] = ("scale",)

    @cached_property
    def weights(self) -> IntK:
        """The codec of the weights alone."""
        return IntK(8, -1, self.symmetric, self.scale_kind)

    @property
    def name(self) -> str:
        kind = "" if self.scale_kind == "F16" else f"-s{self.scale_kind.lower()}"
        return "w8a8" + ("-static" if self.static else "") + ("" if self.symmetric else "-asym") + kind

    @property
    def blind(self) -> Codec:
        return replace(self, static=False)

    def unit(self, columns: int) -> int:
        return self.weights.unit(columns)

    def fit(self, w: torch.Tensor, importance: torch.Tensor | None, state: Any = None) -> Params:
        params = self.weights.fit(w, importance, state)
        return params | {"inputs": torch.zeros_like(params["scale"], dtype=torch.float32)} if self.static else params

    def refit(self, w: torch.Tensor, codes: torch.Tensor, params: Params, importance: torch.Tensor | None) -> Params:
        return params | self.weights.refit(w, codes, params, importance)

    def grid(self, params: Params, columns: int) -> Grid:
        return self.weights.grid(params, columns)

    def calibrated(self, planes: Planes, peaks: torch.Tensor) -> Planes:
        if not self.static:
            return planes
        scales = torch.where(peaks > 0, peaks.float() / SPAN, torch.finfo(torch.float32).eps)  # never 0: a divisor
        return planes | {"inputs": scales.repeat_interleave(len(planes["codes"]) // len(peaks))[:, None]}

    def pack(self, codes: torch.Tensor, params: Params, shape: Shape) -> Planes:
        planes = self.weights.pack(codes, params, shape)
        signed = {name: (planes[name] ^ 128).view(torch.int8) for name in ("codes", "zeros") if name in planes}
        return planes | signed | ({"inputs": params["inputs"][..., 0]} if self.static else {})

    def unpack(self, planes: Planes, shape: Shape) -> tuple[torch.Tensor, Params]:
        plain = {name: planes[name].view(torch.uint8) ^ 128 for name in ("codes", "zeros") if name in planes}
        codes, params = self.weights.unpack({"scales": planes["scales"]} | plain, shape)
        return codes, params | ({"inputs": planes["inputs"].unsqueeze(-1)} if self.static else {})

    def planes(self, shape: Shape) -> dict[str, tuple[str, Shape]]:
        found = self.weights.planes(shape)
        rows, columns = self.matrix(shape)
        found |= {"codes": ("int8", (rows, columns))} | ({} if self.symmetric else {"zeros": ("int8", (rows, 1))})
        return found | ({"inputs": ("float32", (rows, 1))} if self.static else {})


_NAME = re.compile(r"w8a8(-static)?(-asym)?(?:-s(bf16|f32))?")


def parse(name: str) -> Codec | None:
    match = _NAME.fullmatch(name.lower())
    if match is None:
        return None
    static, asymmetric, scale = match.groups()
    return W8A8(static is not None, asymmetric is None, (scale or "F16").upper())

"""The same values in another codec, where two formats share a grid: int4 in groups of 32 n and Q4_0, for example.

Nothing is fitted and nothing rounded: codes are shifted, scales repeated, and the result is compared value by value.
"""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.codecs import ggml
from fewbits.codecs.affine import IntK
from fewbits.codecs.base import Codec, Params, Shape
from fewbits.lazy import torch
from fewbits.qtensor import CHUNK, QTensor


@dataclass(frozen=True)
class _Line:
    """`scale * (code - zero)`: codes uint8 `[rows, columns]`, scale and zero float32 `[rows, units]`."""

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    unit: int  # columns


def candidates(codec: Codec, columns: int) -> list[Codec]:
    """Codecs that may hold the values of a tensor of `codec` exactly, the smallest first; `recode` tells for sure."""
    if isinstance(codec, IntK):
        wider = [IntK(bits, codec.group, codec.symmetric, kind) for bits in (4, 8) for kind in ("F16", codec.scale_kind)
                 if bits >= codec.bits]
        blocks: list[Codec] = []
        if codec.unit(columns) % 32 == 0:
            names = ("Q4_0", "Q8_0") if codec.symmetric else ("Q4_1",)
            blocks = [t for t in map(ggml.TYPES.__getitem__, names) if t.bits >= codec.bits]
        return [c for c in dict.fromkeys([*wider, *blocks]) if c != codec]
    if isinstance(codec, ggml.Simple):
        return [IntK(4 if codec.bits == 4 else 8, 32, not codec.minimum)]
    return []


def recode(q: QTensor, codec: Codec) -> QTensor | None:
    """`q` in `codec`, one of its candidates, or None where a value would change."""
    if q.order is not None and not (isinstance(codec, IntK) and isinstance(q.codec, IntK)):
        return None
    rows, columns = q.codec.matrix(q.shape)
    parts = []
    for at in range(0, rows, max(1, CHUNK // columns)):
        old = q.part(slice(at, min(at + max(1, CHUNK // columns), rows)))
        made = _build(_line(old), codec, old.shape)
        if made is None:
            return None
        new = QTensor(codec, old.shape, made, q.order)
        if not torch.equal(new.dequantize(), old.dequantize()):
            return None
        parts.append(new)
    return QTensor(codec, q.shape, {k: torch.cat([p.planes[k] for p in parts]) for k in parts[0].planes}, q.order)


def _line(q: QTensor) -> _Line:
    codes, params = q.unpack()
    codec, columns = q.codec, q.shape[-1]
    if isinstance(codec, IntK):
        scale, zero = params["scale"].float(), params["zero"].float()
    elif isinstance(codec, ggml.Simple) and codec.minimum:
        scale = params["d"].float()
        zero = torch.where(scale == 0, 0.0, -params["m"].float() / scale)
    else:
        assert isinstance(codec, ggml.Simple)
        scale = params["d"].float()
        zero = torch.full_like(scale, codec.zero)
    return _Line(codes, scale[..., 0], zero[..., 0], codec.unit(columns))


def _build(line: _Line, codec: Codec, shape: Shape) -> dict[str, torch.Tensor] | None:
    """Planes of `codec` from the line's codes, or None where they do not fit its codes or units."""
    columns = shape[-1]
    unit = codec.unit(columns)
    if codec.check(shape) or (line.unit % unit and line.scale.shape[1] > 1):
        return None
    which = (torch.arange(-(-columns // unit)) * unit).div(line.unit, rounding_mode="floor")
    scale, zero = line.scale[:, which], line.zero[:, which]
    if isinstance(codec, ggml.Simple) and codec.minimum:
        return codec.pack(line.codes, _stored({"d": scale, "m": -scale * zero}), shape)
    middle = _middle(codec)
    meant = zero.round() if middle is None else torch.full_like(zero, middle)
    shift = (meant - zero).round()
    codes = line.codes.float() + shift.repeat_interleave(unit, 1)[:, :columns]
    top = (1 << codec.integer_bits) - 1
    if float(codes.min()) < 0 or float(codes.max()) > top or not 0 <= float(meant.min()) <= float(meant.max()) <= top:
        return None
    codes = codes.to(torch.uint8)
    if isinstance(codec, IntK):
        params = {"scale": scale.to(codec.dtype).unsqueeze(-1), "zero": meant.to(torch.uint8).unsqueeze(-1)}
        return codec.pack(codes, params, shape)
    return codec.pack(codes, _stored({"d": scale}), shape)


def _middle(codec: Codec) -> int | None:
    """The zero point that the codec implies, or None where it stores one."""
    if isinstance(codec, IntK):
        return codec.middle if codec.symmetric else None
    assert isinstance(codec, ggml.Simple)
    return codec.zero


def _stored(params: Params) -> Params:
    return {k: v.to(torch.float16).unsqueeze(-1) for k, v in params.items()}


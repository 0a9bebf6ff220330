"""The same values in another codec, where two formats share a grid: int4 in groups of 32 n and Q4_0, for example.

Nothing is fitted and nothing rounded: codes are shifted by whole numbers and scales repeated. All products of such a
scale and a code are exact in float32, so scales and zero points alone decide whether the values stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fewbits.codecs import ggml
from fewbits.codecs.affine import IntK
from fewbits.codecs.base import Codec
from fewbits.codecs.packing import halves_to_stream, join_fields, pack_bits, stream_to_halves, unpack_bits
from fewbits.lazy import torch
from fewbits.qtensor import CHUNK, QTensor


def candidates(codec: Codec, columns: int) -> list[Codec]:
    """Codecs that may hold the values of a tensor of `codec` exactly, the smallest first; `holds` tells for sure."""
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


def holds(q: QTensor, codec: Codec, nearly: bool = False) -> bool:
    """Whether `codec`, one of the candidates, can hold exactly what `q` does. Looks at scales and zero points only.

    `nearly` allows to round scales and minimums to how the codec stores them; codes stay.
    """
    if q.order is not None and not isinstance(codec, IntK):
        return False
    return codec.check(q.shape) is None and _fit(_line(q), q, codec, nearly) is not None


def recode(q: QTensor, codec: Codec) -> QTensor:
    """`q` in `codec`, which `holds` it, at least nearly."""
    rows, columns = q.codec.matrix(q.shape)
    step = max(1, CHUNK // columns)
    parts = []
    for at in range(0, rows, step):
        part = q.part(slice(at, min(at + step, rows)))
        fitted = _fit(_line(part), part, codec, nearly=True)
        assert fitted is not None
        parts.append(_build(part, codec, fitted))
    return QTensor(codec, q.shape, {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, q.order)


@dataclass(frozen=True)
class _Line:
    """`scale * (code - zero)`, float32 `[rows, units]` each; of a minimum, zero may be a fraction, or infinite."""

    scale: torch.Tensor
    zero: torch.Tensor
    unit: int  # columns


def _line(q: QTensor) -> _Line:
    codec, columns = q.codec, q.shape[-1]
    unit = codec.unit(columns)
    if isinstance(codec, IntK):
        scale = q.planes["scales"].float()
        zero = torch.full_like(scale, codec.middle) if codec.symmetric else \
            unpack_bits(q.planes["zeros"], codec.bits, scale.shape[-1]).float()
        return _Line(scale, zero, unit)
    assert isinstance(codec, ggml.Simple)
    head = q.planes["blocks"].unflatten(-1, (-1, codec.block_bytes))[..., :2 + 2 * codec.minimum]
    values = head.contiguous().view(torch.float16).float()  # [rows, units, 1 or 2]
    scale = values[..., 0]
    if not codec.minimum:
        return _Line(scale, torch.full_like(scale, codec.zero), unit)
    least = values[..., 1]
    return _Line(scale, torch.where((scale == 0) & (least == 0), 0.0, -least / scale), unit)


Fitted = tuple[torch.Tensor, torch.Tensor]  # scales as stored; zero points uint8, or minimums float16; `[rows, units]`


def _fit(line: _Line, q: QTensor, codec: Codec, nearly: bool) -> Fitted | None:
    """Scales and zero points of `codec`, or None where they are not those of `line`."""
    columns = q.shape[-1]
    unit = codec.unit(columns)
    if line.unit % unit and line.scale.shape[-1] > 1:
        return None
    which = (torch.arange(-(-columns // unit)) * unit).div(line.unit, rounding_mode="floor")
    dtype = codec.dtype if isinstance(codec, IntK) else torch.float16
    scale = line.scale.to(dtype)
    if not (nearly and bool(scale.isfinite().all())) and not torch.equal(scale.float(), line.scale):
        return None
    if isinstance(codec, ggml.Simple) and codec.minimum:
        least = -line.scale * line.zero
        stored = least.to(torch.float16)
        same = torch.equal(stored.float(), least) or (nearly and bool(stored.isfinite().all()))
        return (scale[:, which], stored[:, which]) if same else None
    if isinstance(codec, IntK) and not codec.symmetric:
        top = (1 << codec.bits) - 1
        if not bool(((line.zero == line.zero.round()) & (line.zero >= 0) & (line.zero <= top)).all()):
            return None
        return scale[:, which], line.zero.to(torch.uint8)[:, which]
    return scale[:, which], torch.empty(0)


def _build(q: QTensor, codec: Codec, fitted: Fitted) -> dict[str, torch.Tensor]:
    """Planes of `codec`: the codes of `q`, moved by the difference of the zero points that both codecs imply."""
    scale, second = fitted
    four = FOURS.get((type(q.codec), type(codec)))
    if four is not None and q.codec.integer_bits == codec.integer_bits == 4:
        return four(q, codec, fitted)
    codes = q.unpack()[0]
    shift = _middle(codec) - _middle(q.codec)
    codes = codes + shift if shift else codes
    if isinstance(codec, IntK):
        zero = torch.full_like(scale, codec.middle, dtype=torch.uint8) if codec.symmetric else second
        return codec.pack(codes, {"scale": scale.unsqueeze(-1), "zero": zero.unsqueeze(-1)}, q.shape)
    return codec.pack(codes, {"d": scale.unsqueeze(-1)} | ({"m": second.unsqueeze(-1)} if len(second) else {}), q.shape)


def _middle(codec: Codec) -> int:
    """The zero point that the codec implies; 0 where it stores one, or a minimum."""
    if isinstance(codec, IntK):
        return codec.middle if codec.symmetric else 0
    assert isinstance(codec, ggml.Simple)
    return 0 if codec.minimum else codec.zero


# 4 bits to 4 bits, by far the most frequent case, without taking nibbles apart
def _stream_to_blocks(q: QTensor, codec: Codec, fitted: Fitted) -> dict[str, torch.Tensor]:
    scale, least = fitted
    fields = [scale.unsqueeze(-1), *([least.unsqueeze(-1)] if len(least) else [])]
    nibbles = stream_to_halves(q.planes["codes"].unflatten(-1, (-1, 16)))
    return {"blocks": join_fields(*fields, nibbles).flatten(-2)}


def _blocks_to_stream(q: QTensor, codec: Codec, fitted: Fitted) -> dict[str, torch.Tensor]:
    assert isinstance(q.codec, ggml.Simple) and isinstance(codec, IntK)
    blocks = q.planes["blocks"].unflatten(-1, (-1, q.codec.block_bytes))
    planes = {"codes": halves_to_stream(blocks[..., -16:]).flatten(-2), "scales": fitted[0]}
    return planes if codec.symmetric else planes | {"zeros": pack_bits(fitted[1], 4)}


FOURS: dict[tuple[type, type], Callable[[QTensor, Codec, Fitted], dict[str, torch.Tensor]]] = {
    (IntK, ggml.Simple): _stream_to_blocks, (ggml.Simple, IntK): _blocks_to_stream}

"""A checkpoint with scales moved through its sites: an equivalent model, whose changed tensors are made when loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec
from fewbits.codecs.floats import F32, Float
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.transforms.sites import Site


@dataclass(frozen=True)
class _Scaled:
    """Loads an entry, its rows divided and its columns multiplied; float32, so that only the solver rounds."""

    entry: Entry
    rows: torch.Tensor | None = None  # [out]
    columns: torch.Tensor | None = None  # [in]

    def __call__(self) -> QTensor:
        values = self.entry.load().dequantize()
        if self.rows is not None:
            values /= self.rows if values.ndim == 1 else self.rows[:, None]
        if self.columns is not None:
            values *= self.columns
        return plain(values)


@dataclass(frozen=True)
class _Held:
    """Loads a tensor that is in memory."""

    values: torch.Tensor

    def __call__(self) -> QTensor:
        return plain(self.values)


def plain(values: torch.Tensor) -> QTensor:
    return QTensor(F32, tuple(values.shape), {"data": values.view(F32.matrix(tuple(values.shape)))})


def scaled(source: Checkpoint, scales: Iterable[tuple[Site, torch.Tensor]],
           written: Mapping[str, Codec]) -> Checkpoint:
    """The checkpoint with each site's producer divided and its consumers multiplied by its scale `[out]`,
    which is 1 for outputs that no consumer reads.

    A norm will be written as `written[its name]` says: its quotient is rounded to that now and the consumers are
    multiplied by what it was really divided by, so that the rounding changes nothing. Other changed tensors become
    float32.
    """
    rows: dict[str, torch.Tensor] = {}
    columns: dict[str, torch.Tensor] = {}
    entries = dict(source.entries)

    for site, scale in scales:
        norm = source.entries[site.producer]
        if len(norm.shape) == 1:
            codec = written.get(norm.name, norm.codec)
            values, scale = _divided(norm.load().dequantize(), scale, site.add_one, codec)
            entries[norm.name] = norm.as_(codec=F32, load=_Held(values))
        else:
            rows[norm.name] = scale
        if site.bias:
            rows[site.bias] = scale
        columns |= dict.fromkeys(site.consumers, scale[site.rows])
    for name in rows.keys() | columns.keys():
        entry = source.entries[name]
        entries[name] = entry.as_(codec=F32, load=_Scaled(entry, rows.get(name), columns.get(name)))
    return replace(source, entries=entries)


def _divided(norm: torch.Tensor, scale: torch.Tensor, add_one: bool, codec: Codec) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm's weight divided by `scale` and rounded to the float type `codec`, and what that divided it by.

    Channels whose quotient is too small for the type keep their weight.
    """
    dtype = codec.dtype if isinstance(codec, Float) else torch.float32
    shift = 1.0 if add_one else 0.0
    factor = norm.double() + shift
    quotient = (factor / scale - shift).to(dtype).float()
    real = factor / (quotient.double() + shift)
    kept = ~((real / scale - 1).abs() < 0.05)  # NaN where both are zero
    return torch.where(kept, norm, quotient), torch.where(kept, 1.0, real).float()

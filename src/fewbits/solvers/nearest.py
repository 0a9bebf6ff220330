"""The solvers that treat every unit by itself: fit, then round to the nearest level."""

from __future__ import annotations

from fewbits.codecs.base import Codec, Params, decode_units, encode_units, fit_units, refit_units, spans
from fewbits.lazy import torch


def nearest(w: torch.Tensor, codec: Codec, importance: torch.Tensor | None = None,
            state: Params | None = None) -> tuple[torch.Tensor, Params]:
    """Parameters of least squared error, every weight alike; nearest codes."""
    params = fit_units(w, codec, None, state)
    return encode_units(w, codec, params), params


def search(w: torch.Tensor, codec: Codec, importance: torch.Tensor | None = None, state: Params | None = None,
           rounds: int = 2) -> tuple[torch.Tensor, Params]:
    """Parameters of least squared error weighted by `importance` `[columns]`; then, where that gains, parameters
    re-fitted to the codes and codes to the parameters, as long as a unit's error falls."""
    params = fit_units(w, codec, importance, state)
    codes = encode_units(w, codec, params)
    if codec.settled:
        return codes, params
    error = _unit_errors(w, codec, codes, params, importance)
    for _ in range(rounds):
        new_params = refit_units(w, codes, codec, params, importance)
        if all(new_params[k] is params[k] or torch.equal(new_params[k], params[k]) for k in params):
            break
        new_codes = encode_units(w, codec, new_params)
        new_error = _unit_errors(w, codec, new_codes, new_params, importance)
        better = new_error < error  # [rows, units]
        if not better.any():
            break
        params = {k: torch.where(better[..., None], new_params[k], p) for k, p in params.items()}
        codes = torch.where(_per_column(better, codec, w.shape[1]), new_codes, codes)
        error = torch.where(better, new_error, error)
    return codes, params


def _unit_errors(w: torch.Tensor, codec: Codec, codes: torch.Tensor, params: Params,
                 importance: torch.Tensor | None) -> torch.Tensor:
    """Weighted squared error `[rows, units]`."""
    squared = (w - decode_units(codes, codec, params)).square_()
    if importance is not None:
        squared *= importance
    parts = [squared[:, cols].reshape(len(w), -1, width).sum(-1)
             for cols, _, width in spans(w.shape[1], codec.unit(w.shape[1]))]
    return torch.cat(parts, dim=1)


def _per_column(flags: torch.Tensor, codec: Codec, columns: int) -> torch.Tensor:
    """`[rows, units]` -> `[rows, columns]`."""
    return torch.cat([flags[:, us].repeat_interleave(width, 1)
                      for _, us, width in spans(columns, codec.unit(columns))], 1)

"""Coordinate descent on tr((W - Q) H (W - Q)^T): a unit's float parameters given its codes, then codes given those.

Each step takes the best value of one thing while all else stays, so the loss never rises. For codes alone this is
QuantEase (Behdin et al., 2023).
"""

from __future__ import annotations

from fewbits.codecs.base import Codec, Params
from fewbits.lazy import torch
from fewbits.solvers.columns import sweep


def descend(w: torch.Tensor, codec: Codec, codes: torch.Tensor, params: Params, moment: torch.Tensor,
            sweeps: int) -> tuple[torch.Tensor, Params]:
    """Better codes `[rows, columns]` and params `[rows, units, k]`; every sweep visits all units in natural order."""
    columns = w.shape[1]
    unit = codec.unit(columns)
    codes, params = codes.T.contiguous(), {k: p.clone() for k, p in params.items()}
    values = torch.empty_like(w.T, memory_format=torch.contiguous_format)  # [columns, rows]
    for at in range(0, columns, unit):
        cut = slice(at, min(at + unit, columns))
        own = {k: p[:, at // unit] for k, p in params.items()}
        values[cut] = codec.grid(own, cut.stop - at).decode(codes[cut].T.contiguous()).T
    off = w.T - values
    for _ in range(sweeps):
        for at in range(0, columns, unit):
            cut = slice(at, min(at + unit, columns))
            own = {k: p[:, at // unit] for k, p in params.items()}
            pull, local = moment[cut] @ off, moment[cut, cut]
            for fit in (refit, refit_integers):
                own, found = fit(codec, codes[cut].T.contiguous(), own, values[cut], pull, local)
                pull.addmm_(local, found - values[cut], alpha=-1)
                values[cut] = found
            values[cut] = improve(codec, own, values[cut], pull, local)
            off[cut] = w.T[cut] - values[cut]
            codes[cut] = codec.grid(own, cut.stop - at).encode(values[cut].T.contiguous()).T
            for k, p in own.items():
                params[k][:, at // unit] = p
    return codes.T.contiguous(), params


def improve(codec: Codec, params: Params, values: torch.Tensor, pull: torch.Tensor,
            local: torch.Tensor) -> torch.Tensor:
    """Values `[unit, rows]` after each column has taken the level that is best while the others stay.

    `pull` `[unit, rows]` is H times what is missing, W - Q, at these columns; `local` is H between them.
    """
    size = local.diagonal()[:, None]
    found, _ = sweep(values + pull / size, codec.grid(params, len(values)), (local / size).T, torch.arange(len(values)),
                     values)
    return found


def refit(codec: Codec, codes: torch.Tensor, params: Params, values: torch.Tensor, pull: torch.Tensor,
          local: torch.Tensor) -> tuple[Params, torch.Tensor]:
    """Float parameters of one unit `[rows, k]` of least loss for its codes `[rows, unit]`, where rounded to storage
    they are better than the present ones; and the values `[unit, rows]` that they give."""
    basis = codec.basis(codes, params)  # name -> [rows, k, unit]
    if not basis:
        return params, values
    slopes = torch.cat(list(basis.values()), 1)
    bend = slopes @ local @ slopes.mT  # [rows, n, n]
    gain = slopes @ pull.T.unsqueeze(-1)
    ridge = torch.diag_embed(bend.diagonal(dim1=1, dim2=2)) * 1e-6
    lower, failed = torch.linalg.cholesky_ex(bend + ridge)
    step = torch.cholesky_solve(gain, lower)[..., 0]
    better, at = dict(params), 0
    rounded = []
    for name, part in basis.items():
        old = params[name].float()
        better[name] = (old + step[:, at:at + part.shape[1]]).to(params[name].dtype)
        rounded.append(better[name].float() - old)
        at += part.shape[1]
    step = torch.cat(rounded, 1).unsqueeze(-1)
    falls = (step.mT @ (2 * gain - bend @ step))[:, 0, 0] > 0
    falls &= failed == 0
    found = {k: torch.where(falls[:, None], better[k], p) for k, p in params.items()}
    return found, codec.grid(found, codes.shape[1]).decode(codes).T


def refit_integers(codec: Codec, codes: torch.Tensor, params: Params, values: torch.Tensor, pull: torch.Tensor,
                   local: torch.Tensor) -> tuple[Params, torch.Tensor]:
    """The same for integer parameters of sub-blocks, one after the other."""
    if not codec.integers:
        return params, values
    pull, params = pull.clone(), dict(params)
    still = {k: torch.zeros_like(params[k]) for k in codec.integers}
    for name, (low, high) in codec.integers.items():
        slope = codec.grid(params | still | {name: torch.ones_like(params[name])}, codes.shape[1]).decode(codes)
        old = params[name].float()
        best = old.clone()
        for i, columns in enumerate(torch.arange(codes.shape[1]).split(codes.shape[1] // old.shape[1])):
            own = slice(int(columns[0]), int(columns[-1]) + 1)
            part = slope[:, own]
            bend, gain = ((part @ local[own, own]) * part).sum(1), (part * pull[own].T).sum(1)
            step = torch.where(bend > 0, gain / bend, 0.0)
            best[:, i] = (old[:, i] + step).round_().clamp_(low, high)
            pull.addmm_(local[:, own], (part * (best[:, i] - old[:, i])[:, None]).T, alpha=-1)
        params[name] = best.to(params[name].dtype)
    return params, codec.grid(params, codes.shape[1]).decode(codes).T

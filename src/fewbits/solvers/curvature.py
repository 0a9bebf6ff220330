"""The second moment of a layer's inputs as solvers need it: damped, and factored in the order of rounding."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from fewbits.calibration.statistics import Statistics
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

SHRINKAGE = 0.3  # of what inputs have in common: text of another kind has less of it
DAMPING = (0.2, 0.5, 1.0, 3.0, 10.0, 30.0, 100.0)  # shares of the geometric mean of the diagonal, tried in turn
CORRECTION = 0.5  # how much of the drift is made good: all of it fits the text it was measured on too closely


@dataclass(frozen=True)
class Curvature:
    """Of tr((W - Q) H (W - Q)^T): H damped, and what is left of it for columns that those after them can correct."""

    moment: torch.Tensor  # H [in, in], damped
    order: list[torch.Tensor]  # columns of every unit, as they are rounded
    upper: torch.Tensor  # Cholesky factor of the inverse of H, rows and columns in that order
    units: list[torch.Tensor]  # of each of `order`: its part of H once later units have corrected, natural order
    importance: torch.Tensor  # [in], of an error once all later columns have corrected it
    columns: torch.Tensor | None  # in act-order all these are of w[:, columns]
    shift: torch.Tensor | None  # [in, in], by which weights make good for what their inputs have lost

    def target(self, w: torch.Tensor) -> torch.Tensor:
        """What the codes are to come near to: `w` `[rows, in]` in order of the columns, corrected for drift."""
        w = w if self.columns is None else w[:, self.columns]
        return w if self.shift is None else w + w @ self.shift


_known: WeakKeyDictionary[Statistics, dict[tuple[int, bool], Curvature]] = WeakKeyDictionary()


def curvature(statistics: Statistics, unit: int, act_order: bool = False) -> Curvature:
    """For units of so many columns; in act-order, of columns sorted by importance. Made once for layers that share
    statistics."""
    known = _known.setdefault(statistics, {})
    if (unit, act_order) not in known:
        columns = statistics.diagonal.argsort(descending=True, stable=True) if act_order else None
        known[unit, act_order] = _curvature(statistics.moment, statistics.drift, unit, columns)
    return known[unit, act_order]


def _curvature(moment: torch.Tensor, drift: torch.Tensor | None, unit: int, columns: torch.Tensor | None) -> Curvature:
    if columns is not None:
        moment = moment[columns][:, columns]
        drift = None if drift is None else drift[columns][:, columns]
    order = unit_order(moment.diagonal(), unit)
    permutation = torch.cat(order)
    damped, upper = inverse_factor(moment[permutation][:, permutation])
    units, at = [], 0
    for part in order:
        own, at = upper[at:at + len(part), at:at + len(part)], at + len(part)
        natural = part.argsort()
        units.append(torch.cholesky_inverse(own, upper=True)[natural][:, natural])
    back = permutation.argsort()
    shift = None if drift is None else CORRECTION * (drift[:, permutation] @ upper.T @ upper)[:, back]
    return Curvature(damped[back][:, back], order, upper, units, upper.diagonal().pow(-2)[back], columns, shift)


def unit_order(importance: torch.Tensor, unit: int) -> list[torch.Tensor]:
    """Columns of every unit, most important first; units by their summed importance."""
    known = importance.cpu()  # a GPU would be waited for at every unit
    groups = torch.arange(len(known)).split(unit)
    groups = tuple(sorted(groups, key=lambda g: -float(known[g].sum())))
    return [g[known[g].argsort(descending=True, stable=True)].to(importance.device) for g in groups]


def inverse_factor(moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second moment, shrunk towards its diagonal and damped, and the upper Cholesky factor of its inverse.

    Damping is a share of the geometric mean of the diagonal: a few inputs of enormous size do not raise it. All that
    is known of dead inputs is the damping. The first of the two results takes the place of `moment`: such a matrix may
    be the largest thing in memory.

    Raises:
        FewbitsError: no damping makes it positive definite.
    """
    diagonal = moment.diagonal().clone()
    live = diagonal[diagonal > 0]
    mean = float(live.double().log().mean().exp()) if len(live) else 1.0
    moment *= 1 - SHRINKAGE
    for share in DAMPING:
        moment.diagonal().copy_(diagonal + share * mean)
        for dtype in dict.fromkeys((moment.dtype, torch.float64)):
            upper = _inverse_factor(moment, dtype)
            if upper is not None:
                return moment, upper
    raise FewbitsError(f"second moment of {len(moment)} inputs is not positive definite at any damping",
                       "use more calibration text")


def _inverse_factor(h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """In the type of `h`, computed in `dtype`; None where that fails."""
    # backwards H = L L^T, so forwards H = V V^T with V upper triangular, and the inverse is U^T U with U = 1/V
    lower, failed = torch.linalg.cholesky_ex(h.to(dtype).flip(0, 1))
    if failed:
        return None
    lower = lower.flip(0, 1)
    eye = torch.eye(len(h), dtype=dtype, device=h.device)
    upper = torch.linalg.solve_triangular(lower, eye, upper=True).to(h.dtype)
    return upper if bool(upper.isfinite().all()) else None

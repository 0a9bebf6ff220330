"""Every step of the descent lowers the loss; where it ends, no single code and no scale can be bettered."""

from __future__ import annotations

import pytest
import torch

from fewbits import codecs
from fewbits.codecs.base import Codec, Params, decode_units, encode_units, fit_units
from fewbits.solvers.descent import descend, refit, refit_integers
from tests.codecs.registry import ALL


def problem(name: str, rows: int = 4, columns: int = 256) -> tuple[Codec, torch.Tensor, torch.Tensor]:
    codec, draw = codecs.get(name), torch.Generator().manual_seed(0)
    mix = torch.eye(columns) + 0.1 * torch.randn(columns, columns, generator=draw)
    x = torch.randn(700, columns, generator=draw) @ mix
    return codec, torch.randn(rows, columns, generator=draw), x.T @ x / 700


def losses(w: torch.Tensor, codec: Codec, codes: torch.Tensor, params: Params, moment: torch.Tensor) -> torch.Tensor:
    off = (w - decode_units(codes, codec, params)).double()
    return ((off @ moment.double()) * off).sum(1)  # [rows]


def searched(w: torch.Tensor, codec: Codec) -> tuple[torch.Tensor, Params]:
    params = fit_units(w, codec, None, codec.begin(w, None))
    return encode_units(w, codec, params), params


@pytest.mark.parametrize("name", ALL)
def test_sweeps_never_raise_the_loss(name: str) -> None:
    codec, w, moment = problem(name)
    codes, params = searched(w, codec)
    before = losses(w, codec, codes, params, moment)
    for _ in range(3):
        codes, params = descend(w, codec, codes, params, moment, 1)
        after = losses(w, codec, codes, params, moment)
        assert (after <= before * (1 + 1e-4)).all()
        before = after
    first = losses(w, codec, *searched(w, codec), moment)
    assert before.sum() < (0.95 if codec.integer_bits < 8 else 0.999) * first.sum()
    packed = codec.unpack(codec.pack(codes, params, (4, 256)), (4, 256))
    assert torch.equal(decode_units(packed[0], codec, packed[1]), decode_units(codes, codec, params))


@pytest.mark.parametrize("name", ["int3-g32", "Q4_1", "Q3_K", "nf4", "kmeans2"])
def test_where_it_ends_no_code_can_be_bettered(name: str) -> None:
    codec, w, moment = problem(name)
    codes, params = descend(w, codec, *searched(w, codec), moment, 30)
    least = losses(w, codec, codes, params, moment)
    for column in range(0, 256, 17):
        for code in range(1 << codec.integer_bits):
            other = codes.clone()
            other[:, column] = code
            assert (losses(w, codec, other, params, moment) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("name", ["int4-g128-asym-sf32", "nf4-b128"])
def test_refit_is_least_squares(name: str) -> None:
    """Against a solver of least squares, in a unit where storage rounds to float32."""
    codec, w, moment = problem(name, columns=128)
    codes, params = searched(w, codec)
    own = {k: p[:, 0] for k, p in params.items()}
    values = codec.grid(own, 128).decode(codes)
    found, _ = refit(codec, codes, own, values.T, moment @ (w - values).T, moment)
    root = torch.linalg.cholesky(moment.double()).T
    (key,) = codec.linear
    for row in range(len(w)):
        slope = codec.grid({k: torch.ones_like(p) if k == key else p for k, p in own.items()}, 128).decode(codes)[row]
        best = torch.linalg.lstsq(root @ slope.double()[:, None], root @ w[row].double()[:, None]).solution
        assert float(found[key][row, 0]) == pytest.approx(float(best), rel=1e-4)


def test_two_parameters_and_rounding() -> None:
    """Scale and minimum of Q4_1 together: neighbouring half-precision numbers are no better by more than rounding."""
    codec, w, moment = problem("Q4_1", columns=32)
    codes, params = searched(w, codec)
    own = {k: p[:, 0] for k, p in params.items()}
    values = codec.grid(own, 32).decode(codes)
    found, better = refit(codec, codes, own, values.T, moment @ (w - values).T, moment)
    torch.testing.assert_close(better.T, codec.grid(found, 32).decode(codes))
    least = losses(w, codec, codes, {k: p[:, None] for k, p in found.items()}, moment)
    assert (least < losses(w, codec, codes, params, moment)).any()
    for part in (0.99, 1.01):
        for key in ("d", "m"):
            other = {k: (p.float() * (part if k == key else 1)).half()[:, None] for k, p in found.items()}
            assert (losses(w, codec, codes, other, moment) >= least * 0.9999).all()


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "IQ4_XS"])
def test_integers_of_sub_blocks(name: str) -> None:
    """From scales that are off by one, the loss falls; where it ends, neighbours of the last are no better."""
    codec, w, moment = problem(name)
    codes, params = searched(w, codec)
    own = {k: p[:, 0] for k, p in params.items()}
    own["scales"] = (own["scales"].int() + 1).clamp(max=codec.integers["scales"][1]).to(own["scales"].dtype)
    values = codec.grid(own, 256).decode(codes)
    found, better = refit_integers(codec, codes, own, values.T, moment @ (w - values).T, moment)
    torch.testing.assert_close(better.T, codec.grid(found, 256).decode(codes))

    def lost(one: Params) -> torch.Tensor:
        return losses(w, codec, codes, {k: p[:, None] for k, p in one.items()}, moment)

    assert (lost(found) < lost(own)).all()
    last = list(codec.integers)[-1]
    low, high = codec.integers[last]
    for step in (-1, 1):
        other = found[last].int()
        other[:, -1] = (other[:, -1] + step).clamp(low, high)
        assert (lost(found | {last: other.to(found[last].dtype)}) >= lost(found) * (1 - 1e-5)).all()

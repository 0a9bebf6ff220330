"""GPTQ against a float64 version that follows the paper's definition, OBQ, and its inequality against rounding."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from fewbits import codecs
from fewbits.calibration.statistics import Experts, Statistics
from fewbits.codecs import ternary
from fewbits.codecs.base import Codec, Params, decode_units, encode_units
from fewbits.errors import FewbitsError
from fewbits.solvers import loss, refuses, solve
from fewbits.solvers.curvature import CORRECTION, DAMPING, SHRINKAGE, curvature, inverse_factor, unit_order
from fewbits.solvers.gptq import gptq
from tests.codecs.registry import ALL

MORE = ("int2-g16-asym", "int8-g64", "fp4-b32")
CODECS = [name for name in (*ALL, *MORE) if name not in ternary.TYPES or name == "TQ2_0"]


def correlated(rows: int, columns: int, tokens: int = 600, seed: int = 0) -> tuple[torch.Tensor, Statistics]:
    """A weight, and statistics of inputs whose columns depend on each other and differ in size."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=draw))
    statistics = Statistics.zeros(columns)
    statistics.add(torch.randn(tokens, columns, generator=draw) @ mix * sizes)
    return torch.randn(rows, columns, generator=draw), statistics


def damped(statistics: Statistics) -> torch.Tensor:
    moment = statistics.moment.double()
    moment = (1 - SHRINKAGE) * moment + SHRINKAGE * torch.diag(moment.diagonal())
    return moment + DAMPING[0] * moment.diagonal().log().mean().exp() * torch.eye(len(moment))


def naive(w: torch.Tensor, codec: Codec, statistics: Statistics) -> torch.Tensor:
    """Column by column with the inverse of what is left of H, recomputed from its definition; values in float64.

    Fits count an error by what is left of it once the columns after it have corrected it: 1 / (H_left^-1)_jj.
    """
    columns, moment = w.shape[1], damped(statistics)
    order = unit_order(statistics.diagonal, codec.unit(columns))
    left = [int(c) for unit in order for c in unit]
    importance = torch.empty(columns, dtype=torch.float64)
    for i, column in enumerate(left):
        importance[column] = 1 / torch.linalg.inv(moment[left[i:]][:, left[i:]])[0, 0]
    work, done = w.double().clone(), torch.empty_like(w, dtype=torch.float64)
    state = codec.begin(w, importance.float())
    for unit in order:
        natural = unit.sort().values
        known = None if state is None else {k: s[:, int(natural[0]) // codec.unit(columns)] for k, s in state.items()}
        grid = codec.grid(codec.fit(work[:, natural], importance[natural], known), len(unit))
        for column in (int(c) for c in unit):
            at = int((natural == column).nonzero())
            only = grid.columns(slice(at, at + 1))
            done[:, column] = only.decode(only.encode(work[:, column:column + 1]))[:, 0].double()
            inverse = torch.linalg.inv(moment[left][:, left])
            here = left.index(column)
            error = (work[:, column] - done[:, column]) / inverse[here, here]
            work[:, left] -= error[:, None] * inverse[here]
            left.remove(column)
    return done


@pytest.mark.parametrize("name", CODECS)
def test_equals_naive_float64(name: str) -> None:
    codec = codecs.get(name)
    w, statistics = correlated(6, 256 if codec.unit(256) == 256 and codec.family == "ggml" else 128)
    statistics.moment = statistics.moment.double()
    bent = curvature(statistics, codec.unit(w.shape[1]))
    codes, params = gptq(w.double(), codec, bent, codec.begin(w, bent.importance.float()), again=False, sweeps=0)
    # a scale may round to the neighbouring half-precision number, and so, in a row at most, another code follow
    difference = (decode_units(codes, codec, params).double() - naive(w, codec, statistics)).abs().amax(1)
    assert int((difference > 4e-3).sum()) <= 1, difference


@pytest.mark.parametrize("name", CODECS)
def test_beats_nearest_where_it_counts(name: str) -> None:
    """tr((W - Q) H (W - Q)^T) is lower than that of rounding and of the weighted search."""
    codec = codecs.get(name)
    w, statistics = correlated(16, 512, seed=1)

    def lost(solver: str) -> float:
        return loss(w, solve(w, codec, solver, statistics), statistics)

    assert lost("gptq") < 0.9 * lost("nearest")
    assert lost("gptq") < lost("search")


def _between(codec: Codec, solved: tuple[torch.Tensor, Params]) -> tuple[torch.Tensor, Codec, Params]:
    return solved[0], codec, solved[1]


def test_later_steps_lower_the_loss() -> None:
    """Fitting a unit's scale to its codes, then coordinate descent: each lowers the damped loss of every row."""
    codec = codecs.get("int3-g32")
    w, statistics = correlated(32, 256, seed=2)
    bent = curvature(statistics, 32)

    def lost(**how: object) -> torch.Tensor:
        off = w - decode_units(*_between(codec, gptq(w, codec, bent, **how)))  # type: ignore[arg-type]
        return ((off @ bent.moment) * off).sum(1)

    plain, again = lost(again=False, sweeps=0), lost(again=True, sweeps=0)
    once, twice = lost(sweeps=1), lost(sweeps=2)
    assert again.sum() < plain.sum()
    assert (once <= again * 1.0001).all() and (twice <= once * 1.0001).all()
    assert twice.sum() < 0.97 * again.sum()


@pytest.mark.parametrize("name", ["int4-g32-asym", "int3-g48", "Q4_0"])
def test_ragged_last_group(name: str) -> None:
    codec = codecs.get(name)
    w, statistics = correlated(8, 172)
    if codec.check(w.shape):
        w, statistics = correlated(8, 160)
    q = solve(w, codec, "gptq", statistics)
    assert q.shape == w.shape
    assert loss(w, q, statistics) < loss(w, solve(w, codec, "search", statistics), statistics)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", ["g32", "g64", "g128", "g1024", "row"])
def test_bits_and_groups(bits: int, group: str) -> None:
    w, statistics = correlated(4, 320, seed=3)
    codec = codecs.get(f"int{bits}-{group}-asym")
    q = solve(w, codec, "gptq", statistics)
    assert loss(w, q, statistics) < loss(w, solve(w, codec, "search", statistics), statistics)


@pytest.mark.parametrize("act_order", [False, True])
def test_drift_is_corrected(act_order: bool) -> None:
    """The target for inputs x that have come off x0 is the best weight for E|W x0 - Q x|^2, in part."""
    w, _ = correlated(6, 48)
    draw = torch.Generator().manual_seed(9)
    x0 = torch.randn(4000, 48, generator=draw) @ torch.randn(48, 48, generator=draw)
    x = 0.8 * x0 + 0.3 * torch.randn(4000, 48, generator=draw)
    statistics = Statistics.zeros(48, drift=True)
    statistics.add(x, x0)
    bent = curvature(statistics, 16, act_order)
    order = torch.arange(48) if bent.columns is None else bent.columns
    moment = damped(statistics)
    ideal = w.double() @ (moment + statistics.drift.double()) @ torch.linalg.inv(moment)
    meant = (1 - CORRECTION) * w.double() + CORRECTION * ideal
    torch.testing.assert_close(bent.target(w).double(), meant[:, order], rtol=1e-3, atol=1e-3)

    def off(solver_statistics: Statistics) -> float:
        q = solve(w, codecs.get("int4-g16"), "gptq-act-order" if act_order else "gptq", solver_statistics).dequantize()
        return float((x0 @ w.T - x @ q.T).square().mean())

    assert off(statistics) < 0.9 * off(Statistics(statistics.moment, 4000))


def obq(w: torch.Tensor, moment: torch.Tensor, levels: torch.Tensor, order: list[int] | None = None) -> torch.Tensor:
    """One row by Optimal Brain Quantization (Frantar and Alistarh, 2022) on a fixed grid, in float64: the weight whose
    rounding costs least comes next, or the next of `order`, and all that are left correct it."""
    work, inverse = w.double().clone(), torch.linalg.inv(moment.double())
    left, done = list(range(len(w))), torch.empty(len(w), dtype=torch.float64)
    while left:
        near = levels[(work[left, None] - levels).abs().argmin(1)]
        cost = (work[left] - near).square() / inverse.diagonal()[left]
        column = order[len(w) - len(left)] if order else left[int(cost.argmin())]
        done[column] = near[left.index(column)]
        left.remove(column)
        work -= (work[column] - done[column]) / inverse[column, column] * inverse[column]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
    return done


def test_obq_gptq_and_nearest_on_one_grid() -> None:
    """On the grid that GPTQ chose: in GPTQ's order OBQ gives the same; in its own it beats rounding, too; and
    coordinate descent ends below both."""
    codec = codecs.get("int3-row")
    w, statistics = correlated(12, 48, seed=4)
    bent = curvature(statistics, 48)
    moment, order = bent.moment.double(), torch.cat(bent.order).tolist()
    codes, params = gptq(w, codec, bent, again=False, sweeps=0)
    solved = decode_units(codes, codec, params).double()
    polished = decode_units(*_between(codec, gptq(w, codec, bent, again=False, sweeps=3))).double()
    totals = dict.fromkeys(("nearest", "obq", "gptq", "polished"), 0.0)
    for row, x in enumerate(w.double()):
        levels = params["scale"][row, 0].double() * torch.arange(-4, 4)
        torch.testing.assert_close(solved[row], obq(x, moment, levels, order), rtol=0, atol=1e-6)
        tries = {"nearest": levels[(x[:, None] - levels).abs().argmin(1)], "obq": obq(x, moment, levels),
                 "gptq": solved[row], "polished": polished[row]}
        for name, q in tries.items():
            totals[name] += float((x - q) @ moment @ (x - q))
    assert max(totals["gptq"], totals["obq"]) < 0.9 * totals["nearest"]
    assert totals["polished"] < min(totals["gptq"], totals["obq"])


def test_act_order() -> None:
    """Columns are solved and stored in order of importance, and the order takes them back."""
    codec = codecs.get("int3-g32")
    w, statistics = correlated(24, 256, seed=5)
    q = solve(w, codec, "gptq-act-order", statistics)
    order = statistics.diagonal.argsort(descending=True)
    assert q.order is not None and torch.equal(q.order, order)
    assert loss(w, q, statistics) < 0.8 * loss(w, solve(w, codec, "search", statistics), statistics)
    sorted_ = Statistics(statistics.moment[order][:, order], statistics.count)
    plain = solve(w[:, order], codec, "gptq", sorted_)
    assert torch.equal(plain.planes["codes"], q.planes["codes"])


def test_stack_of_experts() -> None:
    """Every expert is solved with its own statistics."""
    codec = codecs.get("int3-g32")
    w, first = correlated(8, 64, seed=6)
    other, second = correlated(8, 64, seed=7)
    stats = Experts(2, 64)
    stats.parts = [first, second]
    stats._blended = True
    q = solve(torch.stack([w, other]), codec, "gptq", stats)
    for part, single, statistics in zip(q.dequantize(), (w, other), (first, second), strict=True):
        assert torch.equal(part, solve(single, codec, "gptq", statistics).dequantize())
    both = solve(torch.stack([w, other]), codec, "gptq-act-order", stats)
    assert both.order is not None and both.order.shape == (2, 64)
    assert torch.equal(both.dequantize()[1], solve(other, codec, "gptq-act-order", second).dequantize())


def test_dead_inputs_do_not_disturb() -> None:
    """Weights of inputs that are zero in all the text take their nearest level, and cost the others next to nothing."""
    codec = codecs.get("int4-g32")
    w, statistics = correlated(16, 64, seed=8)
    dead = torch.arange(64) % 8 == 0
    statistics.moment[dead] = 0
    statistics.moment[:, dead] = 0
    q = solve(w, codec, "gptq", statistics)
    codes, params = q.unpack()
    assert torch.equal(encode_units(w, codec, params)[:, dead], codes[:, dead])
    without = solve(w.masked_fill(dead, 0.0), codec, "gptq", statistics)
    assert loss(w, q, statistics) < 1.1 * loss(w, without, statistics)


def test_one_token() -> None:
    """A moment of rank one with dead inputs is solved, not failed."""
    w, _ = correlated(4, 64)
    statistics = Statistics.zeros(64)
    x = torch.zeros(1, 64)
    x[0, ::2] = 1.0
    statistics.add(x)
    assert solve(w, codecs.get("int4-g32"), "gptq", statistics).dequantize().isfinite().all()


def test_inverse_factor_is_the_factor_of_the_inverse() -> None:
    _, statistics = correlated(1, 40)
    moment, upper = inverse_factor(statistics.moment.clone())
    torch.testing.assert_close(moment.double(), damped(statistics))
    torch.testing.assert_close(upper.T @ upper, torch.linalg.inv(moment), rtol=1e-3, atol=1e-4)
    assert torch.equal(upper, upper.triu())


def test_damping_escalates() -> None:
    """Nearly indefinite: the first share fails, a larger one holds, and that is the moment that is used."""
    moment, upper = inverse_factor(torch.tensor([[1.0, 2.2], [2.2, 1.0]]))
    torch.testing.assert_close(moment.diagonal(), torch.tensor([2.0, 2.0]))
    assert upper.isfinite().all()


def test_indefinite_moment_is_named() -> None:
    with pytest.raises(FewbitsError, match="not positive definite"):
        inverse_factor(torch.tensor([[1.0, 999.0], [999.0, 1.0]]))


def test_blocks_across_rows_are_refused() -> None:
    assert "cross rows" in (refuses("gptq", codecs.get("nf4"), (8, 172)) or "")
    with pytest.raises(FewbitsError, match="cross rows"):
        solve(torch.randn(8, 172), codecs.get("nf4"), "gptq", Statistics.zeros(172))


def test_statistics_of_another_width_are_refused() -> None:
    with pytest.raises(FewbitsError, match="statistics of 32 inputs"):
        solve(torch.randn(4, 64), codecs.get("int4-g32"), "gptq", Statistics.zeros(32))


@pytest.fixture(scope="module")
def real_layer(model, shared) -> tuple[torch.Tensor, Statistics, Statistics]:
    """The first layer's q_proj of a real model, statistics of its inputs on two texts."""
    folder = model("smollm2-135m-wide")
    weights = next(folder.glob("*.safetensors"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    with safe_open(weights, "pt") as file:
        embeddings, norm, w = (file.get_tensor(f"model.{n}.weight").float() for n in (
            "embed_tokens", "layers.0.input_layernorm", "layers.0.self_attn.q_proj"))
    found = []
    for text in ("text/c4.txt", "text/wikitext2-train.txt"):
        ids = tokenizer.encode(shared(text).read_text()[:60_000]).ids
        x = embeddings[torch.tensor(ids)]
        found.append(Statistics.zeros(w.shape[1]))
        found[-1].add(x * x.square().mean(-1, keepdim=True).add(1e-5).rsqrt() * norm)
    return w[::8].contiguous(), found[0], found[1]


@pytest.mark.parametrize("name", ["int4-g128", "int2-g64-asym", "int3-row", "nf4", "Q4_0", "Q2_K", "Q3_K", "Q4_K"])
def test_beats_search_on_a_real_layer(name: str, real_layer: tuple[torch.Tensor, Statistics, Statistics]) -> None:
    """On the text that it was calibrated on, and on another."""
    w, seen, unseen = real_layer
    codec = codecs.get(name)
    searched, solved = solve(w, codec, "search", seen), solve(w, codec, "gptq", seen)
    assert loss(w, solved, seen) < 0.75 * loss(w, searched, seen)
    assert loss(w, solved, unseen) < 0.85 * loss(w, searched, unseen)

"""Time and memory from shapes alone, by hand."""

from __future__ import annotations

import pytest

from fewbits.checkpoint import Entry
from fewbits.codecs.floats import F16
from fewbits.jobs import estimating
from fewbits.qtensor import QTensor


def entry(name: str, *shape: int) -> Entry:
    def load() -> QTensor:
        raise AssertionError("shapes are enough")

    return Entry(f"model.layers.0.{name}.weight", shape, F16, load)


BLOCK = [entry("self_attn.q_proj", 8, 8), entry("mlp.up_proj", 20, 8), entry("mlp.down_proj", 8, 20),
         entry("input_layernorm", 8)]
WEIGHTS = 64 + 160 + 160 + 8


def test_memory_of_a_block() -> None:
    """20 x 20 second moments are the widest, passes wait for down_proj with 20 numbers a token; its solve takes more
    than one batch of 10 tokens."""
    held = WEIGHTS + 20 * 20 + 100 * (8 + 20)
    solving, inside = 8 * 8 * 20 + 7 * 20 * 20, 10 * (2 * 8 + 3 * 20)
    assert solving > inside
    assert estimating.block_bytes(BLOCK, 100, 10, 8, drift=False) == 4 * (held + solving)
    assert estimating.block_bytes(BLOCK, 100, 10, 8, drift=True) == 4 * (2 * held + solving)
    assert estimating.block_bytes(BLOCK, 100, 90, 8, drift=False) == 4 * (held + 90 * (2 * 8 + 3 * 20))


@pytest.mark.parametrize("experts", [[entry("mlp.experts.down_proj", 5, 8, 20)],
                                     [entry(f"mlp.experts.{i}.down_proj", 8, 20) for i in range(5)]])
def test_each_expert_has_a_second_moment(experts: list[Entry]) -> None:
    held = 5 * 8 * 20 + 5 * 20 * 20 + 100 * (8 + 20)
    assert estimating.block_bytes(experts, 100, 1, 8, drift=False) == 4 * (held + 8 * 8 * 20 + 7 * 20 * 20)


def test_weights_of_a_module_that_read_the_same_are_solved_as_one() -> None:
    gated = [entry("mlp.gate_proj", 50, 8), entry("mlp.up_proj", 50, 8), entry("mlp.down_proj", 8, 50)]
    held = 3 * 50 * 8 + 50 * 50 + 8 + 50
    assert estimating.block_bytes(gated, 1, 1, 8, drift=False) == 4 * (held + 8 * 50 * 8 + 7 * 50 * 50)
    wide = [entry("mlp.gate_proj", 500, 8), entry("mlp.up_proj", 500, 8)]
    assert estimating.block_bytes(wide, 1, 1, 8, drift=False) == 4 * (8000 + 64 + 16 + 8 * 1000 * 8 + 7 * 8 * 8)


def test_time() -> None:
    """A search costs by the weight, GPTQ by the column too; a walk by the token."""
    assert estimating.solve_cost((8, 20), gptq=False) == 160 * estimating.SEARCH
    assert estimating.solve_cost((8, 20), gptq=True) == 160 * (estimating.SEARCH + 20 * estimating.COLUMN)
    once = estimating.walk_cost(BLOCK, 100, drift=False)
    assert once == 100 * (WEIGHTS - 8 + 8 * 8 + 20 * 20)
    assert estimating.walk_cost(BLOCK, 200, drift=True) == 4 * once

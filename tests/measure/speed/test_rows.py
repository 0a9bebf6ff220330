"""Figures from the seconds of repetitions, by hand."""

from __future__ import annotations

import pytest

from fewbits.measure.speed.rows import Speed, Work, figures


def test_rates_are_of_all_sequences_together() -> None:
    found = figures(Work(100, 4, 3), [{"first": 2.0, "steps": [1, 1, 1, 3]}, {"first": 1.0, "steps": [1, 1, 1, 1]},
                                      {"first": 4.0, "steps": [1, 1, 1, 9]}])
    assert found["first_token_seconds"] == 2.0
    assert found["prefill_tokens_per_second"] == 150
    assert found["decode_tokens_per_second"] == 2.0
    assert (found["token_seconds_median"], found["token_seconds_95"]) == (1, 9)
    assert found["spread"] == {"first_token_seconds": (1, 4), "prefill_tokens_per_second": (75, 300),
                               "decode_tokens_per_second": (1, 3)}


def test_the_95th_percentile_is_a_step_that_was_taken() -> None:
    steps = [float(i) for i in range(1, 101)]
    assert figures(Work(1, 100, 1), [{"first": 1.0, "steps": steps}])["token_seconds_95"] == 95
    assert figures(Work(1, 20, 1), [{"first": 1.0, "steps": steps[:20]}])["token_seconds_95"] == 19


def test_prompts_and_training_steps_have_their_own_figures() -> None:
    assert "decode_tokens_per_second" not in figures(Work(10, 0, 1), [{"first": 1.0, "steps": []}])
    found = figures(Work(10, 0, 2, False, True), [{"forward": 1.0, "backward": 3.0}, {"forward": 2.0, "backward": 2.0}])
    assert (found["forward_seconds"], found["backward_seconds"]) == (1.5, 2.5)
    assert found["spread"]["backward_seconds"] == (2, 3)


@pytest.mark.parametrize(("work", "said"), [
    (Work(512, 64, 1), "prompt of 512 tokens, 64 after it, batch 1"), (Work(8, 0, 4), "prompt of 8 tokens, batch 4"),
    (Work(8, 2, 4, False), "prompt of 8 tokens, 2 after it without the cache, batch 4"),
    (Work(8, 0, 4, False, True), "training step on 4 x 8 tokens")])
def test_works_in_words(work: Work, said: str) -> None:
    assert str(work) == said
    assert Speed("a", "fewbits", "", work.prompt, work.generate, work.batch, work.cache, work.train).work == work

"""Log-likelihoods of endings beside a plain pass of Transformers over each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits.errors import FewbitsError
from fewbits.measure.scoring import Decoded, scorer
from fewbits.measure.tasks import endings as module
from fewbits.measure.tasks.endings import Likelihood, endings

CONTEXTS = [[5, 9, 100, 17, 44], [5, 9, 100, 17, 45, 3], [5, 9], [60, 61, 62]]  # three begin alike
ENDINGS = [[7], [8, 9, 10, 200], [100, 17], [12] * 9]


@torch.inference_mode()
def naive(net: transformers.PreTrainedModel, context: list[int], ending: list[int]) -> Likelihood:
    logits = net(torch.tensor([context + ending])).logits[0, len(context) - 1:-1].double().log_softmax(-1)
    wanted = torch.tensor(ending)
    return float(logits.gather(1, wanted[:, None]).sum()), bool((logits.argmax(-1) == wanted).all())


def check(path: Path, kernel: str | None) -> None:
    near = 1e-4 if kernel else 1e-2  # the native decoder keeps keys and values in 16 bits: 0.0035 measured
    net = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tested = endings(scorer(path, kernel))
    for context in CONTEXTS:
        best = int(net(torch.tensor([context])).logits[0, -1].argmax())
        asked = [*ENDINGS, [best]]
        found, meant = tested.likelihoods(context, asked), [naive(net, context, e) for e in asked]
        assert [greedy for _, greedy in found] == [greedy for _, greedy in meant] and found[-1][1]
        assert [one for one, _ in found] == pytest.approx([one for one, _ in meant], abs=near)


@pytest.mark.parametrize("kernel", [None, "decoded"])
@pytest.mark.parametrize("rows", [256, 3])
def test_as_a_pass_for_each(kernel: str | None, rows: int, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", rows)
    check(tiny, kernel)


def test_on_a_trained_model(shared) -> None:
    check(shared("models/stories260k"), None)


def test_contexts_that_outgrow_the_room(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROOM", 4)
    check(tiny, None)


def test_what_a_context_has_in_common_with_the_last_is_not_computed_again(tiny: Path) -> None:
    tested = endings(scorer(tiny))
    tested.likelihoods(CONTEXTS[0], [[7]])
    fed: list[int] = []
    step = tested._decoder.step
    tested._decoder.step = lambda asked: fed.extend(len(tokens) for _, tokens, _ in asked) or step(asked)
    tested.likelihoods(CONTEXTS[1], [[7], [1, 2, 3]])
    assert fed == [2, 2]


def test_broken_logits_are_told(tiny: Path) -> None:
    net = fewbits.load(tiny)
    net.model.norm.weight.data[3] = float("nan")
    with pytest.raises(FewbitsError, match="NaN"):
        endings(scorer(net)).likelihoods([1, 2], [[3]])


def test_the_native_decoder_is_what_computes(tiny: Path) -> None:
    assert isinstance(scorer(tiny), Decoded) and isinstance(endings(scorer(tiny)), module.Native)

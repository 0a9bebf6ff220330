"""Our model in lm-evaluation-harness beside its own Transformers backend: the same requests, the same answers."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from fewbits.errors import FewbitsError
from fewbits.measure import tasks
from fewbits.measure.tasks.harness import FewbitsLM
from fewbits.measure.tasks.questions import questions
from tests.measure.tasks.files import write

PAIRS = [("Once upon a time", " there was a girl"), ("Once upon a time", " the"), ("One sentence.  ", "Another"),
         ("", "nothing before it"), ("<s>Marked", " as a beginning"),
         ("a very long text " * 20, " is cut from the left")]


@pytest.fixture(scope="module")
def ours(tiny: Path) -> FewbitsLM:
    return FewbitsLM(tiny)


@pytest.fixture(scope="module")
def theirs(tiny: Path) -> HFLM:
    return HFLM(pretrained=str(tiny), dtype="float32", device="cpu", batch_size=2)


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def test_log_likelihoods(ours: FewbitsLM, theirs: HFLM) -> None:
    asked = requests("loglikelihood", *PAIRS)
    found, meant = ours.loglikelihood(asked, disable_tqdm=True), theirs.loglikelihood(asked, disable_tqdm=True)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in meant], abs=1e-2)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in meant]


def test_tokens(ours: FewbitsLM, theirs: HFLM) -> None:
    assert ours.max_length == theirs.max_length and ours.prefix_token_id == theirs.prefix_token_id
    assert ours.eot_token_id == theirs.eot_token_id
    for text, ending in PAIRS:
        assert ours.tok_encode(text) == theirs.tok_encode(text)
        if text:
            assert ours._encode_pair(text, ending) == theirs._encode_pair(text, ending)


def test_whole_texts(ours: FewbitsLM, theirs: HFLM, english: Path) -> None:
    texts = [(english.read_text()[:900],), ("short",)]  # 900 letters: several windows of 256 tokens
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", *texts))
    meant = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", *texts), disable_tqdm=True)
    assert found == pytest.approx(meant, rel=1e-4)


@pytest.mark.parametrize("settings", [{"until": ["\n\n"], "max_gen_toks": 12}, {"until": "e", "max_gen_toks": 30},
                                      {"until": [], "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}])
def test_generated_text(settings: dict, ours: FewbitsLM, theirs: HFLM) -> None:
    asked = [("Once upon", settings), ("What is it? " * 30, settings)]
    found = ours.generate_until(requests("generate_until", *asked))
    assert found == theirs.generate_until(requests("generate_until", *asked), disable_tqdm=True)


def test_generation_settings_that_are_not_known(ours: FewbitsLM) -> None:
    with pytest.raises(FewbitsError, match="num_beams"):
        ours.generate_until(requests("generate_until", ("a", {"until": [], "num_beams": 3})))


def test_chats(ours: FewbitsLM, theirs: HFLM) -> None:
    said = [{"role": "user", "content": "Hello"}]
    assert ours.apply_chat_template(said) == theirs.apply_chat_template(said) == "user: Hello\n"


def test_the_harness_knows_it_by_name(tiny: Path) -> None:
    assert get_model("fewbits") is FewbitsLM
    made = get_model("fewbits").create_from_arg_string(f"pretrained={tiny}", {"batch_size": 1, "device": "cuda:0"})
    assert made.native


def test_its_evaluator_finds_what_we_find(tiny: Path, tmp_path: Path, ours: FewbitsLM) -> None:
    folder, names = write(tmp_path), ["arc_easy", "hellaswag", "truthfulqa_mc1", "truthfulqa_mc2", "piqa", "winogrande"]
    members = [questions(name, folder)[0].task for name in names]
    for member in members:
        member.set_config("num_fewshot", 0)
    meant = simple_evaluate(ours, tasks=members, task_manager=TaskManager(include_defaults=False))["results"]
    found = tasks.run(tiny, names=names, folder=folder)
    assert len(found) == 9
    for one in found:
        assert one.accuracy == pytest.approx(meant[one.task][f"{one.metric},none"])
        assert one.error == pytest.approx(meant[one.task][f"{one.metric}_stderr,none"])


def test_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: called.append(get_model("fewbits")))
    runpy.run_module("fewbits.measure.tasks", run_name="__main__")
    assert called == [FewbitsLM]

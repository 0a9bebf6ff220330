"""A run over task files: which questions, what is kept, what is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset

import fewbits
from fewbits import caching, cli, devices
from fewbits.errors import FewbitsError
from fewbits.measure import tasks
from fewbits.measure.tasks import harness
from fewbits.measure.tasks.answers import Answers
from fewbits.measure.tasks.local import documents
from fewbits.measure.tasks.questions import questions
from tests.measure.tasks.files import write


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "files").mkdir()
    return write(tmp_path / "files")


def test_beside_a_reference(tiny: Path, tmp_path: Path, folder: Path) -> None:
    out = fewbits.quantize(tiny, tmp_path / "q", "int2-g32", calibration="none").path
    found = tasks.run(out, tiny, names=["arc_easy", "mmlu"], folder=folder)
    assert [(r.task, r.metric, r.questions) for r in found] == [("arc_easy", "acc", 3), ("arc_easy", "acc_norm", 3),
                                                                ("mmlu", "acc", 9)]
    alone = tasks.run(tiny, names=["arc_easy", "mmlu"], folder=folder)
    for one, reference in zip(found, alone, strict=True):
        assert one.reference_accuracy == reference.accuracy and reference.difference is None
        assert one.difference == pytest.approx(one.accuracy - one.reference_accuracy)
        assert one.log_probability_shift != 0
    told = found[0].circumstances
    assert [m["name"] for m in told["models"]] == ["q", "tiny"] and all(m["sha256"] for m in told["models"])
    assert told["limit"] is None and told["versions"]["lm_eval"]
    json.dumps(found[0].to_json())


def test_files_and_loaded_models_agree(tiny: Path, folder: Path) -> None:
    names = ["arc_easy", "winogrande", "truthfulqa_mc2"]
    found = tasks.run(fewbits.load(tiny), tiny, names=names, folder=folder)
    assert all(r.flipped == 0 and abs(r.log_probability_shift) < 1e-2 for r in found)


def test_answers_of_a_gpu_are_its_own(tiny: Path, folder: Path, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 40)
    for device in (None, "cuda"):
        (found,) = tasks.run(tiny, names=["winogrande"], folder=folder, limit=1, device=device)
        assert found.circumstances["device"] == device
    assert len(list(caching.folder("answers").iterdir())) == 2


def test_a_killed_run_goes_on(tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = harness.FewbitsLM.likelihoods

    def killed(self, pairs):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(pairs[0][0])
        return ask(self, pairs)

    monkeypatch.setattr(harness.FewbitsLM, "likelihoods", killed)
    with pytest.raises(KeyboardInterrupt):
        tasks.run(tiny, names=["arc_easy"], folder=folder)
    file = next(caching.folder("answers").iterdir())
    file.write_bytes(file.read_bytes() + b'{"question": "half a li')  # what a lost machine may leave
    monkeypatch.setattr(harness.FewbitsLM, "likelihoods", lambda self, pairs: asked.append("again") or ask(self, pairs))
    first = tasks.run(tiny, names=["arc_easy"], folder=folder)
    assert asked.count("again") == 1, "of three questions two were answered"
    monkeypatch.setattr(harness, "FewbitsLM", None)  # not even loaded
    again = tasks.run(tiny, names=["arc_easy"], folder=folder)
    assert [r.accuracy for r in again] == [r.accuracy for r in first]
    with pytest.raises(TypeError):
        tasks.run(tiny, names=["arc_easy"], folder=folder, fresh=True)


def test_another_model_under_the_same_name_is_asked_anew(tiny: Path, tmp_path: Path, folder: Path) -> None:
    out = tmp_path / "q.gguf"
    shifts = []
    for recipe in ("Q8_0", "Q4_0"):
        out.unlink(missing_ok=True)
        fewbits.quantize(tiny, out, recipe, calibration="none")
        shifts.append(tasks.run(out, tiny, names=["piqa"], folder=folder)[0].log_probability_shift)
    assert shifts[0] != shifts[1]


def test_answers_are_what_was_put(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    Answers(file).put("a", [(-1.25, True), (-2.5e-3, False)])
    assert Answers(file)["a"] == [(-1.25, True), (-2.5e-3, False)] and "b" not in Answers(file)
    file.write_bytes(file.read_bytes() + b"half")
    Answers(file).put("b", [(-1.0, True)])
    assert Answers(file)["b"] == [(-1.0, True)] and Answers(file)["a"]


def test_the_first_questions_or_drawn_ones(folder: Path) -> None:
    every = [q.key for q in questions("arc_easy", folder)]
    assert [q.key for q in questions("arc_easy", folder, 2)] == every[:2]
    drawn = [[q.key for q in questions("mmlu", folder, 4, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and len(set(drawn[0])) == 4
    assert len(questions("arc_easy", folder, 100, seed=1)) == 3


def test_subjects_take_turns(folder: Path) -> None:
    asked = questions("mmlu", folder, 4)
    assert [(q.task.task_name, q.number) for q in asked] == [("mmlu_anatomy", 0), ("mmlu_astronomy", 0),
                                                             ("mmlu_virology", 0), ("mmlu_anatomy", 1)]
    assert [q.number for q in questions("mmlu_virology", folder)] == [0, 1, 2]
    with pytest.raises(FewbitsError, match="mmlu_history: no such subject"):
        questions("mmlu_history", folder)


def test_norms_and_shares(folder: Path) -> None:
    """The longest choice wins once lengths are counted; shares of mc2 are probabilities of what is right."""
    asked = questions("arc_easy", folder)[0]  # ice, the sun in summer, a cold stone, snow
    found = [(-6.0, False), (-10.0, False), (-9.0, False), (-5.0, False)]
    assert asked.choice("acc", found) == 3 and asked.choice("acc_norm", found) == 1
    assert asked.scores(found) == {"acc": 0, "acc_norm": 1} and asked.right(found) == -10
    several = questions("truthfulqa_mc2", folder)[0]
    found = [(-0.5, False), (-1.5, False), (-1.5, False)]
    assert several.scores(found)["acc"] == pytest.approx(1 - 0.25 / (0.25 + 0.25 + 2.718281828 ** 1 * 0.25))


def test_questions_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, name: str) -> dict[str, Dataset]:
        asked.append((path, name))
        return {split: Dataset.from_list(documents("arc_easy", folder)) for split in ("train", "validation", "test")}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert [q.key for q in questions("arc_easy")] == [q.key for q in questions("arc_easy", folder)]
    assert asked == [("allenai/ai2_arc", "ARC-Easy")]


def test_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, name: str) -> None:
        raise ConnectionError(f"Couldn't reach {path!r}\nsince there is no network")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(FewbitsError, match="task arc_easy: Couldn't reach 'allenai/ai2_arc'$") as told:
        questions("arc_easy")
    assert "--task-files" in str(told.value.hint)


def test_only_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Dataset.from_list([{"question": "Why?", "best_answer": "So.", "correct_answers": ["So."],
                               "incorrect_answers": ["No."]}])
    monkeypatch.setattr("datasets.load_dataset", lambda **_: {"validation": rows})
    with pytest.raises(FewbitsError, match="task truthfulqa_gen: generate_until, not a choice"):
        questions("truthfulqa_gen")


def test_tasks_that_are_none(tiny: Path, folder: Path) -> None:
    with pytest.raises(FewbitsError, match="no local file is known for task 'arc_eazy'"):
        tasks.run(tiny, names=["arc_eazy"], folder=folder)


def test_the_command(tiny: Path, folder: Path, monkeypatch: pytest.MonkeyPatch,
                     capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fewbits", "eval", str(tiny), "--against", str(tiny), "--tasks", "piqa,winogrande", "--task-files",
               str(folder), "--limit", "2"]
    def call(*more: str) -> None:
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code

    call()
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:4] == ["task", "metric", "of", "right,"] and len(out) == 4
    assert "winogrande" in out[3] and "+0.0 +- 0.0" in out[3]
    call("--json")
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert [(r["task"], r["questions"], r["flipped"]) for r in found] == [("piqa", 2, 0), ("piqa", 2, 0),
                                                                          ("winogrande", 2, 0)]


def test_something_must_be_measured(tiny: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["fewbits", "eval", str(tiny)])
    with pytest.raises(SystemExit):
        cli.main()
    assert "nothing to measure" in capsys.readouterr().err

"""Task files: the harness's own prompts come out of them, and what is wrong is told by its line."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path

import pytest

from fewbits.errors import FewbitsError
from fewbits.measure.tasks.local import FILES, documents
from fewbits.measure.tasks.questions import questions
from tests.measure.tasks.files import CHOICES, HELLASWAG, MMLU, TRUTHFULQA, WINOGRANDE, lines, write

PROMPTS = {  # task: the first question's pairs, and which is right
    "arc_easy": [("Question: Which is hot?\nAnswer:", " " + c) for c in CHOICES[0][1]],
    "piqa": [("Question: Which is hot?\nAnswer:", " " + c) for c in CHOICES[0][1][:2]],
    "winogrande": [(o, " was too large.") for o in WINOGRANDE[0][0]],
    "hellaswag": [("Roof: A man is on a roof. He", " " + e) for e in HELLASWAG[2:6]],
    "mmlu": [("The following are multiple choice questions (with answers) about anatomy.\n\nWhat is 0 + 1?\nA. 0\n"
              "B. 1\nC. 7 or so\nD. x\nAnswer:", f" {letter}") for letter in "ABCD"]}
RIGHT = {"arc_easy": [1], "arc_challenge": [1], "piqa": [1], "winogrande": [0], "hellaswag": [1], "mmlu": [1],
         "truthfulqa_mc1": [0], "truthfulqa_mc2": [0, 1]}


@pytest.mark.parametrize("task", PROMPTS)
def test_prompts_are_the_harness_s(task: str, tmp_path: Path) -> None:
    assert list(questions(task, write(tmp_path))[0].pairs) == PROMPTS[task]


def test_truthfulqa_begins_with_its_six_examples(tmp_path: Path) -> None:
    asked = questions("truthfulqa_mc1", write(tmp_path))[0]
    context, ending = asked.pairs[0]
    assert context.count("Q: ") == 7 and context.endswith("\n\nQ: Is the moon made of cheese?\nA:")
    assert ending == " No.", "the right one comes first"
    assert [e for _, e in questions("truthfulqa_mc2", tmp_path)[0].pairs] == [" No, of rock.", " It is not.", " It is."]


def test_what_is_right(tmp_path: Path) -> None:
    write(tmp_path)
    assert {task: questions(task, tmp_path)[0].gold for task in FILES} == RIGHT


def test_contexts_that_end_with_a_sentence_stay_as_they_are(tmp_path: Path) -> None:
    context, _ = questions("hellaswag", write(tmp_path))[1].pairs[0]
    assert context == HELLASWAG[6]


BAD = [  # file, what stands in it, task, what is told
    ("arc_easy.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 0}\n\n{"query": "a", "gold": 0}\n', "arc_easy",
     "arc_easy.jsonl:3: no field 'choices'"),
    ("arc_easy.jsonl", '{"query": "a"\n', "arc_easy", "arc_easy.jsonl:1: no JSON"),
    ("arc_easy.jsonl", '{"query": "a", "choices": ["b", "c"], "gold": 2}', "arc_easy",
     "arc_easy.jsonl:1: the right choice is 2, of 2"),
    ("arc_easy.jsonl", '{"query": "a", "choices": "bc", "gold": 2}', "arc_easy", "arc_easy.jsonl:1: choices must be"),
    ("arc_easy.jsonl", "[1]", "arc_easy", "arc_easy.jsonl:1: "),
    ("arc_easy.jsonl", "\n", "arc_easy", "no questions"),
    ("piqa.jsonl", '{"query": "a", "choices": ["b", "c", "d"], "gold": 2}', "piqa", "piqa.jsonl:1: "),
    ("winogrande.jsonl", '{"context_options": ["b", "c"], "gold": 1}', "winogrande", "1: no field 'continuation'"),
    ("truthfulqa_mc.json", json.dumps(TRUTHFULQA, indent=2).replace('"mc2_targets"', '"mc3"', 2).replace(
        '"mc3"', '"mc2_targets"', 1), "truthfulqa_mc2", "truthfulqa_mc.json:14: no field 'mc2_targets'"),
    ("truthfulqa_mc.json", '[{"question": 1},\n {"question" 2}]', "truthfulqa_mc1", "truthfulqa_mc.json:1: no field"),
    ("truthfulqa_mc.json", '[\n', "truthfulqa_mc1", "truthfulqa_mc.json:1: the array does not end"),
    ("truthfulqa_mc.json", '{}', "truthfulqa_mc1", "truthfulqa_mc.json:1: [ expected"),
]


@pytest.mark.parametrize("name,text,task,error", BAD)
def test_what_is_wrong_is_told_by_its_line(name: str, text: str, task: str, error: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(FewbitsError) as told:
        documents(task, tmp_path)
    assert error in str(told.value)


def test_six_lines_a_question(tmp_path: Path) -> None:
    file = tmp_path / "hellaswag_val.txt.bz2"
    for changed, error in (({7: "four"}, "bz2:7: "), ({7: "4"}, "bz2:7: the right choice is 4"),
                           ({0: "no topic"}, "bz2:1: no topic")):
        file.write_bytes(bz2.compress("\n".join(changed.get(i, x) for i, x in enumerate(HELLASWAG)).encode()))
        with pytest.raises(FewbitsError, match=error):
            documents("hellaswag", tmp_path)
    file.write_bytes(bz2.compress("\n".join(HELLASWAG[:-1]).encode()))
    with pytest.raises(FewbitsError, match="11 lines"):
        documents("hellaswag", tmp_path)


def test_files_that_are_missing_or_no_archives(tmp_path: Path) -> None:
    with pytest.raises(FewbitsError, match="piqa.jsonl: No such file"):
        documents("piqa", tmp_path)
    (tmp_path / "mmlu_test.jsonl.gz").write_bytes(b"not packed")
    with pytest.raises(FewbitsError, match="mmlu_test.jsonl.gz: "):
        documents("mmlu", tmp_path)
    with pytest.raises(FewbitsError, match="no local file is known for task 'gsm8k'"):
        documents("gsm8k", tmp_path)


def test_four_choices_in_mmlu(tmp_path: Path) -> None:
    (tmp_path / "mmlu_test.jsonl.gz").write_bytes(gzip.compress(json.dumps(MMLU[0] | {"choices": ["0", "1"]}).encode()))
    with pytest.raises(FewbitsError, match="mmlu_test.jsonl.gz:1: 2 choices"):
        documents("mmlu", tmp_path)


@pytest.mark.parametrize("task,count", [("arc_easy", 2376), ("arc_challenge", 1172), ("hellaswag", 10042),
                                        ("mmlu", 14042), ("truthfulqa_mc2", 817), ("piqa", 1838), ("winogrande", 1267)])
def test_whole_files(task: str, count: int, shared) -> None:
    assert len(documents(task, shared("tasks"))) == count


def test_lines_of_one_file_only(tmp_path: Path) -> None:
    lines(tmp_path / "arc_easy.jsonl", [{"query": "Which?", "choices": ["a", "b", "c"], "gold": 2}])
    assert questions("arc_easy", tmp_path)[0].pairs[2] == ("Question: Which?\nAnswer:", " c")

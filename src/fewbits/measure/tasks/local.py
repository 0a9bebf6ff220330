"""Task files on disk, as the documents that lm-evaluation-harness's own task definitions expect.

Prompts, choices and metrics stay the harness's: what happens here is that fields get the names of the hub's data sets.
"""

from __future__ import annotations

import bz2
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

Document = dict[str, Any]
Placed = tuple[int, Any]  # the line where it begins, and what stands there
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class File:
    """Where a task's documents lie, and how one of them is read."""

    name: str
    read: Callable[[str, Path], Iterator[Placed]]
    document: Callable[[Any], Document]


def documents(task: str, folder: str | Path) -> list[Document]:
    """Of a task of lm-evaluation-harness; of `mmlu`, those of all subjects.

    Raises:
        FewbitsError: no file for it; a line that is no document, with its number.
    """
    if task not in FILES:
        raise FewbitsError(f"no local file is known for task {task!r}", "there are " + ", ".join(FILES) +
                           "; without --task-files the hub is asked")
    file = FILES[task]
    path = Path(folder) / file.name
    found = []
    for line, row in file.read(_text(path), path):
        try:
            found.append(file.document(row))
        except KeyError as error:
            raise FewbitsError(f"{path}:{line}: no field {error.args[0]!r}") from None
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise FewbitsError(f"{path}:{line}: {error}") from None
    if not found:
        raise FewbitsError(f"{path}: no questions in it")
    return found


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
        packed = {".gz": gzip.decompress, ".bz2": bz2.decompress}.get(path.suffix)
        return (packed(data) if packed else data).decode()
    except UnicodeDecodeError as error:
        raise FewbitsError(f"{path}: not UTF-8 at byte {error.start}") from None
    except (OSError, EOFError) as error:
        raise FewbitsError(f"{path}: {getattr(error, 'strerror', None) or error}",
                           "the guide on tasks says how files are named") from None


# files ----------------------------------------------------------------------------------------------------------------
def _lines(text: str, path: Path) -> Iterator[Placed]:
    """JSON, one document a line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except json.JSONDecodeError as error:
                raise FewbitsError(f"{path}:{number}: no JSON: {error.msg}") from None


def _array(text: str, path: Path) -> Iterator[Placed]:
    """One JSON array over many lines."""
    decoder, at = json.JSONDecoder(), _behind(text, 0, "[", path)
    while text[at:at + 1] != "]":
        line = text.count("\n", 0, at) + 1
        try:
            found, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise FewbitsError(f"{path}:{error.lineno}: no JSON: {error.msg}") from None
        yield line, found
        at = _behind(text, end, "," if "," in text[end:].lstrip()[:1] else "", path)


def _behind(text: str, at: int, mark: str, path: Path) -> int:
    """The next character that is no space, behind `mark`."""
    found = re.compile(r"\s*" + re.escape(mark) + r"\s*").match(text, at)
    line = text.count("\n", 0, at) + 1
    if found is None:
        raise FewbitsError(f"{path}:{line}: {mark} expected")
    if found.end() == len(text):
        raise FewbitsError(f"{path}:{line}: the array does not end")
    return found.end()


def _sixes(text: str, path: Path) -> Iterator[Placed]:
    """Six lines a document."""
    lines = text.removesuffix("\n").split("\n")
    if len(lines) % 6:
        raise FewbitsError(f"{path}:{len(lines)}: {len(lines)} lines, of six a question: the last one is not whole")
    for i in range(0, len(lines), 6):
        yield i + 1, lines[i:i + 6]


# documents ------------------------------------------------------------------------------------------------------------
def _arc(row: Document) -> Document:
    choices = _texts(row["choices"])
    labels = list(LETTERS[:len(choices)])
    return {"question": row["query"].removeprefix("Question: "), "choices": {"text": choices, "label": labels},
            "answerKey": labels[_which(row["gold"], choices)]}


def _hellaswag(lines: list[str]) -> Document:
    """The hub's data set has a context in two parts: sentences, and the beginning of one, which the harness
    capitalizes. Here it is one line; what follows its last whole sentence in small letters is the second part."""
    topic, parted, context = lines[0].partition(": ")
    if not parted:
        raise ValueError("no topic before the context")
    begun = re.fullmatch(r"(.*[.!?]) +([a-z][^.!?]*)", context)
    sentences, beginning = (begun[1], begun[2]) if begun else (context, "")
    endings = lines[2:]
    return {"activity_label": topic, "ctx_a": sentences, "ctx_b": beginning, "endings": endings,
            "label": str(_which(int(lines[1]), endings))}


def _mmlu(row: Document) -> Document:
    choices = _texts(row["choices"])
    if len(choices) != 4:
        raise ValueError(f"{len(choices)} choices, there must be 4")
    return {"question": row["question"].strip(), "subject": row["subject"], "choices": choices,
            "answer": _which(row["answer"], choices)}


def _truthfulqa(row: Document) -> Document:
    def targets(of: dict[str, int]) -> Document:
        first = sorted(of.items(), key=lambda one: -one[1])  # the harness takes the first of mc1 for the right one
        if not first or first[0][1] != 1:
            raise ValueError("no choice is right")
        return {"choices": [text for text, _ in first], "labels": [label for _, label in first]}

    return {"question": row["question"], "mc1_targets": targets(row["mc1_targets"]),
            "mc2_targets": targets(row["mc2_targets"])}


def _piqa(row: Document) -> Document:
    one, other = choices = _texts(row["choices"])
    return {"goal": row["query"].removeprefix("Question: ").removesuffix("\n"), "sol1": one, "sol2": other,
            "label": _which(row["gold"], choices)}


def _winogrande(row: Document) -> Document:
    """The harness puts the options where the `_` stands: here they are all of the sentence up to there."""
    one, other = options = _texts(row["context_options"])
    return {"sentence": "_ " + row["continuation"], "option1": one, "option2": other,
            "answer": str(_which(row["gold"], options) + 1)}


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) and one for one in found) or len(found) < 2:
        raise ValueError(f"choices must be two texts or more, not {found!r:.60}")
    return found


def _which(found: Any, choices: list[str]) -> int:
    if not isinstance(found, int) or not 0 <= found < len(choices):
        raise ValueError(f"the right choice is {found!r}, of {len(choices)}")
    return found


FILES = {  # task -> its file
    "arc_easy": File("arc_easy.jsonl", _lines, _arc),
    "arc_challenge": File("arc_challenge.jsonl", _lines, _arc),
    "hellaswag": File("hellaswag_val.txt.bz2", _sixes, _hellaswag),
    "mmlu": File("mmlu_test.jsonl.gz", _lines, _mmlu),
    "truthfulqa_mc1": File("truthfulqa_mc.json", _array, _truthfulqa),
    "truthfulqa_mc2": File("truthfulqa_mc.json", _array, _truthfulqa),
    "piqa": File("piqa.jsonl", _lines, _piqa),
    "winogrande": File("winogrande.jsonl", _lines, _winogrande),
}

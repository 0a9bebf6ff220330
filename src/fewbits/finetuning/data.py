"""What a model is fine-tuned on: texts, pairs of prompt and answer, or chats, as token ids and what of them is learnt.

Texts are joined and cut into sequences of equal length. Of pairs and chats the answers are learnt, not the questions.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from pathlib import Path
from typing import Any, overload

import torch
import transformers

from fewbits.calibration.documents import DATASETS, excerpts, lines, named
from fewbits.calibration.sources import READ_PER_TOKEN, frame, joined, turns
from fewbits.errors import FewbitsError

IGNORED = -100  # the label of a token that is not learnt
FORMS = "text, messages, prompt and completion, or instruction and output"
FILES = "give a UTF-8 text, a .jsonl of texts, pairs or chats, or a data set of the hub"
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[\w\[\]%]+)?")  # owner/name, perhaps with a split
LONG = 4096  # sequences that are read of a data set without end, where nothing says how many are wanted

Row = tuple[str, Mapping[str, Any]]  # where it stands, what it holds


@dataclass(frozen=True)
class Example:
    input_ids: torch.Tensor  # [tokens], int64
    labels: torch.Tensor  # [tokens]: the same ids, `IGNORED` where nothing is learnt

    @property
    def learnt(self) -> int:
        """Tokens that are predicted and counted: the first one has nothing before it."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Data(Sequence[Example]):
    """Examples, and what there is to say of them."""

    examples: tuple[Example, ...]
    description: str  # "wiki.txt, 120 examples, 61440 tokens"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, at: int) -> Example: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Example]: ...
    def __getitem__(self, at: int | slice) -> Example | Sequence[Example]:
        return self.examples[at]


def examples(spec: str | Path, tokenizer: transformers.PreTrainedTokenizerBase, *, length: int,
             most: int | None = None) -> Data:
    """The examples of `spec`, none longer than `length` tokens; of a data set of the hub no more than `most`.

    `spec` is a text file; a `.jsonl` (or a `.json` list) of objects with `text`, `messages` (or `conversations`),
    `prompt` and `completion`, or `instruction` (perhaps `input`) and `output`; `c4`, `wikitext2` or `owner/name:split`
    of the hub, through the `datasets` library.

    Raises:
        FewbitsError: nothing readable there, no text in it, a chat that the model's template refuses.
    """
    name, budget = str(spec), (most or LONG) * length * READ_PER_TOKEN
    path = Path(spec)
    if name in DATASETS:
        found = _Reader(tokenizer, name, length).texts(named(name, budget))
    elif path.suffix in (".jsonl", ".json") or not path.exists() and HUB.fullmatch(name):
        rows = _objects(path) if path.suffix == ".json" else (
            _lines(path) if path.suffix == ".jsonl" else _hub(name, most))
        found = _Reader(tokenizer, name, length).rows(rows)
    else:
        found = _Reader(tokenizer, name, length).texts(excerpts(path, sys.maxsize, 1, 0))
    if not found.examples:
        raise FewbitsError(f"{name}: no text to learn from in it", f"its objects hold {FORMS}"
                           if path.suffix in (".jsonl", ".json") else FILES)
    return found


# rows ---------------------------------------------------------------------------------------------------------------
def _lines(path: Path) -> Iterator[Row]:
    return ((f"{path}: at byte {at}", row) for at, row in lines(path, sys.maxsize, 1, 0))


def _objects(path: Path) -> Iterator[Row]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FewbitsError(f"{path}: no such file", FILES) from None
    except ValueError as error:
        raise FewbitsError(f"{path}: no JSON: {error}", "one object a line goes into a .jsonl file") from None
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise FewbitsError(f"{path}: a list of objects is expected", f"of {FORMS}")
    return ((f"{path}: number {i}", row) for i, row in enumerate(found))


def _hub(name: str, most: int | None) -> Iterator[Row]:
    """Rows of a data set of the hub.

    Raises:
        FewbitsError: the `datasets` library is missing, or the hub out of reach.
    """
    try:
        import datasets
    except ImportError:
        raise FewbitsError(f"{name}: no such file; the hub's data sets are read through the datasets library",
                           "pip install 'fewbits[data]', or give a file") from None
    where, _, split = name.partition(":")
    try:
        for i, row in enumerate(datasets.load_dataset(where, split=split or "train", streaming=True)):
            if i == most:
                return
            yield f"{name}: row {i}", row
    except FewbitsError:
        raise
    except Exception as error:  # of the hub, the network, the file system: each library has its own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise FewbitsError(f"{name}: no such file, and no data set that can be read: {first}", FILES) from error


# examples -----------------------------------------------------------------------------------------------------------
class _Reader:
    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, name: str, length: int):
        if length < 2:
            raise FewbitsError(f"--length {length}: a token is learnt from those before it", "take 2 at least")
        self.tokenizer, self.name, self.length = tokenizer, name, length
        self.shortened = self.empty = 0

    def texts(self, documents: Iterable[str]) -> Data:
        return self._data(self._packed(documents))

    def rows(self, rows: Iterable[Row]) -> Data:
        texts: list[str] = []
        found: list[Example] = []
        for where, row in rows:
            if "messages" in row or "conversations" in row:
                found += self._kept(*self._chat(where, turns(where, row)))
            elif isinstance(row.get("text"), str):
                texts.append(row["text"])
            else:
                found += self._kept(*self._pair(where, row))
        return self._data(found + self._packed(texts))

    def _packed(self, documents: Iterable[str]) -> list[Example]:
        """All documents one after another, in sequences of equal length; what is left over is left out, unless it is
        all there is."""
        tokens = joined(self.tokenizer, documents)
        ids = torch.tensor(frame(self.tokenizer)[0] + tokens if tokens else [], dtype=torch.int64)
        whole = len(ids) // self.length * self.length
        parts = ids[:whole].split(self.length) if whole else (ids,) if len(ids) > 1 else ()
        return [Example(part, part) for part in parts]

    def _pair(self, where: str, row: Mapping[str, Any]) -> tuple[list[int], list[bool]]:
        for question, answer in (("prompt", "completion"), ("instruction", "output")):
            if question not in row or answer not in row:
                continue
            parts = [row[question], row[answer]]
            if question == "instruction" and row.get("input"):
                parts[0] = f"{row[question]}\n\n{row['input']}"
            if not all(isinstance(part, str) for part in parts):
                raise FewbitsError(f"{where}: {question} and {answer} are to be strings")
            if question == "instruction" and self.tokenizer.chat_template:
                return self._chat(where, [{"role": r, "content": c} for r, c in zip(("user", "assistant"), parts,
                                                                                     strict=True)])
            return self._joint(parts[0] + ("\n\n" if question == "instruction" else ""), parts[1])
        names = ", ".join(row) or "nothing"
        raise FewbitsError(f"{where}: no text to learn from: it holds {names}", f"what is read: {FORMS}")

    def _joint(self, prompt: str, answer: str) -> tuple[list[int], list[bool]]:
        """Tokenized apart, as the prompt is when the model is asked."""
        asked = self.tokenizer(prompt, verbose=False)["input_ids"]
        end = self.tokenizer.eos_token_id
        if asked and asked[-1] == end:  # some tokenizers end every text
            asked = asked[:-1]
        said = self.tokenizer(answer, add_special_tokens=False, verbose=False)["input_ids"]
        said = said + ([] if end is None else [end])
        return asked + said, [False] * len(asked) + [True] * len(said)

    def _chat(self, where: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """The conversation in the model's template; learnt are the assistant's turns and what ends them."""
        if not self.tokenizer.chat_template:
            raise FewbitsError(f"{where}: a chat, and the model has no chat template",
                               "give texts, or pairs of prompt and completion")
        if not self.tokenizer.is_fast:
            raise FewbitsError(f"{where}: {type(self.tokenizer).__name__} does not tell which letters a token stands "
                               "for", "give pairs of prompt and completion")
        full = self._render(where, messages)
        spans = []
        for i, message in enumerate(messages):
            if message.get("role") == "assistant":
                begins = max(0, full.find(str(message.get("content"))))  # of a first turn: what a template puts before
                before = self._render(where, messages[:i], add_generation_prompt=True) if i else full[:begins]
                through = full if i + 1 == len(messages) else self._render(where, messages[:i + 1])
                spans.append((len(commonprefix((before, full))), len(commonprefix((through, full)))))
        found = self.tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        learnt = [any(begin <= a < b <= end for begin, end in spans) for a, b in found["offset_mapping"]]
        return found["input_ids"], learnt

    def _render(self, where: str, messages: list[dict[str, Any]], **more: Any) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **more))
        except Exception as error:  # a template refuses in its own words, and fails in jinja's
            raise FewbitsError(f"{where}: the model's chat template refuses it: {str(error).splitlines()[0]}") from None

    def _kept(self, ids: list[int], learnt: list[bool]) -> list[Example]:
        """The example, cut where it is too long; none if nothing in it is learnt."""
        self.shortened += len(ids) > self.length
        tokens = torch.tensor(ids[:self.length], dtype=torch.int64)
        labels = tokens.masked_fill(~torch.tensor(learnt[:self.length], dtype=torch.bool), IGNORED)
        example = Example(tokens, labels)
        if example.learnt:
            return [example]
        self.empty += 1
        return []

    def _data(self, found: list[Example]) -> Data:
        notes = [f"{self.name}: {count} {'example' if count == 1 else 'examples'} {what}" for count, what in (
            (self.shortened, f"cut to {self.length} tokens"), (self.empty, "left out: nothing in them is learnt"))
            if count]
        tokens = sum(len(e.input_ids) for e in found)
        some = f"{len(found)} example{'' if len(found) == 1 else 's'}, {tokens} tokens"
        learnt = sum(e.learnt for e in found)
        more = "" if learnt + len(found) >= tokens else f", {learnt} of them learnt"
        return Data(tuple(found), f"{self.name}, {some}{more}", tuple(notes))


def split(data: Data, share: float, most: int) -> tuple[Data, Data]:
    """The examples without, and with only, a share of them spread evenly over all: at most `most`, none of a few."""
    count = min(round(len(data) * share), most, len(data) - 1)
    if share > 0 and len(data) > 3:
        count = max(1, count)
    at = {(2 * i + 1) * len(data) // (2 * count) for i in range(count)} if count > 0 else set()
    parts = ([e for i, e in enumerate(data.examples) if (i in at) == held] for held in (False, True))
    learn, held_out = (replace(data, examples=tuple(part)) for part in parts)
    return learn, held_out

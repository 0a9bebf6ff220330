"""Documents: from a data set of the hub or a file, of which no more is read than needed."""

from __future__ import annotations

import json
import random
from codecs import getincrementaldecoder
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

TEXT = "give a UTF-8 text, a .jsonl of texts or chats, c4, wikitext2 or self"

# name -> arguments of datasets.load_dataset; of c4 the first file of 1024
DATASETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "c4": (("allenai/c4",), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}, "split": "train"}),
    "wikitext2": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
    "wikitext2-test": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test"}),
}


def spread(tokens: int, samples: int, length: int, seed: int) -> list[int]:
    """Where up to `samples` windows of `length` begin, apart: evenly, or with a seed anywhere in its share."""
    windows = tokens // length
    take = min(samples, windows)
    firsts = [i * windows // take for i in range(take + 1)]
    if not seed:
        return [first * length for first in firsts[:-1]]
    draw = random.Random(seed)
    shift = draw.randrange(tokens - windows * length + 1)
    return [shift + draw.randrange(a, b) * length for a, b in zip(firsts, firsts[1:], strict=False)]


def named(name: str, budget: int) -> list[str]:
    """Documents of a data set of the hub until `budget` bytes are read.

    Raises:
        FewbitsError: the `datasets` library is missing, or the hub out of reach.
    """
    try:
        import datasets
    except ImportError:
        raise FewbitsError(f"{name} is read through the datasets library, which is not installed",
                           "pip install 'fewbits[data]', or give a text file, or self") from None
    where, options = DATASETS[name]
    taken, texts = 0, []
    try:
        for row in datasets.load_dataset(*where, streaming=True, **options):
            texts.append(str(row["text"]))
            taken += len(texts[-1].encode())
            if taken >= budget:
                break
    except Exception as error:  # of the hub, the network, the file system: each library has its own
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise FewbitsError(f"{name}: {where[0]} cannot be read: {first}", "give a text file, or self") from error
    return ["".join(texts)] if name.startswith("wikitext2") else texts  # which comes line by line


def _places(path: Path, budget: int, parts: int, seed: int) -> list[tuple[int, int]]:
    """(offset, bytes) of what is read of a file: all of a small one, else `parts` places spread over it.

    Raises:
        FewbitsError: no such file.
    """
    if not path.is_file():
        raise FewbitsError(f"{path}: no such file", TEXT)
    size = path.stat().st_size
    if size <= budget:
        return [(0, size)]
    part = max(1, budget // parts)
    return [(at, part) for at in spread(size, parts, part, seed)]


def excerpts(path: Path, budget: int, parts: int, seed: int) -> Iterator[str]:
    """A text file whole, or places of a large one: letters cut at their edges are left out.

    Raises:
        FewbitsError: not UTF-8.
    """
    for at, count in _places(path, budget, parts, seed):
        with path.open("rb") as file:
            file.seek(at)
            data = file.read(count)
        begin = next((i for i, byte in enumerate(data[:3]) if byte & 0xC0 != 0x80), 0) if at else 0
        try:
            yield getincrementaldecoder("utf-8")().decode(data[begin:], final=at + count >= path.stat().st_size)
        except UnicodeDecodeError as error:
            raise FewbitsError(f"{path}: not UTF-8 at byte {at + begin + error.start}", TEXT) from None


def lines(path: Path, budget: int, parts: int, seed: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a .jsonl file, each with the byte where its line begins.

    Raises:
        FewbitsError: a line that is no JSON object.
    """
    done = 0
    for at, count in _places(path, budget, parts, seed):
        if done >= at + count:  # the line before was longer than its place
            continue
        with path.open("rb") as file:
            file.seek(max(at, done))
            if at > done:
                file.seek(at - 1)
                file.readline()  # the rest of the line before
            while line := file.readline():
                if line.strip():
                    yield file.tell() - len(line), _object(path, file.tell() - len(line), line)
                if (done := file.tell()) >= at + count:
                    break


def _object(path: Path, at: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise FewbitsError(f"{path}: at byte {at}: no JSON object", "one object a line")
    return found


def text_of(path: Path, at: int, line: dict[str, Any]) -> str:
    text = line.get("text")
    if not isinstance(text, str):
        raise FewbitsError(f"{path}: at byte {at}: text is {type(text).__name__}, where a string was expected")
    return text

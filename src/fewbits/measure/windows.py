"""The text that models are measured on, cut into windows of tokens."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fewbits
from fewbits import caching
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.circumstances import identity
from fewbits.runtime.build import tokenizer_of

SAMPLE = 20000  # characters that two tokenizers must agree on


def read_text(path: str | Path) -> str:
    """A UTF-8 text file.

    Raises:
        FewbitsError: no such file, or not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise FewbitsError(f"{path}: {error.strerror}", "give a UTF-8 text file") from error
    except UnicodeDecodeError as error:
        raise FewbitsError(f"{path}: not UTF-8 at byte {error.start}", "give a UTF-8 text file") from error


def cut(text: str, tokenizer: Any, context: int, chunks: int | None, source: str, bos: int | None) -> torch.Tensor:
    """The first `chunks` windows of `context` tokens, `[windows, context]`, all without `chunks`.

    They follow each other without overlap. A model that begins texts with a token gets that as the first one of every
    window, in place of the text's (as llama.cpp does).

    Raises:
        FewbitsError: the text is shorter than a window.
    """
    if chunks is not None:  # no need to tokenize a whole book for its first pages
        text = text[:chunks * context * 24]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // context, chunks or len(ids))
    if not count:
        raise FewbitsError(f"{source}: {len(ids)} tokens, one chunk needs {context}",
                           "give more text or a smaller --context")
    windows = torch.tensor(ids[:count * context]).view(count, context)
    if bos is not None:
        windows[:, 0] = bos
    return windows


def digest(windows: torch.Tensor) -> str:
    """SHA-256 of the tokens."""
    return hashlib.sha256(f"{list(windows.shape)};".encode() + windows.numpy().tobytes()).hexdigest()


def check_same_tokens(one: Checkpoint, other: Checkpoint, text: Path) -> None:
    """Whether two models' tokenizers cut the beginning of a text alike.

    Raises:
        FewbitsError: they don't; the models, and the first token they differ in, are named.
    """
    sample = read_text(text)[:SAMPLE]
    a, b = (_sampled(checkpoint, sample) for checkpoint in (one, other))
    if a == b:
        return
    at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    first, second = (f"{tokenizer_of(c).decode(ids[at:at + 1])!r} to {Path(c.path).name}"
                     for c, ids in ((one, a), (other, b)))
    raise FewbitsError(f"tokenizers differ: token {at} of {text.name} is {first}, {second}",
                       "compare a model with the original it was made from")


def _sampled(checkpoint: Checkpoint, sample: str) -> list[int]:
    """Its tokens; those of a model in files are kept, as reading a large vocabulary takes long."""
    model = identity(checkpoint)["sha256"]
    key = hashlib.sha256(f"{fewbits.__version__} {model} {sample}".encode()).hexdigest()
    file = caching.folder("tokens") / f"{key}.npy"
    if model and file.exists():
        return [int(i) for i in np.load(file)]
    found: list[int] = tokenizer_of(checkpoint)(sample, add_special_tokens=False, verbose=False)["input_ids"]
    if model:
        caching.write(file, lambda out: np.save(out, np.array(found)))
    return found

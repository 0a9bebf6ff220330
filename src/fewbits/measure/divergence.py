"""Kullback-Leibler divergence, top-1 agreement and perplexity of one model beside another, over the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import torch

from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.scoring import ROWS, scorer
from fewbits.runtime.build import bos_of, tokenizer_of


@dataclass(frozen=True)
class Divergence:
    """Figures over `tokens` predicted tokens; natural logarithms. The reference's are None without one."""

    tokens: int
    context: int
    perplexity: float
    perplexity_error: float  # standard error
    reference_perplexity: float | None
    kl_mean: float | None  # of the model from the reference, nats a token
    kl_median: float | None
    kl_99: float | None  # 99th percentile
    top1: float | None  # share of positions with the same most likely token
    seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Sums:
    """What is kept of every predicted position: three numbers."""

    def __init__(self) -> None:
        self.nll: list[torch.Tensor] = []
        self.reference_nll: list[torch.Tensor] = []
        self.kl: list[torch.Tensor] = []
        self.same: list[torch.Tensor] = []

    def add(self, logits: torch.Tensor, reference: torch.Tensor | None, targets: torch.Tensor) -> None:
        q = logits.log_softmax(-1)
        self.nll.append(-q.gather(1, targets[:, None])[:, 0])
        if reference is not None:
            p = reference.log_softmax(-1)
            self.reference_nll.append(-p.gather(1, targets[:, None])[:, 0])
            self.kl.append((p.exp() * (p - q)).sum(-1))
            self.same.append(p.argmax(-1) == q.argmax(-1))


def evaluate(model: str | Path | Checkpoint | Any, against: str | Path | Checkpoint | Any | None = None, *,
             text: str | Path, chunks: int | None = 8, context: int = 512, kernel: str | None = None,
             progress: Callable[[str, int, int], None] | None = None) -> Divergence:
    """Measure `model`, and how far it is from `against`, on windows of `context` tokens of a text file.

    A path, a hub id or a checkpoint is computed by the native decoder where that knows the family and no `kernel` of
    Transformers' modules is asked for. Windows follow each other without overlap; every token of a window but the first
    is predicted (perplexity as in the GPTQ papers, at this context). Models whose tokenizer begins texts with a token
    get it at the start of each window.

    Raises:
        FewbitsError: text shorter than a window, tokenizers that differ, logits that are not finite.
    """
    began = time.monotonic()
    net = scorer(model, kernel)
    reference = None if against is None else scorer(against, kernel)
    tokenizer = tokenizer_of(net.checkpoint)
    windows = cut(read_text(text), tokenizer, context, chunks, str(text), bos_of(tokenizer))
    if reference is not None:
        _same_tokens(tokenizer, tokenizer_of(reference.checkpoint), Path(text))
    sums = _Sums()
    for i, window in enumerate(windows):
        others: Iterable[torch.Tensor | None] = repeat(None) if reference is None else reference.logits(window)
        at = 1
        for logits, other in zip(net.logits(window), others, strict=False):
            targets = window[at:at + ROWS]
            at += ROWS
            logits = logits[:len(targets)]
            if not bool(logits.isfinite().all()):
                raise FewbitsError(f"logits of {net.checkpoint.path} are not finite in chunk {i}",
                                   "the model is broken: fewbits info names its tensors")
            sums.add(logits, None if other is None else other[:len(targets)], targets)
        if progress:
            progress("evaluating", i + 1, len(windows))
    return _figures(sums, context, time.monotonic() - began)


def _figures(sums: _Sums, context: int, seconds: float) -> Divergence:
    nll = torch.cat(sums.nll).double()
    perplexity = math.exp(nll.mean())
    kl = torch.cat(sums.kl).double() if sums.kl else None
    return Divergence(
        tokens=len(nll), context=context, perplexity=perplexity,
        perplexity_error=perplexity * float(nll.std() / math.sqrt(len(nll))) if len(nll) > 1 else math.nan,
        reference_perplexity=math.exp(torch.cat(sums.reference_nll).double().mean()) if kl is not None else None,
        kl_mean=float(kl.mean()) if kl is not None else None,
        kl_median=float(kl.median()) if kl is not None else None,
        kl_99=float(kl.quantile(0.99)) if kl is not None else None,
        top1=float(torch.cat(sums.same).double().mean()) if kl is not None else None, seconds=seconds)


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
    """The first `chunks` windows of `context` tokens, `[windows, context]`."""
    body = context - (bos is not None)
    if chunks is not None:  # no need to tokenize a whole book for its first pages
        text = text[:chunks * context * 24]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    count = min(len(ids) // body, chunks or len(ids))
    if not count:
        raise FewbitsError(f"{source}: {len(ids)} tokens, one chunk needs {body}",
                           "give more text or a smaller --context")
    windows = torch.tensor(ids[:count * body]).view(count, body)
    return windows if bos is None else torch.cat([torch.full((count, 1), bos), windows], dim=1)


def _same_tokens(one: Any, other: Any, text: Path) -> None:
    sample = read_text(text)[:20000]
    a, b = (t(sample, add_special_tokens=False, verbose=False)["input_ids"] for t in (one, other))
    if a != b:
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        raise FewbitsError(f"the two models' tokenizers differ: token {at} of {text.name}",
                           "compare a model with the original it was made from")

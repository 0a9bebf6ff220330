"""Kullback-Leibler divergence, top-1 agreement and perplexity of one model beside another, over the same tokens."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.circumstances import circumstances
from fewbits.measure.references import Reference, Said, reference
from fewbits.measure.scoring import Scorer, divergences, log_sums, scorer, spans
from fewbits.measure.windows import check_same_tokens, cut, digest, read_text
from fewbits.runtime.build import bos_of, tokenizer_of
from fewbits.runtime.sequences import Array


@dataclass(frozen=True)
class Divergence:
    """Figures of a model on a text; natural logarithms, errors are standard errors. Those beside a reference are None
    without one.

    `perplexity` is over all predicted tokens, every one of a window but the first, as in the GPTQ papers (which take
    windows of 2048). `perplexity_llama` is over those of each window's second half, as llama.cpp counts; so are KL
    divergence and top-1 agreement, as in its tool.
    """

    tokens: int  # predicted ones
    context: int
    perplexity: float
    perplexity_error: float
    perplexity_llama: float
    perplexity_llama_error: float
    reference_perplexity: float | None
    reference_perplexity_llama: float | None
    perplexity_ratio: float | None  # to the reference's, over all tokens
    perplexity_ratio_error: float | None  # of differences token by token
    compared: int  # tokens that the following are over
    kl_mean: float | None  # of the model from the reference, nats a token
    kl_mean_error: float | None
    kl_median: float | None
    kl_99: float | None  # percentiles
    kl_999: float | None
    top1: float | None  # share of positions with the same most likely token
    seconds: float
    circumstances: dict[str, Any] = field(compare=False, repr=False)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class _Figures:
    """What is kept of every window: a few numbers a token. Those beside a reference are of tokens from `first` on."""

    def __init__(self, first: int) -> None:
        self.first = first
        self.losses: list[Array] = []
        self.known: list[Array] = []  # the reference's
        self.kl: list[Array] = []
        self.same: list[Array] = []


def evaluate(model: str | Path | Checkpoint | Any, against: str | Path | Checkpoint | Any | None = None, *,
             text: str | Path, chunks: int | None = 8, context: int = 512, kernel: str | None = None,
             device: str | None = None, progress: Callable[[str, int, int], None] | None = None) -> Divergence:
    """Measure `model`, and how far it is from `against`, on windows of `context` tokens of a text file.

    A path, a hub id or a checkpoint is computed by the decoder, on the CPU or on `device`, where that knows the family
    and no `kernel` of Transformers' modules is asked for. Windows follow each other without overlap; a model whose
    tokenizer begins texts with a token gets that as the first one of each. `chunks` None takes the whole text. What the
    reference says is kept in the cache (its last hidden states: as many float32 as they have columns for every second
    token).

    Raises:
        FewbitsError: text shorter than a window, a context of fewer than 4 tokens, tokenizers that differ, logits that
            are not finite.
    """
    if context < 4:
        raise FewbitsError(f"a context of {context} tokens", "windows have at least 4")
    began = time.monotonic()
    net = scorer(model, kernel, device)
    tokenizer = tokenizer_of(net.checkpoint)
    windows = cut(read_text(text), tokenizer, context, chunks, str(text), bos_of(tokenizer))
    figures, beside, models = _Figures(context // 2), None, [net.checkpoint]
    if against is not None:
        other = scorer(against, kernel, device)
        models.append(other.checkpoint)
        check_same_tokens(net.checkpoint, other.checkpoint, Path(text))
        beside = reference(other, windows, figures.first)
    for i, window in enumerate(windows):
        _measure(net, window, None if beside is None else beside.window(i), beside, figures)
        if progress:
            progress("evaluating", i + 1, len(windows))
    told = circumstances(*models, text=Path(text).name, tokens_sha256=digest(windows), chunks=len(windows),
                         context=context, kernels=[net.kernel] + ([beside.scorer.kernel] if beside else []))
    return _result(figures, context, time.monotonic() - began, told)


def _measure(net: Scorer, window: torch.Tensor, said: Said | None, beside: Reference | None, figures: _Figures) -> None:
    targets, last, first = window[1:].numpy(), len(window) - 1, figures.first  # nothing follows the last token
    losses, tops = np.empty(last), np.empty(last, np.int64)
    pieces = [*spans(0, first), *spans(first, last)]
    for rows, logits in zip(pieces, net.logits(window, pieces), strict=True):
        sums, tops[rows] = log_sums(logits, net.checkpoint)
        losses[rows] = sums - logits[np.arange(len(logits)), targets[rows]]
        if beside and said and rows.start >= first:
            known = slice(rows.start - first, rows.stop - first)
            figures.kl.append(divergences(beside.logits(said.states[known]), said.sums[known], logits, sums))
    figures.losses.append(losses)
    if said:
        figures.known.append(said.losses)
        figures.same.append(tops[first:] == said.tops[first:])


BESIDE = ("reference_perplexity", "reference_perplexity_llama", "perplexity_ratio", "perplexity_ratio_error", "kl_mean",
          "kl_mean_error", "kl_median", "kl_99", "kl_999", "top1")


def _result(figures: _Figures, context: int, seconds: float, told: dict[str, Any]) -> Divergence:
    losses = np.stack(figures.losses)  # [windows, context - 1]
    half = losses[:, figures.first:]
    perplexity, error = _exponential(losses)
    llama, llama_error = _exponential(half)
    return Divergence(tokens=losses.size, context=context, perplexity=perplexity, perplexity_error=error,
                      perplexity_llama=llama, perplexity_llama_error=llama_error, compared=half.size, seconds=seconds,
                      circumstances=told, **(_beside(figures, losses) if figures.kl else dict.fromkeys(BESIDE)))


def _beside(figures: _Figures, losses: Array) -> dict[str, float | None]:
    known, kl = np.stack(figures.known), np.concatenate(figures.kl)
    values = (_exponential(known)[0], _exponential(known[:, figures.first:])[0], *_exponential(losses - known),
              float(kl.mean()), _error(kl), *np.quantile(kl, (0.5, 0.99, 0.999)).tolist(),
              float(np.concatenate(figures.same).mean()))
    return dict(zip(BESIDE, values, strict=True))


def _error(values: Array) -> float:
    """Standard error of the mean."""
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan


def _exponential(values: Array) -> tuple[float, float]:
    """e to the mean, and its standard error."""
    found = math.exp(values.mean())
    return found, found * _error(values)

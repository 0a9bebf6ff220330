"""The columns of the table: what each is called, means and shows. The page and the Markdown file have the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fewbits.measure.compare.candidates import Candidate, Comparison, finite
from fewbits.measure.compare.choosing import GRADES, gigabytes, grade

NONE = "–"


@dataclass(frozen=True)
class Column:
    title: str
    help: str
    show: Callable[[Candidate], str]
    number: bool = True  # to the right


def columns(found: Comparison) -> list[Column]:
    """Those that have a figure anywhere."""
    out = [
        Column("format", "The recipe that the model was quantized by, or the file that was given. ● marks those that "
               "nothing beats in size and in KL divergence at once.",
               lambda c: f"{c.name} ●" if c.name in found.frontier else c.name, False),
        Column("container", "The file layout, which decides what programs open it.", lambda c: c.container or NONE,
               False),
        Column("size", "All files together: weights, tokenizer, configuration.",
               lambda c: gigabytes(c.nbytes) if c.nbytes else NONE),
        Column("bits", "Bits a weight, over all tensors: scales, and what stays in floats, included.",
               lambda c: f"{c.bits_per_weight:.2f}" if c.nbytes else NONE),
        Column("loss", "In a word: " + "; ".join(
            f"{g.name}: KL at most {g.kl:g} and the same token in {100 * g.top1:.0f} % or more" for g in GRADES[:-1])
            + ". A convention, explained in fewbits' guide to comparing.", _loss, False),
        Column("KL mean", "Kullback-Leibler divergence of the next token's probabilities from the original's, in nats "
               "a token: 0 is the original.", lambda c: _fine(c, "kl_mean")),
        Column("KL 99 %", "The same where it is worst: one token in a hundred has more.", lambda c: _fine(c, "kl_99")),
        Column("same token", "How often the most likely next token is the original's.",
               lambda c: NONE if c.top1 is None else f"{100 * c.top1:.1f} %"),
        Column("perplexity ratio", "Perplexity divided by the original's, over the same tokens, ± the standard error "
               "of the ratio. It can fall below 1 by accident: believe the KL divergence.", _ratio)]
    for task, metric in dict.fromkeys((t["task"], t["metric"]) for c in found.candidates for t in c.tasks):
        out.append(Column(f"{task} {metric}", f"Score in the task {task} by {metric}, ± standard error; in brackets "
                          "how many choices are not the original's.", partial(_task, task=task, metric=metric)))
    timed = [
        Column("reading", "Tokens of a prompt computed a second (prefill).",
               lambda c: _figure(c, "prefill_tokens_per_second")),
        Column("writing", "Tokens generated a second (decode).", lambda c: _figure(c, "decode_tokens_per_second")),
        Column("first token", "Seconds from the prompt to the first token of the answer.",
               lambda c: _seconds(c.quick("first_token_seconds"))),
        Column("memory", "Most memory of the process while it computed, mapped files included.",
               lambda c: gigabytes(c.quick("resident_bytes") or 0) if c.quick("resident_bytes") else NONE)]
    if any(c.speed for c in found.candidates):
        out += timed
    out.append(Column("made in", "Seconds that quantizing took on this machine, calibration included.",
                      lambda c: _seconds(c.seconds)))
    return out


def _loss(c: Candidate) -> str:
    found = grade(c)
    return NONE if found is None else GRADES[found].name


def _fine(c: Candidate, name: str) -> str:
    value = (c.quality or {}).get(name)
    if value is None:
        return NONE
    known = finite(value)
    if known is None:
        return str(value)
    return f"{known:.4f}" if known >= 5e-5 or known <= 0 else "<0.0001"


def _ratio(c: Candidate) -> str:
    quality = c.quality or {}
    ratio, error = finite(quality.get("perplexity_ratio")), finite(quality.get("perplexity_ratio_error"))
    if ratio is None:
        return NONE
    return f"{ratio:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _task(c: Candidate, task: str, metric: str) -> str:
    row = next((t for t in c.tasks if (t["task"], t["metric"]) == (task, metric)), {})
    accuracy, error = finite(row.get("accuracy")), finite(row.get("error"))
    if accuracy is None:
        return NONE
    flipped = row.get("flipped")
    return (f"{100 * accuracy:.1f}" + ("" if error is None else f" ± {100 * error:.1f}") + " %"
            + ("" if flipped is None else f" ({flipped})"))


def _figure(c: Candidate, name: str) -> str:
    value = c.quick(name)
    return NONE if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _seconds(value: float | None) -> str:
    return NONE if value is None else f"{value:.0f} s" if value >= 10 else f"{value:.2f} s"

"""Which of the measured files to take, in words that need no knowledge of formats."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fewbits.explaining import READERS
from fewbits.measure.compare.candidates import Advice, Candidate


@dataclass(frozen=True)
class Grade:
    """How much of a loss it is: at most this mean divergence, and at least this share of equal next tokens."""

    name: str
    kl: float
    top1: float
    says: str


# a convention, not a law: docs/guides/comparing.md says where the numbers come from
GRADES = (Grade("not noticeable", 0.02, 0.93, "you could hardly tell its answers from the original's"),
          Grade("slight", 0.1, 0.85, "answers differ in wording, rarely in substance"),
          Grade("clear", 0.5, 0.7, "answers get worse: try it on your own questions first"),
          Grade("heavy", float("inf"), 0.0, "much of what the model knew is lost"))


def grade(c: Candidate) -> int | None:
    """Index into GRADES; None where the divergence is unknown."""
    if c.kl is None:
        return None
    top1 = 0.0 if c.top1 is None else c.top1
    return next(i for i, g in enumerate(GRADES) if c.kl <= g.kl and top1 >= g.top1)


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those that nothing beats in size and divergence both, from the smallest; of equals the first."""
    kept: list[Candidate] = []
    for c in sorted((c for c in candidates if c.kl is not None), key=lambda c: (c.nbytes, c.kl)):
        if not kept or _kl(c) < _kl(kept[-1]):
            kept.append(c)
    return kept


def advise(original: Candidate, measured: Sequence[Candidate], memory_bytes: int | None = None) -> list[Advice]:
    """What to take, and answers to the questions that follow. `memory_bytes` is what there is."""
    known = [c for c in measured if c.kl is not None]
    if not known:
        return [Advice("Which should I take?", None, "No candidate's divergence could be measured.")]
    fitting = [c for c in known if memory_bytes is None or c.memory_bytes <= memory_bytes]
    room = "" if memory_bytes is None else f" in {gigabytes(memory_bytes)} of memory"
    if not fitting:
        least = min(known, key=lambda c: c.memory_bytes)
        return [Advice(f"Which should I take{room}?", None,
                       f"None fits: the one that needs least, {least.name}, takes {gigabytes(least.memory_bytes)}.")]
    out = [_answer(original, fitting, room)]
    good = [c for c in fitting if (grade(c) or 0) <= 1] or fitting
    words = "with a slight loss at most" if good is not fitting else "though its loss shows"
    least = min(good, key=lambda c: (c.nbytes, _kl(c)))
    out.append(Advice(f"The smallest {words}?", least.name, f"{_size(least, original)}. {_loss(least)}"))
    timed = [c for c in good if c.quick("decode_tokens_per_second")]
    if timed:
        fast = max(timed, key=_pace)
        out.append(Advice(f"The fastest {words}?", fast.name, f"{_speed(fast, original)}. {_loss(fast)}"))
    if memory_bytes is not None:
        best = min(fitting, key=_kl)
        out.append(Advice(f"The nearest to the original{room}?", best.name,
                          f"It takes {gigabytes(best.memory_bytes)}. {_loss(best)}"))
    else:
        out += _shares(original, known)
    return out + _programs(fitting)


def _answer(original: Candidate, fitting: Sequence[Candidate], room: str) -> Advice:
    unnoticed = [c for c in fitting if grade(c) == 0]
    question = f"Which should I take{room}?"
    if unnoticed:
        take = min(unnoticed, key=lambda c: (c.nbytes, _kl(c)))
        why = "The smallest of those whose loss is not noticeable"
    else:
        take = min(fitting, key=lambda c: (_kl(c), c.nbytes))
        why = f"Each that can be taken loses something; this one loses least, and its loss is {_grade(take).name}"
    why += f": {_size(take, original)}. {_figures(take)}: {_grade(take).says}."
    if room:
        why += f" It takes {gigabytes(take.memory_bytes)} of memory."
    if take.quick("decode_tokens_per_second"):
        why += f" {_speed(take, original)}."
    return Advice(question, take.name, why)


def _shares(original: Candidate, known: Sequence[Candidate]) -> list[Advice]:
    """The best of at most a half, a third and a quarter of the original's size, each once."""
    out: list[Advice] = []
    for words, share in (("half", 2), ("a third of", 3), ("a quarter of", 4)):
        within = [c for c in known if c.nbytes * share <= original.nbytes]
        best = min(within, key=_kl, default=None)
        if best is not None and best.name not in {a.take for a in out}:
            out.append(Advice(f"The nearest to the original at {words} its size?", best.name,
                              f"{_size(best, original)}. {_loss(best)}"))
    return out


def _programs(fitting: Sequence[Candidate]) -> list[Advice]:
    """Where the program decides on the container: the same rule within each."""
    out = []
    for container in dict.fromkeys(c.container for c in fitting):
        mine = [c for c in fitting if c.container == container]
        graded = [c for c in mine if grade(c) == 0] or [c for c in mine if grade(c) == 1]
        take = min(graded, key=lambda c: (c.nbytes, _kl(c))) if graded else min(mine, key=_kl)
        kind = "A GGUF file" if container == "gguf" else f"A directory in the layout {container}"
        out.append(Advice(f"For {READERS.get(container, container)}?", take.name, f"{kind}, "
                          f"{gigabytes(take.nbytes)}. {_loss(take)}"))
    return out if len(out) > 1 else []


# words ----------------------------------------------------------------------------------------------------------------
def _loss(c: Candidate) -> str:
    return f"Loss {_grade(c).name}. {_figures(c)}: {_grade(c).says}."


def _figures(c: Candidate) -> str:
    same = f"The same next token as the original in {100 * c.top1:.1f} % of places, " if c.top1 is not None else ""
    return f"{same}KL divergence {c.kl:.4f}"


def _grade(c: Candidate) -> Grade:
    return GRADES[grade(c) or 0]


def _size(c: Candidate, original: Candidate) -> str:
    times = original.nbytes / c.nbytes if c.nbytes else 1
    beside = f", {times:.1f} times smaller than the original" if times >= 1.05 else ""
    return f"{gigabytes(c.nbytes)}{beside}"


def _speed(c: Candidate, original: Candidate) -> str:
    before = original.quick("decode_tokens_per_second")
    beside = f", {_pace(c) / before:.1f} times as fast as the original" if before else ""
    return f"It writes {_pace(c):.0f} tokens a second here{beside}"


def gigabytes(nbytes: float) -> str:
    """`1.23 GB`, `4.6 MB`, `170 kB`."""
    for unit, size, digits in (("GB", 1e9, 2), ("MB", 1e6, 1)):
        if nbytes >= size:
            return f"{nbytes / size:.{0 if nbytes >= 100 * size else digits}f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"


def _kl(c: Candidate) -> float:
    assert c.kl is not None
    return c.kl


def _pace(c: Candidate) -> float:
    return c.quick("decode_tokens_per_second") or 0.0

"""From a target (bits per weight, bytes of a file) to a recipe: a codec for every tensor, by what each loses in it."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fewbits import codecs, containers, solvers
from fewbits.calibration import sources
from fewbits.calibration.sources import Batch, Calibration
from fewbits.calibration.statistics import Known
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec
from fewbits.containers import experts
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.jobs.job import goal
from fewbits.measure.curvature import importances as own_importances
from fewbits.measure.ledger import Loss
from fewbits.measure.sensitivity import LENGTH, SAMPLES, Losses, windows_of
from fewbits.measure.trials import Trials, replaced
from fewbits.qtensor import QTensor
from fewbits.recipe import Choice, ModelFacts, Overrides, Recipe, llama, patterns
from fewbits.recipe import get as get_recipe
from fewbits.recipe.allocation import Option, Target, allocate
from fewbits.recipe.facts import Fact
from fewbits.sizes import Sizes

WIDE = ("TQ1_0", "Q2_K", "Q3_K", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")  # of rows of whole super-blocks
NARROW = ("Q1_0", "Q4_0", "IQ4_NL", "Q4_1", "Q5_0", "Q5_1", "Q8_0")  # of other rows
GGML = WIDE + NARROW[:-1]
INTEGERS = ("int2-g32", "int3-g128", "int3-g32", "int4-g128", "int4-g32", "int8-g128", "int8-g32")
CANDIDATES = {"gguf": GGML, "fewbits": GGML, "compressed-tensors": INTEGERS, "gptq": INTEGERS,
              "awq": ("int4-g128",), "bitsandbytes": ("nf4",)}  # by container
BELOW, ABOVE = 2.0, 4.2  # bits around the target that codecs are looked at in: others are hardly ever chosen
# what programs that serve directories compute as one matrix, and want in one codec
FUSED = ({"attn_q", "attn_k", "attn_v"}, {"ffn_gate", "ffn_up"})
HELD = 2  # more sequences, that a result is checked on
ROUNDS = 3  # of allocation, those after the first with losses in the company that the one before chose
Losing = Mapping[tuple[str, str], float]  # (tensor, codec) -> nats


@dataclass(frozen=True)
class Allocation:
    """A codec for every tensor, and what was expected of it."""

    target: str
    codecs: dict[str, str]  # of every tensor that has a choice
    bits_per_weight: float
    expected: float  # the sum of losses, nats a token
    kl: float  # as measured on the text that losses were found on
    rounds: list[dict[str, Any]]  # of each: bits per weight, expected and measured divergence
    text: str
    seconds: float
    recipe: Recipe = field(repr=False)
    held: list[Batch] = field(default_factory=list, repr=False)  # text that it was not chosen by

    def to_json(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("recipe", "held")}


def share_out(source: Checkpoint, target: Target, container: str, text: Calibration, *,
              importances: Mapping[str, Known] | None = None, weigh: bool = False, overrides: Overrides = None,
              seed: int = 0, progress: Progress | None = None) -> Allocation:
    """The allocation of `target` in a container, by losses on `text`: estimated ones of linear layers, measured ones of
    other matrices; then, in rounds, those in the company of what the last round chose. The round that loses least is
    taken. With `weigh` the searches that candidates come from are weighted, by the layers' inputs on that text.

    Raises:
        FewbitsError: a target below the smallest possible size, a container of one codec, a model that writes no text.
    """
    began = time.monotonic()
    room = Room(source, target, container, overrides)
    if weigh and not importances:
        importances = own_importances(source, windows_of(source, text.batches))
    losses = Losses(source, text, importances or {}, seed, progress)
    company: dict[str, QTensor] = {}
    losing: dict[tuple[str, str], float] = {}
    rounds: list[tuple[float, float, dict[str, str]]] = []
    while len(rounds) < ROUNDS:
        losing = _together(losing, _losses(losses, room.asked, company))
        chosen, expected = room.solve(losing)
        if any(chosen == before for _, _, before in rounds):
            break
        company = {n: losses.quantized(n, c) for n, c in chosen.items() if codecs.get(c).family != "float"}
        kl = float(losses.trials.divergence(replaced(source, company)).mean())
        rounds.append((kl, expected, chosen))
    kl, expected, chosen = min(rounds, key=lambda r: r[0])
    told = [{"bits_per_weight": room.bits(c), "expected": e, "kl": k} for k, e, c in rounds]
    return Allocation(target.text, chosen, room.bits(chosen), expected, kl, told, text.description,
                      time.monotonic() - began, room.recipe(chosen))


def _losses(losses: Losses, asked: Mapping[str, Sequence[str]], company: Mapping[str, QTensor]
            ) -> dict[tuple[str, str], Loss]:
    found = losses.estimated(asked, company)
    rest = {n: [c for c in several if (n, c) not in found] for n, several in asked.items()}
    return found | losses.measured({n: several for n, several in rest.items() if several}, company)


def _together(before: Losing, found: Mapping[tuple[str, str], Loss]) -> dict[tuple[str, str], float]:
    """Estimates of several rounds as their geometric mean, which wavers less; measured losses as they are."""
    out = {}
    for key, loss in found.items():
        kl = max(loss.kl, 1e-12)
        out[key] = kl if loss.measured or key not in before else (kl * before[key]) ** 0.5
    return out


class Room:
    """What a container lets each tensor of a model be, and how many bytes there are."""

    def __init__(self, source: Checkpoint, target: Target, container: str, overrides: Overrides):
        if container not in CANDIDATES:
            raise FewbitsError(f"bits cannot be shared out in {container}", "they can in " + ", ".join(CANDIDATES))
        self.source, self.target, self.container = source, target, containers.by_name(container)
        self.facts = ModelFacts.of(source)
        self.overrides = overrides
        self.forced = patterns.apply(patterns.parse(overrides), self.facts)
        if container == "gguf":
            get_recipe("F16", "gguf").resolve(self.facts)  # or why there is no GGUF of it
        self.units: dict[str, list[Fact]] = {}
        for fact in self.facts.tensors:
            if self._may(fact):
                self.units.setdefault(self._unit(fact), []).append(fact)
        found = {unit: self._shared(facts) for unit, facts in self.units.items()}
        self._codecs = {unit: several for unit, several in found.items() if several}
        self.units = {unit: self.units[unit] for unit in self._codecs}
        if not self.units:
            raise FewbitsError(f"{source.path}: no tensor has a choice of codecs in {container}")
        self.total, self._bytes = self._limit()
        self._budget = self._check()
        bits = 8 * self._budget / sum(math.prod(f.shape) for facts in self.units.values() for f in facts)
        self._codecs = {unit: [c for c in several if _near(c, self.units[unit][0], bits)] or several
                        for unit, several in self._codecs.items()}

    @property
    def asked(self) -> dict[str, list[str]]:
        """Of every tensor that has a choice, the codecs that it loses something in."""
        return {f.name: [c.name for c in self._codecs[unit] if c.family != "float"]
                for unit, facts in self.units.items() for f in facts}

    def solve(self, losing: Losing) -> tuple[dict[str, str], float]:
        """A codec for every tensor, and the sum of their losses."""
        options = {unit: [Option(c.name, sum(c.nbytes(f.shape) for f in self.units[unit]),
                                 sum(losing.get((f.name, c.name), 0.0) for f in self.units[unit]))
                          for c in several if c.family == "float" or all(
                              (f.name, c.name) in losing for f in self.units[unit])]
                   for unit, several in self._codecs.items()}
        budget = self._budget
        while True:
            chosen = allocate(options, budget)
            more = self._bytes(self._named(chosen)) - self.total  # alignment in the file
            if more <= 0:
                return self._named(chosen), sum(o.loss for o in chosen.values())
            budget -= more

    def _check(self) -> int:
        """Bytes for the tensors that have a choice: without those of the others and of the rest of the file.

        Raises:
            FewbitsError: the target is below the smallest possible size.
        """
        least = {unit: min(several, key=lambda c: c.nbytes(self.units[unit][0].shape))
                 for unit, several in self._codecs.items()}
        chosen = {f.name: least[unit].name for unit, facts in self.units.items() for f in facts}
        needed, own = self._bytes(chosen), sum(codecs.get(chosen[f.name]).nbytes(f.shape)
                                               for facts in self.units.values() for f in facts)
        if needed > self.total:
            raise FewbitsError(f"{self.source.path}: {self._said(self.total)} is below the smallest possible size in "
                               f"{self.container.name}, {self._said(needed)}", "take a larger target")
        return self.total - (needed - own)

    def _limit(self) -> tuple[int, Any]:
        """Bytes that there are, and what counts them in an allocation."""
        if self.target.bits is not None:
            return int(self.target.bits * self.facts.parameters / 8), lambda chosen: self._goal(chosen).nbytes
        sizes = Sizes(self.source)
        assert self.target.nbytes is not None
        return self.target.nbytes, lambda chosen: sizes.of(self.container, self._goal(chosen))

    def _said(self, nbytes: int) -> str:
        if self.target.bits is None:
            return f"{nbytes} bytes"
        return f"{nbytes * 8 / self.facts.parameters:.4g} bits per weight"

    def bits(self, chosen: Mapping[str, str]) -> float:
        return self._goal(chosen).nbytes * 8 / self.facts.parameters

    def recipe(self, chosen: Mapping[str, str]) -> Recipe:
        """An ordinary recipe: the commonest codec, and every tensor by its name."""
        common: Counter[str] = Counter()
        for fact in (fact for facts in self.units.values() for fact in facts):
            common[chosen[fact.name]] += math.prod(fact.shape) * (codecs.get(chosen[fact.name]).family != "float")
        base = get_recipe(common.most_common(1)[0][0], self.container.name)
        rest = {f.name: self._kept(f) for f in self.facts.tensors if len(f.shape) > 1 and f.name not in chosen}
        own = tuple(patterns.one(name, codec, origin=patterns.ALLOCATED) for name, codec in {**rest, **chosen}.items())
        return replace(base, name=self.target.text, overrides=own)

    def _kept(self, fact: Fact) -> str:
        """What a matrix without a choice stays in: in GGUF float16, where llama.cpp would quantize it if it could."""
        if self.container.name == "gguf":
            return "F16" if llama.quantizes(fact) else "F32"
        return fact.codec.name if fact.codec.family == "float" else "F16"

    # what a tensor may be -------------------------------------------------------------------------------------------
    def _may(self, fact: Fact) -> bool:
        if self.container.name == "gguf" and not llama.quantizes(fact):
            return False
        return Losses.takes(fact)

    def _unit(self, fact: Fact) -> str:
        """Tensors of one unit share a codec."""
        whole = experts.stack_of(fact.name)
        together = next((sorted(roles) for roles in FUSED if fact.role in roles), None)
        if together is None or fact.layer is None or self.container.name in ("gguf", "fewbits"):
            return whole
        return f"{fact.layer} {' '.join(together)}"

    def _shared(self, facts: Sequence[Fact]) -> list[Codec]:
        """What all of a unit's tensors may be."""
        found = [self._of(fact) for fact in facts]
        return [c for c in found[0] if all(c in other for other in found[1:])]

    def _of(self, fact: Fact) -> list[Codec]:
        if fact.name in self.forced:
            return [self.forced[fact.name].codec]
        named = CANDIDATES[self.container.name]
        if named == GGML:
            named = NARROW if fact.shape[-1] % 256 else WIDE
        fits = [c for c in map(codecs.get, named) if _takes(c, fact)
                and self.container.refuses(self.source, _entry(fact, c)) is None]
        keeps = self.container.name != "gguf" and fact.codec.family == "float"
        return fits + [fact.codec] if fits and keeps else fits

    # sizes ----------------------------------------------------------------------------------------------------------
    def _named(self, chosen: Mapping[str, Option]) -> dict[str, str]:
        return {f.name: option.codec for unit, option in chosen.items() for f in self.units[unit]}

    def _goal(self, chosen: Mapping[str, str]) -> Checkpoint:
        choices: list[Choice] = self.recipe(chosen).resolve(self.facts, self.overrides)
        return goal(self.source, choices, _unsolved)


def _near(codec: Codec, fact: Fact, bits: float) -> bool:
    """Whether a codec may be chosen where so many bits are left for each weight: one far from that hardly ever is."""
    least, most = min(bits - BELOW, 6.0), max(bits, 4.0) + ABOVE
    return codec.family == "float" or least <= codec.bits_per_weight(fact.shape) <= most


def _takes(codec: Codec, fact: Fact) -> bool:
    return codec.check(fact.shape) is None and (len(fact.shape) == 2 or codec.stacks(fact.shape))


def _entry(fact: Fact, codec: Codec) -> Entry:
    return Entry(fact.name, fact.shape, codec, lambda: _unsolved(fact.name))


def _unsolved(name: str) -> QTensor:
    raise AssertionError(f"{name} is not solved yet")


# for a file -----------------------------------------------------------------------------------------------------------
def place(out: Path) -> str:
    """The container of an allocation where none is named: what the output's name says."""
    return "gguf" if out.name.endswith(".gguf") else "compressed-tensors"


def for_file(source: Checkpoint, target: Target, container: str,
             text: str | Path | Calibration | Sequence[Batch] | None, importances: Mapping[str, Known], *,
             overrides: Overrides = None, solver: str | None = None, length: int = LENGTH, seed: int = 0,
             progress: Progress | None = None) -> Allocation:
    """The allocation by the losses on a text, by default the model's own, of which some is held back for `check`."""
    Room(source, target, container, overrides)  # what cannot be is said before work begins
    taken = sources.calibration("self" if text is None else text, source, samples=SAMPLES + HELD, length=length,
                                seed=seed, progress=progress)
    if len(taken.batches) < 2:
        raise FewbitsError(f"{taken.description}: one sequence, of which none can be held back for a check",
                           "give more text")
    held = min(HELD, len(taken.batches) // 2)
    used = Calibration(taken.batches[:SAMPLES + HELD][:-held], taken.description)
    weigh = not importances and (text is not None or solver in solvers.NEEDS_STATISTICS)
    found = share_out(source, target, container, used, importances=importances, weigh=weigh, overrides=overrides,
                      seed=seed, progress=progress)
    return replace(found, held=taken.batches[:SAMPLES + HELD][-held:])


def check(allocation: Allocation, source: Checkpoint, written: Checkpoint) -> dict[str, Any]:
    """The divergence of the file that was made of an allocation, on text that it was not chosen by."""
    trials = Trials(source, windows_of(source, allocation.held))
    kl = trials.divergence(written)
    return {"file_kl": float(kl.mean()), "file_kl_error": float(kl.std(ddof=1)) / math.sqrt(kl.size),
            "file_tokens": kl.size}

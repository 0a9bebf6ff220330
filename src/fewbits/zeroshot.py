"""Quantizing without calibration text, tensor by tensor, as a model is loaded: `fewbits.load(model, recipe="nf4")`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import nn
from transformers.quantizers.quantizers_utils import should_convert_module

from fewbits import codecs, solvers
from fewbits import recipe as recipes
from fewbits.checkpoint import Checkpoint
from fewbits.codecs import native
from fewbits.codecs.floats import Float
from fewbits.errors import FewbitsError
from fewbits.jobs.job import goal, some
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.recipe import Choice, ModelFacts, Overrides, Recipe
from fewbits.stored import Stored


@dataclass(frozen=True)
class Wish:
    """What was asked of a model that is being loaded."""

    recipe: str | Recipe
    skip: Sequence[str] = ()  # modules to leave alone: by name, by its beginning or end, or as a regular expression
    overrides: Overrides = None
    solver: str | None = None


@dataclass(frozen=True)
class Plan:
    """What each tensor that gets quantized becomes, and what of it is not as asked."""

    choices: dict[str, Choice]
    notes: list[str]


def plan(wish: Wish, facts: ModelFacts, model: nn.Module, held: Callable[[str], bool],
         calibrated: bool = False) -> Plan:
    """The choices for the tensors of a model; `held(name)` says whether Transformers has a layer of packed weights for
    one: it computes with the experts of a layer in one parameter of floats.

    Raises:
        FewbitsError: a recipe that quantizes nothing of this model, and why; a solver that needs calibration text,
            unless it will be `calibrated`.
    """
    recipe, where = recipe_of(wish.recipe, facts), type(model).__name__
    solver = wish.solver or recipe.solver
    for named in sorted({solver or ""} | recipe.solvers):
        if named in solvers.NEEDS_STATISTICS and not calibrated:
            raise FewbitsError(f"solver {named} needs calibration text, which loading has none of",
                               "quantize to a file first: fewbits.quantize(…, calibration=…)")
    everything = recipe.resolve(facts, overrides=wish.overrides, solver=solver)
    left = skipped(wish.skip, [c.name for c in everything])
    meant = [c for c in everything if c.solver and c.name not in left]
    chosen = {c.name: c for c in meant if held(c.name)}
    if not chosen:
        raise FewbitsError(f"{recipe.name} quantizes no layer of {where}: {_why(everything, meant, wish)}",
                           "take another recipe: int8 and nf4 fit nearly every layer")
    for name, choice in chosen.items():
        if choice.codec.blind != choice.codec and not calibrated:
            raise FewbitsError(f"{name} as {choice.codec.name}: its scale of activations is found by calibration",
                               f"take {choice.codec.blind.name}, or quantize to a file first: "
                               "fewbits.quantize(…, calibration=…)")
    was = {f.name: f.codec for f in facts.tensors if f.codec.family != "float"}
    again = {n: was[n].name for n, c in chosen.items() if n in was and was[n] != c.codec}
    apart = [c.name for c in meant if c.name not in chosen]
    notes = [f"{note} ({count} tensors)" if count > 1 else note
             for note, count in Counter(c.note for c in everything if c.note).items() if not is_asked(note)]
    notes += [f"skip {pattern!r}: matches no module of {where}" for pattern in wish.skip
              if all(should_convert_module(name, [pattern]) for name, _ in model.named_modules())]
    if again:
        notes.append(f"{len(again)} tensors were quantized before ({', '.join(sorted(set(again.values())))}): their "
                     "error adds to this one")
    if apart:
        notes.append(f"{some(apart)}: left as they are: Transformers has no packed layer for them")
    return Plan({n: c for n, c in chosen.items() if was.get(n) != c.codec}, notes)


def is_asked(note: str) -> bool:
    """Whether a note says only what an override asked for."""
    return note.startswith("override ")


def skipped(patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    """The tensors of modules that are to be left alone."""
    return {n for n in names if not should_convert_module(n.removesuffix(".weight"), list(patterns))}


def apply(source: Checkpoint, plan: Plan, where: Callable[[str], torch.device]) -> Checkpoint:
    """The checkpoint with tensors that are solved when they are loaded, each on the device that `where` says then."""
    def load(name: str) -> QTensor:
        entry = source.entries[name]
        if isinstance(entry.codec, Float):
            q = entry.load()
            weight = q.planes["data"].view(q.shape)
        else:
            weight = entry.load().dequantize()
        made = solved(weight.to(where(name)), plan.choices[name], str(source.path))
        lies = entry.stored()
        if isinstance(lies, Stored):
            lies.forget()  # pages of the file that nobody needs any more
        return made

    made = goal(source, plan.choices.values(), load).entries
    return Checkpoint(**{**vars(source), "entries": {n: made.get(n, e) for n, e in source.entries.items()}})


def solved(weight: torch.Tensor, choice: Choice, where: str) -> QTensor:
    """One weight as the checkpoint has it, quantized.

    Raises:
        FewbitsError: values that are NaN or infinite.
    """
    bad = native.nonfinite(weight.contiguous())
    if bad:
        raise FewbitsError(f"{where}: {choice.name} has {bad} values that are NaN or infinite",
                           "leave it in floats: skip=[…] with its module")
    assert choice.solver is not None
    return solvers.solve(weight.T if choice.transposed else weight, choice.codec, choice.solver)


def recipe_of(asked: str | Recipe, facts: ModelFacts) -> Recipe:
    """The recipe, for a model that does not go to a file."""
    if isinstance(asked, Recipe):
        return asked
    found = recipes.get(asked)
    if found.mix is None or facts.arch is not None:
        return found
    try:  # a type of ggml, which needs no table of names where nothing goes to GGUF
        return Recipe(asked, "fewbits", codecs.get(asked))
    except FewbitsError:
        return found


def _why(everything: list[Choice], meant: list[Choice], wish: Wish) -> str:
    if meant:
        return f"{some([c.name for c in meant])} are not layers of their own in Transformers"
    if any(c.solver for c in everything):
        return f"skip={list(wish.skip)} leaves none"
    noted = next((c for c in everything if c.note and c.wanted), None) or next((c for c in everything if c.note), None)
    if noted is None:
        return "it names a float type, or there are none"
    reason = noted.wanted.check(noted.shape) if noted.wanted else None
    return f"{noted.name} {list(noted.shape)}: {reason or noted.note}"

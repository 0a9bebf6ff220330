"""Which tensor gets which codec and solver: `get("Q4_K_M").resolve(facts)`.

A recipe is one of llama.cpp's mixes (GGUF), or one codec for all linear layers (GPTQ, bitsandbytes), or a plain float
type, or a TOML file that builds on one of these. Overrides by pattern come on top.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fewbits import arch, codecs
from fewbits.codecs.base import Codec, Shape
from fewbits.containers import experts
from fewbits.errors import FewbitsError
from fewbits.recipe import file, llama, patterns
from fewbits.recipe.facts import LINEAR, Fact, ModelFacts, float_of
from fewbits.recipe.patterns import Override, Overrides

__all__ = ["Choice", "Fact", "ModelFacts", "PRESETS", "Overrides", "Recipe", "get"]

# shown in lists, from few bits to many; any codec's name is a recipe too
PRESETS = ("Q2_K", "int3-g32-asym", "Q3_K_M", "kmeans4", "IQ4_XS", "Q4_K_M", "Q4_0", "int4-g128", "nf4", "nf4-dq",
           "nf4-b128", "fp4", "Q5_0", "Q5_K_M", "Q6_K", "Q8_0", "int8", "w8a8", "w8a8-static", "fp8-e4m3-b128", "f16",
           "bf16", "f32")
CONTAINERS = {"ggml": ("gguf", "mxfp4", "fewbits"), "int": ("gptq", "awq", "compressed-tensors", "fewbits"),
              "table": ("bitsandbytes", "fewbits"), "int8": ("bitsandbytes", "fewbits"), "codebook": ("fewbits",),
              "w8a8": ("compressed-tensors", "fewbits"),
              "fp8": ("compressed-tensors", "fewbits"), "fp8-tiles": ("fp8", "fewbits"), "fp8-e5m2": ("fewbits",),
              "float": ("transformers", "gguf", "fewbits")}  # by family; the first is the default
DEFAULT_SOLVER = "search"


@dataclass(frozen=True)
class Choice:
    """What one tensor gets."""

    name: str
    shape: Shape  # as the codec sees it, `[..., out, in]`
    codec: Codec
    solver: str | None  # None: not quantized
    note: str = ""  # why it is not what the recipe wanted, and what that costs
    wanted: Codec | None = None  # before a fallback; None where there was none
    transposed: bool = False  # the checkpoint has it as `[in, out]`


@dataclass(frozen=True)
class Recipe:
    """A named rule for all tensors of a model, and the container that its result goes to."""

    name: str
    container: str
    codec: Codec | None = None  # of every linear layer; None for a mix
    mix: llama.Mix | None = None
    pure: bool = False  # the mix's base type for every matrix
    solver: str | None = None  # where the call names none
    overrides: tuple[Override, ...] = ()  # its own; those of the call come after them

    @property
    def solvers(self) -> set[str]:
        """The solvers that it names itself."""
        return {s for s in (self.solver, *(o.solver for o in self.overrides)) if s}

    @property
    def file_type(self) -> int | None:
        """GGUF's `general.file_type`."""
        return self.mix.file_type if self.mix else None

    def resolve(self, facts: ModelFacts, overrides: Overrides = None, has_importance: bool = False,
                solver: str | None = None) -> list[Choice]:
        """One choice for every tensor of the checkpoint, in its order.

        Raises:
            FewbitsError: an override that matches nothing or does not fit, a mix for an architecture without GGUF
                names, a type that cannot be written yet, or a solver that cannot take a tensor.
        """
        forced = patterns.apply([*self.overrides, *patterns.parse(overrides)], facts)
        solver = solver or self.solver
        types = self._types(facts, has_importance)
        out = []
        for fact in facts.tensors:
            if fact.name in forced:
                choice = _overridden(fact, forced[fact.name])
            elif self.mix:
                choice = _mixed(fact, *types.get(fact.name, ("F32", "F32")), self.name)
            else:
                choice = self._uniform(fact, facts)
            own = forced[fact.name].solver if fact.name in forced else None
            # an embedding has no inputs to calibrate on
            asked = own or (solver if fact.role in LINEAR else None)
            out += _apart(replace(choice, solver=asked) if choice.solver and asked else choice)
        return out

    def _types(self, facts: ModelFacts, has_importance: bool) -> dict[str, tuple[str, str]]:
        if self.mix is None:
            return {}
        if facts.arch is None:
            raise FewbitsError(f"{self.name} goes to GGUF: {arch.why_not_gguf(facts.config)}",
                               "recipes for other containers take any model: nf4, int4-g128")
        return llama.assign(self.mix, facts, has_importance, self.pure)

    def _uniform(self, fact: Fact, facts: ModelFacts) -> Choice:
        assert self.codec is not None
        if self.codec.family == "float":
            return Choice(fact.name, fact.shape, self.codec, None)
        keep = fact.codec if fact.codec.family == "float" else float_of(facts.config)
        unfit = self._unfit(fact) if fact.role in LINEAR else None
        if unfit:
            return Choice(fact.name, fact.shape, keep, None, f"{unfit}: {keep.name}")
        if fact.role in LINEAR:
            shape = fact.shape[::-1] if fact.role == "conv1d" else fact.shape
            reason = self.codec.check(shape)
            if reason is None:
                return Choice(fact.name, shape, self.codec, DEFAULT_SOLVER, transposed=fact.role == "conv1d")
            more = keep.bits_per_weight(shape) - self.codec.bits_per_weight(shape)
            return Choice(fact.name, fact.shape, keep, None, f"{reason}: {keep.name}, {more:+.2f} bits", self.codec)
        other = not fact.role and len(fact.shape) > 1
        return Choice(fact.name, fact.shape, keep, None, f"not a linear layer: {keep.name}" if other else "")

    def _unfit(self, fact: Fact) -> str | None:
        """Why the container has no layout for a linear layer of this kind, or None."""
        fused = len(fact.shape) == 3 and not experts.splits(fact.name, fact.shape)
        if self.container == "mxfp4" and not fused:
            return "only fused experts are quantized in this layout"
        if fused and self.container not in ("fewbits", "mxfp4"):
            return f"{self.container} has no layout for experts fused in one tensor"
        return None


def get(name: str, container: str | None = None) -> Recipe:
    """The recipe called `name` (case does not matter): a mix of llama.cpp, or any codec; or a TOML file.

    Raises:
        FewbitsError: no such recipe, one that the container cannot hold, or a file that is no recipe.
    """
    if name.lower().endswith(file.SUFFIX):
        base, own_container, solver, overrides = file.read(name)
        if base.lower().endswith(file.SUFFIX):
            raise FewbitsError(f"{name}: base is the file {base!r}", "a base is a preset or a codec: Q4_K_M, nf4")
        try:
            return replace(get(base, container or own_container), name=name, solver=solver, overrides=overrides)
        except FewbitsError as error:
            raise FewbitsError(f"{name}: {error}", error.hint) from None
    _refuse_unwritten(name)
    mix = next((m for m in llama.MIXES if m.lower() == name.lower()), None)
    try:
        codec = None if mix and mix not in llama.FLOATS else codecs.get(name)
    except FewbitsError:
        raise FewbitsError(f"unknown recipe {name!r}", "a mix of llama.cpp: " + ", ".join(llama.MIXES)
                           + "; or any codec: int4-g128, int3-g32-asym, int8, nf4, nf4-dq, fp4, Q4_K, f16") from None
    able = CONTAINERS[codec.family] if codec else CONTAINERS["ggml"]
    target = container or able[0]
    if target not in able:
        raise FewbitsError(f"{name} does not go to {target}", f"it goes to {' or '.join(able)}")
    if codec is not None and target != "gguf":
        return Recipe(name, target, codec)
    if mix:
        return Recipe(mix, target, mix=llama.MIXES[mix])
    assert codec is not None
    return Recipe(codec.name, target, mix=llama.Mix(llama.FILE_TYPE[codec.name], codec.name), pure=True)


def _refuse_unwritten(name: str) -> None:
    near = llama.UNWRITTEN.get(name.upper())
    if near:
        raise FewbitsError(f"{name.upper()} is read and not written here", f"the nearest that is written: {near}")


def _apart(choice: Choice) -> list[Choice]:
    """A stack of experts as it is, or a choice for each where the codec cannot stack them."""
    if choice.solver is None or choice.codec.stacks(choice.shape) or not experts.splits(choice.name, choice.shape):
        return [choice]
    return [replace(choice, name=experts.one(choice.name, i), shape=choice.shape[1:]) for i in range(choice.shape[0])]


def _mixed(fact: Fact, wanted: str, taken: str, recipe: str) -> Choice:
    codec = codecs.get(taken)
    solver = None if codec.family == "float" else DEFAULT_SOLVER
    if wanted == taken:
        return Choice(fact.name, fact.shape, codec, solver)
    note = f"{wanted} does not divide {fact.shape[-1]}: {taken}, {llama.bits(taken) - llama.bits(wanted):+.2f} bits"
    return Choice(fact.name, fact.shape, codec, solver, note, codecs.get(wanted))


def _overridden(fact: Fact, override: Override) -> Choice:
    solver = None if override.codec.family == "float" else DEFAULT_SOLVER
    transposed = fact.role == "conv1d" and solver is not None
    shape = fact.shape[::-1] if transposed else fact.shape
    note = "" if override.origin == patterns.ALLOCATED else override.text
    return Choice(fact.name, shape, override.codec, solver, note, transposed=transposed)

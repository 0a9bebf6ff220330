"""Overrides by pattern: `PATTERN=CODEC`, a glob over Transformers or GGUF names, or `re:` and a regular expression."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fewbits import codecs
from fewbits.codecs.base import Codec
from fewbits.codecs.decode_only import DecodeOnly
from fewbits.errors import FewbitsError
from fewbits.recipe.facts import Fact, ModelFacts

ALLOCATED = "allocated"  # the origin of what a target made of each tensor: nothing to take note of
Overrides = Mapping[str, str] | Iterable[str] | None


@dataclass(frozen=True)
class Override:
    """One pattern and the codec of what it matches."""

    pattern: str
    codec: Codec
    solver: str | None = None  # the solver of the call, where it says none
    origin: str = "override"  # where it was asked for

    @property
    def text(self) -> str:
        return f"{self.origin} {self.pattern}={self.codec.name}"

    def matches(self, fact: Fact) -> bool:
        names = [fact.name, *([fact.gguf] if fact.gguf else [])]
        if self.pattern.startswith("re:"):
            return any(re.search(self.pattern[3:], n) for n in names)
        return any(fnmatchcase(n, self.pattern) for n in names)


def parse(overrides: Overrides) -> list[Override]:
    """`{"*.v_proj.weight": "Q8_0"}` or `["*.v_proj.weight=Q8_0"]`.

    Raises:
        FewbitsError: no `=`, an unknown codec, or a regular expression that does not compile.
    """
    items = overrides.items() if isinstance(overrides, Mapping) else [_split(text) for text in overrides or ()]
    return [one(pattern, name) for pattern, name in items]


def one(pattern: str, name: str, solver: str | None = None, origin: str = "override") -> Override:
    """The override of `pattern` by the codec called `name`.

    Raises:
        FewbitsError: an unknown codec, one that is only read, or a regular expression that does not compile.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern[3:])
        except re.error as e:
            raise FewbitsError(f"{origin} {pattern}={name}: not a regular expression: {e}") from None
    codec = codecs.get(name)
    if isinstance(codec, DecodeOnly):
        raise FewbitsError(f"{origin} {pattern}={name}: {codec.name} is read and not written here")
    return Override(pattern, codec, solver, origin)


def _split(text: str) -> tuple[str, str]:
    pattern, equals, name = text.rpartition("=")  # the last one: a regular expression may hold others
    if not (equals and pattern and name):
        raise FewbitsError(f"override {text!r}: not PATTERN=CODEC", "for example: --override '*.v_proj.weight=Q8_0'")
    return pattern.strip(), name.strip()


def apply(overrides: list[Override], facts: ModelFacts) -> dict[str, Override]:
    """Tensor name -> the last override that matches it.

    A glob often catches vectors (norms, biases) beside matrices: a quantized codec passes over them, unless vectors are
    all that the pattern matches.

    Raises:
        FewbitsError: an override that matches nothing, or whose codec cannot take the shape of a tensor it matches.
    """
    out = {}
    for override in overrides:
        matched = [f for f in facts.tensors if override.matches(f)]
        if not matched:
            raise FewbitsError(f"{override.text}: matches no tensor of the model",
                               f"names look like {_example(facts)}")
        if override.codec.family != "float":
            matched = [f for f in matched if len(f.shape) > 1] or matched
        for fact in matched:
            reason = "it is a vector" if len(fact.shape) < 2 and override.codec.family != "float" \
                else override.codec.check(fact.shape)
            if reason:
                raise FewbitsError(f"{override.text}: {fact.name} {list(fact.shape)} cannot take "
                                   f"{override.codec.name}: {reason}", "narrow the pattern, or choose another codec")
            out[fact.name] = override
    return out


def _example(facts: ModelFacts) -> str:
    fact = next((f for f in facts.tensors if f.layer is not None and len(f.shape) > 1), facts.tensors[0])
    return f"{fact.name} or {fact.gguf}" if fact.gguf else fact.name

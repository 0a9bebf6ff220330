"""Model families as data: `lookup(config)` finds one, `tensors(architecture, config)` lists its tensors in order.

Families that do not go to GGUF have an `Outline` instead, the roles of their weights: `outline(config)`.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from importlib import import_module
from typing import TYPE_CHECKING

from fewbits.arch import wrapped
from fewbits.arch.base import DIMS, Architecture, Config, Tensor, Weight, head_dim

if TYPE_CHECKING:
    from fewbits.arch.outline import Outline

# modules with a family each, in the order in which they are asked: imported as far as a name needs them
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo2", "mixtral",
                 "qwen3_moe", "gpt_oss")
OUTLINES = ("opt", "whisper", "bert", "vit")

__all__ = ["Architecture", "Tensor", "Weight", "architectures", "by_gguf", "complete", "goes_to_gguf", "head_dim",
           "lookup", "outline", "spelled", "tensors", "transposed", "why_not_gguf"]


def architectures() -> Iterator[Architecture]:
    for name in ARCHITECTURES:
        yield getattr(import_module(f"fewbits.arch.{name}"), name.upper())


def lookup(config: Config) -> Architecture | None:
    """The family of a Transformers configuration, by its class name or, where it states none, its model type."""
    name, kind = _class_name(config), config.get("model_type")
    for architecture in architectures():
        if name in architecture.architectures if name else kind in architecture.model_types:
            return architecture
    return None


def _class_name(config: Config) -> str | None:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else None


def outline(config: Config) -> Outline | None:
    """What is known of a family that goes to Transformers-style layouts only."""
    from fewbits.arch.outline import of_type

    found = of_type((getattr(import_module(f"fewbits.arch.{name}"), name.upper()) for name in OUTLINES), config)
    inner = wrapped.inner_type(config)
    family = lookup({"model_type": inner}) if inner else None
    return found or (wrapped.outline(family) if family else None)


def why_not_gguf(config: Config) -> str:
    """Why a model without an Architecture cannot go to GGUF."""
    named = _class_name(config) or config.get("model_type")
    known = outline(config)
    return (f"{named}: {known.reason}" if known
            else f"GGUF needs a table of names for {named}; there are {goes_to_gguf()}")


def by_gguf(name: str, experts: bool = False) -> Architecture | None:
    """The family that GGUF files call `name`; of two called alike, the one with `experts` or the one without."""
    first = None
    for architecture in architectures():
        if architecture.gguf == name and architecture.experts == experts:
            return architecture
        first = first or (architecture if architecture.gguf == name else None)
    return first


def complete(architecture: Architecture, config: Config, names: Container[str] | None = None) -> Config:
    """The configuration in Llama's spelling, with what Transformers takes where it is silent.

    With the `names` of a checkpoint's tensors, they say whether its head is tied.
    """
    theirs = {v: k for k, v in architecture.spelling.items()}
    found = architecture.defaults | {theirs.get(k, k): v for k, v in config.items() if v is not None}
    if names is not None and architecture.head is not None:
        found["tie_word_embeddings"] = architecture.head not in names
    return found


def spelled(architecture: Architecture, config: Config) -> Config:
    """The configuration in the family's own spelling, as config.json holds it."""
    return {architecture.spelling.get(k, k): v for k, v in config.items()}


def transposed(config: Config, name: str) -> bool:
    """Whether files and modules of this model hold the float weight `name` as `[..., in, out]`."""
    architecture = lookup(config)
    if architecture is None:
        return False
    row = re.sub(r"\.\d+\.", ".{i}.", name, count=1)
    return any(w.transposed and w.hf == row for w in architecture.weights)


def goes_to_gguf() -> str:
    """Transformers' class names of the families that GGUF has, for messages."""
    return ", ".join(name for a in architectures() for name in a.architectures)


def tensors(architecture: Architecture, config: Config) -> list[Tensor]:
    """Every tensor that a model of this configuration has, in the order of llama.cpp's files."""
    config = complete(architecture, config)
    found: list[Tensor] = []
    weights = [w for w in architecture.weights if w.present(config)]
    dims = {w.hf: w.dims or DIMS.get(w.role, ()) for w in weights}
    dims |= {w.hf: dims[_weight_of(w.hf)][:1] for w in weights if w.role == "bias" and not w.dims}
    begun: set[str] = set()
    for weight in weights:
        if "{i}" not in weight.hf:
            found.append(Tensor(weight.hf, weight.gguf, weight.role, None, weight.ops(config), dims[weight.hf],
                                weight.transposed))
        elif weight.repeat not in begun:
            begun.add(weight.repeat)
            together = [(w, w.ops(config)) for w in weights if "{i}" in w.hf and w.repeat == weight.repeat]
            found += [Tensor(w.hf.format(i=i), w.gguf.format(i=i), w.role, i, ops, dims[w.hf], w.transposed)
                      for i in range(config[weight.repeat]) for w, ops in together]
    return found


def _weight_of(bias: str) -> str:
    return bias.removesuffix("bias") + "weight"

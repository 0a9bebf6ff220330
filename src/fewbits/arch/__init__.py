"""Model families as data: `lookup(config)` finds one, `tensors(architecture, config)` lists its tensors in order."""

from __future__ import annotations

from collections.abc import Container

from fewbits.arch.base import DIMS, Architecture, Config, Tensor, Weight, head_dim
from fewbits.arch.gemma3 import GEMMA3
from fewbits.arch.llama import LLAMA
from fewbits.arch.qwen2 import QWEN2

ARCHITECTURES = (LLAMA, QWEN2, GEMMA3)

__all__ = ["ARCHITECTURES", "Architecture", "Tensor", "Weight", "by_gguf", "complete", "goes_to_gguf", "head_dim",
           "lookup", "spelled", "tensors", "transposed"]


def lookup(config: Config) -> Architecture | None:
    """The family of a Transformers configuration, by its class name or, where it states none, its model type."""
    names = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if names[0] in architecture.architectures if names else config.get("model_type") in architecture.model_types:
            return architecture
    return None


def by_gguf(name: str) -> Architecture | None:
    """The family that GGUF files call `name`."""
    return next((a for a in ARCHITECTURES if a.gguf == name), None)


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


def transposed(config: Config) -> frozenset[str]:
    """Names of the float weights that files and modules of this model hold as `[..., in, out]`."""
    architecture = lookup(config)
    if architecture is None or not any(w.transposed for w in architecture.weights):
        return frozenset()
    return frozenset(t.hf for t in tensors(architecture, config) if t.transposed)


def goes_to_gguf() -> str:
    """Transformers' class names of the families that GGUF has, for messages."""
    return ", ".join(name for a in ARCHITECTURES if a.gguf for name in a.architectures)


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

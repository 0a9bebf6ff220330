"""Model families as data: `lookup(config)` finds one, `tensors(architecture, config)` lists its tensors in order."""

from __future__ import annotations

from fewbits.arch.base import Architecture, Config, Tensor, Weight, head_dim
from fewbits.arch.gemma3 import GEMMA3
from fewbits.arch.llama import LLAMA
from fewbits.arch.qwen2 import QWEN2

ARCHITECTURES = (LLAMA, QWEN2, GEMMA3)

__all__ = ["ARCHITECTURES", "Architecture", "Tensor", "Weight", "by_gguf", "complete", "head_dim", "lookup", "tensors"]


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


def complete(architecture: Architecture, config: Config) -> Config:
    """The configuration with what Transformers takes where it is silent."""
    return architecture.defaults | {k: v for k, v in config.items() if v is not None}


def tensors(architecture: Architecture, config: Config) -> list[Tensor]:
    """Every tensor that a model of this configuration has, in the order of llama.cpp's files."""
    config = complete(architecture, config)
    found: list[Tensor] = []
    weights = [w for w in architecture.weights if w.present(config)]
    repeated = [w for w in weights if "{i}" in w.hf]
    for weight in weights:
        if weight not in repeated:
            found.append(Tensor(weight.hf, weight.gguf, weight.role, None, weight.ops(config)))
        elif weight is repeated[0]:
            found += [Tensor(w.hf.format(i=i), w.gguf.format(i=i), w.role, i, w.ops(config))
                      for i in range(config["num_hidden_layers"]) for w in repeated]
    return found

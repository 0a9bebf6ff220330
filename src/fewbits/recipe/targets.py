"""Which tensors are weights of linear layers, for architectures outside the table: asked of Transformers' own model."""

from __future__ import annotations

from typing import Any

from fewbits.codecs.base import Shape
from fewbits.lazy import torch, transformers


def roles(model: Any) -> dict[str, str]:
    """Name of a weight -> "linear", "conv1d" (GPT-2's, `[in, out]`), "embedding", "output", of those that are one."""
    out = {}
    bare = torch.nn.modules.linear.NonDynamicallyQuantizableLinear  # MultiheadAttention multiplies by its weight itself
    for name, module in model.named_modules():
        if isinstance(module, bare):
            continue
        if isinstance(module, torch.nn.Linear):
            out[f"{name}.weight"] = "linear"
        elif isinstance(module, transformers.pytorch_utils.Conv1D):
            out[f"{name}.weight"] = "conv1d"
        elif isinstance(module, torch.nn.Embedding):
            out[f"{name}.weight"] = "embedding"
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    out |= {f"{n}.weight": "output" for n, m in model.named_modules() if head is not None and m is head}
    return out


def shapes(model: Any) -> dict[str, Shape]:
    """Names and shapes of the parameters; those of tied weights once."""
    return {n: tuple(p.shape) for n, p in model.named_parameters()}


def match(roles: dict[str, str], names: set[str]) -> dict[str, str]:
    """Roles under the names of a file, which may have or lack the base model's prefix (`transformer.`)."""
    if names & roles.keys():
        return roles
    for name in sorted(roles):
        prefix, _, rest = name.partition(".")
        if rest in names:
            return {n.removeprefix(f"{prefix}."): r for n, r in roles.items()}
    for name in sorted(names):
        prefix, _, rest = name.partition(".")
        if rest in roles:
            return {f"{prefix}.{n}": r for n, r in roles.items()}
    return {}

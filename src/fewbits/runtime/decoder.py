"""Decoder-only transformers that native code runs: a table of families, and the list of steps that one compiles to.

A token costs one native call, whatever the number of layers; docs/concepts/decoder.md has the steps and the cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from fewbits import _native, arch
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError, Unsupported
from fewbits.runtime import weights
from fewbits.runtime.build import settings
from fewbits.runtime.sequences import Decoder

Settings = transformers.PreTrainedConfig
CPU = torch.device("cpu")
ROPES = ("linear", "yarn", "llama3")  # scaled once for all positions; besides "default"
LAYER = "model.layers.{i}."


def _by_layer(s: Settings) -> list[int]:
    return [s.sliding_window if kind == "sliding_attention" else 0 for kind in s.layer_types]


def _everywhere(s: Settings) -> list[int]:
    return [s.sliding_window or 0] * s.num_hidden_layers


def _nowhere(s: Settings) -> list[int]:
    return [0] * s.num_hidden_layers


@dataclass(frozen=True)
class Family:
    """What a model type does beside what all of them do: norms before, SwiGLU, rotary positions, grouped queries."""

    windows: Callable[[Settings], list[int]] = _nowhere  # positions that each layer sees, 0: all
    head_norms: bool = False  # of every head's queries and keys


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(windows=_everywhere),
    "qwen2": Family(windows=_by_layer),
    "qwen3": Family(windows=_by_layer, head_norms=True),
}

# buffers of a call, [tokens, width] each, and what their widths are
HIDDEN, NORMED, QUERIES, KEYS, VALUES, SEEN, GATE, UP = range(8)


@dataclass(frozen=True)
class Widths:
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    head: int

    def buffers(self) -> list[int]:
        queries, keys = self.heads * self.head, self.kv_heads * self.head
        return [self.hidden, self.hidden, queries, keys, keys, queries, self.inner, self.inner]


def compile(checkpoint: Checkpoint) -> Decoder:
    """The steps of a checkpoint's model, its weights prepared for the native kernels.

    Matrices that no native kernel multiplies (orders of columns, `int8`, codebooks) are decoded to float32 once.

    Raises:
        FewbitsError: a model type, activation or rotary scaling that is not supported; tensors missing or misshapen.
    """
    kind = checkpoint.config.get("model_type")
    family = FAMILIES.get(str(kind))
    if family is None:
        raise Unsupported(f"{checkpoint.path}: no native decoder for model type {kind!r}",
                           f"there are {', '.join(FAMILIES)}; fewbits.load() runs others")
    s: Any = settings(checkpoint.config, checkpoint.path)
    if s.hidden_act != "silu":
        raise Unsupported(f"{checkpoint.path}: no native decoder for hidden_act {s.hidden_act!r}", "there is silu")
    inverse, factor = _rotations(checkpoint, s)
    head = getattr(s, "head_dim", None) or s.hidden_size // s.num_attention_heads
    widths = Widths(s.hidden_size, s.intermediate_size, s.num_attention_heads, s.num_key_value_heads, head)
    try:
        plan = _native.Plan(widths=widths.buffers(), layers=s.num_hidden_layers, heads=widths.heads,
                            kv_heads=widths.kv_heads, head=head, scale=head ** -0.5)
        rotation = plan.rotation(inverse.tolist(), factor)
    except ValueError as error:
        raise FewbitsError(f"{checkpoint.path}: {error}") from None
    _write(plan, family, s, _Weights(checkpoint, s), rotation)
    return Decoder(plan, s.vocab_size, s.max_position_embeddings)


def _write(plan: _native.Plan, family: Family, s: Any, weights: _Weights, rotation: int) -> None:
    def norm(name: str, x: int, out: int) -> None:
        plan.norm(x, out, weights.vector(name + ".weight"), s.rms_norm_eps)

    def multiply(x: int, parts: dict[str, int]) -> None:
        plan.multiply(x, [weights.matrix(name + ".weight") for name in parts],
                      [weights.bias(name + ".bias") for name in parts], list(parts.values()))

    plan.embed(weights.matrix("model.embed_tokens.weight"), HIDDEN)
    for i, window in enumerate(family.windows(s)):
        at = LAYER.format(i=i)
        attention, mlp = at + "self_attn.", at + "mlp."
        norm(at + "input_layernorm", HIDDEN, NORMED)
        multiply(NORMED, {attention + "q_proj": QUERIES, attention + "k_proj": KEYS, attention + "v_proj": VALUES})
        for part, buffer in ("q", QUERIES), ("k", KEYS):
            if family.head_norms:
                norm(f"{attention}{part}_norm", buffer, buffer)
            plan.rotate(buffer, rotation)
        plan.attend(QUERIES, KEYS, VALUES, SEEN, i, window, 0.0)
        if i == s.num_hidden_layers - 1:
            plan.narrow()
        multiply(SEEN, {attention + "o_proj": NORMED})
        plan.add(NORMED, HIDDEN)
        norm(at + "post_attention_layernorm", HIDDEN, NORMED)
        multiply(NORMED, {mlp + "gate_proj": GATE, mlp + "up_proj": UP})
        plan.gate(GATE, UP, GATE)
        multiply(GATE, {mlp + "down_proj": NORMED})
        plan.add(NORMED, HIDDEN)
    norm("model.norm", HIDDEN, HIDDEN)
    tied = "lm_head.weight" not in weights.checkpoint.entries
    multiply(HIDDEN, {"model.embed_tokens" if tied else "lm_head": _native.RESULT})


def _rotations(checkpoint: Checkpoint, s: Any) -> tuple[torch.Tensor, float]:
    """Inverse frequencies `[pairs]` and the factor of cosines and sines, as Transformers has them."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kind = s.rope_parameters["rope_type"]
    if kind == "default":
        return LlamaRotaryEmbedding.compute_default_rope_parameters(s)
    if kind not in ROPES:
        raise Unsupported(f"{checkpoint.path}: no native decoder for rope type {kind!r}",
                           f"there are default, {', '.join(ROPES)}; fewbits.load() runs others")
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](s, CPU)
    return inverse, float(factor)


class _Weights:
    """Tensors of a checkpoint, checked against what the family's table says, prepared once each."""

    def __init__(self, checkpoint: Checkpoint, s: Settings):
        self.checkpoint = checkpoint
        family = arch.lookup(checkpoint.config)
        if family is None:
            raise Unsupported(f"{checkpoint.path}: no native decoder for {checkpoint.architecture}",
                               "there are models with a language head; fewbits.load() runs others")
        config = arch.complete(family, s.to_dict(), checkpoint.entries)
        for t in arch.tensors(family, config):
            entry = checkpoint.entries.get(t.hf)
            if entry is None:
                raise FewbitsError(f"{checkpoint.path}: {t.hf} is missing")
            if tuple(entry.shape) != t.shape(config):
                raise FewbitsError(f"{checkpoint.path}: {t.hf} is {list(entry.shape)}, the configuration wants "
                                   f"{list(t.shape(config))}")
        self._made: dict[str, _native.Weight | _native.Floats] = {}

    def matrix(self, name: str) -> _native.Weight | _native.Floats:
        if name not in self._made:
            self._made[name] = weights.matrix(self.checkpoint.entries[name])
        return self._made[name]

    def vector(self, name: str) -> np.ndarray:
        return weights.vector(self.checkpoint.entries[name])

    def bias(self, name: str) -> np.ndarray | None:
        return self.vector(name) if name in self.checkpoint.entries else None

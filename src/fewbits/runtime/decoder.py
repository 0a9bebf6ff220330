"""Decoder-only transformers that native code or a GPU runs: the list of steps that a checkpoint compiles to.

A token costs one native call, whatever the number of layers; docs/concepts/decoder.md has the steps and the cache.
What model types differ in is data: `families` and `arch`. Tensors go by their names in GGUF here, which all share.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fewbits import _native, arch
from fewbits.arch import rope, rotary
from fewbits.arch.base import Config, head_dim, inner, kv_heads
from fewbits.arch.rotary import Rotation
from fewbits.arch.rows import AddOne, Ops, Regroup
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers import experts
from fewbits.errors import FewbitsError, Unsupported
from fewbits.lazy import torch
from fewbits.runtime import engine, families, weights
from fewbits.runtime.engine import Engine, Plan, Rows, Weight
from fewbits.runtime.families import ACTIVATIONS, FULL, SLIDING, Family
from fewbits.runtime.sequences import Decoder

Array = np.ndarray

# buffers of a call, [tokens, width] each; the last is there if there are experts
HIDDEN, NORMED, QUERIES, KEYS, VALUES, SEEN, GATE, UP, CHOSEN = range(9)


def compile(checkpoint: Checkpoint, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Decoder:
    """The steps of a checkpoint's model, its weights prepared for the kernels of a device: by default the CPU's.

    Matrices that no native kernel multiplies (codebooks; experts in `int8` or with columns in another order) are
    decoded to float32 once. On a GPU activations, caches and float weights have the type `dtype`: bfloat16 by default,
    or float16 where that is unknown to it.

    Raises:
        FewbitsError: a model type, or something in its configuration, that is not supported; tensors that are missing
            or misshapen.
        NotHere: Triton does not run on the device, or its free memory does not take the weights.
    """
    return compile_for(checkpoint, engine.of(device, dtype))


def compile_for(checkpoint: Checkpoint, engine: Engine) -> Decoder:
    """The same, for what an engine computes with."""
    try:
        return _compile(families.language(checkpoint), engine)
    except FewbitsError:
        raise
    except KeyError as error:
        raise FewbitsError(f"{checkpoint.path}: the configuration has no {error.args[0]}") from None
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise FewbitsError(f"{checkpoint.path}: the configuration: {str(error).splitlines()[0]}") from None


def compile_or_say(checkpoint: Checkpoint, device: str | None = None) -> Decoder | None:
    """The same, for a device by its name; None, and why on stderr, for a model that Transformers has to compute."""
    try:
        return engine.placed(device, lambda where: compile(checkpoint, where))
    except Unsupported as reason:
        print(f"note: {reason}; Transformers computes", file=sys.stderr)
        return None


def _compile(checkpoint: Checkpoint, engine: Engine) -> Decoder:
    family, table = families.family_of(checkpoint)
    config = families.settings(checkpoint, family, table)
    if head_dim(config) > _native.WIDEST_HEAD:
        raise Unsupported(f"{checkpoint.path}: no native decoder for heads of {head_dim(config)} columns")
    if any(e.codec.family == "w8a8" for e in checkpoint.entries.values()):
        raise Unsupported(f"{checkpoint.path}: no native decoder for activations rounded as w8a8 says",
                          "fewbits.load() runs it")
    engine.check(checkpoint)
    tensors = _Tensors(checkpoint, table, config, engine)
    rotations = _rotations(family, config, checkpoint.path)
    plan = engine.plan(widths=_widths(config, table.experts), layers=config["num_hidden_layers"],
                       heads=config["num_attention_heads"], kv_heads=kv_heads(config), head=head_dim(config),
                       scale=family.scale(config))
    _Writer(plan, family, config, tensors).write(rotations)
    original = max((r.original for r in rotations.values() if r.stretched is not None), default=0)
    return Decoder(engine, plan, config["vocab_size"], config["hidden_size"], config["max_position_embeddings"],
                   original)


def _widths(c: Config, mixture: bool) -> list[int]:
    hidden, wide = c["hidden_size"], inner(c)
    queries, keys = c["num_attention_heads"] * head_dim(c), kv_heads(c) * head_dim(c)
    shared = [hidden, hidden, queries, keys, keys, queries]
    if not mixture:
        return [*shared, wide, wide]
    chosen, wide = c["num_experts_per_tok"], c.get("moe_intermediate_size") or wide
    return [*shared, chosen * wide, chosen * wide, chosen * hidden]


def _rotations(family: Family, config: Config, source: Path) -> dict[str, Rotation]:
    """By kind of layer."""
    if not family.rotated:
        return {}
    found = {}
    for kind in set(family.kinds(config)):
        settings = rope.parameters(config, kind if family.by_kind else "")
        if not family.partly:
            settings.pop("partial_rotary_factor", None)
        if settings["rope_type"] not in rotary.KINDS:
            raise Unsupported(f"{source}: no native decoder for rope type {settings['rope_type']!r}",
                              f"there are {', '.join(rotary.KINDS)}; fewbits.load() may run it")
        found[kind] = rotary.rotation(settings, head_dim(config), config["max_position_embeddings"])
    return found


@dataclass(frozen=True)
class Part:
    """A product, of some rows of a matrix."""

    name: str
    out: int
    rows: Rows = None


@dataclass(frozen=True)
class _Writer:
    """Writes a model down as the steps of a plan."""

    plan: Plan
    family: Family
    config: Config
    tensors: _Tensors

    def write(self, rotations: dict[str, Rotation]) -> None:
        plan, family, c = self.plan, self.family, self.config
        turns = {kind: plan.rotation(r.frequencies.tolist(), r.factor, [] if r.stretched is None else
                                     r.stretched.tolist()) for kind, r in rotations.items()}
        plan.embed(self.tensors.matrix("token_embd"), HIDDEN)
        if "position_embd" in self.tensors:
            plan.positions(self.tensors.matrix("position_embd"), NORMED)
            plan.add(NORMED, HIDDEN)
        if family.embedding:
            plan.scale(HIDDEN, family.embedding(c))
        for i, kind in enumerate(self._kinds()):
            self._layer(i, kind, turns.get(kind))
        self._norm("output_norm", HIDDEN, HIDDEN)
        plan.head(HIDDEN)
        head = "output" if "output" in self.tensors else "token_embd"
        self._multiply(HIDDEN, [Part(head, _native.RESULT)])
        if c.get(family.caps[1]):
            plan.cap(_native.RESULT, c[family.caps[1]])

    def _kinds(self) -> list[str]:
        kinds, layers = self.family.kinds(self.config), self.config["num_hidden_layers"]
        if len(kinds) != layers or not set(kinds) <= {FULL, SLIDING}:
            raise ValueError(f"layer_types {kinds} for {layers} layers")
        return kinds

    def _layer(self, i: int, kind: str, turn: int | None) -> None:
        plan, c, at = self.plan, self.config, f"blk.{i}."
        self._multiply(self._norm(at + "attn_norm", HIDDEN, NORMED), self._queries_keys_values(at))
        for part, buffer in ("q", QUERIES), ("k", KEYS):
            self._norm(f"{at}attn_{part}_norm", buffer, buffer)
            if turn is not None:
                plan.rotate(buffer, turn)
        if c.get("scale_attn_by_inverse_layer_idx"):
            plan.scale(QUERIES, 1 / (i + 1))
        window = c.get("sliding_window") if kind == SLIDING else 0
        plan.attend(QUERIES, KEYS, VALUES, SEEN, i, window or 0, c.get(self.family.caps[0]) or 0.0)
        if i == c["num_hidden_layers"] - 1:
            plan.narrow()
        if self.family.parallel and c["use_parallel_residual"]:
            self._widen(at)
            self._add(SEEN, at + "attn_output", at + "post_attention_norm")
        else:
            self._add(SEEN, at + "attn_output", at + "post_attention_norm")
            if at + "ffn_gate_inp" in self.tensors:
                return self._experts(at)
            self._widen(at)
        self._add(GATE, at + "ffn_down", at + "post_ffw_norm")

    def _queries_keys_values(self, at: str) -> list[Part]:
        fused, c = at + "attn_qkv", self.config
        if fused not in self.tensors:
            return [Part(at + "attn_q", QUERIES), Part(at + "attn_k", KEYS), Part(at + "attn_v", VALUES)]
        heads, width = c["num_attention_heads"], head_dim(c)
        if any(isinstance(op, Regroup) for op in self.tensors.ops(fused)):  # those of a head side by side
            rows = np.arange(3 * heads * width).reshape(heads, 3, width)
            return [Part(fused, out, rows[:, i].ravel()) for i, out in enumerate((QUERIES, KEYS, VALUES))]
        ends = np.cumsum([0, heads * width, kv_heads(c) * width, kv_heads(c) * width]).tolist()
        return [Part(fused, out, slice(*ends[i:i + 2])) for i, out in enumerate((QUERIES, KEYS, VALUES))]

    def _widen(self, at: str) -> None:
        """The first half of the feed-forward part: into GATE."""
        gate, up, wide = at + "ffn_gate", at + "ffn_up", inner(self.config)
        parts = [Part(gate, GATE), Part(up, UP)]
        if gate not in self.tensors:
            fused = self.tensors.shape(up)[0] == 2 * wide
            parts = [Part(up, GATE, slice(0, wide)), Part(up, UP, slice(wide, 2 * wide))] if fused else [Part(up, GATE)]
        self._multiply(self._norm(at + "ffn_norm", HIDDEN, NORMED), parts)
        self.plan.gate(self._activation, GATE, UP if len(parts) == 2 else _native.NONE, GATE)

    def _experts(self, at: str) -> None:
        x = self._norm(at + "ffn_norm", HIDDEN, NORMED)
        gates, ups, downs = (self.tensors.stack(f"{at}ffn_{part}_exps") for part in ("gate", "up", "down"))
        self.plan.experts(x, self.tensors.matrix(at + "ffn_gate_inp"), gates, ups, downs, room=[CHOSEN, GATE, UP],
                          out=NORMED, chosen=self.config["num_experts_per_tok"],
                          normalised=self.family.normalised(self.config), activation=self._activation)
        self.plan.add(NORMED, HIDDEN)

    def _add(self, x: int, name: str, norm: str) -> None:
        """To the hidden state: a product, with a norm behind it if there is one."""
        self._multiply(x, [Part(name, NORMED)])
        self.plan.add(self._norm(norm, NORMED, NORMED), HIDDEN)

    @property
    def _activation(self) -> str:
        return ACTIVATIONS[self.config[self.family.activation]]

    def _norm(self, name: str, x: int, out: int) -> int:
        """Where the result lies: `x` if there is no such norm."""
        if name not in self.tensors:
            return x
        self.plan.norm(x, out, self.tensors.vector(name), self.config[self.family.epsilon], self.family.centred,
                       self.tensors.bias(name))
        return out

    def _multiply(self, x: int, parts: list[Part]) -> None:
        self.plan.multiply(x, [self.tensors.matrix(p.name, p.rows) for p in parts],
                           [self.tensors.bias(p.name, p.rows) for p in parts], [p.out for p in parts])


class _Tensors:
    """Tensors of a checkpoint by their names in GGUF, checked against the family's table; without `.weight`."""

    def __init__(self, checkpoint: Checkpoint, table: arch.Architecture, config: Config, engine: Engine):
        self.checkpoint, self.entries, self.engine = checkpoint, experts.stacked(checkpoint.entries), engine
        self._tensors = {t.gguf.removesuffix(".weight"): t for t in arch.tensors(table, config)}
        self._table: Weight | None = None
        for t in self._tensors.values():
            self._check(t.hf, t.shape(config))

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        entry = self.entries.get(name)
        if entry is None and experts.splits(name, shape):
            for i in range(shape[0]):
                self._check(experts.one(name, i), shape[1:])
        elif entry is None:
            raise FewbitsError(f"{self.checkpoint.path}: {name} is missing")
        elif tuple(entry.shape) != shape:
            raise FewbitsError(f"{self.checkpoint.path}: {name} is {list(entry.shape)}, the configuration wants "
                               f"{list(shape)}")

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def _entry(self, name: str) -> Entry:
        return self.entries[self._tensors[name].hf]

    def ops(self, name: str) -> Ops:
        return self._tensors[name].ops

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entry(name).shape)

    def matrix(self, name: str, rows: Rows = None) -> Weight:
        if rows is not None:
            return self.engine.matrix(self._entry(name), rows)
        if name != "token_embd":
            return self.engine.matrix(self._entry(name))
        if self._table is None:  # a tied head is the same
            self._table = self.engine.matrix(self._entry(name))
        return self._table

    def stack(self, name: str) -> list[Weight]:
        """A layer's experts."""
        whole = self._tensors[name].hf
        if whole in self.entries:
            return self.engine.experts([self.entries[whole]])
        count = sum(experts.stack_of(n) == whole for n in self.entries)
        return self.engine.experts([self.entries[experts.one(whole, i)] for i in range(count)])

    def vector(self, name: str) -> Array:
        values = weights.vector(self._entry(name))
        return values + np.float32(1) if AddOne() in self.ops(name) else values

    def bias(self, name: str, rows: Rows = None) -> Array | None:
        entry = self.entries.get(self._tensors[name].hf.removesuffix("weight") + "bias")
        if entry is None:
            return None
        return np.ascontiguousarray(weights.vector(entry)[slice(None) if rows is None else rows])

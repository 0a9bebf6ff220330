"""What recipes know of a model: names, shapes and roles of its tensors, and a few numbers. Never data."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from fewbits import arch
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs import floats
from fewbits.codecs.base import Codec, Shape
from fewbits.containers import experts
from fewbits.errors import FewbitsError

LINEAR = {"attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down", "linear",
          "conv1d"}  # roles


@dataclass(frozen=True)
class Fact:
    """One tensor, as the checkpoint has it."""

    name: str
    shape: Shape
    codec: Codec  # what it is in now
    role: str = ""  # those of the architecture table, "linear", "conv1d"; empty where nothing is known of it
    layer: int | None = None
    gguf: str | None = None  # its name in a GGUF file, where the table has the architecture


@dataclass(frozen=True)
class ModelFacts:
    """A model as recipes and plans see it."""

    config: dict[str, Any]
    tensors: tuple[Fact, ...]
    arch: str | None = None  # GGUF's name of the architecture, where the table has it

    def number(self, *keys: str, default: int = 0) -> int:
        """The first of the configuration's entries that is there; those of its language model, if it has parts."""
        config = self.config.get("text_config") or self.config
        return next((int(config[k]) for k in keys if config.get(k) is not None), default)

    @classmethod
    def of(cls, checkpoint: Checkpoint, model: Any = None) -> ModelFacts:
        """Facts of a model in any container; `model` is Transformers' own of it, where it is made already."""
        family = arch.lookup(checkpoint.config)
        table: dict[str, arch.Tensor] = {}
        if family:
            whole = arch.complete(family, checkpoint.config, checkpoint.entries)
            table = {t.hf: t for t in arch.tensors(family, whole)}
        outline = arch.outline(checkpoint.config)
        roles = {} if family or outline else _roles(checkpoint, model)
        facts = []
        for e in checkpoint.entries.values():
            t = table.get(experts.stack_of(e.name))
            if t:
                facts.append(Fact(e.name, e.shape, e.codec, t.role, t.layer, t.gguf))
            else:
                role, layer = outline.role(e.name) if outline else (roles.get(e.name, ""), None)
                facts.append(Fact(e.name, e.shape, e.codec, role or _expert(e), layer))
        return cls(checkpoint.config, tuple(facts), family.gguf if family else None)

    @classmethod
    def from_config(cls, config: dict[str, Any], name: str = "config.json") -> ModelFacts:
        """Facts of a model of which only the configuration is there.

        Raises:
            FewbitsError: an architecture that neither the table nor Transformers knows, or entries missing.
        """
        codec = float_of(config)
        family = arch.lookup(config)
        if family is None:
            from fewbits.recipe import targets
            from fewbits.runtime.build import empty_model

            model = empty_model(config, name)
            roles = targets.roles(model)
            return cls(config, tuple(Fact(n, s, codec, roles.get(n, "")) for n, s in targets.shapes(model).items()))
        try:
            whole = arch.complete(family, config)
            facts = {t.hf: Fact(t.hf, t.shape(whole), codec, t.role, t.layer, t.gguf)
                     for t in arch.tensors(family, whole)}
        except KeyError as e:
            raise FewbitsError(f"{name}: no entry {e}, which {family.name} needs") from None
        return cls(config, tuple(facts.values()), family.gguf)

    @property
    def layers(self) -> int:
        return self.number("num_hidden_layers", "n_layer", "num_layers")

    @property
    def heads(self) -> int:
        return self.number("num_attention_heads", "n_head", default=1)

    @property
    def kv_heads(self) -> int:
        return self.number("num_key_value_heads", default=self.heads)

    @property
    def hidden(self) -> int:
        return self.number("hidden_size", "n_embd", "d_model")

    @property
    def head_dim(self) -> int:
        return self.number("head_dim", default=self.hidden // max(1, self.heads))

    @property
    def experts(self) -> int:
        return self.number("num_local_experts", "num_experts", "n_routed_experts")

    @property
    def gqa(self) -> int:
        """Query heads for one key/value head."""
        return self.heads // max(1, self.kv_heads)

    @property
    def has_output(self) -> bool:
        """Whether the output head has a weight of its own; else the embedding serves twice."""
        return any(f.role == "output" for f in self.tensors)

    @property
    def is_70b(self) -> bool:
        """What llama.cpp takes for a 70B model when it picks types."""
        return self.layers == 80 and (self.arch == "qwen2" or (self.arch == "llama" and self.gqa > 1))

    @property
    def parameters(self) -> int:
        return sum(math.prod(f.shape) for f in self.tensors)


def float_of(config: dict[str, Any]) -> Codec:
    """The float type that the configuration names; half precision where it names none."""
    return floats.parse(str(config.get("dtype") or config.get("torch_dtype") or "float16")) or floats.F16


def _expert(entry: Entry) -> str:
    """The role of experts in models outside the table: Transformers has no linear module for them."""
    stack = len(entry.shape) == 3 and experts.ALL.fullmatch(entry.name)
    one = len(entry.shape) == 2 and experts.ONE.fullmatch(entry.name)
    return "linear" if entry.name.endswith(".weight") and (stack or one) else ""


def _roles(checkpoint: Checkpoint, model: Any) -> dict[str, str]:
    from fewbits.recipe import targets
    from fewbits.runtime.build import empty_model
    from fewbits.runtime.places import Places

    model = empty_model(checkpoint.config, str(checkpoint.path)) if model is None else model
    own, names = targets.roles(model), set(checkpoint.entries)
    found, places = targets.match(own, names), Places(model, checkpoint)
    renamed = {name: places.renamed(name) for name in sorted(names - found.keys())}
    return found | {name: own[new] for name, new in renamed.items() if new in own}

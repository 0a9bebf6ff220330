"""llama.cpp's mixes: which type each tensor of a GGUF file gets, as rows of data (the rules of its llama-quant.cpp).

A tensor's *place* is what the rules look at: its kind, how many of its kind come before it, facts of the model. Rules
of a mix are tried in order and the first that holds names the type; what no rule names gets the mix's base type. Rules
for every mix follow: the output head, the wider types of 8-expert and 70B models, and what to take when a width does
not divide.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from fewbits.recipe.facts import Fact, ModelFacts


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in the model."""

    kind: str
    index: int  # of its kind, counted in file order; the layer where a model has experts
    count: int  # how many there are
    facts: ModelFacts
    has_importance: bool
    stacked: bool = False  # the experts of a layer in one tensor


When = Callable[[Place], bool]


def always(p: Place) -> bool:
    return True


def more_bits(p: Place) -> bool:
    """The first and the last eighth of the layers, and every third between them."""
    eighth = p.count // 8
    return p.index < eighth or p.index >= 7 * p.count // 8 or (p.index - eighth) % 3 == 2


def first_eighth(p: Place) -> bool:
    return p.index < p.count // 8


def first_eighth_weighted(p: Place) -> bool:
    return p.has_importance and first_eighth(p)


def first_eighth_unweighted(p: Place) -> bool:
    return not p.has_importance and first_eighth(p)


def first_sixteenth(p: Place) -> bool:
    return p.index < p.count // 16


def _first(n: int, p: Place) -> bool:
    return p.index < n


first_2, first_4 = partial(_first, 2), partial(_first, 4)


def eight_experts(p: Place) -> bool:
    return p.facts.experts == 8


def grouped(p: Place) -> bool:
    """Four or more query heads share each value projection: it is small."""
    return p.facts.gqa >= 4


def stacked(p: Place) -> bool:
    return p.stacked


def falcon(p: Place) -> bool:
    return p.facts.arch == "falcon"


def falcon_first_sixteenth(p: Place) -> bool:
    return falcon(p) and first_sixteenth(p)


def falcon_more_bits(p: Place) -> bool:
    return falcon(p) and more_bits(p)


@dataclass(frozen=True)
class Mix:
    """A named mix: its number in `general.file_type`, its base type, and rows (kind, type, when)."""

    file_type: int
    base: str
    rules: tuple[tuple[str, str, When], ...] = ()


def _iq4(base: str) -> tuple[tuple[str, str, When], ...]:
    return (("attn_v", "Q5_K", grouped), ("ffn_down", "Q5_K", first_eighth_unweighted),
            ("attn_output", base, falcon), ("attn_output", "Q5_K", eight_experts))


MIXES: dict[str, Mix] = {
    "F32": Mix(0, "F32"),
    "F16": Mix(1, "F16"),
    "BF16": Mix(32, "BF16"),
    "Q8_0": Mix(7, "Q8_0"),
    "Q4_0": Mix(2, "Q4_0", (("ffn_down", "Q4_1", first_eighth_weighted),)),
    "Q4_1": Mix(3, "Q4_1"),
    "Q5_0": Mix(8, "Q5_0", (("ffn_down", "Q5_1", first_eighth_weighted),)),
    "Q5_1": Mix(9, "Q5_1"),
    "Q6_K": Mix(18, "Q6_K"),
    "Q2_K": Mix(10, "Q2_K", (
        ("attn_v", "Q4_K", grouped), ("attn_v", "Q3_K", always), ("ffn_down", "Q3_K", always),
        ("attn_output", "Q2_K", falcon), ("attn_output", "Q5_K", eight_experts), ("attn_output", "Q3_K", always))),
    "Q2_K_S": Mix(21, "Q2_K", (("attn_v", "Q4_K", grouped), ("ffn_down", "Q4_K", first_eighth))),
    "Q3_K_S": Mix(11, "Q3_K", (("attn_output", "Q3_K", falcon), ("attn_output", "Q5_K", eight_experts))),
    "Q3_K_M": Mix(12, "Q3_K", (
        ("attn_v", "Q5_K", first_2), ("attn_v", "Q4_K", always),
        ("ffn_down", "Q5_K", first_sixteenth), ("ffn_down", "Q4_K", falcon_more_bits), ("ffn_down", "Q3_K", falcon),
        ("ffn_down", "Q4_K", always),
        ("attn_output", "Q3_K", falcon), ("attn_output", "Q5_K", eight_experts), ("attn_output", "Q4_K", always))),
    "Q3_K_L": Mix(13, "Q3_K", (
        ("attn_v", "Q5_K", always), ("ffn_down", "Q4_K", falcon), ("ffn_down", "Q5_K", always),
        ("attn_output", "Q4_K", falcon), ("attn_output", "Q3_K", eight_experts), ("attn_output", "Q5_K", always))),
    "Q4_K_S": Mix(14, "Q4_K", (
        ("attn_v", "Q5_K", first_4), ("ffn_down", "Q4_K", falcon), ("ffn_down", "Q5_K", first_eighth),
        ("attn_output", "Q4_K", falcon), ("attn_output", "Q5_K", eight_experts))),
    "Q4_K_M": Mix(15, "Q4_K", (
        ("attn_v", "Q6_K", more_bits),
        ("ffn_down", "Q6_K", falcon_first_sixteenth), ("ffn_down", "Q5_K", falcon_more_bits),
        ("ffn_down", "Q4_K", falcon), ("ffn_down", "Q6_K", more_bits),
        ("attn_output", "Q4_K", falcon), ("attn_output", "Q5_K", eight_experts))),
    "Q5_K_S": Mix(16, "Q5_K"),
    "Q5_K_M": Mix(17, "Q5_K", (("attn_v", "Q6_K", more_bits), ("ffn_down", "Q6_K", more_bits))),
    "IQ4_NL": Mix(25, "IQ4_NL", _iq4("IQ4_NL")),
    "IQ4_XS": Mix(30, "IQ4_XS", _iq4("IQ4_XS")),
    "TQ1_0": Mix(36, "TQ1_0", (("embedding", "Q4_K", always),)),
    "TQ2_0": Mix(37, "TQ2_0", (("embedding", "Q4_K", always),)),
    "Q1_0": Mix(40, "Q1_0"),
    "MXFP4_MOE": Mix(38, "Q8_0", tuple((kind, "MXFP4", stacked) for kind in ("ffn_gate", "ffn_up", "ffn_down"))),
}
# mixes of types that are read and not written, each with the nearest that is
UNWRITTEN = {"IQ1_S": "Q2_K_S", "IQ1_M": "Q2_K_S", "IQ2_XXS": "Q2_K_S", "IQ2_XS": "Q2_K_S", "IQ2_S": "Q2_K_S",
             "IQ2_M": "Q2_K", "IQ3_XXS": "Q3_K_S", "IQ3_XS": "Q3_K_S", "IQ3_S": "Q3_K_S", "IQ3_M": "Q3_K_M",
             "NVFP4": "MXFP4", "Q2_0": "Q2_K"}

FILE_TYPE = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K": 11,
             "Q4_K": 14, "Q5_K": 16, "Q6_K": 18, "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "TQ1_0": 36, "TQ2_0": 37,
             "MXFP4": 38, "Q1_0": 40}  # of a file that is all of one type

FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "TQ1_0": "Q4_0", "TQ2_0": "Q4_0", "IQ4_XS": "IQ4_NL", "Q4_K": "Q5_0",
            "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
FLOATS = ("F32", "F16", "BF16")
BLOCK = {name: (32, size) for name, size in (("Q4_0", 18), ("Q4_1", 20), ("Q5_0", 22), ("Q5_1", 24), ("Q8_0", 34),
                                             ("IQ4_NL", 18), ("MXFP4", 17))}
BLOCK |= {name: (256, size) for name, size in (("Q2_K", 84), ("Q3_K", 110), ("Q4_K", 144), ("Q5_K", 176),
                                               ("Q6_K", 210), ("IQ4_XS", 136), ("TQ1_0", 54), ("TQ2_0", 66))}
BLOCK |= {"Q1_0": (128, 18), "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2)}  # columns, bytes of a block

# parts of names of matrices that llama.cpp leaves alone
KEPT = ("_norm.weight", "ffn_gate_inp.weight", "altup", "laurel", "per_layer_model_proj", "ssm_conv1d",
        "shortconv.conv.weight", "attn_rel_b.weight", ".position_embd", ".patch_embd", ".patch_merger", ".rel_pos")
KEPT_WHOLE = ("position_embd.weight", "token_types.weight")

KINDS = (("attn_qkv.weight", "attn_v"), ("attn_kv_b.weight", "attn_v"), ("attn_v.weight", "attn_v"),
         ("attn_k.weight", "attn_k"), ("attn_q.weight", "attn_q"), ("attn_output.weight", "attn_output"),
         ("ffn_up", "ffn_up"), ("ffn_gate", "ffn_gate"), ("ffn_down", "ffn_down"))


def kind_of(gguf: str) -> str:
    """The kind that the rules know a tensor by: fused qkv counts as a value projection, as in llama.cpp."""
    if gguf == "output.weight":
        return "output"
    if gguf in ("token_embd.weight", "per_layer_token_embd.weight"):
        return "embedding"
    return next((kind for part, kind in KINDS if part in gguf), "other")


def quantizes(fact: Fact) -> bool:
    """Whether a mix changes the tensor: matrices called weight, but for norms, routers and position tables."""
    gguf = fact.gguf or ""
    matrix = len(fact.shape) > 1 and any(n > 1 for n in fact.shape[:-1])  # one row counts as a vector in GGUF
    return (matrix and gguf.endswith("weight") and gguf not in KEPT_WHOLE and not any(part in gguf for part in KEPT))


def _file_order(fact: Fact) -> tuple[int, str]:
    layer = re.match(r"blk\.(\d+)\.", fact.gguf or "")
    return (int(layer[1]) if layer else -1, fact.gguf or "")


def assign(mix: Mix, facts: ModelFacts, has_importance: bool, pure: bool = False) -> dict[str, tuple[str, str]]:
    """Tensor name -> (the type the mix wants, the type its width allows); only what a mix changes.

    `pure` gives every matrix the base type, as far as its width allows.
    """
    picked = [f for f in sorted(facts.tensors, key=_file_order) if quantizes(f)]
    kinds = [kind_of(f.gguf or "") for f in picked]
    values = sum(kind_of(f.gguf or "") == "attn_v" for f in facts.tensors)
    counts = {k: values if k == "attn_v" else facts.layers for k in kinds}
    seen: dict[str, int] = {}
    out = {}
    for fact, kind in zip(picked, kinds, strict=True):
        index = seen.get(kind, 0)
        seen[kind] = index + 1
        if facts.experts > 1 and kind.startswith("ffn"):
            index = _file_order(fact)[0]
        place = Place(kind, index, counts[kind], facts, has_importance,
                      len(fact.shape) == 3 and fact.shape[0] > 1)
        wanted = mix.base if pure or mix.base in FLOATS else _wanted(mix, place)
        out[fact.name] = wanted, fit_width(wanted, fact.shape[-1])
    return out


def _is_head(place: Place) -> bool:
    return place.kind == "output" or (place.kind == "embedding" and not place.facts.has_output)


def _wanted(mix: Mix, place: Place) -> str:
    if _is_head(place):
        return "Q8_0" if mix.base == "Q8_0" or falcon(place) else "Q6_K"
    name = next((name for kind, name, when in mix.rules if kind == place.kind and when(place)), mix.base)
    if place.kind == "attn_v" and place.facts.is_70b and name in ("Q3_K", "Q4_K"):
        name = "Q5_K"  # 8 heads share each value projection: it is small, so more bits cost little
    if place.kind in ("attn_v", "attn_k") and eight_experts(place):
        name = "Q8_0"
    return name


def bits(name: str) -> float:
    columns, size = BLOCK[name]
    return 8 * size / columns


def fit_width(name: str, columns: int) -> str:
    """The type that a row of `columns` takes where `name` is wanted."""
    if columns % BLOCK[name][0]:
        name = FALLBACK.get(name, name)
    return "F16" if columns % BLOCK[name][0] else name

"""Rotary position settings: Transformers' two spellings of them, and GGUF's metadata."""

from __future__ import annotations

import math
from typing import Any

Config = dict[str, Any]
Values = dict[str, Any]

TURNS = {"beta_fast": 32.0, "beta_slow": 1.0}  # between which yarn goes from one way of stretching to the other
DEFAULT_THETA = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0, "": 10_000.0}


def parameters(config: Config, kind: str = "") -> Config:
    """`rope_type`, `rope_theta` and the scaling of one kind of layer (`""`: all are alike), from either spelling.

    Transformers 5 writes `rope_parameters`, one dict or one a kind; before, `rope_theta` (Gemma 3's sliding layers:
    `rope_local_base_freq`) stood beside `rope_scaling`, which only the full layers follow.
    """
    found: Config = dict(config.get("rope_parameters") or {})
    if kind and (kind in found or not found):
        found = dict(found.get(kind) or {})
    if kind != "sliding_attention":
        found = dict(config.get("rope_scaling") or {}) | found
    theta = config.get("rope_local_base_freq" if kind == "sliding_attention" else "rope_theta")
    found.setdefault("rope_theta", theta or DEFAULT_THETA[kind])
    kind_of = found.get("rope_type") or found.get("type") or "default"
    found.pop("type", None)
    found["rope_type"] = "longrope" if kind_of == "su" else kind_of  # "su": Phi-3's first name for it
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if config.get(key) is not None and (key == "partial_rotary_factor" or found["rope_type"] == "longrope"):
            found.setdefault(key, config[key])
    return found


def refuse(config: Config, known: tuple[str, ...], kind: str = "", partial: bool = False) -> str | None:
    """Why these settings have no place in a GGUF file, or None. `partial`: it can rotate a part of each head."""
    rope = parameters(config, kind)
    if rope["rope_type"] not in known:
        return f"rope_type is {rope['rope_type']!r}; known here: {', '.join(known)}"
    if not partial and rope.get("partial_rotary_factor", 1.0) != 1.0:
        return f"partial_rotary_factor is {rope['partial_rotary_factor']}"
    odd = [k for k in ("mscale", "mscale_all_dim", "truncate") if rope.get(k) is not None]
    if rope["rope_type"] == "yarn" and odd:
        return f"yarn with {odd[0]} = {rope[odd[0]]} has no place in GGUF metadata"
    for key, meant in TURNS.items():
        if rope["rope_type"] == "yarn" and rope.get(key, meant) not in (None, meant):
            return f"yarn with {key} = {rope[key]}: llama.cpp takes {meant} whatever a file says"
    return None


def metadata(config: Config, kind: str = "") -> Values:
    """`rope.*` metadata: {key: (type, value)}. llama3 scaling travels as the tensor `rope_freqs.weight` instead."""
    rope = parameters(config, kind)
    values: Values = {"rope.freq_base": ("FLOAT32", rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        values["rope.scaling.type"] = ("STRING", rope["rope_type"])
        values["rope.scaling.factor"] = ("FLOAT32", rope["factor"])
    if rope["rope_type"] == "yarn":
        context = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]
        values["rope.scaling.original_context_length"] = ("UINT32", context)
        for key, hf in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"), ("attn_factor", "attention_factor")):
            if rope.get(hf) is not None:
                values[f"rope.scaling.yarn_{key}"] = ("FLOAT32", rope[hf])
    return values


def config(values: Values) -> Config:
    """`rope_parameters` from metadata whose keys have lost their prefix."""
    kind = values.get("rope.scaling.type", "none")
    rope: Config = {"rope_theta": float(values.get("rope.freq_base", 10000.0)), "rope_type": "default"}
    if kind == "none" and "rope.scaling.factor" in values:
        kind = "linear"
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": float(values.get("rope.scaling.factor", 1.0))}
    elif kind != "none":
        raise ValueError(f"rope.scaling.type is {kind!r}; known here: none, linear, yarn")
    if kind == "yarn":
        rope["original_max_position_embeddings"] = values.get("rope.scaling.original_context_length",
                                                              values["context_length"])
        for key, hf in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow"), ("attn_factor", "attention_factor")):
            if f"rope.scaling.yarn_{key}" in values:
                rope[hf] = float(values[f"rope.scaling.yarn_{key}"])
    if "rope.dimension_count" in values and not _whole_head(values):
        rope["partial_rotary_factor"] = values["rope.dimension_count"] / _head(values)
    return {"rope_parameters": rope}


def _head(values: Values) -> int:
    return int(values.get("attention.key_length") or values["embedding_length"] // values["attention.head_count"])


def _whole_head(values: Values) -> bool:
    return bool(values["rope.dimension_count"] == _head(values))


def longrope(values: Values, long: list[float], short: list[float]) -> Config:
    """Entries of `rope_parameters` for Phi-3's two lists of divisors, metadata keys without their prefix."""
    original = values["rope.scaling.original_context_length"]
    attention = values.get("rope.scaling.attn_factor")
    return {"rope_type": "longrope", "long_factor": long, "short_factor": short,
            "original_max_position_embeddings": original,
            **({} if attention is None else {"attention_factor": float(attention)})}


def rotary(config: Config, width: int) -> int:
    """Columns of each head that are rotated."""
    return int(width * parameters(config).get("partial_rotary_factor", 1.0))


# llama3: frequencies are divided by factors, which files hold as a tensor
def llama3_factors(rope: Config, width: int) -> list[float]:
    """The divisors of the width / 2 rotary frequencies (Llama 3.1's long-context scaling)."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, width, 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi) * rope["rope_theta"] ** (-i / width)
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        factors.append(1.0 / ((1.0 - smooth) / rope["factor"] + smooth))
    return factors


def llama3_from_factors(factors: list[float], theta: float) -> Config:
    """The settings whose `llama3_factors` these are, `low_freq_factor` taken as 1 (only ratios can be known).

    Raises:
        ValueError: no such settings exist.
    """
    width, factor = 2 * len(factors), max(factors)
    between = [(theta ** (-2 * i / width), (1 / f - 1 / factor) / (1 - 1 / factor))
               for i, f in enumerate(factors) if 1.0 < f < factor * (1 - 1e-6)]
    if len(between) < 2:
        raise ValueError("rope_freqs.weight does not determine a llama3 scaling")
    (x0, y0), (x1, y1) = between[0], between[-1]
    slope = (y1 - y0) / (x1 - x0)  # smooth = slope * frequency - low / (high - low)
    spread = slope * x0 - y0  # low / (high - low), with low = 1
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": round(factor, 4), "low_freq_factor": 1.0,
            "high_freq_factor": round(1 + 1 / spread, 3),
            "original_max_position_embeddings": round(slope / spread * 2 * math.pi)}
    if any(abs(a - b) > 2e-3 * b for a, b in zip(llama3_factors(rope, width), factors, strict=True)):
        raise ValueError("rope_freqs.weight is no llama3 scaling")
    return rope

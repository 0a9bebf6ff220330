"""Models of parts: a language model of a family in the table, beside a tower for images or sound and a projector.

The language model is quantized as its family is, the rest is left alone. Its tensors lie under `language_model.model.`
(files of Transformers before 4.52, and most that it writes now), under `model.language_model.`, or, in Qwen's older
files, under `model.` beside `visual.`.
"""

from __future__ import annotations

from fewbits.arch.base import Architecture, Config
from fewbits.arch.outline import Outline

# model types of inner or, in older files, whole configurations -> the family that their language model is like
LIKE = {"qwen2_vl": "qwen2", "qwen2_vl_text": "qwen2", "qwen2_5_vl": "qwen2", "qwen2_5_vl_text": "qwen2",
        "qwen3_vl_text": "qwen3", "qwen3_vl_moe_text": "qwen3_moe"}
PREFIXES = (("language_model.model.", "model."), ("model.language_model.", "model."),
            ("language_model.lm_head.", "lm_head."))


def inner_type(config: Config) -> str | None:
    """The model type of the language model inside, as the families of the table call it; None: it is no such model."""
    inner = config.get("text_config")
    if isinstance(inner, dict):
        kind = str(inner.get("model_type"))
        return LIKE.get(kind, kind)
    return LIKE.get(str(config.get("model_type")))


def outline(family: Architecture) -> Outline | None:
    """The roles of a model around one of `family`; None where its files hold weights as `[in, out]`."""
    if any(w.transposed for w in family.weights):
        return None
    return Outline(f"{family.name} and a tower", (), {w.hf: w.role for w in family.weights},
                   "GGUF takes language models alone, without a tower and a projector", PREFIXES)

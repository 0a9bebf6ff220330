"""What model types do beside what their tensors say: a row each of `FAMILIES`, for the native decoder.

Which norms, biases and fused matrices there are, and where, is said by the names in `arch`. Configurations are in
Llama's spelling, with what Transformers takes where they are silent: `settings`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from fewbits import arch
from fewbits.arch import wrapped
from fewbits.arch.base import Config, head_dim
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError, Unsupported

FULL, SLIDING = "full_attention", "sliding_attention"
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
               "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu"}


def _all_full(c: Config) -> list[str]:
    return [FULL] * c["num_hidden_layers"]


def _all_sliding(c: Config) -> list[str]:
    return [SLIDING if c.get("sliding_window") else FULL] * c["num_hidden_layers"]


def _last_sliding(c: Config) -> list[str]:
    window, first = c.get("sliding_window"), c["max_window_layers"]
    return c.get("layer_types") or [SLIDING if window and i >= first else FULL for i in range(c["num_hidden_layers"])]


def _turns(c: Config, pattern: int) -> list[str]:
    """Every `pattern`-th layer sees all positions, unless the configuration says otherwise."""
    turns = [SLIDING if (i + 1) % pattern else FULL for i in range(c["num_hidden_layers"])]
    return c.get("layer_types") or turns


def _every_second(c: Config) -> list[str]:
    return _turns(c, 2)


def _every_sixth(c: Config) -> list[str]:
    return _turns(c, c.get("sliding_window_pattern", 6))


def _of_heads(c: Config) -> float:
    return head_dim(c) ** -0.5


def _of_scalar(c: Config) -> float:
    return float(c["query_pre_attn_scalar"] ** -0.5)


def _gpt2_scale(c: Config) -> float:
    return _of_heads(c) if c["scale_attn_weights"] else 1.0


def _nothing(c: Config) -> str | None:
    return None


def _both_ways(c: Config) -> str | None:
    return "use_bidirectional_attention" if c.get("use_bidirectional_attention") else None


def _mixed_layers(c: Config) -> str | None:
    some = c.get("mlp_only_layers") or c.get("decoder_sparse_step", 1) != 1
    return "some layers without experts (mlp_only_layers, decoder_sparse_step)" if some else None


def _cross(c: Config) -> str | None:
    return "add_cross_attention" if c.get("add_cross_attention") else None


@dataclass(frozen=True)
class Family:
    """A model type. Norms are root mean squares and heads are rotated, unless a row says otherwise."""

    defaults: Config  # what Transformers takes where a configuration is silent, beside what `arch` has
    kinds: Callable[[Config], list[str]] = _all_full  # of layers: FULL or SLIDING
    activation: str = "hidden_act"  # where the configuration has it
    epsilon: str = "rms_norm_eps"
    centred: bool = False  # LayerNorm
    rotated: bool = True
    partly: bool = False  # `partial_rotary_factor` counts
    by_kind: bool = False  # each kind of layer has rotary settings of its own
    scale: Callable[[Config], float] = _of_heads  # of scores
    embedding: Callable[[Config], float] | None = None  # what embeddings are multiplied by
    caps: tuple[str, str] = ("", "")  # configuration entries: of scores, of logits
    parallel: bool = False  # attention and feed-forward read the same, unless `use_parallel_residual` is false
    normalised: Callable[[Config], bool] = field(default=lambda c: True)  # weights of the chosen experts sum to 1
    refuse: Callable[[Config], str | None] = _nothing  # what of a configuration cannot be computed


SILU: Config = {"hidden_act": "silu"}
LLAMA_SIZES: Config = SILU | {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32,
                              "num_attention_heads": 32}
QWEN_SIZES: Config = LLAMA_SIZES | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
                                    "sliding_window": 4096, "max_window_layers": 28}
GEMMA: Config = {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256}


def _root(c: Config) -> float:
    return math.sqrt(c["hidden_size"])


FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA_SIZES | {"intermediate_size": 11008}),
    "mistral": Family(LLAMA_SIZES | {"intermediate_size": 14336, "num_key_value_heads": 8, "sliding_window": 4096,
                                     "max_position_embeddings": 131072}, _all_sliding),
    "qwen2": Family(QWEN_SIZES, _last_sliding),
    "qwen3": Family(QWEN_SIZES, _last_sliding),
    "gemma2": Family(GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}, _every_second,
                     "hidden_activation", scale=_of_scalar, embedding=_root, refuse=_both_ways,
                     caps=("attn_logit_softcapping", "final_logit_softcapping")),
    "gemma3_text": Family(GEMMA, _every_sixth, "hidden_activation", by_kind=True, scale=_of_scalar, embedding=_root,
                          caps=("", "final_logit_softcapping"), refuse=_both_ways),
    "phi3": Family(LLAMA_SIZES | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192,
                                  "original_max_position_embeddings": 4096}, _all_sliding, partly=True),
    "gpt2": Family({"activation_function": "gelu_new", "scale_attn_weights": True}, activation="activation_function",
                   epsilon="layer_norm_epsilon", centred=True, rotated=False, scale=_gpt2_scale, refuse=_cross),
    "gpt_neox": Family({"hidden_act": "gelu", "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576,
                        "num_hidden_layers": 44, "num_attention_heads": 64}, epsilon="layer_norm_eps", centred=True,
                       partly=True, parallel=True),
    "olmo2": Family(LLAMA_SIZES | {"vocab_size": 50304, "intermediate_size": 11008}),
    "mixtral": Family(LLAMA_SIZES | {"intermediate_size": 14336}, _all_sliding),
    "qwen3_moe": Family(QWEN_SIZES | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
                                      "num_key_value_heads": 4}, _all_sliding, refuse=_mixed_layers,
                        normalised=lambda c: bool(c.get("norm_topk_prob"))),
}
WINDOWLESS = ("qwen2", "qwen3", "qwen3_moe")  # have a `sliding_window` that counts if `use_sliding_window` says so
TOWERS = ("gemma3", "llava")  # model types that compute texts as the model in their `text_config` alone does
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


def language(checkpoint: Checkpoint) -> Checkpoint:
    """The language model alone, of a model with a tower for images beside it: what it does with text only."""
    inner, kind = checkpoint.config.get("text_config"), str(wrapped.inner_type(checkpoint.config))
    if not isinstance(inner, dict) or kind not in FAMILIES or checkpoint.config.get("model_type") not in TOWERS:
        return checkpoint
    entries = {}
    for name, entry in checkpoint.entries.items():
        prefix, instead = next((p for p in wrapped.PREFIXES if name.startswith(p[0])), ("", ""))
        inside = instead + name.removeprefix(prefix)
        entries[inside] = entry.as_(name=inside)
    config = {k: v for k, v in inner.items() if k != "architectures"} | {"model_type": kind}
    return Checkpoint(checkpoint.path, checkpoint.container, config, entries, checkpoint.files)


def family_of(checkpoint: Checkpoint) -> tuple[Family, arch.Architecture]:
    """The rows that a checkpoint's model type has here and in `arch`.

    Raises:
        FewbitsError: it has none.
    """
    kind = str(checkpoint.config.get("model_type"))
    if kind not in FAMILIES:
        raise Unsupported(f"{checkpoint.path}: no native decoder for model type {kind!r}",
                           f"there are {', '.join(FAMILIES)}; fewbits.load() runs others")
    table = arch.lookup(checkpoint.config)
    if table is None:
        raise Unsupported(f"{checkpoint.path}: no native decoder for {checkpoint.architecture}",
                           "there are models with a language head; fewbits.load() runs others")
    return FAMILIES[kind], table


def settings(checkpoint: Checkpoint, family: Family, table: arch.Architecture) -> Config:
    """The configuration in Llama's spelling, complete; entries that are null count as stated.

    Raises:
        FewbitsError: sizes that are no numbers above zero, or something that the decoder does not compute.
    """
    theirs = {v: k for k, v in table.spelling.items()}
    null = {theirs.get(k, k) for k, v in checkpoint.config.items() if v is None}
    defaults = {k: v for k, v in (table.defaults | family.defaults).items() if k not in null}
    given = {theirs.get(k, k): v for k, v in checkpoint.config.items() if v is not None}
    config = arch.complete(table, defaults | given, checkpoint.entries)
    config = {k: v for k, v in config.items() if k in defaults or k in given or k == "tie_word_embeddings"}
    if checkpoint.config.get("model_type") in WINDOWLESS and not config.get("use_sliding_window"):
        config.pop("sliding_window", None)
    wrong = next((k for k in SIZES if not isinstance(config.get(k), int) or config[k] < 1), None)
    if wrong is not None:
        raise FewbitsError(f"{checkpoint.path}: the configuration has {wrong} = {config.get(wrong)!r}")
    if config["num_hidden_layers"] > len(checkpoint.entries):
        raise FewbitsError(f"{checkpoint.path}: {config['num_hidden_layers']} layers, with {len(checkpoint.entries)} "
                           "tensors in the file")
    reason = family.refuse(config)
    if reason:
        raise Unsupported(f"{checkpoint.path}: no native decoder for {reason}", "fewbits.load() runs it")
    act = config.get(family.activation)
    if act not in ACTIVATIONS:
        raise Unsupported(f"{checkpoint.path}: no native decoder for {family.activation} {act!r}",
                           f"there are {', '.join(ACTIVATIONS)}")
    return config

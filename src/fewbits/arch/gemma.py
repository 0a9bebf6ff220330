"""What Gemma 2 and Gemma 3 have in common: norms that multiply by 1 + w, windows on most layers, scaled attention."""

from __future__ import annotations

from fewbits.arch.base import Config, Values, head_dim


def scale(config: Config, largest: int) -> int:
    """`query_pre_attn_scalar` as GGUF implies it: llama.cpp knows the model of `largest` layers by their number."""
    if config["num_hidden_layers"] == largest:
        return int(config["hidden_size"] // config["num_attention_heads"])
    return head_dim(config)


def layers(count: int, pattern: int) -> list[str]:
    """`layer_types` where every `pattern`-th layer sees all positions."""
    return ["full_attention" if (i + 1) % pattern == 0 else "sliding_attention" for i in range(count)]


def refuse(config: Config, name: str, pattern: int, largest: int) -> str | None:
    """What neither of them can say in GGUF."""
    act = config.get("hidden_activation", "gelu_pytorch_tanh")
    if act != "gelu_pytorch_tanh":
        return f"hidden_activation is {act!r}, {name} in GGUF means 'gelu_pytorch_tanh'"
    if config.get("attention_bias"):
        return f"attention_bias is set: {name} in GGUF has no biases"
    if config.get("use_bidirectional_attention"):
        return f"use_bidirectional_attention is set: {name} in GGUF is causal"
    found = config.get("layer_types"), config.get("sliding_window_pattern", pattern)
    if found[1] != pattern or found[0] not in (None, layers(config["num_hidden_layers"], pattern)):
        return f"its layers do not follow {pattern - 1} sliding to 1 full, as {name} in GGUF does"
    wanted = scale(config, largest)
    if config.get("query_pre_attn_scalar", 256) != wanted:
        return f"query_pre_attn_scalar is {config.get('query_pre_attn_scalar', 256)}: {name} in GGUF means {wanted}"
    return None


def config(values: Values, pattern: int, largest: int) -> Config:
    """Configuration entries that follow from the metadata of either."""
    shape = {"num_hidden_layers": values["block_count"], "hidden_size": values["embedding_length"],
             "num_attention_heads": values["attention.head_count"], "head_dim": values.get("attention.key_length")}
    return {"layer_types": layers(values["block_count"], pattern), "query_pre_attn_scalar": scale(shape, largest)}

"""Part of gpu.py: a Llama of 8 billion random weights that no file holds, made on the GPU tensor by tensor."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import Bench

from fewbits import arch, codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import BF16
from fewbits.qtensor import QTensor
from fewbits.runtime.specimen import copies, random_weight

LOOKED_UP = "model.embed_tokens.weight"
LLAMA: dict[str, Any] = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": None}
TINY: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1,
                        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 320}


def config(bench: Bench) -> dict[str, Any]:
    found = LLAMA | (TINY if bench.rehearsed else {})
    return found | ({"num_hidden_layers": bench.layers} if bench.layers else {})


def checkpoint(bench: Bench, recipe: str) -> Checkpoint:
    """Matrices of the blocks in a codec, embeddings and head in bfloat16, norms of ones."""
    settings = config(bench)
    table = arch.lookup(settings)
    assert table is not None
    made: dict[tuple[Codec, Shape], QTensor] = {}
    entries = {}
    for tensor in arch.tensors(table, arch.complete(table, settings)):
        ends = tensor.role in ("token_embd", "output", "norm")
        codec, shape = BF16 if ends else codecs.get(recipe), tensor.shape(settings)
        load = (partial(ones, shape) if tensor.role == "norm" else
                partial(weight, made, codec, shape, bench.device))
        entries[tensor.hf] = Entry(tensor.hf, shape, codec, load)
    return Checkpoint(Path(f"random-{recipe}"), "safetensors", settings, entries)


def weight(made: dict[tuple[Codec, Shape], QTensor], codec: Codec, shape: Shape, device: torch.device) -> QTensor:
    """The same numbers for all tensors of a shape, in memory of their own."""
    if (codec, shape) not in made:
        made[codec, shape] = random_weight(codec, shape, device)
    return copies(made[codec, shape], 1)[0]


def ones(shape: Shape) -> QTensor:
    """On the CPU, where a file's norms come from."""
    return QTensor(BF16, shape, {"data": torch.ones(BF16.matrix(shape), dtype=torch.bfloat16)})


def token_bytes(source: Checkpoint) -> int:
    """Of the weights that a token is multiplied with: all but the table that it is looked up in."""
    return sum(entry.nbytes for name, entry in source.entries.items() if name != LOOKED_UP)


def plain_model(bench: Bench, dtype: torch.dtype) -> Any:
    """Transformers' own model with random weights, on the device."""
    import transformers

    settings, usual = transformers.AutoConfig.for_model(**config(bench)), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with bench.device:
            return transformers.LlamaForCausalLM(settings).eval()
    finally:
        torch.set_default_dtype(usual)

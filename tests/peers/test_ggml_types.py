"""llama.cpp computes with a file of each ggml type what we compute with it."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch
import transformers

import fewbits
from fewbits.loading import checkpoint_of

pytestmark = pytest.mark.peer
TYPES = ("Q4_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4", "TQ1_0", "TQ2_0", "Q1_0")
LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
tokens, paths = json.loads(sys.argv[1]), sys.argv[2:]
for path in paths:
    llama = Llama(path, n_ctx=len(tokens), n_batch=64, logits_all=True, type_k=0, type_v=0, flash_attn=False,
                  n_threads=1, n_threads_batch=1, verbose=False)
    llama.eval(tokens)
    np.save(path + ".npy", llama.scores[:len(tokens)])
"""


def test_logits_are_llamas(tmp_path, peer, shared):
    """Its activations are rounded to 8 bits, which is all that may differ: measured 0.7e-4 … 2.3e-4."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=2, vocab_size=512,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    source = tmp_path / "source"
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((shared("models/stories260k") / name).read_bytes())
    paths = {name: tmp_path / f"{name}.gguf" for name in TYPES}
    for name, path in paths.items():
        fewbits.quantize(source, path, name, overrides={"*": name})
    tokens = torch.randint(3, 512, (32,))
    subprocess.run([peer("llama"), "-c", LOGITS, json.dumps(tokens.tolist()), *map(str, paths.values())], check=True,
                   capture_output=True)
    for name, path in paths.items():
        theirs = np.load(f"{path}.npy").astype(np.float64)
        model = fewbits.load(path)
        assert {e.codec.name for e in checkpoint_of(model).entries.values()} == {"F32", name}
        with torch.no_grad():
            ours = model(tokens[None]).logits[0].double().numpy()
        assert ((ours - theirs) ** 2).sum() <= 1e-3 * (ours ** 2).sum(), name

"""llama.cpp opens what we write, computes what transformers computes, and tokenizes as the files we read say."""

from __future__ import annotations

import json
import random
import subprocess

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from fewbits import containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F32
from fewbits.containers.gguf import Gguf
from fewbits.qtensor import QTensor
from tests.peers.llama import logits

pytestmark = pytest.mark.peer
TOKENS = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
print(json.dumps([llama.tokenize(t.encode(), add_bos=True, special=True) for t in json.load(sys.stdin)]))
"""
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 256, "vocab_size": 512}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SMALL),
    "llama-bias": transformers.LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": transformers.LlamaConfig(**SMALL, head_dim=64, rope_parameters=LLAMA3),
    "llama-linear": transformers.LlamaConfig(**SMALL, rope_parameters={
        "rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}),
    "llama-yarn": transformers.LlamaConfig(**SMALL, rope_parameters={
        "rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 64}),
    "mistral": transformers.MistralConfig(**SMALL, sliding_window=None, head_dim=32),
    "qwen2": transformers.Qwen2Config(**SMALL, rope_parameters={"rope_type": "default", "rope_theta": 1e6}),
    "gemma3": transformers.Gemma3TextConfig(**(SMALL | {"num_hidden_layers": 7}), head_dim=32, sliding_window=24,
                                            query_pre_attn_scalar=32, final_logit_softcapping=30.0),
    "gemma3-bases": transformers.Gemma3TextConfig(
        **(SMALL | {"num_hidden_layers": 6}), head_dim=64, sliding_window=24, query_pre_attn_scalar=64,
        rope_parameters={"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 5e3}}),
}


def tiny(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.rand_like(p) - 0.5 if p.ndim == 1 else torch.randn_like(p) * 0.15)
    return model.eval()


def checkpoint(model: transformers.PreTrainedModel, path, files: dict[str, bytes]) -> Checkpoint:
    def entry(name: str, w: torch.Tensor) -> Entry:
        shape = tuple(w.shape)
        return Entry(name, shape, F32, lambda: QTensor(F32, shape, {"data": w.reshape(F32.matrix(shape))}))

    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    return Checkpoint(path / "source", "transformers", config, {n: entry(n, w) for n, w in state.items()}, files)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_transformers(name, tmp_path, peer, shared):
    python = peer("llama")
    folder = shared("models/stories260k")
    files = {f: (folder / f).read_bytes() for f in ("tokenizer.json", "tokenizer_config.json")}
    model = tiny(CONFIGS[name])
    containers.write(Gguf(), tmp_path / "m.gguf", checkpoint(model, tmp_path, files))
    tokens = torch.randint(3, SMALL["vocab_size"], (100,)).tolist()  # past the sliding window and llama3's old context
    theirs = logits(python, tmp_path / "m.gguf", tokens)
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].double().numpy()
    assert ((ours - theirs) ** 2).sum() / (ours ** 2).sum() <= 1e-6


def _texts() -> list[str]:
    rng = random.Random(0)
    sets = ["abcdefgh", "  \n\t", "0123456789", ".,!?'\"-_<>[]", "éüñçßøå", "приветмир", "你好世界", "こんにちは",
            "مرحبا", "नमस्ते", "🙂🎉👍🏽", "e\u0301o\u0308", "▁", "'s't'll", "\u00a0\u3000"]
    words = ["".join(rng.choice(rng.choice(sets)) for _ in range(rng.randint(1, 200))) for _ in range(150)]
    return ["", " ", "Hello world", "  two  spaces", "<s>x</s>", *words]


@pytest.mark.parametrize("name", ["stories260k", "smollm2-135m", "SmolLM2-135M-Instruct.Q4_1.gguf",
                                  "gemma-3-270m.Q4_K_M.gguf"])
def test_tokens_are_those_of_tokenizer_json(name, tmp_path, peer, shared, model):
    """llama.cpp on the file we write, against the tokenizer.json it came from and the one that we make of it."""
    source = containers.open(shared("models/stories260k") if name == "stories260k" else model(name))
    back = containers.write(Gguf(), tmp_path / "m.gguf", source)
    texts = _texts()
    done = subprocess.run([peer("llama"), "-c", TOKENS, str(tmp_path / "m.gguf")], input=json.dumps(texts), text=True,
                          check=True, capture_output=True)
    theirs = json.loads(done.stdout)
    for files in (source.files, back.files):
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        for text, wanted in zip(texts, theirs, strict=True):
            assert tokenizer.encode(text).ids == wanted, text


def test_a_file_without_a_tokenizer_opens(tmp_path, peer):
    containers.write(Gguf(), tmp_path / "m.gguf", checkpoint(tiny(CONFIGS["qwen2"]), tmp_path, {}))
    code = "import sys, llama_cpp as c; p = c.llama_model_default_params(); c.llama_backend_init()\n" \
           "m = c.llama_model_load_from_file(sys.argv[1].encode(), p); assert m\n" \
           "assert c.llama_vocab_n_tokens(c.llama_model_get_vocab(m)) == 512"
    subprocess.run([peer("llama"), "-c", code, str(tmp_path / "m.gguf")], check=True, capture_output=True)

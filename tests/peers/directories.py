"""What a peer loaded from our directories, and what it packed for us to read."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from fewbits import containers, load
from fewbits.checkpoint import Entry


def agrees(folder: Path, count: int) -> None:
    """The peer's `count` weights of a directory (in FOLDER.values, float16) are ours, its logits near ours."""
    theirs = safetensors.torch.load_file(f"{folder}.values")
    logits = theirs.pop("logits").float()
    assert len(theirs) == count
    ours = containers.open(folder)
    for name, meant in theirs.items():
        assert torch.equal(ours.entries[name].load().dequantize(torch.float16), meant), (folder.name, name)
    with torch.no_grad():
        mine = load(folder, kernel="decoded")(torch.arange(8)[None]).logits
    assert (mine - logits).pow(2).mean() / mine.pow(2).mean() < 1e-5  # they compute in float16


def packed(folder: Path, number: int) -> tuple[Entry, torch.Tensor]:
    """The weight `x.weight` that the peer packed as case `number`, as we read it, and what it stands for."""
    path = folder / f"case{number}"
    path.mkdir()
    files = safetensors.torch.load_file(folder / f"{number}.safetensors")
    meant = files.pop("meant")
    safetensors.torch.save_file(files, path / "model.safetensors")
    settings = json.loads((folder / f"{number}.json").read_text())
    (path / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return containers.open(path).entries["x.weight"], meant

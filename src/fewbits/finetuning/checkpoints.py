"""Checkpoints of a training: the parameters that are trained, nothing of the frozen model beside them."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

NAME = "trained.safetensors"
KEPT = "fitted_"  # begins the names of buffers that change while training, and are saved too
LAST = "trainer_state.json"  # what Trainer writes when everything else is there
LITTLE = 1 << 20  # bytes free on a disk that is as good as full


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    buffers = {name: b for name, b in model.named_buffers() if name.rpartition(".")[2].startswith(KEPT)}
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad} | buffers


def complete(folder: Path) -> bool:
    return (folder / LAST).exists() and (folder / NAME).exists()


def restore(model: nn.Module, folder: Path) -> None:
    """Put the parameters of a checkpoint into the model."""
    found = load_file(folder / NAME)
    with torch.no_grad():
        for name, p in trained(model).items():
            p.copy_(found[name])


class Checkpointed(transformers.Trainer):
    """A trainer that saves and loads these. A full disk is an OSError, whichever library meets it."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        assert isinstance(self.model, nn.Module)
        save_file({n: p.contiguous() for n, p in trained(self.model).items()}, os.path.join(output_dir, NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        assert isinstance(self.model, nn.Module)
        restore(self.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, *given: Any, **named: Any) -> None:
        try:
            super()._save_checkpoint(*given, **named)
        except (RuntimeError, SafetensorError) as error:
            folder = str(self.args.output_dir)
            if shutil.disk_usage(folder).free > LITTLE and "No space left" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), folder) from error

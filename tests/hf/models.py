"""What the tests of the plug-in share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from fewbits.runtime.linear import QLinear

IDS = torch.arange(3, 60)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def packed(model: torch.nn.Module) -> int:
    return sum(isinstance(m, QLinear) for m in model.modules())


def described(folder: Path) -> dict[str, Any]:
    """What a config.json says of the weights."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def pretrained(path: Path, **options: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(path, **options)

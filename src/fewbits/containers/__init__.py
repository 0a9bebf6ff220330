"""Every file layout, in the order in which a path is tried; `open(path)` finds the one that fits."""

from __future__ import annotations

from pathlib import Path

from fewbits.checkpoint import Checkpoint
from fewbits.containers.awq import Awq
from fewbits.containers.base import Container, write
from fewbits.containers.bnb import BitsAndBytes
from fewbits.containers.compressed import CompressedTensors
from fewbits.containers.directory import TransformersDirectory, read_json
from fewbits.containers.gguf import Gguf
from fewbits.containers.gptq import Gptq
from fewbits.errors import FewbitsError

__all__ = ["CONTAINERS", "Container", "by_name", "detect", "open", "write"]

CONTAINERS: tuple[Container, ...] = (Gguf(), Gptq(), Awq(), CompressedTensors(), BitsAndBytes(),
                                     TransformersDirectory())

VARIANTS: dict[str, Container] = {"gptq-v1": Gptq("gptq"), "gptq-v2": Gptq("gptq_v2")}  # for writing


def by_name(name: str) -> Container:
    """The container called `name`: "gguf", "gptq", "bitsandbytes", "transformers".

    Raises:
        FewbitsError: there is none.
    """
    for container in CONTAINERS:
        if container.name == name:
            return container
    if name in VARIANTS:
        return VARIANTS[name]
    raise FewbitsError(f"unknown container {name!r}", "one of: " + ", ".join(c.name for c in CONTAINERS))


def detect(path: Path) -> Container | None:
    """The container whose layout `path` is in, or None."""
    return next((container for container in CONTAINERS if container.detect(path)), None)


def open(path: Path | str) -> Checkpoint:
    """Open a model in any layout; its tensors are loaded when asked for.

    Raises:
        FewbitsError: there is nothing at `path`, or nothing that any container reads.
    """
    path = Path(path)
    if not path.exists():
        raise FewbitsError(f"{path}: no such file or directory")
    container = detect(path)
    if container is None:
        raise FewbitsError(*_why(path))
    return container.read(path)


def _why(path: Path) -> tuple[str, str]:
    """What stands in the way of reading `path`."""
    if path.is_file():
        return f"{path}: not a GGUF file", "a model is a .gguf file or a directory with config.json and *.safetensors"
    if not (path / "config.json").is_file():
        return f"{path}: has no config.json", "a model directory holds config.json and *.safetensors"
    if not any(path.glob("*.safetensors*")):
        return (f"{path}: has config.json and no *.safetensors",
                "pickled weights (*.bin, *.pt) are not read: convert them to safetensors first")
    quantization = read_json(path / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    return (f"{path}: config.json names the quantization method {method!r}, which no container reads",
            "read are: " + ", ".join(c.name for c in CONTAINERS))

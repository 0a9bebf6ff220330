"""Every file layout, in the order in which a path is tried; `open(path)` finds the one that fits."""

from __future__ import annotations

from pathlib import Path

from fewbits.checkpoint import Checkpoint
from fewbits.containers import pickles
from fewbits.containers.awq import Awq
from fewbits.containers.base import Container, write
from fewbits.containers.bnb import BitsAndBytes
from fewbits.containers.compressed import CompressedTensors
from fewbits.containers.directory import TransformersDirectory, folder_of, read_json
from fewbits.containers.fewbits import Fewbits
from fewbits.containers.fp8 import Fp8
from fewbits.containers.ggml_legacy import Ggml
from fewbits.containers.gguf import Gguf
from fewbits.containers.gptq import Gptq
from fewbits.containers.mxfp4 import Mxfp4
from fewbits.errors import FewbitsError

__all__ = ["CONTAINERS", "Container", "by_name", "detect", "open", "write"]

CONTAINERS: tuple[Container, ...] = (Gguf(), Ggml(), Gptq(), Awq(), CompressedTensors(), BitsAndBytes(), Fp8(),
                                     Mxfp4(), Fewbits(), TransformersDirectory())

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


def open(path: Path | str, allow_pickle: bool = False) -> Checkpoint:
    """Open a model in any layout; its tensors are loaded when asked for.

    With `allow_pickle`, weights in pickles (`*.pt`, `*.bin`) are read too, by a loader that runs no code of theirs.

    Raises:
        FewbitsError: there is nothing at `path`, or nothing that any container reads.
    """
    path = Path(path)
    if not path.exists():
        raise FewbitsError(f"{path}: no such file or directory")
    if allow_pickle and pickles.is_pickled(path):
        return _unpickled(path)
    container = detect(path)
    if container is None:
        raise FewbitsError(*_why(path))
    return container.read(path)


def _unpickled(path: Path) -> Checkpoint:
    """Pickles hold models in full precision, or GPTQ's of the time before safetensors."""
    if not (folder_of(path) / "config.json").is_file():
        raise FewbitsError(f"{path}: no config.json beside it", "a model is its weights and its config.json")
    raws = pickles.raw_tensors(path)
    packed = any(name.endswith(".qweight") for name in raws)
    return (Gptq() if packed else TransformersDirectory()).gather(path, raws)


def _why(path: Path) -> tuple[str, str]:
    """What stands in the way of reading `path`."""
    if path.is_file() and path.suffix in pickles.SUFFIXES:
        return f"{path}: pickled weights are not opened unasked", pickles.NOT_ASKED
    if path.suffix == ".safetensors" and not (path.parent / "config.json").is_file():
        return f"{path}: no config.json beside it", "a model is its weights and its config.json"
    if path.is_file() and path.suffix != ".safetensors":
        return f"{path}: not a GGUF file", "a model is a .gguf file or a directory with config.json and *.safetensors"
    folder, meant = folder_of(path), "a model directory holds config.json and *.safetensors"
    if not (folder / "config.json").is_file():
        return f"{path}: has no config.json", meant
    if path.is_dir() and not any(path.glob("*.safetensors*")):
        return (f"{path}: has config.json and no *.safetensors",
                pickles.NOT_ASKED if pickles.is_pickled(path) else meant)
    quantization = read_json(folder / "config.json").get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    return (f"{path}: config.json names the quantization method {method!r}, which no container reads",
            "read are: " + ", ".join(c.name for c in CONTAINERS))

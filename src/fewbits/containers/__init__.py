"""Every file layout, in the order in which a path is tried; `open(path)` finds the one that fits.

Layouts are modules that are imported when one is asked for, or when a path was none of those before.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.checkpoint import Checkpoint
    from fewbits.containers.base import Container, write

    CONTAINERS: tuple[Container, ...]
    VARIANTS: dict[str, Container]

__all__ = ["CONTAINERS", "Container", "by_name", "detect", "open", "write"]

# name -> module, class
HOMES = {"gguf": ("gguf", "Gguf"), "ggml": ("ggml_legacy", "Ggml"), "gptq": ("gptq", "Gptq"), "awq": ("awq", "Awq"),
         "compressed-tensors": ("compressed", "CompressedTensors"), "bitsandbytes": ("bnb", "BitsAndBytes"),
         "fp8": ("fp8", "Fp8"), "mxfp4": ("mxfp4", "Mxfp4"), "fewbits": ("fewbits", "Fewbits"),
         "transformers": ("directory", "TransformersDirectory")}
WRITTEN = {"gptq-v1": "gptq", "gptq-v2": "gptq_v2"}  # variants of GPTQ's layout, for writing


def __getattr__(name: str) -> Any:
    if name == "CONTAINERS":
        return tuple(_all())
    if name == "VARIANTS":
        return {variant: by_name(variant) for variant in WRITTEN}
    if name in ("Container", "write"):
        return getattr(import_module("fewbits.containers.base"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@cache
def _made(name: str) -> Container:
    module, kind = HOMES[name]
    made: Container = getattr(import_module(f"fewbits.containers.{module}"), kind)()
    return made


def _all() -> Iterator[Container]:
    return map(_made, HOMES)


@cache
def by_name(name: str) -> Container:
    """The container called `name`: "gguf", "gptq", "bitsandbytes", "transformers".

    Raises:
        FewbitsError: there is none.
    """
    if name in HOMES:
        return _made(name)
    if name in WRITTEN:
        from fewbits.containers.gptq import Gptq

        return Gptq(WRITTEN[name])
    raise FewbitsError(f"unknown container {name!r}", "one of: " + ", ".join(HOMES))


def detect(path: Path) -> Container | None:
    """The container whose layout `path` is in, or None."""
    return next((container for container in _all() if container.detect(path)), None)


def open(path: Path | str, allow_pickle: bool = False) -> Checkpoint:
    """Open a model in any layout; its tensors are loaded when asked for.

    With `allow_pickle`, weights in pickles (`*.pt`, `*.bin`) are read too, by a loader that runs no code of theirs.

    Raises:
        FewbitsError: there is nothing at `path`, or nothing that any container reads.
    """
    path = Path(path)
    if not path.exists():
        raise FewbitsError(f"{path}: no such file or directory")
    if allow_pickle:
        from fewbits.containers import pickles

        if pickles.is_pickled(path):
            return _unpickled(path)
    container = detect(path)
    if container is None:
        raise FewbitsError(*_why(path))
    return container.read(path)


def _unpickled(path: Path) -> Checkpoint:
    """Pickles hold models in full precision, or GPTQ's of the time before safetensors."""
    from fewbits.containers import pickles
    from fewbits.containers.directory import TransformersDirectory, folder_of
    from fewbits.containers.gptq import Gptq

    if not (folder_of(path) / "config.json").is_file():
        raise FewbitsError(f"{path}: no config.json beside it", "a model is its weights and its config.json")
    raws = pickles.raw_tensors(path)
    packed = any(name.endswith(".qweight") for name in raws)
    return (Gptq() if packed else TransformersDirectory()).gather(path, raws)


def _why(path: Path) -> tuple[str, str]:
    """What stands in the way of reading `path`."""
    from fewbits.containers import pickles
    from fewbits.containers.directory import folder_of, read_json

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
            "read are: " + ", ".join(HOMES))

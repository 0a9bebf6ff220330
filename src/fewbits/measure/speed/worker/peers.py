"""Transformers without us: alone, on bitsandbytes' kernels, on GPTQModel's."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .base import Json
from .modules import Modules

TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # of safetensors


class Transformers(Modules):
    """Alone, in the type that most weights are stored in, whatever the configuration says."""

    method: str | None = None  # of quantization, which the directory must have
    dtype = ""

    def __init__(self, job: Json):
        super().__init__(job)
        from transformers import AutoModelForCausalLM

        self._pretrained = AutoModelForCausalLM.from_pretrained

    def read(self, job: Json) -> Any:
        folder = Path(job["model"])
        if not (folder / "config.json").is_file():
            raise ValueError("it reads directories of Transformers only")
        settings = json.loads((folder / "config.json").read_text()).get("quantization_config") or {}
        found = settings.get("quant_method")
        if found != self.method:
            raise ValueError(f"the weights are in a layout of {found}" if found else "the weights are not quantized")
        return self.opened(folder, settings)

    def opened(self, folder: Path, settings: Json, **options: Any) -> Any:
        net = self._pretrained(folder, device_map={"": "cpu"}, dtype=self.dtype or stored(folder), **options)
        self.kernel = str(net.dtype).removeprefix("torch.")
        return net


def stored(folder: Path) -> str:
    found: Counter[str] = Counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as data:
            header = json.loads(data.read(int.from_bytes(data.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__":
                found[tensor["dtype"]] += tensor["data_offsets"][1] - tensor["data_offsets"][0]
    return TYPES.get(max(found, key=lambda kind: found[kind], default=""), "auto")


class Bitsandbytes(Transformers):
    """Products of four bits in bfloat16 or float32, around them float32."""

    method, dtype, packages = "bitsandbytes", "float32", (*Modules.packages, "bitsandbytes")
    ways: tuple[str, ...] = ("bfloat16", "float32")

    def __init__(self, job: Json):
        super().__init__(job)
        from bitsandbytes.nn import Linear4bit

        self._kind = Linear4bit

    def opened(self, folder: Path, settings: Json, **options: Any) -> Any:
        net = super().opened(folder, settings)
        self.layers = [m for m in net.modules() if isinstance(m, self._kind)]
        if not self.layers:
            self.ways = ("",)
        return net

    def take(self, way: str) -> None:
        self.kernel = way
        for layer in self.layers:
            layer.compute_dtype = getattr(self.torch, way)


class Gptqmodel(Transformers):
    """The kernels that it picks, or its plain one where those refuse the widths."""

    method, dtype, packages = "gptq", "float32", (*Modules.packages, "gptqmodel")

    def __init__(self, job: Json):
        os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it stops without
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than what is measured
        super().__init__(job)
        import gptqmodel  # noqa: F401

    def opened(self, folder: Path, settings: Json, **options: Any) -> Any:
        from transformers import GPTQConfig

        plain = GPTQConfig(bits=settings["bits"], backend="gptq_torch")
        refused: Exception | None = None
        for options in ({}, {"quantization_config": plain}):
            try:
                net = super().opened(folder, settings, **options)
                with self.torch.inference_mode():
                    net(self.torch.tensor([[1, 2]]))
                layer = next(m for m in net.modules() if hasattr(m, "qweight"))
                self.kernel = type(layer).__name__
                return net
            except (RuntimeError, ValueError, NotImplementedError) as error:
                refused = error
        assert refused is not None
        raise refused

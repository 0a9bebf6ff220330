"""Transformers' MXFP4 directories, the layout of gpt-oss: the experts in MXFP4, all else in floats.

In the place of `x.experts.down_proj` [experts, out, in] are `…down_proj_blocks` (U8 [experts, out, in / 32, 16]) and
`…down_proj_scales` (U8 [experts, out, in / 32], exponents of two with 127 added); `gate_up_proj` alike. Byte i of 16
holds elements 2 i (low half) and 2 i + 1, where ggml's blocks hold i and i + 16. Codes and exponents are the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Shape
from fewbits.codecs.mxfp4 import MXFP4
from fewbits.codecs.packing import pack_bits, unpack_bits
from fewbits.containers.directory import Directory, Layout, float_modules, float_reason
from fewbits.containers.safetensors import Raw, Spec
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

BLOCK = 32
CODEC = MXFP4()
PROJECTIONS = (".experts.gate_up_proj", ".experts.down_proj")


class Mxfp4(Directory):
    """gpt-oss as OpenAI released it."""

    name: ClassVar[str] = "mxfp4"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return (quantization or {}).get("quant_method") == "mxfp4"

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        names = [name.removesuffix("_blocks") for name in raws if name.endswith("_blocks")]
        found = [_read(raws, name) for name in names]
        for name, raw in raws.items():
            if name.endswith("_scales"):
                raise raw.refuse("belongs to a quantized tensor whose blocks are missing")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        if not isinstance(entry.codec, MXFP4):
            return "directories of gpt-oss have MXFP4 and floats only"
        if len(entry.shape) != 3 or not entry.name.endswith(PROJECTIONS):
            return "only fused experts (experts.gate_up_proj, experts.down_proj) are in MXFP4 in this layout"
        return None

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return Mxfp4Layout(checkpoint)


class Mxfp4Layout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        entries = self.checkpoint.entries
        if not any(isinstance(e.codec, MXFP4) for e in entries.values()):
            return None
        floats = [n for n, e in entries.items() if float_reason(e) is None]
        embeddings = [n.removesuffix(".weight") for n in floats if n.endswith("embed_tokens.weight")]
        whole = dict.fromkeys(n.rpartition(".")[0] for n in floats if n.endswith(PROJECTIONS))
        return {"quant_method": "mxfp4",
                "modules_to_not_convert": [*float_modules(self.checkpoint), *embeddings, *whole]}

    def specs(self, entry: Entry) -> dict[str, Spec]:
        if not isinstance(entry.codec, MXFP4):
            return super().specs(entry)
        groups = (*entry.shape[:-1], entry.shape[-1] // BLOCK)
        return {f"{entry.name}_blocks": ("U8", (*groups, BLOCK // 2)), f"{entry.name}_scales": ("U8", groups)}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if not isinstance(tensor.codec, MXFP4):
            return super().tensors(name, tensor)
        blocks, scales = to_file(tensor)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}


# the file's tensors and ggml's blocks ---------------------------------------------------------------------------------
def to_file(tensor: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks `[..., in / 32, 16]` and scales `[..., in / 32]`."""
    codes, params = tensor.unpack()
    groups = (*tensor.shape[:-1], tensor.shape[-1] // BLOCK)
    return pack_bits(codes, 4).reshape(*groups, BLOCK // 2), params["exponent"].reshape(groups)


def from_file(blocks: torch.Tensor, scales: torch.Tensor, shape: Shape) -> QTensor:
    """The inverse of `to_file`."""
    rows, columns = CODEC.matrix(shape)
    codes = unpack_bits(blocks.reshape(rows, columns // 2), 4, columns)
    return QTensor.pack(CODEC, shape, codes, {"exponent": scales.reshape(rows, -1, 1)})


# reading --------------------------------------------------------------------------------------------------------------
def _read(raws: dict[str, Raw], name: str) -> Entry:
    """Take the blocks and scales of one tensor out of `raws`."""
    blocks = raws.pop(f"{name}_blocks")
    if f"{name}_scales" not in raws:
        raise blocks.refuse(f"needs {name}_scales, which is missing")
    scales = raws.pop(f"{name}_scales")
    if blocks.dtype != "U8" or len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK // 2 or 0 in blocks.shape:
        raise blocks.refuse(f"{blocks.dtype} {list(blocks.shape)}, where U8 [experts, out, in / 32, 16] was expected")
    if scales.spec != ("U8", blocks.shape[:-1]):
        raise scales.refuse(f"{scales.dtype} {list(scales.shape)}, where U8 {list(blocks.shape[:-1])} was expected")
    shape = (*blocks.shape[:2], blocks.shape[2] * BLOCK)

    def load() -> QTensor:
        exponents = scales.tensor()
        bad = (exponents == 255).nonzero()
        if len(bad):
            raise scales.refuse(f"NaN (255) at {bad[0].tolist()}", "the file is damaged")
        return from_file(blocks.tensor(), exponents, shape)

    return Entry(name, shape, CODEC, load)

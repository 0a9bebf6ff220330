"""Transformers' fine-grained FP8 directories, the layout of DeepSeek-V3 and Qwen3-FP8: a scale for each square tile.

Beside `x.weight` (F8_E4M3 [out, in]) is `x.weight_scale_inv` (F32 [row tiles, column tiles]), by which the weight is
multiplied; tiles at the edges may be cut. Scales in BF16 and in powers of two (F8_E8M0, or U8) are read, and where
`weight_block_size` is null one scale for the whole tensor.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Shape, units
from fewbits.codecs.float8 import Float8, Float8Tiles
from fewbits.containers.directory import Directory, Layout, float_modules, float_reason, linear_reason
from fewbits.containers.safetensors import Raw, Spec
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

KINDS = {"F8_E4M3": "fp8-e4m3", "F8_E5M2": "fp8-e5m2"}
POWERS = ("F8_E8M0", "U8")  # scales that are exponents of two, 127 added
SCALE = "_scale_inv"
OF_ACTIVATIONS = (".activation_scale", ".input_scale")


class Fp8(Directory):
    """E4M3 weights with one float32 scale a tile."""

    name: ClassVar[str] = "fp8"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return (quantization or {}).get("quant_method") == "fp8"

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        if not raws:
            return []
        tile = _tile(next(iter(raws.values())).file.path.parent / "config.json", quantization)
        for name in [n for n in raws if n.endswith(OF_ACTIVATIONS)]:
            del raws[name]  # activations are not quantized here
        found = [_read_weight(raws, name, tile) for name in [n for n, raw in raws.items() if raw.dtype in KINDS]]
        for name, raw in raws.items():
            if name.endswith(SCALE):
                raise raw.refuse("belongs to a weight that is missing, or not in float8")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        codec = entry.codec
        if not isinstance(codec, Float8Tiles) or codec.kind.name != "e4m3":
            return "Transformers' fp8 directories have fp8-e4m3 with a scale a tile only (fp8-e4m3-b128)"
        first = next((e for e in checkpoint.entries.values() if isinstance(e.codec, Float8Tiles)), entry)
        if first.codec != codec:
            return f"all tiles have one size in this layout, and {first.name} is {first.codec.name}"
        if entry.shape[-1] % codec.tile:
            return (f"tiles of {codec.tile} do not divide {entry.shape[-1]} columns, and Transformers misreads the "
                    "rest: take a smaller tile, such as -b64")
        return linear_reason(checkpoint, entry)

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return Fp8Layout(checkpoint)


class Fp8Layout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        tiles = [e.codec.tile for e in self.checkpoint.entries.values() if isinstance(e.codec, Float8Tiles)]
        if not tiles:
            return None
        skip = float_modules(self.checkpoint)
        if "lm_head.weight" not in self.checkpoint.entries:
            skip.append("lm_head")  # tied: transformers makes the layer, and nothing quantized is there for it
        return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [tiles[0], tiles[0]],
                "modules_to_not_convert": skip or None}

    def specs(self, entry: Entry) -> dict[str, Spec]:
        if not isinstance(entry.codec, Float8Tiles):
            return super().specs(entry)
        return {entry.name: ("F8_E4M3", entry.shape),
                entry.name + SCALE: ("F32", entry.codec.planes(entry.shape)["scales"][1])}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if not isinstance(tensor.codec, Float8Tiles):
            return super().tensors(name, tensor)
        codes = tensor.planes["codes"].contiguous().view(tensor.codec.kind.dtype)
        return {name: codes.reshape(tensor.shape), name + SCALE: tensor.planes["scales"]}


# reading --------------------------------------------------------------------------------------------------------------
def _tile(config: Path, quantization: dict[str, Any]) -> int | None:
    """Rows and columns of a tile; None where a tensor has one scale."""
    found = quantization.get("weight_block_size", [128, 128])
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != 2 or not all(type(n) is int and n > 0 for n in found):
        raise FewbitsError(f"{config}: quantization_config: weight_block_size {found!r}", "two numbers, or null")
    if found[0] != found[1]:
        raise FewbitsError(f"{config}: quantization_config: tiles of {found[0]} x {found[1]} weights are not read",
                           "square ones are")
    return found[0]


def _read_weight(raws: dict[str, Raw], name: str, tile: int | None) -> Entry:
    """Take a weight and its scales out of `raws`."""
    weight = raws.pop(name)
    shape = weight.shape
    if len(shape) < 2 or 0 in shape:
        raise weight.refuse(f"{weight.dtype} {list(shape)}, where a matrix was expected")
    if name + SCALE not in raws:
        raise weight.refuse(f"needs {name}{SCALE}, which is missing")
    scale = raws.pop(name + SCALE)
    if scale.dtype not in ("F32", "F16", "BF16", *POWERS):
        raise scale.refuse(f"{scale.dtype} {list(scale.shape)}, where F32 was expected")
    codec = codecs.get(KINDS[weight.dtype] + ("" if tile is None else f"-b{tile}"))
    assert isinstance(codec, Float8)
    meant = () if tile is None else (*shape[:-2], units(shape[-2], tile), units(shape[-1], tile))
    if scale.shape != meant and not (tile is None and scale.shape == (1,)):
        raise scale.refuse(f"{list(scale.shape)}, where {list(meant)} was expected of {list(shape)} "
                           + ("weights with one scale" if tile is None else f"weights in tiles of {tile} x {tile}"))
    return Entry(name, shape, codec, lambda: _load(weight, scale, codec, shape))


def _load(weight: Raw, scale: Raw, codec: Float8, shape: Shape) -> QTensor:
    specs = codec.planes(shape)
    scales = _powers(scale) if scale.dtype in POWERS else scale.finite().float()
    if not isinstance(codec, Float8Tiles):
        scales = scales.reshape(1, 1).expand(specs["scales"][1]).contiguous()
    planes = {"codes": weight.tensor().view(torch.uint8), "scales": scales}
    return QTensor(codec, shape, {part: plane.reshape(specs[part][1]) for part, plane in planes.items()})


def _powers(raw: Raw) -> torch.Tensor:
    """2^(byte - 127) in float32; the byte 255 is NaN."""
    exponent = raw.tensor().view(torch.uint8).int()
    if bool((exponent == 255).any()):
        raise raw.refuse("a scale is NaN (255)", "the file is damaged")
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)

"""The format "float-quantized" of compressed-tensors: `x.weight` in F8_E4M3, times `x.weight_scale`.

A scale for each row ("channel", written and read), for the whole tensor ("tensor"), or for each square tile ("block").
Activations are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from fewbits import codecs
from fewbits.checkpoint import Entry
from fewbits.codecs.base import Codec
from fewbits.codecs.float8 import Float8, Float8Tiles
from fewbits.containers.intk import SCALES
from fewbits.containers.safetensors import Raw, Spec
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

FORMAT = "float-quantized"
SCALE = "_scale"


def writes(codec: Codec) -> bool:
    return isinstance(codec, Float8) and not isinstance(codec, Float8Tiles) and codec.kind.name == "e4m3"


def specs(entry: Entry) -> dict[str, Spec]:
    return {entry.name: ("F8_E4M3", entry.shape), entry.name + SCALE: ("F32", (entry.shape[0], 1))}


def tensors(name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
    return {name: tensor.planes["codes"].contiguous().view(torch.float8_e4m3fn), name + SCALE: tensor.planes["scales"]}


def weights() -> dict[str, Any]:
    """What the configuration says of them."""
    return {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "channel",
            "group_size": None}


def tiles(groups: Iterable[dict[str, Any]]) -> set[int]:
    """The sizes of square tiles that the configuration's groups name."""
    found = [(group.get("weights") or {}).get("block_structure") for group in groups]
    return {f[0] for f in found if isinstance(f, list) and len(f) == 2 and f[0] == f[1] and type(f[0]) is int
            and f[0] > 0}


def read(raws: dict[str, Raw], name: str, sizes: Iterable[int]) -> Entry:
    """Take a weight and its scales out of `raws`."""
    weight = raws.pop(name)
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise weight.refuse(f"{weight.dtype} {list(weight.shape)}, where a matrix was expected")
    if name + SCALE not in raws:
        raise weight.refuse(f"needs {name}{SCALE}, which is missing")
    scale, shape = raws.pop(name + SCALE), weight.shape
    rows, by_tiles = codecs.get("fp8-e4m3"), [codecs.get(f"fp8-e4m3-b{size}") for size in sorted(sizes)]
    forms: dict[Codec, list[tuple[int, ...]]] = {rows: [(shape[0], 1), (1, 1), (1,), ()]}
    forms |= {codec: [codec.planes(shape)["scales"][1]] for codec in by_tiles}
    codec = next((c for c, shapes in forms.items() if scale.shape in shapes), None)
    if scale.dtype not in SCALES or codec is None:
        meant = [f"[{shape[0]}, 1]", "[1]", *(str(list(forms[c][0])) for c in by_tiles)]
        raise scale.refuse(f"{scale.dtype} {list(scale.shape)}, where {' or '.join(SCALES)} {' or '.join(meant)} was "
                           f"expected of a weight {list(shape)}")

    def load() -> QTensor:
        wanted = codec.planes(shape)["scales"][1]
        scales = scale.finite().float()
        if scales.shape != wanted:
            scales = scales.reshape(1, 1).expand(wanted).contiguous()
        return QTensor(codec, shape, {"codes": weight.tensor().view(torch.uint8), "scales": scales})

    return Entry(name, shape, codec, load)

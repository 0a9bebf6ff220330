"""The part of compressed-tensors directories that is int8: the format "int-quantized".

For a linear layer `x` [out, in]: `x.weight` int8 [out, in], `x.weight_scale` [out, 1], where weights are asymmetric
`x.weight_zero_point` int8 [out, 1]. What becomes of activations stands in the configuration's `input_activations`: a
scale for each token, or one a layer, `x.input_scale` float32 [1].
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fewbits.checkpoint import Entry
from fewbits.codecs.base import Codec
from fewbits.codecs.w8a8 import W8A8
from fewbits.containers.intk import SCALES, codec_of, expect
from fewbits.containers.safetensors import Raw, Spec, take
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

FORMAT = "int-quantized"
ROUNDED = {"num_bits": 8, "type": "int", "symmetric": True}
TOKEN, LAYER = {"strategy": "token", "dynamic": True}, {"strategy": "tensor", "dynamic": False}


# writing --------------------------------------------------------------------------------------------------------------
def group(codec: W8A8) -> dict[str, Any]:
    """What the configuration says of layers in this codec, but for their names."""
    weights = ROUNDED | {"symmetric": codec.symmetric, "strategy": "channel", "dynamic": False}
    return {"weights": weights, "input_activations": ROUNDED | (LAYER if codec.static else TOKEN),
            "output_activations": None, "format": FORMAT}


def specs(entry: Entry) -> dict[str, Spec]:
    codec, (rows, columns) = entry.codec, entry.shape
    assert isinstance(codec, W8A8)
    found: dict[str, Spec] = {entry.name: ("I8", (rows, columns)), f"{entry.name}_scale": (codec.scale_kind, (rows, 1))}
    if not codec.symmetric:
        found[f"{entry.name}_zero_point"] = ("I8", (rows, 1))
    if codec.static:
        found[_input_scale(entry.name)] = ("F32", (1,))
    return found


def tensors(name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
    planes = tensor.planes
    found = {name: planes["codes"], f"{name}_scale": planes["scales"]}
    if "zeros" in planes:
        found[f"{name}_zero_point"] = planes["zeros"]
    if "inputs" in planes:
        found[_input_scale(name)] = planes["inputs"][0]
    return found


def _input_scale(name: str) -> str:
    return name.removesuffix("weight") + "input_scale"


# reading --------------------------------------------------------------------------------------------------------------
def read(raws: dict[str, Raw], name: str, groups: Mapping[str, dict[str, Any]]) -> Entry:
    """Take an int8 weight with one scale a row, or one in all, out of `raws`; and what rounds its activations."""
    weight = raws.pop(name)
    expect(weight, ("I8",), 2)
    scale, zero = take(raws, f"{name}_scale", weight), raws.pop(f"{name}_zero_point", None)
    rows, columns = weight.shape
    for raw, dtypes in ((scale, tuple(SCALES)), (zero, ("I8",))):
        if raw is not None and (raw.dtype not in dtypes or raw.shape not in ((rows, 1), (1,), ())):
            raise raw.refuse(f"{raw.dtype} {list(raw.shape)}, where {' or '.join(dtypes)} [{rows}, 1] or [1] was "
                             "expected", "int8 weights with one scale a row are read")
    kind = _activations(name.removesuffix(".weight"), groups, weight)
    inputs = take(raws, _input_scale(name), weight) if kind == LAYER else None
    if inputs is not None and (inputs.dtype not in SCALES or inputs.shape not in ((1,), ())):
        raise inputs.refuse(f"{inputs.dtype} {list(inputs.shape)}, where {' or '.join(SCALES)} [1] was expected")
    plain = codec_of(8, -1, zero is None, scale)
    codec: Codec = plain
    if kind is not None:
        codec = W8A8(inputs is not None, plain.symmetric, plain.scale_kind)

    def load() -> QTensor:
        planes = {"codes": weight.tensor(), "scales": _column(scale.finite(), rows)}
        if zero is not None:
            planes["zeros"] = _column(zero.tensor(), rows)
        if kind is None:
            planes |= {k: planes[k].view(torch.uint8) ^ 128 for k in ("codes", "zeros") if k in planes}
        if inputs is not None:
            planes["inputs"] = _column(_positive(inputs), rows)
        return QTensor(codec, (rows, columns), planes)

    return Entry(name, (rows, columns), codec, load)


def _positive(raw: Raw) -> torch.Tensor:
    found = raw.finite().float()
    if not bool((found > 0).all()):
        raise raw.refuse(f"a scale of {float(found.min()):g}")
    return found


def _column(values: torch.Tensor, rows: int) -> torch.Tensor:
    return values.reshape(-1, 1).expand(rows, 1).contiguous()


def _activations(module: str, groups: Mapping[str, dict[str, Any]], weight: Raw) -> dict[str, Any] | None:
    """How the activations of a layer are rounded: TOKEN or LAYER; None where they are not, or in another way."""
    try:
        named = [g for g in groups.values() if any(_names(t, module) for t in g.get("targets") or ())]
    except (re.error, TypeError, AttributeError) as error:
        raise weight.refuse(f"config_groups: targets: {error}") from None
    found = (named or [g for g in groups.values() if "Linear" in (g.get("targets") or ())] or [{}])[0]
    said = found.get("input_activations")
    if not isinstance(said, dict) or any(said.get(key, value) != value for key, value in ROUNDED.items()):
        return None
    return next((kind for kind in (TOKEN, LAYER) if said.get("strategy") == kind["strategy"]
                 and said.get("dynamic", False) == kind["dynamic"]), None)


def _names(target: str, module: str) -> bool:
    return re.match(target[3:], module) is not None if target.startswith("re:") else target == module

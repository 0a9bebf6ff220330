"""compressed-tensors directories (llm-compressor, vLLM): int-k weights in the format "pack-quantized".

Beside each other, for a linear layer `x` [out, in] of k bits: `x.weight_packed` int32 [out, in * k / 32], codes along
`in` in a little-endian bit stream; `x.weight_scale` [out, groups]; where weights are asymmetric `x.weight_zero_point`
int32 [out * k / 32, groups], packed along `out`; `x.weight_shape` int64 [2]. Codes and zero points are signed numbers
with 2^(k-1) added. "int-quantized" (compressed_int8.py) has int8 in `x.weight` itself, "float-quantized" float8
(compressed_float8.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.affine import IntK
from fewbits.codecs.base import Codec
from fewbits.codecs.packing import pack_bits, packed_bytes, unpack_bits
from fewbits.codecs.w8a8 import W8A8
from fewbits.containers import compressed_float8 as float8
from fewbits.containers import compressed_int8 as int8
from fewbits.containers.directory import Directory, Layout, float_modules, float_reason, linear_reason
from fewbits.containers.intk import (
    BITS,
    SCALES,
    codec_of,
    expect,
    expect_shape,
    group_reason,
    order_of,
    to_bytes,
    to_words,
    words,
    zeros_of,
)
from fewbits.containers.safetensors import Raw, Spec, take
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

PACKED, MIXED = "pack-quantized", "mixed-precision"
FORMATS = (PACKED, float8.FORMAT, int8.FORMAT, "naive-quantized", MIXED, "dense")
OF_ACTIVATIONS = tuple(f".{what}_{part}" for what in ("input", "output", "k", "v", "q")
                       for part in ("scale", "zero_point", "global_scale"))


@dataclass(frozen=True)
class Kind:
    """What a group of the configuration says of its weights; `group` is -1 where a row has one scale."""

    bits: int
    group: int
    symmetric: bool

    def groups(self, columns: int) -> int:
        return 1 if self.group == -1 else -(-columns // self.group)


class CompressedTensors(Directory):
    """What compressed-tensors saves, and transformers and vLLM load through it."""

    name: ClassVar[str] = "compressed-tensors"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return (quantization or {}).get("quant_method") == "compressed-tensors"

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        if not raws:
            return []
        kinds = _kinds(next(iter(raws.values())).file.path.parent, quantization)
        found = [int8.read(raws, name, quantization["config_groups"]) for name, raw in list(raws.items())
                 if name.endswith(".weight") and raw.dtype == "I8"]
        for name in [n for n in raws if n.endswith(OF_ACTIVATIONS)]:
            del raws[name]  # activations are rounded with int8 weights only
        packed = [name.removesuffix("_packed") for name in raws if name.endswith(".weight_packed")]
        found += [_read_packed(raws, name, kinds) for name in packed]
        tiles = float8.tiles(quantization["config_groups"].values())
        found += [float8.read(raws, name, tiles) for name, raw in list(raws.items()) if raw.dtype == "F8_E4M3"]
        for name, raw in raws.items():
            if name.endswith((".weight_scale", ".weight_zero_point", ".weight_g_idx")):
                raise raw.refuse("belongs to a quantized weight that is missing, or is in no form that is read")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        codec = entry.codec
        if float8.writes(codec) or isinstance(codec, W8A8):
            return linear_reason(checkpoint, entry)
        if not isinstance(codec, IntK) or codec.bits not in BITS:
            return "compressed-tensors has w8a8, int2, int3, int4 and int8 in groups only, and fp8-e4m3"
        return group_reason(codec, entry.shape[-1]) or linear_reason(checkpoint, entry)

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return CompressedLayout(checkpoint)


class CompressedLayout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        return quantization_config(self.checkpoint)

    def specs(self, entry: Entry) -> dict[str, Spec]:
        codec = entry.codec
        if float8.writes(codec):
            return float8.specs(entry)
        if isinstance(codec, W8A8):
            return int8.specs(entry)
        if not isinstance(codec, IntK):
            return super().specs(entry)
        rows, columns = entry.shape
        groups = columns // codec.unit(columns)
        found: dict[str, Spec] = {f"{entry.name}_packed": ("I32", (rows, words(columns, codec.bits))),
                                  f"{entry.name}_scale": (codec.scale_kind, (rows, groups)),
                                  f"{entry.name}_shape": ("I64", (2,))}
        if not codec.symmetric:
            found[f"{entry.name}_zero_point"] = ("I32", (words(rows, codec.bits), groups))
        return found

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if float8.writes(tensor.codec):
            return float8.tensors(name, tensor)
        if isinstance(tensor.codec, W8A8):
            return int8.tensors(name, tensor)
        if not isinstance(tensor.codec, IntK):
            return super().tensors(name, tensor)
        if tensor.order is not None:
            raise FewbitsError(f"compressed-tensors cannot hold {name}: its columns are in an order of their own "
                               "(act-order), which the format no longer has")
        return {f"{name}_{k}": v for k, v in to_file(tensor).items()}


def quantization_config(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What compressed-tensors wants to know: a group for all layers but those that differ, which are named."""
    kinds: dict[str, dict[str, Any]] = {}
    for entry in checkpoint.entries.values():
        found = _group(entry.codec)
        if found is not None:
            kinds[entry.name.removesuffix(".weight")] = found
    if not kinds:
        return None
    ignore = float_modules(checkpoint)
    if "lm_head.weight" not in checkpoint.entries:
        ignore.append("lm_head")  # tied: transformers makes the layer, and nothing quantized is there for it
    alike: dict[str, list[str]] = {}
    for module, kind in kinds.items():
        alike.setdefault(json.dumps(kind), []).append(module)
    groups: dict[str, dict[str, Any]] = {}
    for i, (text, modules) in enumerate(sorted(alike.items(), key=lambda item: -len(item[1]))):
        groups[f"group_{i}"] = {"targets": modules if i else ["Linear"], **json.loads(text)}
    formats = {group["format"] for group in groups.values()}
    return {"quant_method": "compressed-tensors", "format": formats.pop() if len(formats) == 1 else MIXED,
            "quantization_status": "compressed", "config_groups": groups, "ignore": ignore, "kv_cache_scheme": None,
            "global_compression_ratio": None}


def _group(codec: Codec) -> dict[str, Any] | None:
    """What the configuration says of layers in this codec, but for their names; None where they are in floats."""
    if isinstance(codec, W8A8):
        return int8.group(codec)
    others: dict[str, Any] = {"input_activations": None, "output_activations": None}
    if float8.writes(codec):
        return {"weights": float8.weights(), **others, "format": float8.FORMAT}
    if not isinstance(codec, IntK):
        return None
    weights = {"num_bits": codec.bits, "type": "int", "symmetric": codec.symmetric, "dynamic": False,
               "strategy": "channel" if codec.group == -1 else "group",
               "group_size": None if codec.group == -1 else codec.group}
    return {"weights": weights, **others, "format": PACKED}


# the file's tensors and the canonical planes --------------------------------------------------------------------------
def to_file(tensor: QTensor) -> dict[str, torch.Tensor]:
    """packed, scale, shape and perhaps zero_point of a tensor."""
    codec, (rows, columns) = tensor.codec, tensor.shape
    assert isinstance(codec, IntK)
    found = {"packed": to_words(tensor.planes["codes"], words(columns, codec.bits)), "scale": tensor.planes["scales"],
             "shape": torch.tensor([rows, columns])}
    if not codec.symmetric:
        zeros = pack_bits(zeros_of(tensor).t(), codec.bits)
        found["zero_point"] = to_words(zeros, words(rows, codec.bits)).t().contiguous()
    return found


# reading --------------------------------------------------------------------------------------------------------------
def _kinds(folder: Path, config: dict[str, Any]) -> list[Kind]:
    """What the groups of the configuration say of int weights; refuses formats that are not read."""
    where = f"{folder / 'config.json'}: quantization_config:"
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        raise FewbitsError(f"{where} config_groups {groups!r}", "an object of groups, each with its weights in full")
    sparsity, transform = config.get("sparsity_config") or {}, config.get("transform_config")
    formats = [found.get("format") for found in (config, sparsity, *groups.values()) if isinstance(found, dict)]
    for name in formats:
        if name is not None and name not in FORMATS:
            raise FewbitsError(f"{where} format {name!r}", f"read are {', '.join(FORMATS)}")
    if transform and transform != {"config_groups": {}}:
        raise FewbitsError(f"{where} transform_config", "models whose activations are rotated as they run are not read")
    return list(_weights(where, groups))


def _weights(where: str, groups: dict[str, dict[str, Any]]) -> Iterator[Kind]:
    for name, group in groups.items():
        found = group.get("weights")
        if found is None or (isinstance(found, dict) and found.get("type", "int") != "int"):
            continue
        at = f"{where} config_groups: {name}:"
        if not isinstance(found, dict):
            raise FewbitsError(f"{at} weights {found!r}", "an object was expected")
        bits, size, strategy = found.get("num_bits", 8), found.get("group_size"), found.get("strategy")
        strategy = strategy or ("channel" if size == -1 else "group" if size else "tensor")
        if type(bits) is not int or bits not in BITS:
            raise FewbitsError(f"{at} {bits!r} bits", "2, 3, 4 or 8")
        if strategy not in ("group", "channel", "tensor"):
            raise FewbitsError(f"{at} strategy {strategy!r}", "group or channel")
        size = size if strategy == "group" else -1
        if type(size) is not int or (size < 1 and strategy == "group"):
            raise FewbitsError(f"{at} groups of {size!r}", "a number of columns")
        yield Kind(bits, size, found.get("symmetric", True) is not False)


def _read_packed(raws: dict[str, Raw], name: str, kinds: list[Kind]) -> Entry:
    """Take the tensors of one packed weight out of `raws`."""
    packed = raws.pop(f"{name}_packed")
    expect(packed, ("I32",), 2)
    scale, shape_raw = (take(raws, f"{name}_{part}", packed) for part in ("scale", "shape"))
    zero, g_idx = (raws.pop(f"{name}_{part}", None) for part in ("zero_point", "g_idx"))
    expect(scale, tuple(SCALES), 2)
    rows, columns = _shape(shape_raw)
    kind = _fitting(packed, zero, scale, (rows, columns), kinds)
    groups = kind.groups(columns)
    expect_shape(packed, (rows, words(columns, kind.bits)), kind.bits, kind.group)
    expect_shape(scale, (rows, groups), kind.bits, kind.group)
    if zero is not None:
        _expect_zero(zero, rows, groups, kind)
    if g_idx is not None:
        expect(g_idx, ("I32", "I64"), 1)
        expect_shape(g_idx, (columns,), kind.bits, kind.group)
    codec = codec_of(kind.bits, kind.group, zero is None, scale)

    def load() -> QTensor:
        stream = to_bytes(packed.tensor())
        order = _order(g_idx, columns, codec, groups)
        if order is not None:
            stream = pack_bits(unpack_bits(stream, codec.bits, columns)[:, order], codec.bits)
        planes = {"codes": stream[:, :packed_bytes(columns, codec.bits)].contiguous(), "scales": scale.finite()}
        if zero is not None:
            planes["zeros"] = pack_bits(_zeros(zero, codec, rows), codec.bits)
        return QTensor(codec, (rows, columns), planes, order)

    return Entry(name, (rows, columns), codec, load)


def _shape(raw: Raw) -> tuple[int, int]:
    if raw.shape != (2,) or raw.dtype not in ("I64", "I32"):
        raise raw.refuse(f"{raw.dtype} {list(raw.shape)}, where I64 [2] was expected")
    rows, columns = struct.unpack("<2q" if raw.dtype == "I64" else "<2i", raw.data())
    if rows < 1 or columns < 1:
        raise raw.refuse(f"a weight of {[rows, columns]}")
    return rows, columns


def _fitting(packed: Raw, zero: Raw | None, scale: Raw, shape: tuple[int, int], kinds: list[Kind]) -> Kind:
    """Which of the configuration's groups a layer is of: its own tensors tell."""
    fit = [k for k in kinds if packed.shape == (shape[0], words(shape[1], k.bits))
           and scale.shape[1] == k.groups(shape[1]) and k.symmetric == (zero is None)]
    if len({k.bits for k in fit}) > 1:
        raise packed.refuse(f"{' or '.join(str(k.bits) for k in fit)} bits: its shape fits more than one group of "
                            "the configuration")
    if fit:
        return fit[0]
    if not kinds:
        raise packed.refuse("packed, and no group of the configuration has int weights")
    if all(k.symmetric == (zero is not None) for k in kinds):
        raise packed.refuse(f"is {'symmetric' if zero is None else 'asymmetric'}, and no group of the configuration is")
    return kinds[0]


def _expect_zero(zero: Raw, rows: int, groups: int, kind: Kind) -> None:
    """Packed along `out`; in the first versions of the format int8, not packed."""
    expect(zero, ("I32", "I8"), 2)
    expect_shape(zero, (words(rows, kind.bits) if zero.dtype == "I32" else rows, groups), kind.bits, kind.group)


def _zeros(zero: Raw, codec: IntK, rows: int) -> torch.Tensor:
    """Zero points `[rows, groups]`."""
    if zero.dtype == "I32":
        return unpack_bits(to_bytes(zero.tensor().t()), codec.bits, rows).t()
    found = zero.tensor().to(torch.int16) + codec.middle
    if not 0 <= int(found.min()) <= int(found.max()) <= codec.top:
        raise zero.refuse(f"zero points from {int(found.min()) - codec.middle} to {int(found.max()) - codec.middle} in "
                          f"{codec.bits} bits")
    return found.to(torch.uint8)


def _order(g_idx: Raw | None, columns: int, codec: IntK, groups: int) -> torch.Tensor | None:
    """Column order of full act-order; a g_idx of -1 everywhere was never set."""
    if g_idx is None or bool((g_idx.tensor() == -1).all()):
        return None
    return order_of(g_idx, columns, codec.unit(columns), groups)

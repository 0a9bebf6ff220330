"""GPTQ directories, the layout of AutoGPTQ and GPTQModel: int-k weights with one scale and zero point a group.

Beside each other, where a linear layer `x` [out, in] has k bits and groups of g columns:
`x.qweight` int32 [in * k / 32, out], codes along `in`; `x.qzeros` int32 [in / g, out * k / 32], zero points along
`out`; `x.scales` [in / g, out]; `x.g_idx` int32 [in], the group of each column. Codes lie in little-endian bit streams
through the words. Version 1 ("gptq") stores zero - 1; version 2 ("gptq_v2") stores the zero point itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fewbits import __version__
from fewbits.checkpoint import Checkpoint, Entry, Filed
from fewbits.codecs.affine import IntK
from fewbits.codecs.base import Shape
from fewbits.codecs.packing import pack_bits, packed_bytes, unpack_bits
from fewbits.containers.directory import (
    Directory,
    Layout,
    float_modules,
    float_reason,
    folder_of,
    linear_reason,
    names_contain,
    read_json,
)
from fewbits.containers.gptq_config import Rules, dynamic_rules
from fewbits.containers.gptq_inferred import Inferred, infer, shapes_of
from fewbits.containers.intk import (
    BITS,
    SCALES,
    all_alike,
    codec_of,
    expect,
    expect_shape,
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
from fewbits.stored import Apart

V1, V2 = "gptq", "gptq_v2"


class Gptq(Directory):
    """GPTQ directories. Written in version 1 if every weight is symmetric, else in version 2, unless told otherwise.

    GPTQModel refuses asymmetric weights in version 1 from any writer but itself.
    """

    name: ClassVar[str] = "gptq"
    ordered: ClassVar[bool] = True

    def __init__(self, version: str | None = None):
        if version not in (None, V1, V2):
            raise FewbitsError(f"unknown version {version!r} of GPTQ directories", f"{V1} or {V2}")
        self.version = version

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        if quantization is None:
            return not (folder_of(path) / "quant_config.json").is_file() and names_contain(path, ".qweight")
        return quantization.get("quant_method", "gptq" if "bits" in quantization else None) == "gptq"

    def quantization(self, path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
        found = super().quantization(path, config)
        if found is None and (path / "quantize_config.json").is_file():  # as older AutoGPTQ wrote it
            found = read_json(path / "quantize_config.json")
        return found

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        modules = [name.removesuffix(".qweight") for name in raws if name.endswith(".qweight")]
        if not modules:
            return []
        folder = next(iter(raws.values())).file.path.parent
        shapes = shapes_of(read_json(folder / "config.json"))
        widths = {name.removesuffix(".weight"): shape[-1] for name, shape in shapes.items() if len(shape) > 1}
        _drop_biases(raws, modules, shapes)
        rules = Rules.parse(folder, quantization) if quantization else infer(raws, modules, widths)
        found = [read_module(raws, module, rules, widths.get(module)) for module in modules]
        for name, raw in raws.items():
            if name.endswith((".qzeros", ".g_idx")):
                raise raw.refuse("belongs to a quantized layer whose qweight is missing")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        codec = entry.codec
        if not isinstance(codec, IntK) or codec.bits not in BITS:
            return "GPTQ directories have int2, int3, int4 and int8 in groups only"
        reason = linear_reason(checkpoint, entry)
        if reason is None and self.version == V1 and not codec.symmetric:
            zeros = entry.load().unpack()[1]["zero"]
            if bool((zeros == 0).any()):
                return f"it has zero points of 0, which version 1 ({V1}) cannot hold; {V2} can"
        return reason

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return GptqLayout(checkpoint, self.version)


class GptqLayout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint, version: str | None):
        codecs_used = [e.codec for e in checkpoint.entries.values()]
        symmetric = all(codec.symmetric for codec in codecs_used if isinstance(codec, IntK))
        self.version = version or (V1 if symmetric else V2)
        self.checkpoint = checkpoint
        self.ordered = False  # whether a tensor came with a column order

    def quantization_config(self) -> dict[str, Any] | None:
        return quantization_config(self.checkpoint, self.version, self.ordered)

    def specs(self, entry: Entry) -> dict[str, Spec]:
        codec = entry.codec
        if not isinstance(codec, IntK):
            return super().specs(entry)
        module, (rows, columns) = entry.name.removesuffix(".weight"), entry.shape
        groups = -(-columns // codec.unit(columns))
        return {f"{module}.qweight": ("I32", (words(columns, codec.bits), rows)),
                f"{module}.qzeros": ("I32", (groups, words(rows, codec.bits))),
                f"{module}.scales": (codec.scale_kind, (groups, rows)),
                f"{module}.g_idx": ("I32", (columns,))}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if not isinstance(tensor.codec, IntK):
            return super().tensors(name, tensor)
        self.ordered |= tensor.order is not None
        module = name.removesuffix(".weight")
        return {f"{module}.{k}": v for k, v in to_file(tensor, self.version).items()}


def quantization_config(checkpoint: Checkpoint, version: str, ordered: bool) -> dict[str, Any] | None:
    """What GPTQModel and transformers want to know; layers that differ from most are named in "dynamic"."""
    kinds = {e.name.removesuffix(".weight"): (e.codec.bits, e.codec.group, e.codec.symmetric)
             for e in checkpoint.entries.values() if isinstance(e.codec, IntK)}
    if not kinds:
        return None
    bits, group, symmetric = Counter(kinds.values()).most_common(1)[0][0]
    skipped = [m for m in float_modules(checkpoint) if m.split(".")[-1] != "lm_head"]
    dynamic = dynamic_rules(kinds, (bits, group, symmetric), skipped)
    return {
        "bits": bits,
        "group_size": group,
        "sym": symmetric,
        "desc_act": ordered,
        "lm_head": any(m.split(".")[-1] == "lm_head" for m in kinds),
        "quant_method": "gptq",
        "checkpoint_format": version,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"fewbits:{__version__}"]},
    } | ({"dynamic": dynamic} if dynamic else {})


# the file's tensors and the canonical planes --------------------------------------------------------------------------
def to_file(tensor: QTensor, version: str) -> dict[str, torch.Tensor]:
    """qweight, qzeros, scales and g_idx of a tensor."""
    codec, (rows, columns), stream = tensor.codec, tensor.shape, tensor.planes["codes"]
    assert isinstance(codec, IntK)
    unit = codec.unit(columns)
    g_idx = torch.arange(columns, dtype=torch.int32) // unit  # [columns]
    if tensor.order is not None:
        back = torch.argsort(tensor.order)  # where each column of the weight is stored
        stream = pack_bits(unpack_bits(stream, codec.bits, columns)[:, back], codec.bits)
        g_idx = g_idx[back]
    zeros = zeros_of(tensor).t()
    if version == V1:
        zeros = (zeros - 1) & ((1 << codec.bits) - 1)  # uint8 wraps
    return {"qweight": to_words(stream, words(columns, codec.bits)).t().contiguous(),
            "qzeros": to_words(pack_bits(zeros, codec.bits), words(rows, codec.bits)),
            "scales": tensor.planes["scales"].t().contiguous(), "g_idx": g_idx}


@dataclass(frozen=True)
class Module:
    """The raw tensors of one quantized layer, checked against each other."""

    qweight: Raw
    qzeros: Raw
    scales: Raw
    g_idx: Raw | None
    codec: IntK
    columns: int
    version: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.scales.shape[1], self.columns

    def load(self) -> QTensor:
        codec, (rows, columns) = self.codec, self.shape
        stream = to_bytes(self.qweight.tensor().t())  # [rows, bytes]
        order = order_of(self.g_idx, columns, codec.unit(columns), self.scales.shape[0])
        if order is not None:
            stream = pack_bits(unpack_bits(stream, codec.bits, columns)[:, order], codec.bits)
        planes = {"codes": stream[:, :packed_bytes(columns, codec.bits)].contiguous(),
                  "scales": self.scales.finite().t().contiguous()}
        if not codec.symmetric:
            zeros = unpack_bits(to_bytes(self.qzeros.tensor()), codec.bits, rows)  # [groups, rows]
            zeros = (zeros + 1) & ((1 << codec.bits) - 1) if self.version == V1 else zeros
            planes["zeros"] = pack_bits(zeros.t(), codec.bits)
        return QTensor(codec, self.shape, planes, order)

    def stored(self) -> Apart | None:
        """Where its codes lie; None where columns are in another order, or codes cross bytes."""
        codec, (rows, columns), codes = self.codec, self.shape, self.qweight.array()
        if codes is None or codec.bits == 3 or columns * codec.bits % 32:
            return None
        g_idx = None if self.g_idx is None else self.g_idx.array()
        if g_idx is not None and self.g_idx is not None:
            found = g_idx.view("<i4" if self.g_idx.dtype == "I32" else "<i8")
            if not np.array_equal(found, np.arange(columns) // codec.unit(columns)):
                return None
        scales, zeros, words = self.scales.finite_array(), None, self.qzeros.array()
        assert scales is not None and words is not None
        if not codec.symmetric:
            mask = (1 << codec.bits) - 1
            each = words.reshape(len(scales), -1, 1) >> np.arange(0, 8, codec.bits, dtype=np.uint8) & mask
            zeros = (each.reshape(len(scales), -1)[:, :rows].T + np.uint8(self.version == V1)) & mask
        return Apart(codec, self.shape, codes, scales.T, zeros, across=True)


# reading --------------------------------------------------------------------------------------------------------------
def _drop_biases(raws: dict[str, Raw], modules: list[str], known: Mapping[str, Shape]) -> None:
    """Leave out biases of zeros that the architecture has no place for: older writers gave every layer one."""
    for name in (f"{module}.bias" for module in modules):
        if known and name in raws and name not in known and not raws[name].data().strip(b"\0"):
            del raws[name]


def read_module(raws: dict[str, Raw], module: str, rules: Rules | Inferred, width: int | None) -> Entry:
    """Take the tensors of one layer out of `raws`; `width` is how many columns the architecture wants, if known."""
    qweight = raws.pop(f"{module}.qweight")
    qzeros, scales = (take(raws, f"{module}.{part}", qweight) for part in ("qzeros", "scales"))
    g_idx = raws.pop(f"{module}.g_idx", None)
    bits, group = rules.of(module)
    for raw in (qweight, qzeros):
        expect(raw, ("I32",), 2)
    expect(scales, tuple(SCALES), 2)
    if g_idx is not None:
        expect(g_idx, ("I32", "I64"), 1)
    columns = g_idx.shape[0] if g_idx is not None else width or qweight.shape[0] * 32 // bits
    rows = scales.shape[1]
    groups = 1 if group == -1 else -(-columns // group)
    for raw, meant in ((qweight, (words(columns, bits), rows)), (scales, (groups, rows)),
                       (qzeros, (groups, words(rows, bits)))):
        expect_shape(raw, meant, bits, group)
    symmetric = all_alike(qzeros, bits, rows, (1 << (bits - 1)) - (rules.version == V1))
    codec = codec_of(bits, group, symmetric, scales)
    found = Module(qweight, qzeros, scales, g_idx, codec, columns, rules.version)
    return Entry(f"{module}.weight", found.shape, codec, Filed(found.load, found.stored))

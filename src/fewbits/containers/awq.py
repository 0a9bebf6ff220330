"""AWQ directories in the "gemm" version: int4 with a scale and zero point a group, packed along `out`.

Beside each other, for a linear layer `x` [out, in] with groups of g columns: `x.qweight` int32 [in, out / 8],
`x.qzeros` int32 [in / g, out / 8], `x.scales` [in / g, out]. A word holds eight neighbours along `out`, interleaved:
from its lowest four bits up numbers 0, 2, 4, 6, 1, 3, 5, 7. Zero points are stored as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.affine import IntK
from fewbits.codecs.packing import pack_bits, packed_bytes, transpose_nibbles
from fewbits.containers.directory import Directory, Layout, float_modules, float_reason, linear_reason, read_json
from fewbits.containers.intk import (
    SCALES,
    codec_of,
    expect,
    expect_shape,
    group_reason,
    to_bytes,
    to_words,
    zeros_of,
)
from fewbits.containers.safetensors import Raw, Spec, take
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies where in a word
BACK = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of them lies
BITS, LANES = 4, 8  # bits a code, codes a word
MIDDLE = b"\x88"  # two zero points of 8


class Awq(Directory):
    """What AutoAWQ writes, and transformers loads through gptqmodel."""

    name: ClassVar[str] = "awq"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return (quantization or {}).get("quant_method") == "awq"

    def quantization(self, path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
        found = super().quantization(path, config)
        if found is None and (path / "quant_config.json").is_file():  # as older AutoAWQ wrote it
            old = read_json(path / "quant_config.json")
            found = {"quant_method": "awq", "bits": old.get("w_bit"), "group_size": old.get("q_group_size"),
                     "zero_point": old.get("zero_point"), "version": old.get("version")}
        return found

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        modules = [name.removesuffix(".qweight") for name in raws if name.endswith(".qweight")]
        if not modules:
            return []
        group = _group(next(iter(raws.values())).file.path.parent, quantization)
        found = [read_module(raws, module, group) for module in modules]
        for name, raw in raws.items():
            if name.endswith(".qzeros"):
                raise raw.refuse("belongs to a quantized layer whose qweight is missing")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        codec = entry.codec
        if not isinstance(codec, IntK) or codec.bits != BITS:
            return "AWQ has int4 in groups only"
        if codec.scale_kind != "F16":
            return f"AWQ has scales in float16, not {codec.scale_kind}"
        rows, columns = entry.shape[-2:]
        if rows % LANES:
            return f"AWQ packs {LANES} rows into a word, and {rows} is no multiple of {LANES}"
        first = next((e.codec for e in checkpoint.entries.values() if isinstance(e.codec, IntK)), codec)
        if first.group != codec.group:
            return f"AWQ has one group size in a model, and another layer is {first.name}"
        return group_reason(codec, columns) or linear_reason(checkpoint, entry)

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return AwqLayout(checkpoint)


class AwqLayout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        kinds = [e.codec for e in self.checkpoint.entries.values() if isinstance(e.codec, IntK)]
        if not kinds:
            return None
        return {"quant_method": "awq", "version": "gemm", "bits": BITS, "group_size": kinds[0].group,
                "zero_point": True, "backend": "auto", "modules_to_not_convert": float_modules(self.checkpoint) or None}

    def specs(self, entry: Entry) -> dict[str, Spec]:
        if not isinstance(entry.codec, IntK):
            return super().specs(entry)
        module, (rows, columns) = entry.name.removesuffix(".weight"), entry.shape
        groups = columns // entry.codec.unit(columns)
        return {f"{module}.qweight": ("I32", (columns, rows // LANES)),
                f"{module}.qzeros": ("I32", (groups, rows // LANES)),
                f"{module}.scales": (entry.codec.scale_kind, (groups, rows))}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if not isinstance(tensor.codec, IntK):
            return super().tensors(name, tensor)
        if tensor.order is not None:
            raise FewbitsError(f"awq cannot hold {name}: its columns are in an order of their own (act-order)")
        module = name.removesuffix(".weight")
        return {f"{module}.{k}": v for k, v in to_file(tensor).items()}


# the file's tensors and the canonical planes --------------------------------------------------------------------------
def to_file(tensor: QTensor) -> dict[str, torch.Tensor]:
    """qweight, qzeros and scales of a tensor."""
    zeros = pack_bits(zeros_of(tensor), BITS)
    return {"qweight": _interleaved(tensor.planes["codes"], tensor.shape[1]),
            "qzeros": _interleaved(zeros, tensor.planes["scales"].shape[1]),
            "scales": tensor.planes["scales"].t().contiguous()}


def _interleaved(stream: torch.Tensor, count: int) -> torch.Tensor:
    """Bit streams of `count` codes a row `[rows, bytes]` to words `[count, rows / 8]`."""
    words = to_words(stream, -(-count // LANES))
    return transpose_nibbles(words.view(-1, LANES, words.shape[1])[:, list(ORDER)].flatten(0, 1))[:count]


def _natural(found: torch.Tensor) -> torch.Tensor:
    """The inverse of `_interleaved`."""
    count = len(found)
    words = transpose_nibbles(torch.nn.functional.pad(found, (0, 0, 0, -count % LANES)))
    natural = words.view(-1, LANES, words.shape[1])[:, list(BACK)].flatten(0, 1)
    return to_bytes(natural)[:, :packed_bytes(count, BITS)].contiguous()


# reading --------------------------------------------------------------------------------------------------------------
def _group(folder: Path, config: dict[str, Any]) -> int:
    """The group size; refuses what is not the gemm version of 4 bits."""
    where = f"{folder / 'config.json'}: quantization_config:"
    version = config.get("version") or config.get("checkpoint_format") or config.get("format") or "gemm"
    if not isinstance(version, str) or version.lower() != "gemm":
        raise FewbitsError(f"{where} version {version!r}", "of AWQ's layouts only gemm is read")
    bits, group = config.get("bits", config.get("w_bit", BITS)), config.get("group_size", 128)
    if bits != BITS:
        raise FewbitsError(f"{where} {bits!r} bits", "AWQ in the gemm version has 4")
    if type(group) is not int or (group < 1 and group != -1):
        raise FewbitsError(f"{where} groups of {group!r}", "a number of columns, or -1 for one group a row")
    return group


def read_module(raws: dict[str, Raw], module: str, group: int) -> Entry:
    """Take the tensors of one layer out of `raws`."""
    qweight = raws.pop(f"{module}.qweight")
    qzeros, scales = (take(raws, f"{module}.{part}", qweight) for part in ("qzeros", "scales"))
    expect(qweight, ("I32",), 2)
    expect(qzeros, ("I32",), 2)
    expect(scales, tuple(SCALES), 2)
    columns, lanes = qweight.shape
    rows, unit = LANES * lanes, columns if group == -1 else group
    if columns % unit:
        raise qweight.refuse(f"{columns} columns, which groups of {unit} do not divide",
                             "quantization_config does not belong to this file")
    groups = columns // unit
    expect_shape(scales, (groups, rows), BITS, group)
    expect_shape(qzeros, (groups, lanes), BITS, group)
    zeros = qzeros.data()
    codec, shape = codec_of(BITS, group, zeros.count(MIDDLE) == len(zeros), scales), (rows, columns)

    def load() -> QTensor:
        planes = {"codes": _natural(qweight.tensor()), "scales": scales.finite().t().contiguous()}
        if not codec.symmetric:
            planes["zeros"] = _natural(qzeros.tensor())
        return QTensor(codec, shape, planes)

    return Entry(f"{module}.weight", shape, codec, load)

"""GPTQ files of the time before `quantization_config`: bits and group size of each layer, from its tensors' shapes.

GPTQ-for-LLaMa wrote `NAME-4bit-128g.safetensors` beside a plain config.json, at first without `g_idx`. Zero points are
those of version 1. What a file's name says is compared with what was found, and never believed.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits import arch
from fewbits.codecs.base import Shape
from fewbits.containers.intk import BITS, SCALES, all_alike, expect, words
from fewbits.containers.safetensors import Raw
from fewbits.errors import FewbitsError

GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # what groups were made of, where the shapes alone leave a choice
HINT = 'say it in a quantize_config.json beside the file, for example {"bits": 4, "group_size": 128}'


@dataclass(frozen=True)
class Inferred:
    """Bits and group size by layer, as `gptq_config.Rules` has them."""

    layers: Mapping[str, tuple[int, int]]
    version: str = "gptq"

    def of(self, module: str) -> tuple[int, int]:
        return self.layers[module]


def infer(raws: Mapping[str, Raw], modules: list[str], widths: Mapping[str, int]) -> Inferred:
    """What the tensors of `modules` say of themselves; `widths` are the columns that the architecture wants, if known.

    Raises:
        FewbitsError: a layer whose shapes fit none or more than one, or the name of its file says otherwise.
    """
    bits = {module: _bits(raws, module, widths) for module in modules}
    if all(all_alike(raws[f"{m}.qzeros"], b, raws[f"{m}.scales"].shape[1], 1 << (b - 1)) for m, b in bits.items()):
        raise raws[f"{modules[0]}.qzeros"].refuse(
            "every zero point is stored as the middle of the grid, which in version 1 would mean one more",
            'say the version in a quantize_config.json beside the file: "checkpoint_format": "gptq_v2" or "gptq"')
    fitting = {module: _groups(raws, module, bits[module], widths) for module in modules}
    several = [found for found in fitting.values() if found]
    common = set.intersection(*several) if several else set()
    layers = {}
    for module in modules:
        found = fitting[module] & common or fitting[module]
        if len(found) > 1:
            raise raws[f"{module}.scales"].refuse(
                f"groups of {' or '.join(map(str, sorted(found)))} columns: its shape fits them all", HINT)
        layers[module] = bits[module], found.pop() if found else -1
    _compare(raws[f"{modules[0]}.qweight"].file.path, layers)
    return Inferred(layers)


def shapes_of(config: Mapping[str, Any]) -> dict[str, Shape]:
    """The tensors that a model of this configuration has; empty where its architecture is not known here."""
    family = arch.lookup(dict(config))
    if family is None:
        return {}
    try:
        full = arch.complete(family, dict(config))
        return {t.hf: t.shape(full) for t in arch.tensors(family, full)}
    except (KeyError, TypeError, ValueError):
        return {}


def _bits(raws: Mapping[str, Raw], module: str, widths: Mapping[str, int]) -> int:
    qweight, qzeros, scales = (raws.get(f"{module}.{part}") for part in ("qweight", "qzeros", "scales"))
    assert qweight is not None
    if qzeros is None and f"{module}.zeros" in raws:
        raise raws[f"{module}.zeros"].refuse("zero points that are not integers, as the first versions of "
                                             "GPTQ-for-LLaMa wrote them: they are not read")
    if qzeros is None or scales is None:
        raise qweight.refuse(f"needs {module}.{'qzeros' if qzeros is None else 'scales'}, which is missing")
    expect(qweight, ("I32",), 2)
    expect(qzeros, ("I32",), 2)
    expect(scales, tuple(SCALES), 2)
    rows = scales.shape[1]
    if qweight.shape[1] != rows:
        awq = " (as AWQ has it)" if qweight.shape[1] * 8 == rows else ""
        raise qweight.refuse(f"{list(qweight.shape)}, where [.., {rows}] was expected of GPTQ{awq}",
                             "a quantization_config in config.json says what a layout is")
    fit = [b for b in BITS if qzeros.shape[1] == words(rows, b)]
    columns = _columns(raws, module, widths)
    if columns is not None:
        fit = [b for b in fit if qweight.shape[0] == words(columns, b)]
    if len(fit) != 1:
        of = "" if columns is None else f" of {columns} columns"
        raise qweight.refuse(f"{list(qweight.shape)} with qzeros {list(qzeros.shape)}{of} fit "
                             f"{' or '.join(map(str, fit)) or 'no number of'} bits", HINT)
    return fit[0]


def _columns(raws: Mapping[str, Raw], module: str, widths: Mapping[str, int]) -> int | None:
    g_idx = raws.get(f"{module}.g_idx")
    if g_idx is None:
        return widths.get(module)
    expect(g_idx, ("I32", "I64"), 1)
    return g_idx.shape[0]


def _groups(raws: Mapping[str, Raw], module: str, bits: int, widths: Mapping[str, int]) -> set[int]:
    """Group sizes that the layer's shapes allow; empty where a row has one group, of whatever size."""
    groups, g_idx = raws[f"{module}.scales"].shape[0], raws.get(f"{module}.g_idx")
    if groups == 1:
        return set()
    if g_idx is not None:
        return {array("i" if g_idx.dtype == "I32" else "q", g_idx.data()).count(0)} - {0} or {1}
    columns = widths.get(module) or raws[f"{module}.qweight"].shape[0] * 32 // bits
    exact = {columns // groups} if columns % groups == 0 else set()
    return exact | {g for g in GROUPS if -(-columns // g) == groups}


def _compare(path: Path, layers: Mapping[str, tuple[int, int]]) -> None:
    """Refuse a file whose name says other bits or groups than most of its layers have."""
    found = list(layers.values())
    common = max(found, key=found.count)
    for pattern, unit, meant in ((r"(\d+)[ _-]?bits?(?![a-z])", "bits", common[0]),
                                 (r"(?<![\d.])(\d+)g(?![a-z])", "columns a group", common[1])):
        named = re.search(pattern, path.stem.lower())
        if named and int(named[1]) != meant and not (unit != "bits" and meant == -1):
            raise FewbitsError(f"{path}: its name says {named[1]} {unit}, its tensors {meant}",
                               "rename the file if the name is wrong")

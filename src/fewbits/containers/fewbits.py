"""The layout of our own: a directory like those of Transformers that holds every codec, tensor by tensor.

In the place of a quantized tensor `x` are its planes, `x.codes`, `x.scales` and so on, as the codec lays them out, and
`x.order` (int32) where its columns are in an order of their own. config.json says in `quantization_config.tensors` what
codec and shape each has. A `*` in a name there stands for a number, and a name written out goes before one with `*`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import Float
from fewbits.containers.directory import Directory, Layout, turned
from fewbits.containers.safetensors import DTYPES, Raw, Spec
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

METHOD, VERSION = "fewbits", 1
ORDER = "order"
FILE_DTYPES = {torch_name: name for name, (torch_name, _) in DTYPES.items()}
Kind = tuple[Codec, Shape]


class Fewbits(Directory):
    """Any codec, any tensor: mixtures, embeddings, stacked experts."""

    name: ClassVar[str] = METHOD
    ordered: ClassVar[bool] = True

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return (quantization or {}).get("quant_method") == METHOD

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        if not raws:
            return []
        config = next(iter(raws.values())).file.path.parent / "config.json"
        kinds, used, names = read_kinds(config, quantization), set(), {}
        for raw_name in raws:
            name, _, part = raw_name.rpartition(".")
            key = key_of(kinds, name)
            if key is not None and part in (*kinds[key][0].planes(kinds[key][1]), ORDER):
                used.add(key)
                names[name] = kinds[key]
        unused = next((key for key in kinds if key not in used), None)
        if unused is not None:
            raise FewbitsError(f"{config}: quantization_config: {unused}: no file holds a tensor of that name")
        found = [_take(raws, name, *kind) for name, kind in names.items()]
        for raw in raws.values():
            if ".weight." in raw.name or raw.dtype == "U8":
                raise raw.refuse("belongs to a quantized tensor that config.json does not name",
                                 "its quantization_config was changed, or is that of another model")
        return found

    def stacked(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        return entries

    def as_filed(self, checkpoint: Checkpoint) -> Checkpoint:
        return replace(checkpoint, entries=turned(checkpoint.config, checkpoint.entries))

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        return entry.codec.check(entry.shape)

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return FewbitsLayout(checkpoint)


class FewbitsLayout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        kinds: dict[str, Kind] = {e.name: (e.codec, e.shape) for e in self.checkpoint.entries.values()
                                  if not isinstance(e.codec, Float)}
        tensors = {key: {"codec": codec.name, "shape": list(shape)} for key, (codec, shape) in short(kinds).items()}
        return {"quant_method": METHOD, "version": VERSION, "tensors": tensors}

    def specs(self, entry: Entry) -> dict[str, Spec]:
        if isinstance(entry.codec, Float):
            return super().specs(entry)
        found = plane_specs(entry.name, entry.codec, entry.shape)
        order = entry.load().order if entry.codec.family == "int" else None  # others never come with one
        return found if order is None else found | {f"{entry.name}.{ORDER}": ("I32", tuple(order.shape))}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        if isinstance(tensor.codec, Float):
            return super().tensors(name, tensor)
        planes = tensor.planes if tensor.order is None else tensor.planes | {ORDER: tensor.order.int()}
        return {f"{name}.{part}": plane for part, plane in planes.items()}


def plane_specs(name: str, codec: Codec, shape: Shape) -> dict[str, Spec]:
    return {f"{name}.{part}": (FILE_DTYPES[dtype], size) for part, (dtype, size) in codec.planes(shape).items()}


# which codec and shape each tensor has --------------------------------------------------------------------------------
def starred(name: str) -> str:
    """The name with `*` for every number: what the layers of a model have in common."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def short(kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """The same in few entries: what most layers have under a name with `*`, the others written out."""
    alike: dict[str, dict[str, Kind]] = {}
    for name, kind in kinds.items():
        alike.setdefault(starred(name), {})[name] = kind
    found: dict[str, Kind] = {}
    for key, members in alike.items():
        common, count = Counter(members.values()).most_common(1)[0]
        if count > 1:
            found[key] = common
        found |= {name: kind for name, kind in members.items() if count == 1 or kind != common}
    return found


def key_of(kinds: Mapping[str, Kind], name: str) -> str | None:
    return next((key for key in (name, starred(name)) if key in kinds), None)


def read_kinds(config: Path, quantization: dict[str, Any]) -> dict[str, Kind]:
    """What config.json says of every quantized tensor.

    Raises:
        FewbitsError: another version, an unknown codec, or a shape that its codec cannot have.
    """
    where = f"{config}: quantization_config:"
    version, tensors = quantization.get("version"), quantization.get("tensors")
    if type(version) is not int or version != VERSION:
        raise FewbitsError(f"{where} version {version!r}, where {VERSION} is read", "a newer fewbits may read it")
    if not isinstance(tensors, dict):
        raise FewbitsError(f"{where} tensors {tensors!r}, where an object of names was expected")
    return {name: _kind(f"{where} {name}:", found) for name, found in tensors.items()}


def _kind(where: str, found: Any) -> Kind:
    if not isinstance(found, dict) or not isinstance(found.get("codec"), str):
        raise FewbitsError(f"{where} {found!r}, where a codec and a shape were expected")
    shape = found.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise FewbitsError(f"{where} shape {shape!r}")
    try:
        codec = codecs.get(found["codec"])
    except FewbitsError as error:
        raise FewbitsError(f"{where} {error}", "a newer fewbits may know it") from None
    reason = codec.check(tuple(shape)) or ("held as it is, without planes" if isinstance(codec, Float) else None)
    if reason:
        raise FewbitsError(f"{where} {codec.name} at shape {shape}: {reason}")
    return codec, tuple(shape)


# reading --------------------------------------------------------------------------------------------------------------
def _take(raws: dict[str, Raw], name: str, codec: Codec, shape: Shape) -> Entry:
    """Take the planes of one tensor out of `raws`."""
    specs = plane_specs(name, codec, shape)
    here = next(raw for raw in (raws.get(n) for n in (*specs, f"{name}.{ORDER}")) if raw is not None)
    missing = next((n for n in specs if n not in raws), None)
    if missing is not None:
        raise here.refuse(f"needs {missing}, which is missing")
    if name in raws:
        raise here.refuse(f"stands beside {name}, which it is in the place of")
    planes = {n.removeprefix(f"{name}."): raws.pop(n) for n in specs}
    for part, raw in planes.items():
        if raw.spec != specs[f"{name}.{part}"]:
            dtype, size = specs[f"{name}.{part}"]
            raise raw.refuse(f"{raw.dtype} {list(raw.shape)}, where {dtype} {list(size)} was expected of {codec.name} "
                             f"at shape {list(shape)}")
    order = raws.pop(f"{name}.{ORDER}", None)
    if order is not None and (order.dtype != "I32" or order.shape not in ((shape[-1],), (shape[0], shape[-1]))):
        raise order.refuse(f"{order.dtype} {list(order.shape)}, where I32 [{shape[-1]}] was expected")

    def load() -> QTensor:
        values = {part: raw.finite() if raw.dtype.startswith(("F", "BF")) else raw.tensor()
                  for part, raw in planes.items()}
        return QTensor(codec, shape, values, None if order is None else _order(order))

    return Entry(name, shape, codec, load)


def _order(raw: Raw) -> torch.Tensor:
    order = raw.tensor().long()
    if not torch.equal(order.sort(-1).values, torch.arange(order.shape[-1]).expand(order.shape)):
        raise raw.refuse("is no order of the columns: some are missing or there twice")
    return order

"""GGUF, llama.cpp's file format: one file with configuration, tokenizer and tensors of ggml types."""

from __future__ import annotations

import json
import re
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np

from fewbits import arch, codecs
from fewbits.arch import Architecture, Tensor, rows
from fewbits.checkpoint import Checkpoint, Entry, Filed
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import F32, Float
from fewbits.containers import experts, gguf_file, gguf_split, gguf_tokenizer
from fewbits.containers.base import Container, Progress
from fewbits.containers.gguf_config import (
    DERIVED,
    INTEGERS,
    config_of,
    derived,
    family_of,
    get,
    metadata,
    own_config,
)
from fewbits.containers.gguf_file import GgufFile, Spec, Value
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Stored

OLD_EXPERT = re.compile(rf"(blk\.\d+\.ffn_(?:gate|down|up))\.{experts.NUMBER}\.weight")  # Mixtral before 2024-04

__all__ = ["Files", "Gguf", "SplitGguf", "assemble", "bare", "bare_entries", "metadata", "records"]


class Files(UserDict[str, Any]):
    """Tokenizer files, made when first asked for: a header is read in a blink, 262 144 tokens are not."""

    def __getitem__(self, name: str) -> bytes:
        if callable(self.data[name]):
            self.data[name] = self.data[name]()
        return bytes(self.data[name])


class Gguf(Container):
    """GGUF, version 2 or 3, in one file or several; written as one of version 3."""

    name: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    def detect(self, path: Path) -> bool:
        if path.is_dir():
            return bool(gguf_split.heads(path)) and not any(path.glob("*.safetensors*"))
        with open(path, "rb") as file:
            return file.read(4) == gguf_file.MAGIC

    # reading --------------------------------------------------------------------------------------------------------
    def read(self, path: Path) -> Checkpoint:
        return assemble(gguf_split.read(path), self.name)

    # writing --------------------------------------------------------------------------------------------------------
    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        family = arch.lookup(checkpoint.config)
        if family is None:
            return arch.why_not_gguf(checkpoint.config)
        config = own_config(family, checkpoint)
        reason = family.refuse(config)
        if reason or entry.name.endswith(family.skipped):
            return reason
        tensor = _find(family, config, experts.stack_of(entry.name))
        if tensor is None:
            return f"{family.gguf} has no tensor of that name"
        if entry.codec.family not in ("ggml", "float"):
            return f"GGUF holds floats and ggml types, not the family {entry.codec.family!r}"
        if len(entry.shape) > gguf_file.MAX_DIMENSIONS:
            return f"{len(entry.shape)} dimensions; GGUF holds {gguf_file.MAX_DIMENSIONS}"
        if not all(op.packed for op in tensor.ops) and not isinstance(entry.codec, Float):
            return "this tensor is stored plus one, in float32"
        return entry.codec.check(entry.shape)

    def meant(self, checkpoint: Checkpoint) -> Checkpoint:
        """Norms stored plus one lose what float32 rounds away there; tensors that follow from the rest are left out."""
        family = arch.lookup(checkpoint.config)
        assert family is not None
        entries = {}
        for tensor, entry in _pairs(family, checkpoint):
            if not all(op.packed for op in tensor.ops):
                entry = entry.as_(load=partial(_there_and_back, tensor, entry))
            entries[entry.name] = entry
        return Checkpoint(checkpoint.path, checkpoint.container, checkpoint.config, entries, checkpoint.files,
                          checkpoint.facts)

    def stage(self, path: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
        family = arch.lookup(checkpoint.config)
        assert family is not None
        pairs, specs = list(_pairs(family, checkpoint)), records(checkpoint)
        extra = derived(family, own_config(family, checkpoint))

        def data() -> Iterator[np.ndarray]:
            done, total = 0, sum(s.nbytes for s in specs)
            yield from (values.view(np.uint8) for values in extra.values())
            for tensor, entry in pairs:
                if progress:
                    progress("writing", done, total)
                part = _stored_bytes(tensor, entry)
                done += part.nbytes
                yield part

        self.put(path, metadata(checkpoint), specs, data())

    def put(self, path: Path, metadata: dict[str, Value], specs: list[Spec], data: Iterator[np.ndarray]) -> None:
        """Write the tensors `specs`, whose bytes `data` gives in order."""
        gguf_file.write(path, metadata, specs, data)


class SplitGguf(Gguf):
    """A folder of GGUF files of at most `most_bytes` each, with at most `most_tensors` each."""

    suffix: ClassVar[str] = ""

    def __init__(self, most_bytes: int | None = None, most_tensors: int | None = None):
        limits = [n for n in (most_bytes, most_tensors) if n is not None]
        if not limits or min(limits) < 1:
            raise FewbitsError(f"{most_bytes} bytes or {most_tensors} tensors a file is no limit to split by")
        self.most_bytes, self.most_tensors = most_bytes, most_tensors

    def put(self, path: Path, metadata: dict[str, Value], specs: list[Spec], data: Iterator[np.ndarray]) -> None:
        gguf_split.write(path, metadata, gguf_split.split(metadata, specs, self.most_bytes, self.most_tensors), data)


# reading ------------------------------------------------------------------------------------------------------------
def assemble(file: GgufFile, container: str) -> Checkpoint:
    """A checkpoint of the tensors and metadata of an opened file.

    Raises:
        FewbitsError: not a model of a known family, or not all of one.
    """
    kind = get(file, "general.type", "STRING")
    if kind == "adapter":
        raise FewbitsError(f"{file.path}: is a LoRA adapter, not a model", "convert it together with its base model")
    if kind == "imatrix":
        raise FewbitsError(f"{file.path}: is an importance matrix, not a model", "quantize a model with it: --imatrix")
    family = family_of(file)
    config = config_of(file, family)
    table = {t.gguf: t for t in arch.tensors(family, config)}
    _check_vocabulary(file, config)
    found: dict[str, list[tuple[Spec, Tensor]]] = {}  # by Transformers' name
    for spec in file.tensors.values():
        if spec.name in DERIVED:
            continue
        expert = OLD_EXPERT.fullmatch(spec.name) if family.experts else None
        tensor = table.get(f"{expert[1]}_exps.weight" if expert else spec.name)
        if tensor is None:
            raise FewbitsError(f"{file.path}: tensor {spec.name!r} has no place in {family.gguf}")
        found.setdefault(experts.one(tensor.hf, int(expert[2])) if expert else tensor.hf, []).append((spec, tensor))
    entries = experts.stacked({name: _entry(file, name, parts) for name, parts in found.items()})
    there = {tensor.gguf for parts in found.values() for _, tensor in parts}
    missing = table.keys() - there
    if missing:
        raise FewbitsError(f"{file.path}: tensor {sorted(missing)[0]!r} is missing ({len(missing)} tensors are)",
                           "the file is incomplete: fetch it again")
    _check_shapes(file, config, table, entries)
    facts = {"metadata": file.metadata, "version": file.version, "name": get(file, "general.name", "STRING"),
             "file_type": get(file, "general.file_type", "UINT32"),
             "parts": [part.path for part in file.parts] or None}
    files = _files(file, config)
    return Checkpoint(file.path, container, arch.spelled(family, config), entries, files,  # type: ignore[arg-type]
                      {k: v for k, v in facts.items() if v is not None})


def _check_vocabulary(file: GgufFile, config: dict[str, Any]) -> None:
    tokens = file.metadata.get(gguf_tokenizer.KEY + "tokens")
    if tokens is not None and tokens.type == "ARRAY" and len(tokens.value) != config["vocab_size"]:
        raise FewbitsError(f"{file.path}: the embedding has {config['vocab_size']} rows, for {len(tokens.value)} "
                           "tokens")


def _check_shapes(file: GgufFile, config: dict[str, Any], table: dict[str, Tensor], entries: dict[str, Entry]) -> None:
    for tensor in table.values():
        found, wanted = entries[tensor.hf].shape, tensor.shape(config)
        if tensor.dims and found != wanted:
            raise FewbitsError(f"{file.path}: tensor {tensor.gguf!r} has the shape {list(found)}; the metadata make it "
                               f"{list(wanted)}")


def _codec(file: GgufFile, spec: Spec) -> Codec:
    if spec.type in file.codecs:
        return cast(Codec, file.codecs[spec.type])
    try:
        return codecs.get(spec.type)
    except FewbitsError:
        raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type}, which is not a weight type") from None


def _entry(file: GgufFile, name: str, parts: list[tuple[Spec, Tensor]]) -> Entry:
    """The entry that one tensor of the file becomes, or several together."""
    spec, tensor = parts[0]
    codec = _codec(file, spec)
    for other, row in parts:
        if not (isinstance(_codec(file, other), Float) or all(op.packed for op in row.ops)):
            raise FewbitsError(f"{file.path}: tensor {other.name!r} is {other.type}; floats are expected of a norm")
        if other.shape != spec.shape or other.type != spec.type:
            raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type} {list(spec.shape)} and "
                               f"{other.name!r} {other.type} {list(other.shape)}; they are parts of one tensor")

    def load() -> QTensor:
        found = [(row.ops, QTensor(codec, s.shape, _planes(codec, s.shape, file.data(s)))) for s, row in parts]
        try:
            return rows.join(found) if len(found) > 1 else rows.undo(*found[0])
        except ValueError as error:
            raise FewbitsError(f"{file.path}: tensor {spec.name!r} of shape {list(spec.shape)}: {error}") from None

    def stored() -> Stored | None:
        columns = spec.shape[-1] if len(spec.shape) > 1 else 1
        found = [(row.ops, Stored(codec, columns, (file.data(s),))) for s, row in parts]
        try:
            return rows.find_all(found, spec.shape) if len(found) > 1 else rows.find(*found[0])
        except ValueError as error:
            raise FewbitsError(f"{file.path}: tensor {spec.name!r} of shape {list(spec.shape)}: {error}") from None

    shape = rows.whole(tensor.ops, spec.shape) if len(parts) > 1 else spec.shape
    return Entry(name, shape, rows.codec(tensor.ops, codec), Filed(load, stored))


def bare_entries(file: GgufFile) -> dict[str, Entry]:
    """The tensors of any GGUF file under their own names; those that are no weights (integers) are left out."""
    found = {}
    for spec in file.tensors.values():
        with suppress(FewbitsError):
            found[spec.name] = _entry(file, spec.name, [(spec, Tensor(spec.name, spec.name, "", None, ()))])
    return found


def bare(path: Path) -> Checkpoint | None:
    """A GGUF file that is no model of a family in the table, its tensors under their own names; None where it is one.

    It can be looked at, and neither be run nor converted: what its tensors are for is not known.
    """
    file = gguf_split.read(path)
    name = get(file, "general.architecture", "STRING")
    adapter = get(file, "general.type", "STRING") == "adapter"
    if arch.by_gguf(name) is not None and not adapter:
        return None
    facts = {"metadata": file.metadata, "version": file.version, "parts": [part.path for part in file.parts] or None,
             "names": "the file's own: " + ("it is a LoRA adapter" if adapter else f"there is no table for {name}")}
    return Checkpoint(file.path, Gguf.name, {"architectures": [str(name)]}, bare_entries(file), {},
                      {k: v for k, v in facts.items() if v is not None})


def _planes(codec: Codec, shape: Shape, data: np.ndarray) -> dict[str, torch.Tensor]:
    """The canonical planes over a tensor's bytes, without a copy."""
    (name, (dtype, size)), = codec.planes(shape).items()
    kind = getattr(torch, dtype)
    if data.ctypes.data % kind.itemsize:
        data = data.copy()  # only in a file whose alignment is smaller than a float
    return {name: torch.from_numpy(data).view(kind).view(size)}


def _files(file: GgufFile, config: dict[str, Any]) -> Files | dict[str, Any]:
    if get(file, gguf_tokenizer.KEY + "model", "STRING") in (None, "no_vocab", "none"):
        return {}

    def named(make: Callable[[Mapping[str, Value]], bytes]) -> Callable[[], bytes]:
        def run() -> bytes:
            try:
                return make(file.metadata)
            except FewbitsError as error:
                raise FewbitsError(f"{file.path}: {error}", error.hint) from None
        return run

    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    turn = get(file, "tokenizer.ggml.eot_token_id", *INTEGERS)
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return Files({"tokenizer.json": named(gguf_tokenizer.tokenizer_json),
                  "tokenizer_config.json": named(gguf_tokenizer.tokenizer_config),
                  "generation_config.json": json.dumps(ids, indent=2).encode()})


# writing ------------------------------------------------------------------------------------------------------------
def _find(family: Architecture, config: dict[str, Any], name: str) -> Tensor | None:
    """The table's row for one name, without making the rows of all layers."""
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
    if layer >= config["num_hidden_layers"]:
        return None
    return next((Tensor(name, w.gguf.format(i=layer), w.role, layer, w.ops(config)) for w in family.weights
                 if w.present(config) and w.hf.format(i=layer) == name), None)


def _pairs(family: Architecture, checkpoint: Checkpoint) -> Iterator[tuple[Tensor, Entry]]:
    """Tensors in file order with their entries."""
    entries = experts.stacked(checkpoint.entries)
    for tensor in arch.tensors(family, own_config(family, checkpoint)):
        if tensor.hf not in entries:
            raise FewbitsError(f"{checkpoint.path}: {tensor.hf} is missing, which {family.name} has")
        yield tensor, entries[tensor.hf]


def _stored_codec(tensor: Tensor, entry: Entry) -> Codec:
    """Vectors, biases and routers are stored in float32, as llama.cpp expects; other matrices as they are."""
    simple = len(entry.shape) == 1 or tensor.role == "bias" or tensor.role == "ffn_gate_inp" and isinstance(
        entry.codec, Float)
    return F32 if simple else rows.codec(tensor.ops, entry.codec)


def _stored_bytes(tensor: Tensor, entry: Entry) -> np.ndarray:
    stored = rows.apply(tensor.ops, entry.load())
    if stored.codec != F32 == _stored_codec(tensor, entry):
        stored = QTensor(F32, stored.shape, {"data": stored.dequantize().view(F32.matrix(stored.shape))})
    (plane,) = stored.planes.values()
    return plane.contiguous().view(torch.uint8).numpy().reshape(-1)


def _there_and_back(tensor: Tensor, entry: Entry) -> QTensor:
    return rows.undo(tensor.ops, rows.apply(tensor.ops, entry.load()))


def records(checkpoint: Checkpoint) -> list[Spec]:
    """Names, shapes and types of the tensors that a file of this checkpoint holds, in order."""
    family = arch.lookup(checkpoint.config)
    assert family is not None
    extra = derived(family, own_config(family, checkpoint))
    return [Spec(name, values.shape, "F32") for name, values in extra.items()] + [
        Spec(t.gguf, rows.shape(t.ops, e.shape), _stored_codec(t, e).name) for t, e in _pairs(family, checkpoint)]

"""GGUF, llama.cpp's file format: one file with configuration, tokenizer and tensors of ggml types."""

from __future__ import annotations

import json
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fewbits import arch, codecs
from fewbits.arch import Architecture, Tensor, rows
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import F32, Float
from fewbits.containers import gguf_file, gguf_tokenizer
from fewbits.containers.base import Container, Progress
from fewbits.containers.gguf_config import (
    INTEGERS,
    ROPE_FREQS,
    config_of,
    family_of,
    get,
    metadata,
    own_config,
    rope_freqs,
)
from fewbits.containers.gguf_file import GgufFile, Spec, Value
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

SKIPPED = "rotary_emb.inv_freq"  # older checkpoints store what follows from the configuration


__all__ = ["Files", "Gguf", "metadata", "records"]


class Files(UserDict[str, Any]):
    """Tokenizer files, made when first asked for: a header is read in a blink, 262 144 tokens are not."""

    def __getitem__(self, name: str) -> bytes:
        if callable(self.data[name]):
            self.data[name] = self.data[name]()
        return bytes(self.data[name])


class Gguf(Container):
    """One GGUF file, version 2 or 3; written as version 3."""

    name: ClassVar[str] = "gguf"
    suffix: ClassVar[str] = ".gguf"

    def detect(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) == gguf_file.MAGIC

    # reading --------------------------------------------------------------------------------------------------------
    def read(self, path: Path) -> Checkpoint:
        file = gguf_file.read(path)
        family = family_of(file)
        config = config_of(file, family)
        table = {t.gguf: t for t in arch.tensors(family, config)}
        entries = {}
        for spec in file.tensors.values():
            if spec.name == ROPE_FREQS:
                continue
            if spec.name not in table:
                raise FewbitsError(f"{path}: tensor {spec.name!r} has no place in {family.gguf}")
            entry = _entry(file, spec, table[spec.name])
            entries[entry.name] = entry
        missing = table.keys() - file.tensors.keys()
        if missing:
            raise FewbitsError(f"{path}: tensor {sorted(missing)[0]!r} is missing ({len(missing)} tensors are)",
                               "the file is incomplete: fetch it again")
        facts = {"metadata": file.metadata, "version": file.version, "name": get(file, "general.name", "STRING"),
                 "file_type": get(file, "general.file_type", "UINT32")}
        return Checkpoint(path, self.name, config, entries, _files(file, config),  # type: ignore[arg-type]
                          {k: v for k, v in facts.items() if v is not None})

    # writing --------------------------------------------------------------------------------------------------------
    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        family = arch.lookup(checkpoint.config)
        if family is None:
            known = ", ".join(name for a in arch.ARCHITECTURES for name in a.architectures)
            return f"GGUF needs a table of names for {checkpoint.architecture}; there are {known}"
        config = own_config(family, checkpoint)
        reason = family.refuse(config)
        if reason or entry.name.endswith(SKIPPED):
            return reason
        tensor = _find(family, config, entry.name)
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
        freqs = rope_freqs(own_config(family, checkpoint))

        def data() -> Iterator[np.ndarray]:
            done, total = 0, sum(s.nbytes for s in specs)
            if freqs is not None:
                yield freqs.view(np.uint8)
            for tensor, entry in pairs:
                if progress:
                    progress("writing", done, total)
                part = _stored_bytes(tensor, entry)
                done += part.nbytes
                yield part

        gguf_file.write(path, metadata(checkpoint), specs, data())


# reading ------------------------------------------------------------------------------------------------------------
def _codec(file: GgufFile, spec: Spec) -> Codec:
    try:
        return codecs.get(spec.type)
    except FewbitsError:
        raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type}, which is not a weight type") from None


def _entry(file: GgufFile, spec: Spec, tensor: Tensor) -> Entry:
    codec = _codec(file, spec)
    if not (isinstance(codec, Float) or all(op.packed for op in tensor.ops)):
        raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type}; floats are expected of a norm")

    def load() -> QTensor:
        stored = QTensor(codec, spec.shape, _planes(codec, spec.shape, file.data(spec)))
        try:
            return rows.undo(tensor.ops, stored)
        except ValueError as error:
            raise FewbitsError(f"{file.path}: tensor {spec.name!r} of shape {list(spec.shape)}: {error}") from None

    return Entry(tensor.hf, spec.shape, rows.codec(tensor.ops, codec), load)


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
    for tensor in arch.tensors(family, own_config(family, checkpoint)):
        if tensor.hf not in checkpoint.entries:
            raise FewbitsError(f"{checkpoint.path}: {tensor.hf} is missing, which {family.name} has")
        yield tensor, checkpoint.entries[tensor.hf]


def _stored_codec(tensor: Tensor, entry: Entry) -> Codec:
    """Vectors are stored in float32, as readers of GGUF expect; matrices as they are."""
    return F32 if len(entry.shape) == 1 else rows.codec(tensor.ops, entry.codec)


def _stored_bytes(tensor: Tensor, entry: Entry) -> np.ndarray:
    stored = rows.apply(tensor.ops, entry.load())
    if len(entry.shape) == 1 and stored.codec != F32:
        stored = QTensor(F32, stored.shape, {"data": stored.dequantize().view(1, -1)})
    (plane,) = stored.planes.values()
    return plane.contiguous().view(torch.uint8).numpy().reshape(-1)


def _there_and_back(tensor: Tensor, entry: Entry) -> QTensor:
    return rows.undo(tensor.ops, rows.apply(tensor.ops, entry.load()))


def records(checkpoint: Checkpoint) -> list[Spec]:
    """Names, shapes and types of the tensors that a file of this checkpoint holds, in order."""
    family = arch.lookup(checkpoint.config)
    assert family is not None
    freqs = rope_freqs(own_config(family, checkpoint))
    return ([] if freqs is None else [Spec(ROPE_FREQS, freqs.shape, "F32")]) + [
        Spec(t.gguf, e.shape, _stored_codec(t, e).name) for t, e in _pairs(family, checkpoint)]

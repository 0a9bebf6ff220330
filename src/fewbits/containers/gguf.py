"""GGUF, llama.cpp's file format: one file with configuration, tokenizer and tensors of ggml types."""

from __future__ import annotations

import json
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from gguf.constants import GGML_QUANT_VERSION, LlamaFileType

from fewbits import arch, codecs
from fewbits.arch import Architecture, Tensor, rope, rows
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec, Shape
from fewbits.codecs.floats import F32, Float
from fewbits.containers import gguf_file, gguf_tokenizer
from fewbits.containers.base import Container, Progress
from fewbits.containers.gguf_file import GgufFile, Spec, Value
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

ROPE_FREQS = "rope_freqs.weight"
SKIPPED = "rotary_emb.inv_freq"  # older checkpoints store what follows from the configuration


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
        family = _family(file)
        config = _config(file, family)
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
        facts = {"metadata": file.metadata, "version": file.version, "name": _get(file, "general.name", "STRING"),
                 "file_type": _get(file, "general.file_type", "UINT32")}
        return Checkpoint(path, self.name, config, entries, _files(file, config),  # type: ignore[arg-type]
                          {k: v for k, v in facts.items() if v is not None})

    # writing --------------------------------------------------------------------------------------------------------
    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        family = arch.lookup(checkpoint.config)
        if family is None:
            known = ", ".join(name for a in arch.ARCHITECTURES for name in a.architectures)
            return f"GGUF needs a table of names for {checkpoint.architecture}; there are {known}"
        config = _own_config(family, checkpoint)
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
        freqs = _rope_freqs(_own_config(family, checkpoint))

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
def _get(file: GgufFile, key: str, *types: str) -> Any:
    """A metadata value of one of `types`, or None where it is missing."""
    value = file.metadata.get(key)
    if value is None:
        return None
    if value.type not in types:
        raise FewbitsError(f"{file.path}: {key} is of type {value.type}; {' or '.join(types)} is expected")
    return value.value


def _family(file: GgufFile) -> Architecture:
    name = _get(file, "general.architecture", "STRING")
    family = arch.by_gguf(name)
    if family is None:
        known = ", ".join(a.gguf for a in arch.ARCHITECTURES)
        raise FewbitsError(f"{file.path}: general.architecture is {name!r}; there are tables for {known}")
    return family


INTEGERS = ("UINT32", "INT32", "UINT64", "INT64", "UINT16", "INT16", "UINT8", "INT8")


def _config(file: GgufFile, family: Architecture) -> dict[str, Any]:
    """Transformers' configuration of what the metadata describe."""
    prefix = family.gguf + "."
    values = {k.removeprefix(prefix): v.value for k, v in file.metadata.items() if k.startswith(prefix)}
    config: dict[str, Any] = {"architectures": [family.architectures[0]], "model_type": family.model_types[0]}
    for field in family.fields:
        types = ("FLOAT32", "FLOAT64") if field.type == "FLOAT32" else INTEGERS
        value = _get(file, prefix + field.key, *types)
        if value is None and field.required:
            raise FewbitsError(f"{file.path}: {prefix + field.key} is missing")
        if value is None and field.default is not None:
            value = field.default(config)
        if value is not None:
            config[field.hf] = value
    for key in ("num_hidden_layers", "num_attention_heads", "hidden_size", "num_key_value_heads"):
        if not 1 <= config[key] <= 1 << 24:
            raise FewbitsError(f"{file.path}: {key} is {config[key]}")
    if config["num_hidden_layers"] > len(file.tensors):
        raise FewbitsError(f"{file.path}: {prefix}block_count is {config['num_hidden_layers']}, with "
                           f"{len(file.tensors)} tensors in the file")
    if "token_embd.weight" not in file.tensors:
        raise FewbitsError(f"{file.path}: tensor 'token_embd.weight' is missing")
    config["vocab_size"] = file.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in file.tensors
    for key in ("attention_bias", "mlp_bias"):
        probe = "blk.0.attn_output.bias" if key == "attention_bias" else "blk.0.ffn_down.bias"
        if family.gguf == "llama":
            config[key] = probe in file.tensors
    config |= family.constants
    try:
        config |= family.extra_config(values)
        if ROPE_FREQS in file.tensors:
            config["rope_parameters"] = _llama3(file, config["rope_parameters"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise FewbitsError(f"{file.path}: {error}") from None
    for name, key in gguf_tokenizer.SPECIAL.items():
        found = _get(file, gguf_tokenizer.KEY + key, *INTEGERS)
        if name in ("bos_token", "eos_token", "pad_token"):
            config[f"{name}_id"] = found
    kinds = {s.type for s in file.tensors.values() if len(s.shape) > 1}
    for kind, dtype in (("F32", "float32"), ("BF16", "bfloat16"), ("F16", "float16")):
        if kinds == {kind}:
            config["dtype"] = dtype
    config.setdefault("dtype", "float16")
    return config


def _llama3(file: GgufFile, settings: dict[str, Any]) -> dict[str, Any]:
    spec = file.tensors[ROPE_FREQS]
    if spec.type != "F32" or len(spec.shape) != 1:
        raise ValueError(f"{ROPE_FREQS} is {spec.type} {list(spec.shape)}; a float32 vector is expected")
    factors = file.data(spec).view(np.float32).tolist()
    return rope.llama3_from_factors(factors, settings["rope_theta"])


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
    if _get(file, gguf_tokenizer.KEY + "model", "STRING") in (None, "no_vocab", "none"):
        return {}

    def named(make: Callable[[Mapping[str, Value]], bytes]) -> Callable[[], bytes]:
        def run() -> bytes:
            try:
                return make(file.metadata)
            except FewbitsError as error:
                raise FewbitsError(f"{file.path}: {error}", error.hint) from None
        return run

    ids = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if config[k] is not None}
    turn = _get(file, "tokenizer.ggml.eot_token_id", *INTEGERS)
    if turn is not None and turn != ids.get("eos_token_id"):
        ids["eos_token_id"] = [*([ids["eos_token_id"]] if "eos_token_id" in ids else []), turn]
    return Files({"tokenizer.json": named(gguf_tokenizer.tokenizer_json),
                  "tokenizer_config.json": named(gguf_tokenizer.tokenizer_config),
                  "generation_config.json": json.dumps(ids, indent=2).encode()})


# writing ------------------------------------------------------------------------------------------------------------
def _own_config(family: Architecture, checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration with defaults filled in; whether the head is tied is what the tensors say."""
    tied = "lm_head.weight" not in checkpoint.entries
    return arch.complete(family, checkpoint.config) | {"tie_word_embeddings": tied}


def _find(family: Architecture, config: dict[str, Any], name: str) -> Tensor | None:
    """The table's row for one name, without making the rows of all layers."""
    layer = next((int(part) for part in name.split(".") if part.isdecimal()), 0)
    if layer >= config["num_hidden_layers"]:
        return None
    return next((Tensor(name, w.gguf.format(i=layer), w.role, layer, w.ops(config)) for w in family.weights
                 if w.present(config) and w.hf.format(i=layer) == name), None)


def _pairs(family: Architecture, checkpoint: Checkpoint) -> Iterator[tuple[Tensor, Entry]]:
    """Tensors in file order with their entries."""
    for tensor in arch.tensors(family, _own_config(family, checkpoint)):
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


def _rope_freqs(config: dict[str, Any]) -> np.ndarray | None:
    settings = rope.parameters(config, "full_attention" if config.get("layer_types") else "")
    if settings["rope_type"] != "llama3":
        return None
    return np.array(rope.llama3_factors(settings, arch.head_dim(config)), np.float32)


def records(checkpoint: Checkpoint) -> list[Spec]:
    """Names, shapes and types of the tensors that a file of this checkpoint holds, in order."""
    family = arch.lookup(checkpoint.config)
    assert family is not None
    freqs = _rope_freqs(_own_config(family, checkpoint))
    return ([] if freqs is None else [Spec(ROPE_FREQS, freqs.shape, "F32")]) + [
        Spec(t.gguf, e.shape, _stored_codec(t, e).name) for t, e in _pairs(family, checkpoint)]


def metadata(checkpoint: Checkpoint) -> dict[str, Value]:
    """All metadata: what the file came with, where it was GGUF, else made from configuration and tokenizer."""
    family = arch.lookup(checkpoint.config)
    assert family is not None
    config = _own_config(family, checkpoint)
    kept: dict[str, Value] = dict(checkpoint.facts.get("metadata") or {})
    kept.pop("general.alignment", None)
    out = {"general.architecture": Value("STRING", family.gguf)}
    if "general.name" not in kept:
        name = checkpoint.facts.get("name") or str(config.get("_name_or_path") or checkpoint.path.stem)
        out |= {"general.type": Value("STRING", "model"), "general.name": Value("STRING", Path(name).name)}
    for field in family.fields:
        value = config.get(field.hf)
        if value is None and field.default is not None:
            value = field.default(config)
        if value is not None:
            out[f"{family.gguf}.{field.key}"] = Value(field.type, value)
        elif field.required:
            raise FewbitsError(f"{checkpoint.path}: config.json has no {field.hf}")
    out |= {f"{family.gguf}.{k}": Value(*v) for k, v in family.extra_metadata(config).items()}
    if gguf_tokenizer.KEY + "model" not in kept:
        embedding = checkpoint.entries["model.embed_tokens.weight"].shape[0]
        try:
            tokenizer = gguf_tokenizer.to_metadata(checkpoint.files, config, embedding)
        except FewbitsError as error:
            raise FewbitsError(f"{checkpoint.path}: {error}", error.hint) from None
        if tokenizer[gguf_tokenizer.KEY + "model"].value == "no_vocab":
            out[f"{family.gguf}.vocab_size"] = Value("UINT32", embedding)
        out |= tokenizer
    out["general.quantization_version"] = Value("UINT32", GGML_QUANT_VERSION)
    out["general.file_type"] = Value("UINT32", _file_type(checkpoint))
    return kept | {k: v for k, v in out.items() if k not in kept or not _same(kept[k], v)}


def _same(kept: Value, new: Value) -> bool:
    """Whether a value is kept with the type it came in."""
    if kept.type == "ARRAY" or new.type == "ARRAY":
        return False
    return bool(kept.value == new.value) or (kept.type == "FLOAT32" and np.float32(kept.value) == np.float32(new.value))


def _file_type(checkpoint: Checkpoint) -> int:
    """`general.file_type`: what the recipe says, else by the type that holds most weights."""
    if checkpoint.facts.get("file_type") is not None:
        return int(checkpoint.facts["file_type"])
    weights: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        if len(entry.shape) > 1:
            weights[entry.codec.name] += entry.parameters
    kind = weights.most_common(1)[0][0]
    names = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_M", "Q4_K": "MOSTLY_Q4_K_M", "Q5_K": "MOSTLY_Q5_K_M",
             "MXFP4": "MOSTLY_MXFP4_MOE"}
    name = names.get(kind, f"MOSTLY_{kind}")
    return int(LlamaFileType[name]) if name in LlamaFileType.__members__ else int(LlamaFileType.GUESSED)

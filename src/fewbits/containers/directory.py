"""Directories as Transformers knows them: config.json, safetensors files, tokenizer files.

A layout of quantized weights (GPTQ, bitsandbytes) is such a directory with other tensors in the place of a weight: it
overrides how entries are gathered from raw tensors, and the `Layout` that says which raw tensors an entry becomes.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from fewbits import arch
from fewbits.checkpoint import Buffer, Checkpoint, Entry, Filed
from fewbits.codecs.floats import BF16, F16, F32, Float
from fewbits.containers import canonical, experts
from fewbits.containers.base import Container, Progress
from fewbits.containers.safetensors import Raw, SafeTensors, Spec, Writer, header_of, nbytes
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Stored

JSON_LIMIT = 100_000_000  # bytes of config.json or an index
SHARD = 5_000_000_000  # bytes a file, as transformers splits by default
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CARRIED = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
           "chat_template.jinja", "chat_template.json", "generation_config.json", "preprocessor_config.json",
           "processor_config.json", "image_processor_config.json", "video_preprocessor_config.json")
FLOATS = {"F32": F32, "F16": F16, "BF16": BF16}


class Layout:
    """What the entries of one checkpoint become in its files; this one holds floats only."""

    def specs(self, entry: Entry) -> dict[str, Spec]:
        """Names, types and shapes of the raw tensors of an entry, known before its data."""
        return {entry.name: (entry.codec.name, entry.shape)}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        """The raw tensors of the entry `name`, once it is loaded."""
        return {name: tensor.planes["data"].reshape(tensor.shape)}

    def quantization_config(self) -> dict[str, Any] | None:
        """What config.json says of the layout; asked for after the last tensor."""
        return None


class Directory(Container):
    """A directory with config.json and safetensors files."""

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        """Whether a directory, or a file in one, with this `quantization_config` is in this layout."""
        raise NotImplementedError

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        """Take the raw tensors of quantized weights out of `raws`, as entries."""
        return []

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return Layout()

    def quantization(self, path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
        """Take the description of the quantization out of `config`."""
        found = config.pop("quantization_config", None)
        if not isinstance(found, dict | None):
            raise FewbitsError(f"{path / 'config.json'}: quantization_config is not an object")
        return found

    # reading --------------------------------------------------------------------------------------------------------
    def detect(self, path: Path) -> bool:
        folder = folder_of(path)
        weights = [path] if path.is_file() else folder.glob("*.safetensors*")
        if not (folder / "config.json").is_file() or not any(".safetensors" in file.suffixes for file in weights):
            return False
        return self.claims(path, self.quantization(folder, read_json(folder / "config.json")))

    def read(self, path: Path) -> Checkpoint:
        return self.gather(path, raw_tensors(path))

    def gather(self, path: Path, raws: dict[str, Raw]) -> Checkpoint:
        """The checkpoint of the directory or file `path` with these raw tensors."""
        folder = folder_of(path)
        config = read_json(folder / "config.json")
        check_config(folder / "config.json", config)
        quantization = self.quantization(folder, config)
        names = list(raws)
        found = {entry.name: entry for entry in self.entries(raws, quantization or {})}
        buffers = {}
        for name, raw in raws.items():
            if raw.dtype in FLOATS and raw.shape:
                found[name] = float_entry(raw)
            elif raw.dtype.startswith(("F", "C")) and raw.shape:
                raise raw.refuse(f"{raw.dtype} weights are not read", "convert them to F32, F16 or BF16 first")
            elif name.endswith("weight"):
                raise raw.refuse(f"{raw.dtype} {list(raw.shape)} is a packed weight, and config.json does not say how "
                                 "to read it", "its quantization_config, or another tensor beside it, is missing")
            else:
                buffers[name] = Buffer(raw.dtype, raw.shape, raw.tensor)
        order = {name: i for i, name in enumerate(names)}
        entries = self.stacked(dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order)))))
        entries = turned(config, canonical.named(config, entries))
        files = {name: (folder / name).read_bytes() for name in CARRIED if (folder / name).is_file()}
        facts = {"quantization_config": quantization} if quantization else {}
        return Checkpoint(path, self.name, config, entries, files, facts, buffers)

    def stacked(self, entries: dict[str, Entry]) -> dict[str, Entry]:
        """The entries with experts stacked."""
        return experts.stacked(entries)

    # writing --------------------------------------------------------------------------------------------------------
    def as_filed(self, checkpoint: Checkpoint) -> Checkpoint:
        entries = turned(checkpoint.config, checkpoint.entries)
        return replace(checkpoint, entries=experts.unstacked(entries.values()))

    def meant(self, checkpoint: Checkpoint) -> Checkpoint:
        return replace(checkpoint, entries=self.stacked(checkpoint.entries))

    def stage(self, path: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
        checkpoint = self.as_filed(checkpoint)
        layout = self.layout(checkpoint)
        path.mkdir()
        for name, data in checkpoint.files.items():
            if name not in CARRIED:
                raise FewbitsError(f"{name}: not a file that belongs into a model directory")
            (path / name).write_bytes(data)
        self._write_shards(path, checkpoint, layout, progress)
        config = {k: v for k, v in checkpoint.config.items() if k != "quantization_config"}
        quantization = layout.quantization_config()
        write_json(path / "config.json", config | ({"quantization_config": quantization} if quantization else {}))

    def _write_shards(self, path: Path, checkpoint: Checkpoint, layout: Layout, progress: Progress | None) -> None:
        specs = {entry.name: layout.specs(entry) for entry in checkpoint.entries.values()}
        specs |= {name: {name: (buffer.dtype, buffer.shape)} for name, buffer in checkpoint.buffers.items()}
        shards = split(specs, SHARD)
        done, total = 0, checkpoint.nbytes
        index: dict[str, str] = {}
        for i, shard in enumerate(shards):
            name = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
            merged = {raw: spec for owner in shard for raw, spec in specs[owner].items()}
            index |= dict.fromkeys(merged, name)
            with Writer(path / name, merged, {"format": "pt"}) as out:
                for owner in shard:
                    if owner in checkpoint.entries:
                        entry = checkpoint.entries[owner]
                        _write_entry(out, layout, entry)
                        done += entry.nbytes
                    else:
                        out.write(owner, checkpoint.buffers[owner].load())
                    if progress:
                        progress("writing", done, total)
        if len(shards) > 1:
            size = sum(nbytes(spec) for owned in specs.values() for spec in owned.values())
            write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})


class TransformersDirectory(Directory):
    """A model in full or half precision."""

    name: ClassVar[str] = "transformers"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        return quantization is None and not (folder_of(path) / "quantize_config.json").exists()

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        return float_reason(entry)

    def stage(self, path: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
        """A `dtype` in the configuration becomes that of the weights, if they share one: Transformers obeys it."""
        types = {entry.codec.name for entry in checkpoint.entries.values()}
        found = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get("".join(types))
        told = {key: found for key in ("dtype", "torch_dtype") if found and checkpoint.config.get(key)}
        super().stage(path, replace(checkpoint, config=checkpoint.config | told), progress)


def _write_entry(out: Writer, layout: Layout, entry: Entry) -> None:
    for name, data in layout.tensors(entry.name, entry.load()).items():
        out.write(name, data)


def turned(config: dict[str, Any], entries: dict[str, Entry]) -> dict[str, Entry]:
    """Float weights that files hold as `[..., in, out]`: from there to `[..., out, in]`, and back."""
    return {n: _turned(e) if isinstance(e.codec, Float) and arch.transposed(config, n) else e
            for n, e in entries.items()}


def _turned(entry: Entry) -> Entry:
    codec, shape = entry.codec, (*entry.shape[:-2], entry.shape[-1], entry.shape[-2])

    def load() -> QTensor:
        data = entry.load().planes["data"].view(entry.shape).transpose(-1, -2)
        return QTensor(codec, shape, {"data": data.reshape(codec.matrix(shape))})

    return Entry(entry.name, shape, codec, load)


def float_reason(entry: Entry) -> str | None:
    return None if isinstance(entry.codec, Float) else "holds float32, float16 and bfloat16 only"


def linear_reason(checkpoint: Checkpoint, entry: Entry) -> str | None:
    """Why transformers would not look for a quantized linear layer under this name, or None."""
    module = module_of(entry.name)
    if module is None or len(entry.shape) != 2:
        return "only the two-dimensional weight of a linear layer can be quantized in this layout"
    if is_embedding(module):
        return "transformers keeps embeddings in floats in this layout"
    if module.split(".")[-1] == "lm_head" and checkpoint.config.get("tie_word_embeddings"):
        return "the output head is tied to the embeddings, which transformers keeps in floats in this layout"
    return None


def module_of(name: str) -> str | None:
    return name[:-len(".weight")] if name.endswith(".weight") else None


def is_embedding(module: str) -> bool:
    last = module.split(".")[-1]
    return "embed" in last and last != "embed_out" or last in ("wte", "wpe")


def float_modules(checkpoint: Checkpoint) -> list[str]:
    """Modules with a two-dimensional weight left in floats that isn't an embedding, in order."""
    modules = [module_of(e.name) for e in checkpoint.entries.values()
               if isinstance(e.codec, Float) and len(e.shape) == 2]
    return [m for m in modules if m is not None and not is_embedding(m)]


def float_entry(raw: Raw) -> Entry:
    codec = FLOATS[raw.dtype]
    shape = raw.shape

    def stored() -> Stored | None:
        data = raw.array()
        return None if data is None else Stored(codec, shape[-1] if len(shape) > 1 else 1, (data,))

    return Entry(raw.name, shape, codec, Filed(
        lambda: QTensor(codec, shape, {"data": raw.tensor().reshape(codec.matrix(shape))}), stored))


def split(specs: dict[str, dict[str, Spec]], limit: int) -> list[list[str]]:
    """Owners of raw tensors, in order, in as few runs as stay below `limit` bytes each."""
    shards: list[list[str]] = [[]]
    room = limit
    for owner, owned in specs.items():
        size = sum(nbytes(spec) for spec in owned.values())
        if size > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(owner)
        room -= size
    return shards


def folder_of(path: Path) -> Path:
    """The directory of a model that is given as a directory or as one file in it."""
    return path.parent if path.is_file() else path


def names_contain(path: Path, text: str) -> bool:
    """Whether a tensor of the first file is called so; looks for the text in its header."""
    return text.encode() in header_of(_files(path, _index(path))[0])


def _files(path: Path, index: dict[str, str] | None) -> list[Path]:
    if path.is_file():
        return [path]
    if index is None:
        return [path / _only_file(path)]
    found = [path / name for name in sorted(set(index.values()))]
    for file in found:
        if not file.is_file():
            raise FewbitsError(f"{path / INDEX}: names the file {file.name}, which is missing",
                               "fetch the missing file")
    return found


def raw_tensors(path: Path) -> dict[str, Raw]:
    """Every tensor of the directory, from one file or from all that its index names; or of the one file `path`."""
    raws: dict[str, Raw] = {}
    index = _index(path)
    for file in _files(path, index):
        for raw in SafeTensors(file).tensors.values():
            if raw.name in raws:
                raise raw.refuse(f"is in {raws[raw.name].file.path.name} too")
            raws[raw.name] = raw
    for tensor, name in (index or {}).items():
        if tensor not in raws or raws[tensor].file.path.name != name:
            raise FewbitsError(f"{path / INDEX}: {tensor} should be in {name}, and is not")
    return raws


def _index(path: Path) -> dict[str, str] | None:
    if path.is_file():
        of = re.search(r"-of-0*(\d+)\.safetensors$", path.name)
        if of and of[1] != "1":
            raise FewbitsError(f"{path}: one of {of[1]} files of a model", f"open the directory: {path.parent}")
        return None
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return None
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FewbitsError(f"{path / INDEX}: weight_map is not an object of tensor names")
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and Path(name).name == name and name.isprintable() and "\\" not in name
        if not plain or not name.endswith(".safetensors"):
            raise FewbitsError(f"{path / INDEX}: {tensor}: {name!r} is not the name of a file in this directory")
    return weight_map


def _only_file(path: Path) -> str:
    """model.safetensors, or the one file with another name, as AutoGPTQ wrote it."""
    files = [file.name for file in path.glob("*.safetensors")]
    if WEIGHTS in files:
        return WEIGHTS
    if len(files) != 1:
        raise FewbitsError(f"{path}: {len(files) or 'no'} safetensors files, and no {INDEX}",
                           "pickled weights (*.bin, *.pt) are not read: convert them to safetensors first")
    return files[0]


def check_config(path: Path, config: dict[str, Any]) -> None:
    """Refuse what everything else takes for granted: names of classes and types are text."""
    for key in ("model_type", "dtype", "torch_dtype"):
        if not isinstance(config.get(key), str | None):
            raise FewbitsError(f"{path}: {key} {config[key]!r}", "text was expected")
    classes = config.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise FewbitsError(f"{path}: architectures {classes!r}", "a list of class names was expected")


def read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > JSON_LIMIT:
        raise FewbitsError(f"{path}: {path.stat().st_size} bytes, where at most {JSON_LIMIT} are read")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise FewbitsError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise FewbitsError(f"{path}: not a JSON object")
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


"""LoRA adapters: a directory of peft's, or a GGUF file of llama.cpp's. Both hold, for some weights W, a and b of
W + scale * b @ a; they differ in names, in the order of rows and in how they say the scale.

peft's layout is in `peft`. GGUF: `general.type` "adapter", `adapter.type` "lora", `adapter.lora.alpha`;
`<weight>.lora_a` and `<weight>.lora_b` under GGUF's names, rows of b in the file's order; of the embedding a is
`[vocabulary, rank]` and b `[width, rank]`. The scale is alpha / rank, or 1 where alpha is 0.
https://github.com/ggml-org/llama.cpp/pull/8332
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from fewbits import arch, codecs
from fewbits.arch import Architecture, Tensor, rows
from fewbits.codecs.floats import Float
from fewbits.containers import gguf_file, peft
from fewbits.containers.base import check_output, flat_bytes, remove, sync
from fewbits.containers.gguf_config import get
from fewbits.containers.gguf_file import GgufFile, Spec, Value
from fewbits.containers.peft import Lora, Pair, float_tensor, transposed
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor

ENDS = (".lora_a", ".lora_b")  # in GGUF
ALPHA = "adapter.lora.alpha"


def is_adapter(path: Path) -> bool:
    """Whether `path` is a LoRA adapter in either layout."""
    if path.is_dir():
        return (path / peft.CONFIG).is_file()
    with open(path, "rb") as file:
        if file.read(4) != gguf_file.MAGIC:
            return False
    return get(gguf_file.read(path), "general.type", "STRING") == "adapter"


def read_lora(path: Path, config: dict[str, Any]) -> Lora:
    """Read an adapter of a model of this configuration, in either layout.

    Raises:
        FewbitsError: no LoRA adapter, one that changes more than weights, or one of another model.
    """
    family = arch.lookup(config)
    if family is None or not family.gguf:
        raise FewbitsError(f"{path}: GGUF has no names for the base model; there are {arch.goes_to_gguf()}")
    config = arch.complete(family, config)
    lora = peft.read_plain(path) if path.is_dir() else _read_gguf(path, family, config)
    table = _table(family, config)
    for name, pair in lora.pairs.items():
        if name not in table:
            tied = family.head == name and config.get("tie_word_embeddings")
            raise FewbitsError(f"{path}: changes {name}, which "
                               + ("is tied to the embedding" if tied else f"{family.name} does not have"))
        shape = table[name].shape(config)
        if (pair.b.shape[0], pair.a.shape[1]) != shape or pair.a.shape[0] != pair.b.shape[1]:
            raise FewbitsError(f"{path}: {name}: a {list(pair.a.shape)} and b {list(pair.b.shape)} do not make "
                               f"{list(shape)}", "it belongs to another model")
    return lora


def write_lora(lora: Lora, out: Path, config: dict[str, Any], to: str) -> None:
    """Write an adapter as "gguf-lora" (a file) or "peft" (a directory).

    Raises:
        FewbitsError: `out` exists, or the layout cannot hold the adapter.
    """
    family = arch.lookup(config)
    assert family is not None
    out = out.resolve()
    check_output(out, lora.path)
    with _fresh(out) as partial:
        if to == "gguf-lora":
            _write_gguf(lora, partial, family, arch.complete(family, config))
        else:
            peft.write(lora, partial, {n for n in lora.pairs if _is_embedding(n, config)},
                       any(w.transposed for w in family.weights))


def to_gguf(source: Path, config: dict[str, Any], out: Path) -> Lora:
    """Write the peft directory's adapter as a GGUF file; `config` is the base model's configuration."""
    write_lora(read_lora(source, config), out, config, "gguf-lora")
    return read_lora(out, config)


def to_peft(gguf: Path, config: dict[str, Any], out: Path) -> Lora:
    """Write the GGUF file's adapter as a peft directory; `config` is the base model's configuration."""
    write_lora(read_lora(gguf, config), out, config, "peft")
    return read_lora(out, config)


@contextmanager
def _fresh(out: Path) -> Iterator[Path]:
    """A name beside `out` that becomes `out` if all goes well."""
    partial = out.with_name(f".{out.name}.partial")
    remove(partial)
    try:
        yield partial
        sync(partial)
        os.replace(partial, out)
    except BaseException:
        remove(partial)
        raise


def _table(family: Architecture, config: dict[str, Any]) -> dict[str, Tensor]:
    """The matrices that an adapter can change, by their Transformers name."""
    return {t.hf: t for t in arch.tensors(family, config) if len(t.dims) == 2 and all(
        op.packed and not isinstance(op, rows.Every) for op in t.ops)}


def _is_embedding(name: str, config: dict[str, Any]) -> bool:
    family = arch.lookup(config)
    assert family is not None
    return any(w.hf == name and w.role in ("token_embd", "position_embd") for w in family.weights)


# GGUF ---------------------------------------------------------------------------------------------------------------
def _read_gguf(path: Path, family: Architecture, config: dict[str, Any]) -> Lora:
    file = gguf_file.read(path)
    kind, lora = get(file, "general.type", "STRING"), get(file, "adapter.type", "STRING")
    if (kind, lora) != ("adapter", "lora"):
        raise FewbitsError(f"{path}: general.type is {kind!r} and adapter.type {lora!r}; a LoRA adapter is expected")
    found = get(file, "general.architecture", "STRING")
    if found != family.gguf:
        raise FewbitsError(f"{path}: is an adapter for {found}, and the base model is {family.gguf}")
    if "adapter.alora.invocation_tokens" in file.metadata:
        raise FewbitsError(f"{path}: works only behind certain tokens (aLoRA); a plain LoRA is expected")
    alpha = get(file, ALPHA, "FLOAT32") or 0.0
    if not math.isfinite(alpha):
        raise FewbitsError(f"{path}: {ALPHA} is {alpha}")
    table = {t.gguf: t for t in _table(family, config).values()}
    halves: dict[str, dict[str, Spec]] = {}
    for spec in file.tensors.values():
        weight, end = spec.name[:-7], spec.name[-7:]
        if end not in ENDS or weight not in table or len(spec.shape) != 2:
            raise FewbitsError(f"{path}: tensor {spec.name!r} {list(spec.shape)} is no half of a LoRA pair of "
                               f"{family.gguf}", "merge the adapter into its base model instead")
        halves.setdefault(weight, {})[end[-1]] = spec
    pairs = {}
    for weight, both in halves.items():
        if both.keys() != {"a", "b"}:
            raise FewbitsError(f"{path}: {weight} has one half of its LoRA pair")
        a, b = (_stored(file, both[half]) for half in "ab")
        if _is_embedding(table[weight].hf, config):
            a, b = transposed(b), a
        rank = a.shape[0]
        if b.shape[1] != rank:
            raise FewbitsError(f"{path}: {weight}: a {list(both['a'].shape)} and b {list(both['b'].shape)} have no "
                               "rank in common")
        try:
            b = rows.undo(table[weight].ops, b)
        except ValueError as error:
            raise FewbitsError(f"{path}: {weight}: {error}") from None
        pairs[table[weight].hf] = Pair(a, b, alpha / rank if alpha else 1.0)
    return Lora(path, pairs, str(get(file, "general.base_model.0.name", "STRING") or ""))


def _stored(file: GgufFile, spec: Spec) -> QTensor:
    """A tensor in floats; what is quantized is decoded."""
    try:
        codec = codecs.get(spec.type)
    except FewbitsError:
        raise FewbitsError(f"{file.path}: tensor {spec.name!r} is {spec.type}, which is not a weight type") from None
    (name, (dtype, size)), = codec.planes(spec.shape).items()
    plane = torch.from_numpy(file.data(spec)).view(getattr(torch, dtype)).view(size)
    tensor = QTensor(codec, spec.shape, {name: plane})
    return tensor if isinstance(codec, Float) else float_tensor(tensor.dequantize())


def _write_gguf(lora: Lora, path: Path, family: Architecture, config: dict[str, Any]) -> None:
    """One alpha for the whole file: where pairs differ in scale * rank, what remains of it goes into b, in float32."""
    table, alphas = _table(family, config), {n: p.scale * p.rank for n, p in lora.pairs.items()}
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 0.0
    if not np.float32(alpha) or not math.isfinite(np.float32(alpha)):
        raise FewbitsError(f"{lora.path}: alpha is {alpha}, which means another scale in GGUF")
    specs: list[Spec] = []
    data: list[np.ndarray] = []
    for tensor in table.values():
        if tensor.hf not in lora.pairs:
            continue
        pair = lora.pairs[tensor.hf]
        a, b = pair.a, pair.b
        if alphas[tensor.hf] != alpha:
            b = float_tensor(b.dequantize() * (alphas[tensor.hf] / alpha))
        b = rows.apply(tensor.ops, b)
        if _is_embedding(tensor.hf, config):
            a, b = b, transposed(a)
        for end, half in zip(ENDS, (a, b), strict=True):
            specs.append(Spec(tensor.gguf + end, half.shape, half.codec.name))
            data.append(flat_bytes(half.planes["data"]).numpy())
    metadata = {"general.architecture": Value("STRING", str(family.gguf)), "general.type": Value("STRING", "adapter"),
                "adapter.type": Value("STRING", "lora"), ALPHA: Value("FLOAT32", alpha),
                "general.name": Value("STRING", lora.path.name)}
    if lora.base:
        metadata |= {"general.base_model.count": Value("UINT32", 1),
                     "general.base_model.0.name": Value("STRING", lora.base)}
    gguf_file.write(path, metadata, specs, data)

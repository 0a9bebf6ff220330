"""llama.cpp's files of the time before GGUF, for Llama alone: magic ggml, ggmf (version 1), ggjt (versions 1 to 3).

Layout, little-endian: magic, version (not in ggml); n_vocab, n_embd, n_mult, n_head, n_layer, n_rot, ftype; n_vocab
tokens (length, text, and from ggmf on a float32 score); tensors up to the end of the file: number of dimensions, length
of the name, type, dimensions innermost first, name, from ggjt on padding to a multiple of 32, data. Numbers: 32 bits.

The file is read as what it would be in GGUF. What it does not say follows from shapes (the width of the MLP, heads of
keys) or is what all its models had (context, epsilon, rotary base); `facts["assumed"]` lists the latter.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs import ggml_old
from fewbits.codecs.base import Codec
from fewbits.codecs.ggml_old import Old
from fewbits.containers import gguf_tokenizer, gguf_types
from fewbits.containers.base import Container, Progress
from fewbits.containers.gguf import assemble
from fewbits.containers.gguf_file import MAX_RECORDS, REMOVED, GgufFile, Reader, Spec, Value
from fewbits.containers.gguf_pretokenizer import SPACE
from fewbits.containers.gguf_tokenizer import BYTE, CONTROL, NORMAL, UNKNOWN
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

MAGICS = {b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt"}  # the letters as a little-endian number
VERSIONS = {"ggmf": (1,), "ggjt": (1, 2, 3)}
HEADER = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
LONGEST = 4096  # bytes of a token or a name
MOST_TOKENS = 1 << 18  # Llama had 32 000
TYPES = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 4: "Q4_2", 5: "Q4_3", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K",
         11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K"}
SINCE = {"Q2_K": 3, "Q3_K": 3, "Q4_K": 3, "Q5_K": 3, "Q6_K": 3}  # versions of ggjt
NAMES = {"tok_embeddings": "token_embd", "norm": "output_norm", "output": "output", "attention.wq": "attn_q",
         "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
         "attention_norm": "attn_norm", "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down",
         "feed_forward.w3": "ffn_up", "ffn_norm": "ffn_norm"}
SKIPPED = "rope.freqs"  # follows from the configuration
ASSUMED = {"context_length": ("UINT32", 2048), "rope.freq_base": ("FLOAT32", 10000.0)}
EPSILON = 1e-6  # of the first Llama, the only one until ggjt 2
EPSILON_3 = 5e-6  # what llama.cpp took for ggjt 3, between the first Llama's 1e-6 and the second's 1e-5
FIRST_BYTE, BYTES = 3, 256


@dataclass(frozen=True)
class OldSpec(Spec):
    """A tensor in blocks of its time."""

    codec: Codec | None = None

    @property
    def nbytes(self) -> int:
        assert self.codec is not None
        return self.codec.nbytes(self.shape)


class Ggml(Container):
    """Files of magic ggml, ggmf or ggjt; read only."""

    name: ClassVar[str] = "ggml"
    suffix: ClassVar[str] = ".bin"

    def detect(self, path: Path) -> bool:
        if not path.is_file():
            return False
        with open(path, "rb") as file:
            return file.read(4) in MAGICS

    def read(self, path: Path) -> Checkpoint:
        file, layout = _read(path)
        found = assemble(file, self.name)
        assumed = {k: file.metadata[f"llama.{k}"].value for k in (*ASSUMED, "attention.layer_norm_rms_epsilon")}
        return replace(found, entries={name: _today(entry) for name, entry in found.entries.items()},
                       facts=found.facts | {"layout": layout, "assumed": assumed})

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        return "files of the time before GGUF are read, not written"

    def stage(self, path: Path, checkpoint: Checkpoint, progress: Progress | None) -> None:
        raise FewbitsError(f"{path}: files of the time before GGUF are read, not written", "write gguf")


def _today(entry: Entry) -> Entry:
    """The entry in a present type, where one holds the same values."""
    codec = entry.codec
    if not isinstance(codec, Old) or codec.today is None:
        return entry
    today = codec.today
    return entry.as_(codec=today, load=lambda: QTensor.pack(today, entry.shape, *entry.load().unpack()))


def _read(path: Path) -> tuple[GgufFile, str]:
    """The file as GGUF would have it, and the name of its layout."""
    with open(path, "rb") as opened:
        buffer = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    reader = Reader(path, buffer)
    reader.at = 4
    kind, version = MAGICS[buffer[:4]], 0
    if kind in VERSIONS:
        version = reader.take("<I", "version")
        if version not in VERSIONS[kind]:
            raise reader.error(f"{kind} version {version}; {', '.join(map(str, VERSIONS[kind]))} can be read")
    layout = f"{kind} {version}" if version else f"{kind} (no version)"
    header = {name: reader.take("<I", name) for name in HEADER}
    _check(reader, header, layout)
    tokens, scores = _vocabulary(reader, header["n_vocab"], kind != "ggml")
    blocks = version if kind == "ggjt" else 1
    tensors = {s.name: s for s in _tensors(reader, layout, blocks, kind == "ggjt")}
    metadata = _metadata(reader, header, tensors, layout, blocks)
    metadata |= _tokenizer(reader, tokens, scores)
    known = {s.type: s.codec for s in tensors.values() if isinstance(s, OldSpec)}
    return GgufFile(path, 0, metadata, tensors, 0, buffer, codecs=known), layout


def _check(reader: Reader, header: dict[str, int], layout: str) -> None:
    """Llama's header holds together; those of other models of the time (GPT-J, MPT, Falcon) do not, read as Llama's."""
    embd, heads = header["n_embd"], header["n_head"]
    if not (heads and embd and embd % heads == 0 and header["n_rot"] == embd // heads and header["n_layer"]
            and header["ftype"] < 100):
        raise reader.error(f"{layout}: this is not the header of a Llama ("
                           + ", ".join(f"{k} {v}" for k, v in header.items()) + ")",
                           "of the files older than GGUF only Llama's are read")


def _vocabulary(reader: Reader, count: int, scored: bool) -> tuple[list[bytes], np.ndarray]:
    """Texts of the tokens, and their scores (not before ggmf: SentencePiece numbers pieces by falling score)."""
    if count > (reader.size - reader.at) // (8 if scored else 4):
        raise reader.error(f"n_vocab is {count}, more than the remaining {reader.size - reader.at} bytes can hold")
    if count > MOST_TOKENS:
        raise reader.error(f"n_vocab is {count}; at most {MOST_TOKENS} are read")
    tokens, scores = [], -np.arange(count, dtype=np.float32)
    for i in range(count):
        size = reader.take("<I", f"length of token {i}")
        if size > LONGEST:
            raise reader.error(f"token {i} has {size} bytes; at most {LONGEST} are read",
                               "of the files older than GGUF only Llama's are read")
        tokens.append(reader.bytes(size, f"token {i}"))
        if scored:
            scores[i] = reader.take("<f", f"score of token {i}")
    return tokens, scores


def _tensors(reader: Reader, layout: str, version: int, padded: bool) -> Iterator[Spec]:
    names: set[str] = set()
    while reader.at < reader.size:
        dims, size, kind = (reader.take("<I", f"{what} of a tensor") for what in ("dimensions", "name", "type"))
        if not 1 <= dims <= 2 or not 1 <= size <= LONGEST:
            raise reader.error(f"{layout}: a tensor has {dims} dimensions and a name of {size} bytes")
        shape = tuple(reader.take("<I", "shape of a tensor") for _ in range(dims))[::-1]
        try:
            old = reader.bytes(size, "a tensor's name").decode()
        except UnicodeDecodeError:
            raise reader.error("a tensor's name is not valid UTF-8") from None
        if padded:
            reader.at += -reader.at % 32
        spec = _spec(reader, layout, version, _name(old), old, shape, kind)
        reader.at += spec.nbytes
        if reader.at > reader.size:
            raise reader.error(f"tensor {old!r} ends at byte {reader.at} of a file of {reader.size}",
                               "the file is cut short: fetch it again")
        if spec.name in names or len(names) >= MAX_RECORDS:
            raise reader.error(f"tensor {old!r} appears twice" if spec.name in names else
                               f"there are more than {MAX_RECORDS} tensors")
        names.add(spec.name)
        if old != SKIPPED:
            yield spec


def _name(old: str) -> str:
    """GGUF's name of a tensor, or its own where it has none."""
    layer, rest = "", old
    if old.startswith("layers."):
        _, number, rest = old.split(".", 2) if old.count(".") > 1 else ("", "", old)
        layer = f"blk.{number}."
    module = rest.removesuffix(".weight")
    return f"{layer}{NAMES[module]}.weight" if module in NAMES and rest != module else old


def _spec(reader: Reader, layout: str, version: int, name: str, old: str, shape: tuple[int, ...], kind: int) -> Spec:
    label = TYPES.get(kind)
    if label is None or SINCE.get(label, 0) > version or (label in REMOVED.values() and version > 1):
        raise reader.error(f"tensor {old!r} has the type {kind}{f' ({label})' if label else ''}, which {layout} does "
                           "not have")
    if min(shape) < 1 or math.prod(shape) > 1 << 62:
        raise reader.error(f"tensor {old!r} has the impossible shape {list(shape)}")
    codec = ggml_old.TYPES.get(version, {}).get(label)
    block = codec.columns if codec else gguf_types.TYPES[label][1]
    if shape[-1] % block:
        raise reader.error(f"tensor {old!r}: rows of {shape[-1]} do not divide into blocks of {block} ({label})")
    if codec:
        return OldSpec(name, shape, codec.name, reader.at, codec)
    return Spec(name, shape, label, reader.at)


def _metadata(reader: Reader, header: dict[str, int], tensors: dict[str, Spec], layout: str,
              version: int) -> dict[str, Value]:
    width, head = header["n_embd"], header["n_rot"]
    shapes = {name: spec.shape for name, spec in tensors.items()}
    embedding = shapes.get("token_embd.weight", (0, 0))
    if embedding != (header["n_vocab"], width):
        part = len(embedding) == 2 and embedding[0] == header["n_vocab"] and embedding[1] and width % embedding[1] == 0
        raise reader.error(f"{layout}: the embedding is {list(embedding)}, and the header says "
                           f"{[header['n_vocab'], width]}",
                           f"this is one of the {width // embedding[1]} files of a model, which are not joined here"
                           if part else None)
    mlp, keys = shapes.get("blk.0.ffn_gate.weight", (0,))[0], shapes.get("blk.0.attn_k.weight", (0,))[0]
    if not mlp or not keys or keys % head:
        raise reader.error(f"{layout}: blk.0 has an MLP of {mlp} rows and keys of {keys}, in heads of {head}")
    epsilon = EPSILON if version < 3 else EPSILON_3
    sizes = {"embedding_length": width, "block_count": header["n_layer"], "feed_forward_length": mlp,
             "attention.head_count": header["n_head"], "attention.head_count_kv": keys // head,
             "rope.dimension_count": head, "vocab_size": header["n_vocab"]}
    own: dict[str, tuple[str, Any]] = {k: ("UINT32", v) for k, v in sizes.items()} | ASSUMED
    own["attention.layer_norm_rms_epsilon"] = ("FLOAT32", epsilon)
    return {"general.architecture": Value("STRING", "llama"), "general.type": Value("STRING", "model"),
            "general.name": Value("STRING", reader.path.stem)} | {f"llama.{k}": Value(*v) for k, v in own.items()}


def _tokenizer(reader: Reader, raws: list[bytes], scores: np.ndarray) -> dict[str, Value]:
    """Tokens as GGUF has them; their kinds follow from their places: unknown, two ends, 256 bytes, pieces."""
    if len(raws) < FIRST_BYTE or not np.isfinite(scores).all():
        raise reader.error(f"a vocabulary of {len(raws)} tokens, {int(np.isfinite(scores).sum())} with a finite score")
    types = np.full(len(raws), NORMAL, np.int32)
    types[:FIRST_BYTE] = UNKNOWN, CONTROL, CONTROL
    tokens = ["<unk>", "<s>", "</s>"]
    if raws[FIRST_BYTE:FIRST_BYTE + BYTES] == [bytes([i]) for i in range(BYTES)]:
        types[FIRST_BYTE:FIRST_BYTE + BYTES] = BYTE
        tokens += [f"<0x{i:02X}>" for i in range(BYTES)]
    for i in range(len(tokens), len(raws)):
        try:
            tokens.append(raws[i].decode().replace(" ", SPACE))
        except UnicodeDecodeError:
            raise reader.error(f"token {i} is not valid UTF-8: {raws[i]!r}") from None
        if not raws[i]:
            types[i] = CONTROL
    found = {"model": Value("STRING", "llama"), "pre": Value("STRING", "default"),
             "tokens": Value("ARRAY", tokens, "STRING"), "scores": Value("ARRAY", scores, "FLOAT32"),
             "token_type": Value("ARRAY", types, "INT32"), "unknown_token_id": Value("UINT32", 0),
             "bos_token_id": Value("UINT32", 1), "eos_token_id": Value("UINT32", 2)}
    return {gguf_tokenizer.KEY + key: value for key, value in found.items()}

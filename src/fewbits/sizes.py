"""How many bytes a checkpoint takes in a container, from what the container would write: names, types and shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers import gguf, gguf_file, gguf_tokenizer
from fewbits.containers.base import Container
from fewbits.containers.directory import Directory
from fewbits.containers.gguf import Gguf
from fewbits.containers.safetensors import Spec, nbytes

OFFSET = 0.0012345678943246603  # of nested scales: its digits are part of the file, and not known before the data
TOKENIZER_BYTES = {"directory": 75, "gguf": 40}  # a token, where no tokenizer is there: about Llama 3's and Qwen2's


class Sizes:
    """Sizes of one model in any container; what recipes share is worked out once."""

    def __init__(self, source: Checkpoint):
        self.source = source
        self.has_tokenizer = any(name in source.files for name in ("tokenizer.json", "tokenizer.model", "vocab.txt"))

    def of(self, container: Container, goal: Checkpoint) -> int:
        """Bytes of all files that `container` would write.

        Raises:
            FewbitsError: a tokenizer or configuration that GGUF cannot hold.
        """
        if isinstance(container, Gguf):
            return self._gguf(goal)
        assert isinstance(container, Directory)
        return self._directory(container, goal)

    def _guess(self, kind: str) -> int:
        return 0 if self.has_tokenizer else TOKENIZER_BYTES[kind] * int(self.source.config.get("vocab_size") or 0)

    # directories ------------------------------------------------------------------------------------------------------
    def _directory(self, container: Directory, goal: Checkpoint) -> int:
        goal = container.as_filed(goal)
        layout = container.layout(goal)
        specs: dict[str, Spec] = {}
        for entry in goal.entries.values():
            specs |= layout.specs(entry.as_(load=_with_offset(entry)))
        specs |= {name: (b.dtype, b.shape) for name, b in goal.buffers.items()}
        quantization = layout.quantization_config()
        config = goal.config | ({"quantization_config": quantization} if quantization else {})
        return (_safetensors_header(specs) + sum(map(nbytes, specs.values())) + self._files
                + len(json.dumps(config, indent=2, ensure_ascii=False)) + 1 + self._guess("directory"))

    @cached_property
    def _files(self) -> int:
        """The tokenizer's files. Those of a GGUF file take seconds to make: they are not made just to be counted."""
        metadata = self.source.facts.get("metadata") or {}
        if gguf_tokenizer.KEY + "tokens" in metadata:
            return _tokenizer_json(metadata)
        return sum(len(data) for data in self.source.files.values())

    # GGUF -------------------------------------------------------------------------------------------------------------
    def _gguf(self, goal: Checkpoint) -> int:
        specs = gguf.records(goal)
        head = self._metadata + len(gguf_file.header({}, specs))
        return _aligned(head) + sum(_aligned(s.nbytes) for s in specs) + self._guess("gguf")

    @cached_property
    def _metadata(self) -> int:
        """Bytes of the metadata, the tokenizer's among them; nearly the same in every recipe."""
        found = gguf.metadata(replace(self.source, facts={**self.source.facts, "file_type": 0}))
        return len(gguf_file.header(found, [])) - len(gguf_file.header({}, []))


def _tokenizer_json(metadata: dict[str, gguf_file.Value]) -> int:
    """About what tokenizer.json takes: `"token": 12345, ` for each token and `["left", "right"], ` for each merge.

    A SentencePiece model lists no merges; tokenizer.json then has about two for each token.
    """
    tokens = [len(t.encode()) for t in metadata[gguf_tokenizer.KEY + "tokens"].value]
    merges = metadata.get(gguf_tokenizer.KEY + "merges")
    text = sum(len(m.encode()) + 9 for m in merges.value) if merges else 2 * sum(n + 12 for n in tokens)
    return sum(tokens) + 11 * len(tokens) + text


def _aligned(size: int) -> int:
    return -(-size // gguf_file.ALIGNMENT) * gguf_file.ALIGNMENT


def _with_offset(entry: Entry) -> Any:
    """A stand-in for the data of a tensor whose container looks at the offset of nested scales or the column order."""
    return lambda: SimpleNamespace(planes={"offset": SimpleNamespace(item=lambda: OFFSET)}, order=None)


def _safetensors_header(specs: dict[str, Spec]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [at, at + nbytes(spec)]}
        at += nbytes(spec)
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8

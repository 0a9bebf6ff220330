"""How many bytes a checkpoint takes in a container, from what the container would write: names, types and shapes."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers import gguf, gguf_file
from fewbits.containers.base import Container
from fewbits.containers.directory import Directory
from fewbits.containers.gguf import Gguf
from fewbits.containers.safetensors import Spec, nbytes

OFFSET = 0.0012345678943246603  # of nested scales: its digits are part of the file, and not known before the data
TOKENIZER_BYTES = {"directory": 75, "gguf": 38}  # a token, where no tokenizer is there yet: measured on SmolLM2


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
        """The tokenizer's files. Those of a GGUF file are not made just to be counted."""
        if self.source.container == "gguf":
            return TOKENIZER_BYTES["directory"] * int(self.source.config["vocab_size"])
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


def _aligned(size: int) -> int:
    return -(-size // gguf_file.ALIGNMENT) * gguf_file.ALIGNMENT


def _with_offset(entry: Entry) -> Any:
    """A stand-in for the data of a tensor whose container looks at the offset of nested scales."""
    return lambda: SimpleNamespace(planes={"offset": SimpleNamespace(item=lambda: OFFSET)})


def _safetensors_header(specs: dict[str, Spec]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in specs.items():
        header[name] = {"dtype": spec[0], "shape": list(spec[1]), "data_offsets": [at, at + nbytes(spec)]}
        at += nbytes(spec)
    text = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + text + -text % 8

"""Our table of ggml's types against the gguf package's."""

from __future__ import annotations

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fewbits.containers.gguf_types import NAMES, TYPES


def test_equals_the_gguf_package() -> None:
    theirs = {kind.name: (int(kind), *GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert {name: TYPES[name] for name in theirs} == theirs
    assert {NAMES[number]: number for number, _, _ in TYPES.values()} == {n: t[0] for n, t in TYPES.items()}

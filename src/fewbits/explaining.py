"""What a number becomes in every format, and what a format is: for people who want to understand."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

from fewbits import codecs, containers, layouts, number_formats
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec, decode_units, encode_units
from fewbits.codecs.decode_only import DecodeOnly
from fewbits.containers.base import Container
from fewbits.errors import FewbitsError
from fewbits.layouts import Layout
from fewbits.lazy import torch
from fewbits.number_formats import FORMATS, Stored
from fewbits.qtensor import QTensor
from fewbits.recipe import CONTAINERS

# the codecs that a number is shown in
SHOWN = ("Q8_0", "int8", "fp8-e4m3", "fp8-e5m2", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "nf4", "fp4", "Q4_0", "Q4_K",
         "IQ4_NL", "IQ4_XS", "MXFP4", "int4-g128-asym", "int4-g128", "kmeans4", "int3-g32-asym", "Q3_K", "kmeans3",
         "Q2_K", "TQ2_0", "Q1_0")
COLUMNS, AT = 256, 17  # of the block around the number, and where in it the number stands
SHAPES = ((4096, 4096), (4096, 11008), (576, 1536), (64, 172))
PAGES = {"float": "floats.md", "fp8": "floats.md", "fp8-e5m2": "floats.md", "fp8-tiles": "floats.md",
         "int": "integers.md", "int8": "integers.md", "w8a8": "integers.md", "table": "tables.md",
         "codebook": "codebooks.md", "ggml": "ggml-blocks.md"}
READERS = {
    "gguf": "llama.cpp, Ollama, LM Studio", "gptq": "Transformers (with gptqmodel), vLLM", "awq": "Transformers, vLLM",
    "compressed-tensors": "Transformers, vLLM", "bitsandbytes": "Transformers (with bitsandbytes)",
    "transformers": "Transformers, and whatever reads its files", "fp8": "Transformers, vLLM",
    "mxfp4": "Transformers, vLLM", "fewbits": "fewbits"}
_LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 4096, "intermediate_size": 4096,
          "num_attention_heads": 32, "num_hidden_layers": 1, "vocab_size": 32000}
_GPT_OSS = {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"}
PROBES = ((_LLAMA, "model.layers.0.mlp.up_proj.weight", (4096, 4096)),  # weights that a container may hold
          (_GPT_OSS, "model.layers.0.mlp.experts.down_proj", (4, 4096, 4096)))


@dataclass(frozen=True)
class Level:
    """What a codec makes of the number. `below` and `above`: the levels there around it, None past the ends."""

    codec: str
    bits_per_weight: float
    code: int
    stored: float
    error: float  # stored - number
    below: float | None
    above: float | None
    block_error: float  # root mean square error of the whole block, relative to its root mean square


@dataclass(frozen=True)
class ValueExplained:
    """A number: its bits in floating point formats, and the nearest level of each codec in a block of neighbours."""

    text: str
    value: float
    read_as: str  # where the text was bits
    formats: list[Stored]
    block: str  # what the neighbours are; empty where there are none
    levels: list[Level]

    def to_json(self) -> dict[str, Any]:
        """With NaN and infinities as text: JSON has none."""
        return _plain(asdict(self))


@dataclass(frozen=True)
class CodecExplained:
    """A number format."""

    codec: str
    family: str
    writes: bool  # or is only decoded
    layout: Layout | None
    bits: list[tuple[tuple[int, ...], float | None, str]]  # shape, bits per weight, or why it cannot be
    levels: list[float]  # of a unit fitted to normal weights, the largest magnitude 1; empty where they are not known
    containers: list[str]
    readers: list[str]
    page: str
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return _plain(asdict(self))


def explain(what: str, *, block: Sequence[float] | None = None, largest: float | None = None,
            reading: str | None = None) -> ValueExplained | CodecExplained:
    """Explain a number (`0.1`, `inf`, bits as `0x3dcc`), or a codec by its name.

    A number's neighbours are `block`, or 255 that are normally distributed: their standard deviation is 1, or such that
    the largest has the magnitude `largest`. `reading` is the format that hexadecimal bits are of.

    Raises:
        FewbitsError: neither a number nor a codec, or neighbours that are not finite.
    """
    try:
        value, read_as = number_formats.parse(what, reading)
    except FewbitsError as error:
        if reading is not None or what.strip().lower().startswith("0x"):
            raise
        try:
            codec = codecs.get(what)
        except FewbitsError:
            raise FewbitsError(f"{what!r} is neither a number nor a codec", "for example 0.1, 0x3dcc, Q4_K, nf4, "
                               "int4-g128") from error
        return explain_codec(codec)
    stored = [number_formats.store(value, form) for form in FORMATS]
    if not math.isfinite(value):
        return ValueExplained(what, value, read_as, stored, "", [])
    row, words = neighbours(value, block, largest)
    levels = [level(codecs.get(name), row, row.index(value)) for name in SHOWN]
    return ValueExplained(what, value, read_as, stored, words, sorted(levels, key=lambda x: -x.bits_per_weight))


# numbers --------------------------------------------------------------------------------------------------------------
def neighbours(value: float, block: Sequence[float] | None = None,
               largest: float | None = None) -> tuple[list[float], str]:
    """A row of weights that holds `value`, and what it is in words.

    Raises:
        FewbitsError: `block` is empty or not finite, or `largest` is no positive number.
    """
    if block is not None:
        given = list(block)
        if not given or not all(map(math.isfinite, given)):
            raise FewbitsError(f"a block of {given} is no block of finite numbers", "for example --block 0.1,-0.3,0.2")
        own = given if value in given else [value, *given]
        columns = -(-len(own) // COLUMNS) * COLUMNS
        row = (own * (columns // len(own) + 1))[:columns]
        return row, f"the {len(own)} numbers given, again and again to fill {len(row)} columns"
    if largest is not None and not 0 < largest < math.inf:
        raise FewbitsError(f"--max {largest} is no magnitude", "a positive number")
    count = COLUMNS - 1
    row = [NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)]
    random.Random(0).shuffle(row)
    peak = row.index(max(row))
    row[AT], row[peak] = row[peak], row[AT]  # beside the number, in the smallest block that holds it
    scale = 1.0 if largest is None else largest / row[AT]
    row = [x * scale for x in row]
    row.insert(AT, value)
    return row, (f"{COLUMNS} weights, the others normally distributed with standard deviation {scale:.4g}; their "
                 f"largest, {row[AT + 1]:.4g}, stands beside it")


def level(codec: Codec, row: list[float], at: int) -> Level:
    """What `codec` makes of column `at` of one row of weights."""
    from fewbits import solvers

    q = solvers.solve(torch.tensor([row], dtype=torch.float32), codec, "search")
    codes, _ = q.unpack()
    decoded, exact = q.dequantize()[0].double(), torch.tensor(row, dtype=torch.float64)
    stored, value = float(decoded[at]) + 0.0, row[at]  # -0 is 0
    spread = float(exact.square().sum().sqrt())
    block_error = float((decoded - exact).square().sum().sqrt()) / spread if spread else 0.0
    around = levels(q, at)
    below = max((x for x in around if x <= value), default=None)
    above = min((x for x in around if x >= value), default=None)
    return Level(codec.name, codec.bits_per_weight((4096, 4096)), int(codes[0, at]), stored, stored - value, below,
                 above, block_error)


def levels(q: QTensor, at: int) -> list[float]:
    """Every value that column `at` of a quantized row can take with its parameters, ascending."""
    codes, params = q.unpack()
    count = 1 << q.codec.integer_bits
    codes = codes[:1].repeat(count, 1)
    codes[:, at] = torch.arange(count, dtype=torch.uint8)
    params = {k: p[:1].expand(count, *p.shape[1:]) for k, p in params.items()}
    decoded = decode_units(codes, q.codec, params)
    again = decode_units(encode_units(decoded.nan_to_num(), q.codec, params), q.codec, params)
    used = (decoded == again)[:, at]  # codes that are never chosen stand for no level
    return sorted({x + 0.0 for x in decoded[used, at].tolist()})


# codecs ---------------------------------------------------------------------------------------------------------------
def explain_codec(codec: Codec) -> CodecExplained:
    """A number format: bits per weight, bytes, levels, who reads it."""
    bits: list[tuple[tuple[int, ...], float | None, str]] = []
    for shape in SHAPES:
        reason = codec.check(shape)
        bits.append((shape, None, reason) if reason else (shape, codec.bits_per_weight(shape), ""))
    layout, writes = layouts.layout(codec), not isinstance(codec, DecodeOnly)
    found = _normal_levels(codec) if writes and codec.family != "float" else []
    taking = [name for name in CONTAINERS[codec.family] if _takes(containers.by_name(name), codec)]
    page = "k-quants.md" if codec.name.endswith("_K") else PAGES[codec.family]
    notes = [] if writes else ["decoded, never written: a recipe of this type is refused"]
    return CodecExplained(codec.name, codec.family, writes, layout, bits, found, taking,
                          [READERS[name] for name in taking], f"docs/formats/{page}", notes)


def _takes(container: Container, codec: Codec) -> bool:
    """Whether the container itself says that it holds the codec, in one of the probes."""
    for config, name, shape in PROBES:
        entry = Entry(name, shape, codec, _nothing)
        if container.refuses(Checkpoint(Path(codec.name), "transformers", config, {name: entry}), entry) is None:
            return True
    return False


def _normal_levels(codec: Codec) -> list[float]:
    from fewbits import solvers

    row, _ = neighbours(0.0)
    q = solvers.solve(torch.tensor([row], dtype=torch.float32), codec, "search")
    found = levels(q, AT)
    peak = max(map(abs, found))
    return [x / peak for x in found] if peak else found


def _nothing() -> QTensor:
    raise FewbitsError("nothing to load")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value

"""bitsandbytes directories: NF4 and FP4, with nested scales or plain, and LLM.int8().

4 bits, beside `x.weight` (uint8 [bytes, 1]): `.absmax`, `.quant_map`, with nested scales `.nested_absmax` and
`.nested_quant_map`, and `.quant_state.bitsandbytes__nf4`, JSON in a uint8 tensor. 8 bits: `x.weight` (int8 [out, in]),
`x.SCB` (float32 [out], the largest magnitude of a row) and `x.weight_format` (0: rows).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fewbits import codecs
from fewbits.checkpoint import Checkpoint, Entry, Filed
from fewbits.codecs.base import Codec
from fewbits.codecs.table import NESTED_BLOCK, TABLES, Table, dynamic_map, table
from fewbits.containers.base import flat_bytes
from fewbits.containers.directory import Directory, Layout, float_modules, float_reason, linear_reason
from fewbits.containers.safetensors import Raw, Spec, take
from fewbits.errors import FewbitsError
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.stored import Apart

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = re.compile(r"(.+)\.quant_state\.bitsandbytes__(\w+)")
AFTER_FORWARD = ("bitsandbytes on a CPU with AVX-512 rearranged this layer's scales in a forward pass and saved them "
                 "so: their order and precision are lost")
AGAIN = "quantize the original model again, and save it before its first forward pass"


class BitsAndBytes(Directory):
    """What transformers saves of a model quantized by bitsandbytes."""

    name: ClassVar[str] = "bitsandbytes"

    def claims(self, path: Path, quantization: dict[str, Any] | None) -> bool:
        found = quantization or {}
        old = found.get("load_in_4bit") or found.get("load_in_8bit")  # written before there was a quant_method
        return found.get("quant_method") == "bitsandbytes" or ("quant_method" not in found and bool(old))

    def entries(self, raws: dict[str, Raw], quantization: dict[str, Any]) -> list[Entry]:
        states = [match for match in map(STATE.fullmatch, raws) if match]
        rows = [name.removesuffix(".SCB") for name in raws if name.endswith(".SCB")]
        found = [_read_table(raws, match[0], match[1], match[2]) for match in states]
        found += [_read_rows(raws, module) for module in rows]
        for name, raw in raws.items():
            if ".weight." in name and "parametrizations.weight.original" not in name:  # torch's, of a norm of weights
                raise raw.refuse("belongs to a 4-bit weight whose quant_state is missing")
        return found

    def accepts(self, checkpoint: Checkpoint, entry: Entry) -> str | None:
        if float_reason(entry) is None:
            return None
        if entry.codec.family not in ("table", "int8"):
            return "bitsandbytes has nf4, fp4 and int8 only"
        if isinstance(entry.codec, Table) and entry.codec.block not in BLOCKS:
            return f"bitsandbytes has blocks of {', '.join(map(str, BLOCKS))} only"
        first = next((e for e in checkpoint.entries.values() if e.codec.family in ("table", "int8")), entry)
        if first.codec.family != entry.codec.family:
            return f"a model is either in 4 or in 8 bits in bitsandbytes, and {first.name} is {first.codec.name}"
        return linear_reason(checkpoint, entry)

    def layout(self, checkpoint: Checkpoint) -> Layout:
        return BitsAndBytesLayout(checkpoint)


class BitsAndBytesLayout(Layout):
    """What the entries of one checkpoint become."""

    def __init__(self, checkpoint: Checkpoint):
        config = checkpoint.config
        self.dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
        if self.dtype not in ("float32", "float16", "bfloat16"):
            raise FewbitsError(f"{checkpoint.path}: config.json: dtype {self.dtype!r} is none that bitsandbytes knows",
                               "float32, float16 or bfloat16")
        self.checkpoint = checkpoint

    def quantization_config(self) -> dict[str, Any] | None:
        return quantization_config(self.checkpoint, self.dtype)

    def specs(self, entry: Entry) -> dict[str, Spec]:
        codec, name = entry.codec, entry.name
        if codec.family == "int8":
            module = name.removesuffix(".weight")
            return {name: ("I8", entry.shape), f"{module}.SCB": ("F32", entry.shape[:1]),
                    f"{module}.weight_format": ("U8", ())}
        if not isinstance(codec, Table):
            return super().specs(entry)
        blocks = blocks_of(codec, entry.shape)
        # the offset's digits are part of the JSON, so its length is known only once the entry is loaded
        offset = entry.load().planes["offset"].item() if codec.nested else None
        found: dict[str, Spec] = {name: ("U8", (-(-entry.parameters // 2), 1)), f"{name}.quant_map": ("F32", (16,)),
                                  f"{name}.absmax": ("U8" if codec.nested else "F32", (blocks,))}
        if codec.nested:
            found[f"{name}.nested_absmax"] = ("F32", (-(-blocks // NESTED_BLOCK),))
            found[f"{name}.nested_quant_map"] = ("F32", (256,))
        state = quant_state(codec, entry.shape, self.dtype, offset)
        return found | {f"{name}.quant_state.bitsandbytes__{codec.kind}": ("U8", (len(state),))}

    def tensors(self, name: str, tensor: QTensor) -> dict[str, torch.Tensor]:
        codec, planes = tensor.codec, tensor.planes
        if codec.family == "int8":
            module = name.removesuffix(".weight")
            return {name: planes["codes"].reshape(tensor.shape), f"{module}.SCB": planes["absmax"].reshape(-1),
                    f"{module}.weight_format": torch.zeros((), dtype=torch.uint8)}
        if not isinstance(codec, Table):
            return super().tensors(name, tensor)
        found = {name: planes["codes"].reshape(-1, 1), f"{name}.absmax": planes["absmax"].reshape(-1),
                 f"{name}.quant_map": table(codec.kind).table}
        if codec.nested:
            found[f"{name}.nested_absmax"] = planes["nested_absmax"].reshape(-1)
            found[f"{name}.nested_quant_map"] = dynamic_map().table
        offset = planes["offset"].item() if codec.nested else None
        state = quant_state(codec, tensor.shape, self.dtype, offset)
        return found | {f"{name}.quant_state.bitsandbytes__{codec.kind}": torch.tensor(list(state), dtype=torch.uint8)}


def quant_state(codec: Table, shape: tuple[int, ...], dtype: str, offset: float | None) -> bytes:
    """The JSON of a 4-bit weight, byte for byte as bitsandbytes writes it."""
    state: dict[str, Any] = {"quant_type": codec.kind, "blocksize": codec.block, "dtype": dtype, "shape": list(shape)}
    if codec.nested:
        state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
    return json.dumps(state).encode()


def quantization_config(checkpoint: Checkpoint, dtype: str) -> dict[str, Any] | None:
    """What `BitsAndBytesConfig` of transformers writes; every layer left in floats is named."""
    quantized = [e for e in checkpoint.entries.values() if e.codec.family in ("table", "int8")]
    if not quantized:
        return None
    common = Counter(e.codec for e in quantized).most_common(1)[0][0]
    four = common if isinstance(common, Table) else None
    skip = float_modules(checkpoint)
    if "lm_head.weight" not in checkpoint.entries:
        skip.append("lm_head")  # tied: transformers makes the layer, and nothing quantized is there for it
    before = checkpoint.facts.get("quantization_config") or {}
    return {
        "_load_in_4bit": four is not None,
        "_load_in_8bit": four is None,
        "bnb_4bit_compute_dtype": before.get("bnb_4bit_compute_dtype", dtype),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": four.kind if four else "fp4",
        "bnb_4bit_use_double_quant": bool(four and four.nested),
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": skip or None,
        "llm_int8_threshold": before.get("llm_int8_threshold", 6.0),
        "load_in_4bit": four is not None,
        "load_in_8bit": four is None,
        "quant_method": "bitsandbytes",
    }


def blocks_of(codec: Table, shape: tuple[int, ...]) -> int:
    return -(-math.prod(shape) // codec.block)


# reading --------------------------------------------------------------------------------------------------------------
def _read_table(raws: dict[str, Raw], state_name: str, name: str, kind: str) -> Entry:
    state_raw = raws.pop(state_name)
    codec, shape, offset = _parse_state(state_raw, kind)
    parts = {part: take(raws, part, state_raw) for part in _parts(name, codec)}
    weight, absmax = parts[name], parts[f"{name}.absmax"]
    count, blocks = math.prod(shape), blocks_of(codec, shape)
    if weight.end - weight.start != -(-count // 2):
        raise weight.refuse(f"{weight.end - weight.start} bytes, where the shape {list(shape)} takes {-(-count // 2)}")
    if len(weight.shape) == 2 and weight.shape == (shape[0], count // shape[0] // 2) and weight.shape[1] > 1:
        raise weight.refuse("codes in the order of bitsandbytes' AVX-512 kernel, not in that of its files", AGAIN)
    if absmax.dtype == "BF16" or len(absmax.shape) == 2:
        raise absmax.refuse(f"{absmax.dtype} {list(absmax.shape)}: {AFTER_FORWARD}", AGAIN)
    _expect(absmax, "U8" if codec.nested else "F32", (blocks,))
    _expect(parts[f"{name}.quant_map"], "F32", (16,))
    if codec.nested:
        _expect(parts[f"{name}.nested_absmax"], "F32", (-(-blocks // NESTED_BLOCK),))
        _expect(parts[f"{name}.nested_quant_map"], "F32", (256,))

    def load() -> QTensor:
        _expect_levels(parts[f"{name}.quant_map"], table(codec.kind).table)
        found = {"codes": flat_bytes(weight.tensor()), "absmax": absmax.tensor()}
        if codec.nested:
            _expect_levels(parts[f"{name}.nested_quant_map"], dynamic_map().table)
            found["nested_absmax"] = parts[f"{name}.nested_absmax"].finite()
            found["offset"] = torch.tensor([offset], dtype=torch.float32)
        else:
            absmax.finite()
        shapes = codec.planes(shape)
        return QTensor(codec, shape, {k: v.reshape(shapes[k][1]) for k, v in found.items()})

    def stored() -> Apart | None:
        codes, levels, absmax_ = weight.array(), parts[f"{name}.quant_map"].array(), absmax.array()
        if codes is None or levels is None or absmax_ is None or len(shape) != 2 or shape[1] % codec.block:
            return None
        if not np.array_equal(levels.view("<f4"), np.array(TABLES[codec.kind], np.float32)):
            return None
        if codec.nested:
            values, nested = parts[f"{name}.nested_quant_map"].array(), parts[f"{name}.nested_absmax"].finite_array()
            assert values is not None and nested is not None
            scales = values.view("<f4")[absmax_] * nested.repeat(NESTED_BLOCK)[:blocks] + np.float32(offset)
        else:
            scales = absmax.finite_array()
        return Apart(codec, (shape[0], shape[1]), codes, scales.reshape(shape[0], -1))

    return Entry(name, shape, codec, Filed(load, stored))


def _parts(name: str, codec: Table) -> list[str]:
    parts = [name, f"{name}.absmax", f"{name}.quant_map"]
    return parts + ([f"{name}.nested_absmax", f"{name}.nested_quant_map"] if codec.nested else [])


def _parse_state(raw: Raw, kind: str) -> tuple[Table, tuple[int, ...], float | None]:
    """Codec, shape and the offset of nested scales, from the JSON of a weight."""
    try:
        state = json.loads(raw.data())
        block, shape = state["blocksize"], state["shape"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise raw.refuse(f"not the JSON of a quantized weight ({error!r})") from None
    if kind not in ("nf4", "fp4") or state.get("quant_type") != kind:
        raise raw.refuse(f"quant_type {state.get('quant_type')!r} in a tensor called {kind}")
    if type(block) is not int or block not in BLOCKS:
        raise raw.refuse(f"blocksize {block!r}", f"bitsandbytes has {', '.join(map(str, BLOCKS))}")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise raw.refuse(f"shape {shape!r}")
    nested = "nested_blocksize" in state
    offset = state.get("nested_offset")
    if nested:
        if state.get("nested_dtype") != "float32":
            raise raw.refuse(f"nested_dtype {state.get('nested_dtype')!r}: {AFTER_FORWARD}", AGAIN)
        if state["nested_blocksize"] != NESTED_BLOCK:
            raise raw.refuse(f"nested_blocksize {state['nested_blocksize']!r}, where bitsandbytes has {NESTED_BLOCK}")
        if not isinstance(offset, float) or not math.isfinite(offset):
            raise raw.refuse(f"nested_offset {offset!r}")
    codec = codecs.get(f"{kind}-b{block}" + ("-dq" if nested else ""))
    assert isinstance(codec, Table)
    return codec, tuple(shape), offset


def _read_rows(raws: dict[str, Raw], module: str) -> Entry:
    scale = raws.pop(f"{module}.SCB")
    weight = take(raws, f"{module}.weight", scale)
    layout = raws.pop(f"{module}.weight_format", None)
    if layout is not None and any(layout.data()):
        raise layout.refuse(f"{layout.data()[0]}: only row-major weights (0) are read",
                            "load and save the model with a present bitsandbytes, which writes rows")
    if weight.dtype != "I8" or len(weight.shape) != 2:
        raise weight.refuse(f"{weight.dtype} {list(weight.shape)}, where I8 [out, in] was expected")
    _expect(scale, "F32", weight.shape[:1])
    codec: Codec = codecs.get("int8")

    def stored() -> Apart | None:
        codes, scales = weight.array(), scale.finite_array()
        if codes is None or scales is None:
            return None
        return Apart(codec, (weight.shape[0], weight.shape[1]), codes, scales.reshape(-1, 1))

    return Entry(f"{module}.weight", weight.shape, codec, Filed(lambda: QTensor(
        codec, weight.shape, {"codes": weight.tensor(), "absmax": scale.finite().reshape(-1, 1)}), stored))


def _expect(raw: Raw, dtype: str, shape: tuple[int, ...]) -> None:
    if raw.spec != (dtype, shape):
        raise raw.refuse(f"{raw.dtype} {list(raw.shape)}, where {dtype} {list(shape)} was expected")


def _expect_levels(raw: Raw, meant: torch.Tensor) -> None:
    if not torch.equal(raw.tensor(), meant):
        raise raw.refuse("other levels than those of bitsandbytes", "the file was made with a changed number format")

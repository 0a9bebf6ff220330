"""Hostile safetensors files and directories: a name -> the files of a model directory, and what is said of them.

`FILES` are files by themselves (a header, data, perhaps a length that lies); `DIRECTORIES` whole directories, each a
function so that nothing is built before it is asked for. Messages are regular expressions.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

EIGHT = bytes(8)
Files = dict[str, "bytes | Path"]  # a Path is a symbolic link


def file_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8), name: str = "a", **more: Any) -> dict[str, Any]:
    return {name: {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}}


# name -> header, data, length as stated (None: as it is), message
FILES: dict[str, tuple[Any, bytes, int | None, str]] = {
    "zero header": (b"", b"", 0, "header of 0 bytes"),
    "header of one byte": (b"{", b"", 1, "header of 1 bytes"),
    "huge header": (b"{}", b"", 2**63, "header of 9223372036854775808 bytes"),
    "largest header": (b"{}", b"", 2**64 - 1, "header of 18446744073709551615 bytes"),
    "header longer than the file": (b"{}", b"", 3, "header of 3 bytes cannot be in a file of 10 bytes"),
    "not JSON": (b"{nonsense", b"", None, "not JSON"),
    "cut JSON": (b'{"a": {"dtype"', b"", None, "not JSON"),
    "two values": (b"{} {}", b"", None, "not JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", None, "not JSON"),
    "UTF-16": ("{}".encode("utf-16"), b"", None, "not JSON|not a JSON"),
    "a byte order mark": (b"\xef\xbb\xbf{}", b"", None, "not JSON"),
    "nested too deep": (b"[" * 200_000, b"", None, "not JSON"),
    "objects nested too deep": (b'{"a":' * 200_000, b"", None, "not JSON"),
    "a number of many digits": (b'{"a": ' + b"9" * 100_000 + b"}", b"", None, "not JSON"),
    "a list": (b"[]", b"", None, "not a JSON object"),
    "null": (b"null", b"", None, "not a JSON object"),
    "duplicate names": (b'{"a": {}, "a": {}}', b"", None, "'a' appears twice"),
    "duplicate keys": (b'{"a":{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}}', EIGHT, None,
                       "'dtype' appears twice"),
    "duplicate among many": (("{" + ",".join(f'"{i}":0' for i in range(10_000)) + ',"7":0}').encode(), b"", None,
                             "'7' appears twice"),
    "metadata": ({"__metadata__": 3}, b"", None, "__metadata__"),
    "an entry that is none": ({"a": [0, 8]}, EIGHT, None, "a: needs dtype"),
    "no dtype": ({"a": {"shape": [], "data_offsets": [0, 0]}}, b"", None, "a: needs dtype"),
    "more keys": (one(extra=1), EIGHT, None, "a: needs dtype"),
    "unknown dtype": (one("F3"), EIGHT, None, "a: unknown dtype 'F3'"),
    "dtype of another kind": (one(["F32"]), EIGHT, None, "a: unknown dtype"),
    "negative shape": (one(shape=(-2,)), EIGHT, None, r"a: shape \[-2\]"),
    "negative shapes": (one(shape=(-2, -1)), EIGHT, None, r"a: shape \[-2, -1\]"),
    "fractional shape": (one(shape=(2.0,)), EIGHT, None, r"a: shape \[2.0\]"),
    "infinite shape": (b'{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', EIGHT, None,
                       r"a: shape \[inf"),
    "true as a dimension": (one(shape=(True, 2)), EIGHT, None, "a: shape"),
    "text as a dimension": (one(shape=("2",)), EIGHT, None, "a: shape"),
    "many dimensions": (one(shape=(1,) * 10_000 + (2,)), EIGHT, None, "a: 10001 dimensions"),
    "negative offset": (one(offsets=(-8, 0)), EIGHT, None, r"a: data_offsets \[-8, 0\]"),
    "three offsets": (one(offsets=(0, 4, 8)), EIGHT, None, "a: data_offsets"),
    "offsets swapped": (one(offsets=(8, 0)), EIGHT, None, "a: data_offsets"),
    "offset behind the end": (one(offsets=(8, 16)), EIGHT, None, r"a: data_offsets \[8, 16\] in 8 bytes"),
    "offset of 2^64": (one(offsets=(0, 2**64)), EIGHT, None, "a: data_offsets"),
    "shape and length differ": (one(shape=(3,)), EIGHT, None, "takes 12 bytes"),
    "overflowing shape": (one(shape=(2**62, 2**62)), EIGHT, None, "takes 8507"),
    "a shape whose product wraps to what is there": (one(shape=(2**33, 2**31 + 1)), EIGHT, None, "takes 73786"),
    "hole at the beginning": (one(offsets=(8, 16)), EIGHT * 2, None, "a: begins at byte 8 .*hole"),
    "overlap": (one() | one(offsets=(4, 12), name="b"), bytes(12), None, "b: begins at byte 4 .*overlap"),
    "the same bytes twice": (one() | one(name="b"), EIGHT, None, "b: begins at byte 0 .*overlap"),
    "hole in between": (one() | one(offsets=(12, 20), name="b"), bytes(20), None, "b: begins at byte 12 .*hole"),
    "bytes behind": (one(), bytes(9), None, "1 bytes behind the last tensor"),
    "data and no tensors": (b"{}", EIGHT, None, "8 bytes behind the last tensor"),
    "an empty name": (one(name=""), EIGHT, None, "a tensor called ''"),
    "a name of a page": (one(name="a" * 5000), EIGHT, None, "a tensor called 'aaa"),
    "NUL in a name": (one(name="a\0b"), EIGHT, None, r"a tensor called 'a\\x00b'"),
    "an escape in a name": (one(name="\x1b[2Ja"), EIGHT, None, r"a tensor called '\\x1b"),
    "half a surrogate pair in a name": (b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT, None,
                                        r"a tensor called '\\ud800'"),
    "a name that climbs": (one(name="../../a"), EIGHT, None, r"a tensor called '\.\./\.\./a'"),
}


def model(tensors: dict[str, torch.Tensor] | None = None, quantization: Any = None, **config: Any) -> Files:
    settings = {"model_type": "unheard"} | config | ({"quantization_config": quantization} if quantization else {})
    return {"config.json": json.dumps(settings).encode(), "model.safetensors": safetensors.torch.save(
        tensors or {"x.weight": torch.ones(2, 2)})}


def indexed(weight_map: Any, **files: bytes | Path) -> Files:
    found = model()
    part = found.pop("model.safetensors")
    return found | {"part.safetensors": part, "model.safetensors.index.json": json.dumps(
        {"weight_map": weight_map}).encode()} | {k.replace("__", "."): v for k, v in files.items()}


def layers(**tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"x.{name}": t.contiguous() for name, t in tensors.items()}


WORDS = torch.zeros(2, 8, dtype=torch.int32)  # 16 columns of 4 bits, 8 rows
G_IDX = (torch.arange(16) // 8).int()
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 8}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {
    "group_0": {"weights": {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 8}}}}


def gptq(quantization: Any = None, **changes: torch.Tensor) -> Files:
    parts = {"qweight": WORDS, "qzeros": torch.full((2, 1), 0x77777777, dtype=torch.int32),
             "scales": torch.ones(2, 8).half(), "g_idx": G_IDX}
    return model(layers(**parts | changes), GPTQ | (quantization or {}))


def awq(quantization: Any = None, **changes: torch.Tensor) -> Files:
    parts = {"qweight": torch.zeros(16, 1, dtype=torch.int32), "qzeros": torch.zeros(2, 1, dtype=torch.int32),
             "scales": torch.ones(2, 8).half()}
    return model(layers(**parts | changes), AWQ | (quantization or {}))


def compressed(**changes: torch.Tensor) -> Files:
    parts = {"weight_packed": torch.zeros(8, 2, dtype=torch.int32), "weight_scale": torch.ones(8, 2).half(),
             "weight_shape": torch.tensor([8, 16])}
    return model(layers(**parts | changes), COMPRESSED)


def bnb(nested: bool = False, state: dict[str, Any] | None = None, state_there: bool = True,
        **changes: torch.Tensor | None) -> Files:
    from fewbits.codecs.table import dynamic_map, table

    about: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}
    parts: dict[str, Any] = {"weight": torch.zeros(64, 1, dtype=torch.uint8), "weight.absmax": torch.ones(2),
                             "weight.quant_map": table("nf4").table}
    if nested:
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
        parts |= {"weight.absmax": torch.zeros(2, dtype=torch.uint8), "weight.nested_absmax": torch.ones(1),
                  "weight.nested_quant_map": dynamic_map().table}
    text = json.dumps(about | (state or {})).encode()
    parts["weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(text), dtype=torch.uint8) if state_there else None
    parts |= {k.replace("weight__", "weight."): v for k, v in changes.items()}
    return model(layers(**{k: v for k, v in parts.items() if v is not None}),
                 {"quant_method": "bitsandbytes", "load_in_4bit": True})


def int8(**changes: torch.Tensor) -> Files:
    parts = {"weight": torch.zeros(2, 4, dtype=torch.int8), "SCB": torch.ones(2)}
    return model(layers(**parts | changes), {"quant_method": "bitsandbytes", "load_in_8bit": True})


def with_(value: float, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    found = torch.ones(*shape, dtype=dtype)
    found.view(-1)[1] = value
    return found


INF, NAN = float("inf"), float("nan")
DIRECTORIES: dict[str, tuple[Callable[[], Files], str]] = {
    # the index
    "an index that climbs": (lambda: indexed({"x.weight": "../part.safetensors"}), "is not the name of a file in this"),
    "an index with a full path": (lambda: indexed({"x.weight": "/etc/part.safetensors"}), "is not the name of a file"),
    "an index into a folder": (lambda: indexed({"x.weight": "a/part.safetensors"}), "is not the name of a file"),
    "an index of a pickle": (lambda: indexed({"x.weight": "part.bin"}), "is not the name of a file"),
    "NUL in the index": (lambda: indexed({"x.weight": "part\0.safetensors"}), "is not the name of a file"),
    "a list as index": (lambda: indexed(["part.safetensors"]), "weight_map is not an object"),
    "an empty index": (lambda: indexed({}), "weight_map is not an object"),
    "a number in the index": (lambda: indexed({"x.weight": 3}), "is not the name of a file"),
    "a missing shard": (lambda: indexed({"x.weight": "part.safetensors", "y": "gone.safetensors"}),
                        "gone.safetensors, which is missing"),
    "a missing tensor": (lambda: indexed({"x.weight": "part.safetensors", "y": "part.safetensors"}),
                         "y should be in part.safetensors"),
    "a shard that links into the void": (lambda: indexed({"y": "gone.safetensors"}, gone__safetensors=Path("nowhere")),
                                         "gone.safetensors, which is missing"),
    "a shard that links to itself": (
        lambda: indexed({"y": "loop.safetensors"}, loop__safetensors=Path("loop.safetensors")),
        "loop.safetensors, which is missing"),
    "a shard that links to a device": (lambda: indexed({"y": "zero.safetensors"}, zero__safetensors=Path("/dev/zero")),
                                       "zero.safetensors, which is missing"),
    # config.json
    "no JSON": (lambda: model() | {"config.json": b"{"}, "config.json: not JSON"),
    "JSON nested too deep": (lambda: model() | {"config.json": b"[" * 200_000}, "config.json: not JSON"),
    "a config that is a list": (lambda: model() | {"config.json": b"[]"}, "config.json: not a JSON object"),
    "a quantization that is a list": (lambda: model(quantization=[1]), "quantization_config is not an object"),
    "a method that is a list": (lambda: model(quantization={"quant_method": ["gptq"]}), "quantization method"),
    "architectures that are a number": (lambda: model(architectures=5), "architectures 5"),
    "architectures of numbers": (lambda: model(architectures=[5]), r"architectures \[5\]"),
    "a model type that is a list": (lambda: model(model_type=["llama"]), r"model_type \['llama'\]"),
    # tensors
    "packed and not explained": (lambda: model({"x.weight": torch.zeros(4, 1, dtype=torch.uint8)}),
                                 "is a packed weight"),
    "doubles": (lambda: model({"x.weight": torch.zeros(2, dtype=torch.float64)}), "F64 weights are not read"),
    "pickles only": (lambda: {k: v for k, v in model().items() if k == "config.json"} | {"pytorch_model.bin": b"\x80"},
                     r"no \*\.safetensors"),
    # GPTQ
    "GPTQ: g_idx out of range": (lambda: gptq(g_idx=G_IDX + 1), "groups 1 to 2, where there are 2"),
    "GPTQ: g_idx below 0": (lambda: gptq(g_idx=G_IDX - 1), "groups -1 to 0"),
    "GPTQ: g_idx near 2^31": (lambda: gptq(g_idx=G_IDX + 2**31 - 2), "groups 2147483646 to 2147483647"),
    "GPTQ: unequal groups": (lambda: gptq(g_idx=torch.tensor([0] * 9 + [1] * 7).int()), "group 1 has 7 columns"),
    "GPTQ: groups of 0": (lambda: gptq({"group_size": 0}), "groups of 0"),
    "GPTQ: groups longer than the row": (lambda: gptq({"group_size": 32}), r"scales: \[2, 8\], where \[1, 8\]"),
    "GPTQ: infinite scale": (lambda: gptq(scales=with_(INF, 2, 8)), r"scales: inf at \[0, 1\]"),
    "GPTQ: NaN scale": (lambda: gptq(scales=with_(NAN, 2, 8)), r"scales: nan at \[0, 1\]"),
    # AWQ
    "AWQ: groups of 0": (lambda: awq({"group_size": 0}), "groups of 0"),
    "AWQ: groups longer than the row": (lambda: awq({"group_size": 32}), "16 columns, which groups of 32"),
    "AWQ: infinite scale": (lambda: awq(scales=with_(INF, 2, 8)), r"scales: inf at \[0, 1\]"),
    "AWQ: NaN scale": (lambda: awq(scales=with_(NAN, 2, 8)), r"scales: nan at \[0, 1\]"),
    # compressed-tensors
    "compressed: shape of 2^62": (lambda: compressed(weight_shape=torch.tensor([1, 2**62])), "packed: .* was expected"),
    "compressed: negative shape": (lambda: compressed(weight_shape=torch.tensor([8, -16])), r"a weight of \[8, -16\]"),
    "compressed: infinite scale": (lambda: compressed(weight_scale=with_(INF, 8, 2)), r"scale: inf at \[0, 1\]"),
    "compressed: NaN scale": (lambda: compressed(weight_scale=with_(NAN, 8, 2)), r"scale: nan at \[0, 1\]"),
    "compressed: g_idx out of range": (lambda: compressed(weight_g_idx=G_IDX + 5), "groups 5 to 6"),
    # bitsandbytes
    "bitsandbytes: absmax too short": (lambda: bnb(weight__absmax=torch.ones(1)),
                                       r"absmax: F32 \[1\], where F32 \[2\]"),
    "bitsandbytes: absmax too long": (lambda: bnb(weight__absmax=torch.ones(3)), r"absmax: F32 \[3\], where F32 \[2\]"),
    "bitsandbytes: no absmax": (lambda: bnb(weight__absmax=None), "needs x.weight.absmax, which is missing"),
    "bitsandbytes: no nested absmax": (lambda: bnb(True, weight__nested_absmax=None), "needs x.weight.nested_absmax"),
    "bitsandbytes: no nested map": (lambda: bnb(True, weight__nested_quant_map=None),
                                    "needs x.weight.nested_quant_map"),
    "bitsandbytes: no nested offset": (lambda: bnb(True, {"nested_offset": None}), "nested_offset None"),
    "bitsandbytes: nested offset NaN": (lambda: bnb(True, {"nested_offset": NAN}), "nested_offset nan"),
    "bitsandbytes: no state": (lambda: bnb(state_there=False), "quant_state is missing"),
    "bitsandbytes: block of 0": (lambda: bnb(state={"blocksize": 0}), "blocksize 0"),
    "bitsandbytes: shape of 2^62": (lambda: bnb(state={"shape": [2**62, 2]}), "64 bytes, where the shape"),
    "bitsandbytes: shape of 0": (lambda: bnb(state={"shape": [0]}), r"shape \[0\]"),
    "bitsandbytes: infinite absmax": (lambda: bnb(weight__absmax=with_(INF, 2, dtype=torch.float32)), r"inf at \[1\]"),
    "bitsandbytes: NaN absmax": (lambda: bnb(weight__absmax=with_(NAN, 2, dtype=torch.float32)), r"nan at \[1\]"),
    "bitsandbytes: NaN nested": (lambda: bnb(True, weight__nested_absmax=torch.full((1,), NAN)), r"nan at \[0\]"),
    "bitsandbytes: NaN in SCB": (lambda: int8(SCB=with_(NAN, 2, dtype=torch.float32)), r"SCB: nan at \[1\]"),
    "bitsandbytes: SCB too long": (lambda: int8(SCB=torch.ones(3)), r"SCB: F32 \[3\], where F32 \[2\]"),
}

# scales of zero are what a row of zeros has: they decode to zeros
ZEROS: dict[str, Callable[[], Files]] = {
    "GPTQ": lambda: gptq(scales=torch.zeros(2, 8).half()), "AWQ": lambda: awq(scales=torch.zeros(2, 8).half()),
    "compressed": lambda: compressed(weight_scale=torch.zeros(8, 2).half()),
    "bitsandbytes": lambda: bnb(weight__absmax=torch.zeros(2)), "int8": lambda: int8(SCB=torch.zeros(2)),
}


def lay(folder: Path, files: Files) -> Path:
    """Put the files into a new folder."""
    folder.mkdir()
    for name, data in files.items():
        if isinstance(data, Path):
            (folder / name).symlink_to(data)
        else:
            (folder / name).write_bytes(data)
    return folder

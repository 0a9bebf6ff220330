"""ggml's own C functions decode our blocks to our values, bit for bit, and accept them as valid; any bytes too."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch
from gguf.constants import GGMLQuantizationType

from fewbits import codecs
from fewbits.codecs import decode_only
from fewbits.qtensor import QTensor
from fewbits.solvers.nearest import nearest, search

NUMBERS = {"Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q2_K": 10, "Q3_K": 11, "Q4_K": 12, "Q5_K": 13,
           "Q6_K": 14, "IQ4_NL": 20, "IQ4_XS": 23, "TQ1_0": 34, "TQ2_0": 35, "MXFP4": 39, "Q1_0": 41}
SCRIPT = """
import ctypes, pathlib, sys
import llama_cpp, numpy as np
lib = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
lib.ggml_validate_row_data.restype = ctypes.c_bool
number, name, source, target = sys.argv[1:]
for part in ("fitted", "random"):
    if not pathlib.Path(f"{source}/{part}.npy").exists():
        continue
    blocks = np.load(f"{source}/{part}.npy")
    out = np.zeros(int(np.load(f"{source}/count.npy")), dtype=np.float32)
    if part == "fitted":
        assert lib.ggml_validate_row_data(int(number), blocks.ctypes.data, blocks.nbytes)
    decode = getattr(lib, "dequantize_row_" + name)
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    np.save(f"{target}/{part}-decoded.npy", out)
"""


DECODED = {name: int(GGMLQuantizationType[name]) for name in decode_only.TYPES}


@pytest.mark.peer
@pytest.mark.parametrize("name", [*NUMBERS, *DECODED])
def test_ggml_decodes_our_blocks_to_our_values(name, peer, tmp_path):
    codec, shape = codecs.get(name), (32, 512)
    ((_, size),) = codec.planes(shape).values()
    data = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    tensors = {"random": QTensor(codec, shape, {"blocks": data})}
    if name in NUMBERS:
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
        tensors["fitted"] = QTensor.pack(codec, shape, *nearest(w, codec))
    np.save(tmp_path / "count.npy", np.array(32 * 512))
    for part, tensor in tensors.items():
        np.save(tmp_path / f"{part}.npy", tensor.planes["blocks"].numpy())
    label, number = name.lower().replace("_k", "_K"), (NUMBERS | DECODED)[name]
    subprocess.run([peer("llama"), "-c", SCRIPT, str(number), label, str(tmp_path), str(tmp_path)], check=True)
    for part, tensor in tensors.items():
        want, got = np.load(tmp_path / f"{part}-decoded.npy"), tensor.dequantize().numpy().reshape(-1)
        assert np.array_equal(got, want, equal_nan=True)
        assert part == "random" or np.isfinite(want).all()


QUANTIZE = """
import ctypes, pathlib, sys
import llama_cpp, numpy as np
lib = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
long, pointer, (number, folder) = ctypes.c_int64, ctypes.c_void_p, sys.argv[1:]
lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
lib.ggml_quantize_chunk.restype = ctypes.c_size_t
w, importance = np.load(folder + "/w.npy"), np.load(folder + "/importance.npy")
for name, weight in (("plain", None), ("weighted", importance.ctypes.data)):
    out = np.zeros(w.nbytes, dtype=np.uint8)
    size = lib.ggml_quantize_chunk(int(number), w.ctypes.data, out.ctypes.data, 0, *w.shape, weight)
    np.save(f"{folder}/{name}.npy", out[:size].reshape(len(w), -1))
"""


@pytest.mark.peer
@pytest.mark.parametrize("name", NUMBERS)
def test_our_error_is_no_larger_than_llamas(name, peer, tmp_path):
    codec, shape, generator = codecs.get(name), (64, 512), torch.Generator().manual_seed(0)
    w = torch.randn(shape, generator=generator) * 0.02
    w[torch.rand(shape, generator=generator) < 0.005] *= 8
    importance = torch.randn(shape[1], generator=generator).mul(1.5).exp()
    np.save(tmp_path / "w.npy", w.numpy())
    np.save(tmp_path / "importance.npy", importance.numpy())
    subprocess.run([peer("llama"), "-c", QUANTIZE, str(NUMBERS[name]), str(tmp_path)], check=True)
    for part, weight in (("plain", None), ("weighted", importance)):
        theirs = QTensor(codec, shape, {"blocks": torch.from_numpy(np.load(tmp_path / f"{part}.npy"))}).dequantize()
        codes, params = nearest(w, codec) if weight is None else search(w, codec, weight)
        ours = QTensor.pack(codec, shape, codes, params).dequantize()
        wrong, least = (float(((v - w).double().square() * (1 if weight is None else weight)).sum())
                        for v in (ours, theirs))
        assert wrong <= 1.00001 * least  # Q1_0 without importances is the same

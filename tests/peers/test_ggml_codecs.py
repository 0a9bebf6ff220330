"""ggml's own C functions decode our blocks to our values, bit for bit, and accept them as valid."""

from __future__ import annotations

import subprocess

import numpy as np
import pytest
import torch

from fewbits import codecs
from fewbits.qtensor import QTensor
from fewbits.solvers.nearest import nearest

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
    blocks = np.load(f"{source}/{part}.npy")
    out = np.zeros(int(np.load(f"{source}/count.npy")), dtype=np.float32)
    if part == "fitted":
        assert lib.ggml_validate_row_data(int(number), blocks.ctypes.data, blocks.nbytes)
    decode = getattr(lib, "dequantize_row_" + name)
    decode.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    decode(blocks.ctypes.data, out.ctypes.data, out.size)
    np.save(f"{target}/{part}-decoded.npy", out)
"""


@pytest.mark.peer
@pytest.mark.parametrize("name", NUMBERS)
def test_ggml_decodes_our_blocks_to_our_values(name, peer, tmp_path):
    codec, shape = codecs.get(name), (32, 512)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.02
    fitted = QTensor.pack(codec, shape, *nearest(w, codec))
    size = fitted.planes["blocks"].shape
    data = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    random = QTensor(codec, shape, {"blocks": data})
    np.save(tmp_path / "count.npy", np.array(w.numel()))
    for part, tensor in (("fitted", fitted), ("random", random)):
        np.save(tmp_path / f"{part}.npy", tensor.planes["blocks"].numpy())
    label = name.lower().replace("_k", "_K")
    subprocess.run([peer("llama"), "-c", SCRIPT, str(NUMBERS[name]), label, str(tmp_path), str(tmp_path)], check=True)
    for part, tensor in (("fitted", fitted), ("random", random)):
        want, got = np.load(tmp_path / f"{part}-decoded.npy"), tensor.dequantize().numpy().reshape(-1)
        assert np.array_equal(got, want, equal_nan=True)
        assert part == "random" or np.isfinite(want).all()

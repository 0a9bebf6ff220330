"""Squared error of our fits beside llama.cpp's own quantizers, on the matrices of real models.

Both get the same float32 weights; in the weighted case also the same importances, by which the error is weighted. A
ratio is our error over llama.cpp's, each summed over all matrices relative to their squared weights. The importances
are seeded and lognormal (sigma 1.5), like second moments of activations: a few inputs count a hundred times the median.

All ggml types that both can produce are run, or those that are named:

    python benchmarks/squared_error.py [--peer-python .peers/llama/bin/python] [--types Q2_K ...] [--rows 256]
"""

from __future__ import annotations

import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import ROOT, parser, show
from gguf.constants import GGMLQuantizationType
from safetensors import safe_open

from fewbits import codecs
from fewbits.codecs import ggml, iq4, kquants, mxfp4, ternary
from fewbits.codecs.base import Codec
from fewbits.qtensor import CHUNK, QTensor
from fewbits.solvers.nearest import nearest, search

TYPES = (*ggml.TYPES, *kquants.TYPES, *iq4.TYPES, *mxfp4.TYPES, *ternary.TYPES)
MODELS = ("smollm2-135m-wide", "minilm", "stories260k")
PEER = """
import ctypes, pathlib, sys, time
import llama_cpp, numpy as np
lib = ctypes.CDLL(str(pathlib.Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
lib.ggml_quantize_chunk.restype = ctypes.c_size_t
lib.ggml_row_size.restype = ctypes.c_size_t
long = ctypes.c_int64
lib.ggml_row_size.argtypes = [ctypes.c_int, long]
pointer = ctypes.c_void_p
lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]
for line in sys.stdin:
    number, folder, weighted = line.split()
    w = np.load(folder + "/w.npy")
    importance = np.load(folder + "/importance.npy") if weighted == "1" else None
    out = np.zeros((len(w), lib.ggml_row_size(int(number), w.shape[1])), dtype=np.uint8)
    start = time.process_time()
    lib.ggml_quantize_chunk(int(number), w.ctypes.data, out.ctypes.data, 0, *w.shape,
                            None if importance is None else importance.ctypes.data)
    seconds = time.process_time() - start
    np.save(folder + "/blocks.npy", out)
    print(seconds, flush=True)
"""


class Peer:
    """llama.cpp's quantizers in its own Python, one matrix at a time through files."""

    def __init__(self, python: Path, folder: str):
        self.folder = folder
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([str(python), "-c", PEER], stdin=pipe, stdout=pipe, text=True)

    def quantize(self, codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, float]:
        """Decoded values, and CPU seconds."""
        assert self.process.stdin and self.process.stdout
        np.save(f"{self.folder}/w.npy", w.numpy())
        if importance is not None:
            np.save(f"{self.folder}/importance.npy", importance.numpy())
        number = GGMLQuantizationType[codec.name].value
        self.process.stdin.write(f"{number} {self.folder} {int(importance is not None)}\n")
        self.process.stdin.flush()
        seconds = float(self.process.stdout.readline())
        blocks = torch.from_numpy(np.load(f"{self.folder}/blocks.npy"))
        return QTensor(codec, tuple(w.shape), {"blocks": blocks}).dequantize(), seconds

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def ours(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Decoded values, and CPU seconds."""
    seconds, parts = 0.0, []
    for part in w.split(max(1, CHUNK // w.shape[1])):
        start = time.process_time()
        codes, params = search(part, codec, importance) if importance is not None else nearest(part, codec)
        packed = QTensor.pack(codec, tuple(part.shape), codes, params)
        seconds += time.process_time() - start
        parts.append(packed.dequantize())
    return torch.cat(parts), seconds


def matrices(path: Path, codec: Codec, most_rows: int) -> Iterator[tuple[str, torch.Tensor]]:
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118
                w = f.get_tensor(name)
                if w.ndim == 2 and w.is_floating_point() and codec.check(tuple(w.shape)) is None:
                    yield name, w[:most_rows or None].float().contiguous()


def importances(name: str, columns: int) -> torch.Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))).mul_(1.5).exp_()


def error(w: torch.Tensor, decoded: torch.Tensor, importance: torch.Tensor | float) -> float:
    return float(((w - decoded).square_().double() * importance).sum() / (w.square().double() * importance).sum())


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peer-python", type=Path, default=ROOT / ".peers" / "llama" / "bin" / "python")
    p.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    p.add_argument("--names", nargs="+", default=MODELS, help="models, by folder")
    p.add_argument("--rows", type=int, default=0, help="take only the first rows of each matrix")
    options = p.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options.peer_python, folder)
        for kind in options.types:
            codec = codecs.get(kind)
            for model in options.names:
                sums = {key: 0.0 for key in ("plain", "theirs", "weighted", "theirs weighted", "ours s", "theirs s")}
                weights, path = 0, options.models / model
                path = path if path.exists() else options.shared / "data" / "models" / model
                for name, w in matrices(path, codec, options.rows):
                    weights += w.numel()
                    for key, importance in (("", None), (" weighted", importances(name, w.shape[1]))):
                        scale: torch.Tensor | float = 1.0 if importance is None else importance
                        decoded, seconds = ours(codec, w, importance)
                        other, other_seconds = peer.quantize(codec, w, importance)
                        sums[key.strip() or "plain"] += error(w, decoded, scale)
                        sums["theirs" + key] += error(w, other, scale)
                        sums["ours s"] += seconds / 2
                        sums["theirs s"] += other_seconds / 2
                if not weights:  # no matrix is as wide as a block
                    continue
                rows.append([kind, model, weights, sums["plain"] / sums["theirs"],
                             sums["weighted"] / sums["theirs weighted"], sums["ours s"], sums["theirs s"]])
                print(*rows[-1], flush=True)
        peer.close()
    show("Squared error, ours / llama.cpp's", ["type", "model", "weights", "plain", "weighted", "CPU seconds ours",
                                               "CPU seconds theirs"], rows, options.json)


if __name__ == "__main__":
    main()

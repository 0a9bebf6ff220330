"""How fast weights are encoded, beside llama.cpp's own quantizers, and what is lost by it.

One thread each, CPU nanoseconds a weight, the least of some rounds, float16 weights to the file's bytes; llama.cpp has
them as float32 already, widening is not counted there. Errors are relative to llama.cpp's, and to those of the search
in Python (`fit` alone). Then whole recipes: what their types cost, by the weights of the model that each gets;
and whole files from the same F16 GGUF, the median of the rounds. Importances are those of squared_error.py.

    python benchmarks/encoders.py [--peer-python .peers/llama/bin/python] [--types Q4_K ...] [--rows 1024] [--rounds 3]
"""

from __future__ import annotations

import math
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import gguf
import numpy as np
import torch
from common import ROOT, parser, show
from squared_error import Peer, error, importances, matrices

import fewbits
from fewbits import codecs, containers, recipe, solvers
from fewbits.calibration.statistics import Diagonal
from fewbits.codecs import ggml, iq4, kquants, native
from fewbits.codecs.base import Codec, decode_units, encode_units, fit_units
from fewbits.imatrix.data import Imatrix, Sums
from fewbits.recipe.facts import ModelFacts

TYPES = (*kquants.TYPES, *ggml.TYPES, *iq4.TYPES)
RECIPES = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K")
PEER_FILES = """
import ctypes, sys, time
import llama_cpp, numpy as np
source, target, recipe, weighted = sys.argv[1:]
how = llama_cpp.llama_model_quantize_default_params()
how.nthread, how.ftype = 1, getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + recipe)
if weighted:
    known = {k: v for k, v in np.load(weighted).items()}
    entries = (llama_cpp.llama_model_imatrix_data * (len(known) + 1))()
    for entry, (name, values) in zip(entries, known.items()):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    how.imatrix = entries
start = time.process_time()
failed = llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(how))
print(time.process_time() - start)
sys.exit(failed)
"""


def ours(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Decoded values, and CPU seconds."""
    known = None if importance is None else Diagonal(importance)
    start = time.process_time()
    packed = solvers.solve_and_measure(w, codec, "search", known).q
    seconds = time.process_time() - start
    return packed.dequantize(), seconds


def reference(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    with mock.patch.object(native, "here", lambda x: False):
        params = fit_units(w, codec, importance, None)
        return decode_units(encode_units(w, codec, params), codec, params)


def files(peer_python: Path, model: Path, folder: Path, rounds: int) -> Iterator[list[Any]]:
    """CPU seconds to quantize whole files, ours and theirs."""
    source = folder / "F16.gguf"
    fewbits.quantize(model, source, "F16", container="gguf")
    shapes = {e.name: e.shape for e in gguf.GGUFReader(source).tensors if e.name.startswith("blk") and len(e.shape) > 1}
    known = {name: importances(name, int(shape[0])).numpy() for name, shape in shapes.items()}
    np.savez(folder / "known.npz", **known)
    matrix = Imatrix({name: Sums(v[None], np.ones(1, np.int64)) for name, v in known.items()})
    for name in RECIPES:
        for weighted in (False, True):
            mine, theirs = [], []
            for i in range(rounds):
                out = folder / f"{name}-{weighted}-{i}.gguf"
                start = time.process_time()
                fewbits.quantize(source, out, name, imatrix=matrix if weighted else None, calibration="none")
                mine.append(time.process_time() - start)
                command = [peer_python, "-c", PEER_FILES, source, out.with_suffix(".peer"), name,
                           folder / "known.npz" if weighted else ""]
                run = subprocess.run(command, check=True, capture_output=True, text=True)
                theirs.append(float(run.stdout.split()[-1]))
                for file in folder.glob(f"{name}-*"):
                    file.unlink()
            ours, peers = median(mine), median(theirs)
            yield [name, "weighted" if weighted else "plain", ours, peers, peers / ours]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--peer-python", type=Path, default=ROOT / ".peers" / "llama" / "bin" / "python")
    p.add_argument("--types", nargs="+", default=TYPES, choices=TYPES)
    p.add_argument("--model", default="smollm2-135m-wide", help="a folder of --models")
    p.add_argument("--rows", type=int, default=1024, help="of each matrix, at most")
    p.add_argument("--rounds", type=int, default=3)
    options = p.parse_args()
    torch.set_num_threads(1)
    rows, cost = [], {}
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(options.peer_python, folder)
        for kind in options.types:
            codec = codecs.get(kind)
            for weighted in (False, True):
                found = measure(peer, codec, options.models / options.model, weighted, options.rows, options.rounds)
                cost[kind, weighted] = found[:2]
                rows.append([kind, "weighted" if weighted else "plain", *found[:2], found[1] / found[0], *found[2:]])
                print(*rows[-1], flush=True)
        peer.close()
        whole = list(files(options.peer_python, options.models / options.model, Path(folder), options.rounds))
    header = ["type", "importance", "ours ns", "llama.cpp ns", "times as fast", "error / llama.cpp's",
              "error / reference's"]
    show("Encoding: CPU nanoseconds a weight, one thread", header, rows, options.json)
    show("Whole files: CPU seconds, one thread", ["recipe", "importance", "ours", "llama.cpp", "times as fast"], whole)
    facts = ModelFacts.of(containers.open(options.models / options.model))
    for name in RECIPES:
        for weighted in (False, True):
            choices = recipe.get(name).resolve(facts, has_importance=weighted)
            chosen = [(c.codec.name, math.prod(c.shape)) for c in choices if c.codec.name in TYPES]
            if all((kind, weighted) in cost for kind, _ in chosen):
                mine, theirs = (sum(n * cost[kind, weighted][i] for kind, n in chosen) for i in (0, 1))
                print(f"{name} {'weighted' if weighted else 'plain'}: {theirs / mine:.2f} times as fast")


def measure(peer: Peer, codec: Codec, path: Path, weighted: bool, most_rows: int,
            rounds: int) -> tuple[float, float, float, float]:
    """Nanoseconds a weight, ours and theirs; our error over theirs, and over the reference's."""
    seconds, lost, weights = [0.0, 0.0], [0.0, 0.0, 0.0], 0
    for name, w in list(matrices(path, codec, most_rows))[::20]:
        importance = importances(name, w.shape[1]) if weighted else None
        scale: torch.Tensor | float = 1.0 if importance is None else importance
        half = w.half()
        w = half.float()
        mine = [ours(codec, half, importance) for _ in range(rounds)]
        theirs = [peer.quantize(codec, w, importance) for _ in range(rounds)]
        for i, tries in enumerate((mine, theirs)):
            seconds[i] += min(s for _, s in tries)
            lost[i] += error(w, tries[0][0], scale)
        lost[2] += error(w, reference(codec, w, importance), scale)
        weights += w.numel()
    ns = [s / weights * 1e9 for s in seconds]
    return ns[0], ns[1], lost[0] / lost[1], lost[0] / lost[2]


if __name__ == "__main__":
    main()

"""How fast weights are encoded, beside llama.cpp's own quantizers, and what is lost by it.

One thread each, CPU nanoseconds a weight, the least of some rounds, float32 weights to the file's bytes; errors are
relative to llama.cpp's, and to those of the reference search in Python (`fit` alone). Then whole recipes: what their
types cost, by the weights of the model that each gets. Importances are those of squared_error.py.

    python benchmarks/encoders.py [--peer-python .peers/llama/bin/python] [--types Q4_K ...] [--rows 1024] [--rounds 3]
"""

from __future__ import annotations

import math
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from common import ROOT, parser, show
from squared_error import Peer, error, importances, matrices

from fewbits import codecs, containers, recipe
from fewbits.codecs import ggml, iq4, kquants, native
from fewbits.codecs.base import Codec, decode_units, encode_units, fit_units
from fewbits.qtensor import QTensor
from fewbits.recipe.facts import ModelFacts
from fewbits.solvers.nearest import nearest, search

TYPES = (*kquants.TYPES, *ggml.TYPES, *iq4.TYPES)
RECIPES = ("Q4_K_M", "Q3_K_M", "Q2_K", "Q6_K")


def ours(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> tuple[torch.Tensor, float]:
    """Decoded values, and CPU seconds."""
    start = time.process_time()
    codes, params = nearest(w, codec) if importance is None else search(w, codec, importance)
    packed = QTensor.pack(codec, tuple(w.shape), codes, params)
    seconds = time.process_time() - start
    return packed.dequantize(), seconds


def reference(codec: Codec, w: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    with mock.patch.object(native, "here", lambda x: False):
        params = fit_units(w, codec, importance, None)
        return decode_units(encode_units(w, codec, params), codec, params)


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
    header = ["type", "importance", "ours ns", "llama.cpp ns", "times as fast", "error / llama.cpp's",
              "error / reference's"]
    show("Encoding: CPU nanoseconds a weight, one thread", header, rows, options.json)
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
        mine = [ours(codec, w, importance) for _ in range(rounds)]
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

"""Part of gpu.py: GPTQ of one block of a model of 8 billion weights, in seconds; times 32 for all of them.

The second moments are those of random inputs that have something in common, as many as calibration usually has. What
the model computes between its blocks, and the writing of the file, come on top.
"""

from __future__ import annotations

import math
import time
from typing import Any

import gpu_llama
import torch
from gpu import Bench

from fewbits import codecs
from fewbits.calibration.statistics import Statistics
from fewbits.solvers import solve_together

RECIPE = "int4-g128"
TOKENS, AT_ONCE = 128 * 2048, 8192
SPREAD = 0.02


def run(bench: Bench) -> None:
    settings = gpu_llama.config(bench)
    for taken in [seconds(bench, settings) for _ in range(1 if bench.rehearsed else 2)][-1:]:  # the first is a warm-up
        figures = {name: math.nan if bench.rehearsed else value for name, value in taken.items()}
        layers = gpu_llama.LLAMA["num_hidden_layers"]
        figures["minutes for all blocks"] = sum(figures.values()) * layers / 60
        bench.row("gptq", f"{RECIPE}, one block", figures, note=f"{TOKENS} tokens; all {layers} blocks: extrapolated")


def seconds(bench: Bench, c: dict[str, Any]) -> dict[str, float]:
    """Of the statistics, and of the solver; weights that read the same are solved together."""
    hidden, wide = c["hidden_size"], c["intermediate_size"]
    keys = hidden // c["num_attention_heads"] * c["num_key_value_heads"]
    parts = ((hidden, (hidden, keys, keys)), (hidden, (hidden,)), (hidden, (wide, wide)), (wide, (hidden,)))
    spent = {"statistics, s": 0.0, "solver, s": 0.0}
    codec = codecs.get(RECIPE)
    tokens, at_once = (512, 256) if bench.rehearsed else (TOKENS, AT_ONCE)
    for columns, outs in parts:
        inputs = torch.randn(at_once, columns, device=bench.device) + torch.randn(at_once, 1, device=bench.device)
        weights = [torch.randn(out, columns, device=bench.device) * SPREAD for out in outs]
        began = now(bench)
        found = Statistics.zeros(columns, device=bench.device)
        for _ in range(tokens // at_once):
            found.add(inputs)
        between = now(bench)
        for solved in solve_together(weights, codec, "gptq", found):
            assert bool(solved.q.dequantize().isfinite().all())
        spent["statistics, s"] += between - began
        spent["solver, s"] += now(bench) - between
    return spent


def now(bench: Bench) -> float:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
    return time.perf_counter()

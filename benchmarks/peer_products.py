"""Times one linear layer of bitsandbytes or GPTQModel on the CPU; run by the Python that has it.

    python peer_products.py JOB.json

It knows nothing of fewbits. The job: kind (nf4, int8, or gptq with `model`, a quantized Llama that GPTQModel loads with
the kernels it chooses, and `layer`, the name of one of its layers), shape [out, in], rows (several counts), threads,
seconds (of each measurement), bytes (over which copies of the weight rotate), found (where the medians go: count ->
seconds, the better of bfloat16 and float32 activations).
"""

from __future__ import annotations

import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


def layers(job: dict[str, Any]) -> Iterator[tuple[torch.nn.Module, torch.dtype]]:
    """The layer, and the type of activations it is given."""
    if job["kind"] == "gptq":
        from gptqmodel import BACKEND, GPTQModel

        for dtype in (torch.bfloat16, torch.float32):
            try:
                net = GPTQModel.load(job["model"], device="cpu", backend=BACKEND.AUTO, dtype=dtype).model
            except Exception as reason:  # a kernel that it may choose does not take every type
                print(f"gptqmodel, {dtype}: {reason}", flush=True)
                continue
            layer = net.get_submodule(job["layer"])
            print("gptqmodel:", type(layer).__name__, dtype, flush=True)
            yield layer, dtype
        return
    import bitsandbytes as bnb

    rows, columns = job["shape"]
    weight = torch.randn(rows, columns) * 0.02
    for dtype in (torch.bfloat16, torch.float32):
        if job["kind"] == "nf4":
            layer = bnb.nn.Linear4bit(columns, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
            layer.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        else:
            layer = bnb.nn.Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False)
        yield layer.to("cpu").eval(), dtype


@torch.inference_mode()
def median(copies: list[torch.nn.Module], x: torch.Tensor, seconds: float) -> float:
    for layer in copies[:2]:
        layer(x)  # kernels that pack a weight do so when it is first used
    taken, began = [], time.perf_counter()
    while len(taken) < 3 or time.perf_counter() - began < seconds:
        for layer in copies:
            start = time.perf_counter()
            layer(x)
            taken.append(time.perf_counter() - start)
            if len(taken) >= 3 and time.perf_counter() - began > 10 * seconds:
                break
    return statistics.median(taken)


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    found = {str(n): math.inf for n in job["rows"]}
    for layer, dtype in layers(job):
        with torch.inference_mode():
            layer(torch.randn(1, job["shape"][1], dtype=dtype))  # before it is copied: see above
        size = sum(t.nbytes for t in [*layer.parameters(), *layer.buffers()])
        copies = [layer, *(copy.deepcopy(layer) for _ in range(job["bytes"] // max(size, 1)))]
        for n in job["rows"]:
            spent = median(copies, torch.randn(n, job["shape"][1], dtype=dtype), job["seconds"])
            print(job["kind"], job["shape"], n, dtype, spent, flush=True)
            found[str(n)] = min(found[str(n)], spent)
    Path(job["found"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()

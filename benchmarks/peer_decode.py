"""Decoding in transformers, with bitsandbytes or gptqmodel below; run by the Python that has them.

    python peer_decode.py JOB.json    model, kind (fp32, bf16, nf4, int8, gptq), threads, before, decoded, found (.json)
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling takes longer than the few tokens

import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig


def options(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Arguments of `from_pretrained`; of several, the first that runs counts."""
    kind = job["kind"]
    if kind in ("fp32", "bf16"):
        return [{"dtype": torch.float32 if kind == "fp32" else torch.bfloat16}]
    if kind == "nf4":
        return [{"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)}
            for dtype in (torch.bfloat16, torch.float32)]
    if kind == "int8":
        return [{"dtype": torch.float32, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)}]
    bits = json.loads((Path(job["model"]) / "config.json").read_text())["quantization_config"]["bits"]
    return [{"dtype": torch.float32},
            {"dtype": torch.float32, "quantization_config": GPTQConfig(bits=bits, backend="gptq_torch")}]


@torch.inference_mode()
def decode(net: Any, before: int, decoded: int) -> dict[str, float]:
    """Seconds, of the clock and of all processors, of tokens one after the other; the most likely is taken."""
    cache = transformers.DynamicCache()
    net(torch.arange(100, 100 + before)[None], past_key_values=cache, logits_to_keep=1)
    token, wall, busy = 1, time.perf_counter(), time.process_time()
    for _ in range(decoded):
        token = int(net(torch.tensor([[token]]), past_key_values=cache).logits[0, -1].argmax())
    return {"wall": time.perf_counter() - wall, "busy": time.process_time() - busy}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    best: dict[str, float] = {}
    for kwargs in options(job):
        try:
            net = AutoModelForCausalLM.from_pretrained(job["model"], device_map={"": "cpu"}, **kwargs)
            decode(net, job["before"], 2)  # once before the clock runs
            found = decode(net, job["before"], job["decoded"])
        except (RuntimeError, ValueError, NotImplementedError) as error:
            print(f"{job['kind']} {kwargs}: {error}", flush=True)
            continue
        if not best or found["busy"] < best["busy"]:
            best = found
    Path(job["found"]).write_text(json.dumps(best))


if __name__ == "__main__":
    main()

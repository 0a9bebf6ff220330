"""Logits of a quantized directory in Transformers with bitsandbytes or GPTQModel; run by the Python that has it.

    python peer_exchange.py JOB.json    method, model, tokens (lists of equal length), out (.npy, float32)

With `quantize` (arguments of BitsAndBytesConfig) the model is quantized while loading and saved as `save`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling the layers takes longer than the few windows

import numpy as np
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPTQConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    options: dict[str, Any] = {"device_map": {"": "cpu"}, "dtype": torch.float32}
    if job["method"] == "gptq":  # the kernel that it picks by itself on a processor cannot run every width
        bits = json.loads((Path(job["model"]) / "config.json").read_text())["quantization_config"]["bits"]
        options["quantization_config"] = GPTQConfig(bits=bits, backend="gptq_torch")
    elif job.get("quantize"):
        options["quantization_config"] = BitsAndBytesConfig(**job["quantize"])
    net = AutoModelForCausalLM.from_pretrained(job["model"], **options)
    if job.get("save"):
        net.save_pretrained(job["save"])
    net.train()  # bitsandbytes has another kernel for inference, which rounds and refuses widths; there is no dropout
    rows = []
    with torch.no_grad():
        for window in job["tokens"]:
            rows.append(net(torch.tensor([window]), use_cache=False).logits[0].float().numpy())
    np.save(job["out"], np.stack(rows))


if __name__ == "__main__":
    main()

"""Logits of a GPTQ directory in transformers with gptqmodel; run by the Python that has both.

    python peer_transformers.py JOB.json    model, tokens (lists of equal length), out (.npy, float32)
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling the layers takes longer than the few windows

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GPTQConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    bits = json.loads((Path(job["model"]) / "config.json").read_text())["quantization_config"]["bits"]
    # the kernel that it picks by itself on a processor cannot run width 576
    net = AutoModelForCausalLM.from_pretrained(job["model"], device_map={"": "cpu"}, dtype=torch.float32,
                                               quantization_config=GPTQConfig(bits=bits, backend="gptq_torch"))
    out: np.memmap | None = None
    with torch.inference_mode():
        for i, window in enumerate(job["tokens"]):
            logits = net(torch.tensor([window]), use_cache=False).logits[0].float().numpy()
            if out is None:
                out = np.lib.format.open_memmap(job["out"], "w+", np.float32, (len(job["tokens"]), *logits.shape))
            out[i] = logits


if __name__ == "__main__":
    main()

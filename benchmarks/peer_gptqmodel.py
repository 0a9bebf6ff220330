"""Quantizes with GPTQModel; run by the Python that has it, and knows nothing of fewbits.

    python peer_gptqmodel.py JOB.json

The job: model, out, tokens (lists of equal length), bits, group_size, and the settings that GPTQModel is to take beside
its defaults. Writes out/peer.json: wall and processor seconds of quantizing (loading and saving apart), its version,
the settings it took.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # on two cores it stops without

import gptqmodel
import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    settings = dict(job["settings"])
    if settings.pop("gptaq", False):
        settings["gptaq"] = GPTAQConfig(device="cpu")
    config = QuantizeConfig(bits=job["bits"], group_size=job["group_size"], device="cpu", **settings)
    model = GPTQModel.load(job["model"], config, dtype=torch.float32, backend=BACKEND.GPTQ_TORCH)
    samples = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["tokens"]]
    wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
    model.quantize(samples, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    wall, after = time.monotonic() - wall, resource.getrusage(resource.RUSAGE_SELF)
    model.save(job["out"])
    taken = {k: str(getattr(config, k)) for k in ("sym", "desc_act", "act_group_aware", "mse", "gptaq", "damp_percent",
                                                  "true_sequential")}
    found = {"seconds": wall, "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
             "version": gptqmodel.__version__, "settings": taken}
    (Path(job["out"]) / "peer.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()

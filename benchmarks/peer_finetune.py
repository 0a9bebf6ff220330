"""Trains a LoRA adapter by Transformers and peft alone; run by the Python that has bitsandbytes, or any other.

    python peer_finetune.py JOB.json

It knows nothing of fewbits. The job: model (a directory, perhaps of bitsandbytes), dtype (of activations), adapter (a
peft directory to begin from), tokens (a safetensors file: ids [n, length], one row a step), steps, rate, warm_up, turn
(steps until it waits for a line on stdin). It prints a JSON object a line: the seconds of each step, and at the end
the losses and the peaks of memory.
"""

from __future__ import annotations

import json
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def status(name: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@contextmanager
def watched() -> Iterator[None]:
    """Says at the end how much memory was taken at most."""
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, status("RssAnon"))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    done.set()
    thread.join()
    say(anonymous=peak, resident=status("VmHWM"))


def say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


def wait() -> None:
    """Until it is this process's turn."""
    say(turn=True)
    sys.stdin.readline()


def model(job: dict[str, Any]) -> torch.nn.Module:
    import peft
    import transformers

    dtype = getattr(torch, job["dtype"])
    net = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
    for module in net.modules():
        if type(module).__name__ == "Linear4bit":
            module.compute_dtype, module.compute_type_is_set = dtype, True
    return peft.PeftModel.from_pretrained(net, job["adapter"], is_trainable=True)


def main() -> None:
    sys.path.pop(0)  # bitsandbytes looks for a package of the name that kernels.py has here
    from transformers import get_scheduler

    job = json.loads(Path(sys.argv[1]).read_text())
    torch.set_num_threads(job["threads"])
    with watched():
        net = model(job).train()
        ids = load_file(job["tokens"])["ids"]
        trained = [p for p in net.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
        schedule = get_scheduler("cosine", optimizer, math.ceil(job["warm_up"] * job["steps"]), job["steps"])
        losses = []
        for step in range(job["steps"]):
            if step % job["turn"] == 0:
                wait()
            began = time.perf_counter()
            row = ids[step % len(ids)][None]
            loss = net(input_ids=row, labels=row, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            say(seconds=time.perf_counter() - began)
    say(losses=losses)


if __name__ == "__main__":
    main()

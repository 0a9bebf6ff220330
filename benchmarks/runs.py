"""Parts of accuracy.py that run whole programs: logits inside the peers, times, memory, a killed run."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from inspect import signature
from pathlib import Path

import memory
import numpy as np
from artifacts import CONTEXT, Bench, mean_kl, save_logits
from baselines import windows
from cache import Row
from common import ROOT
from gguf_llama import model_of, round_activations

from fewbits import containers
from fewbits.containers.base import remove

TEXT = "wikitext2-test"
OURS = """
import json, resource, sys, time
import fewbits.quantizing
job = json.loads(sys.argv[1])
wall, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF)
fewbits.quantizing.quantize(**job)
wall, after = time.monotonic() - wall, resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps({"seconds": wall, "processor_seconds": after.ru_utime + after.ru_stime - before.ru_utime
                  - before.ru_stime}))
"""


def inside_llama(bench: Bench, model: str, to: str, method: str) -> Row:
    """KL of llama.cpp's logits from the original's, and of ours on the same file with activations rounded alike."""
    path, _ = bench.file(model, to, method)
    reference, text = bench.reference(model, TEXT).logits, bench.windows(model, TEXT)
    out = bench.work / "logits.npy"
    bench.peers.run("llama", "peer_llama.py", "logits", job={"model": str(path), "out": str(out),
                                                             "tokens": text.tolist()})
    found = {"inside": mean_kl(reference, np.load(out, mmap_mode="r"))}
    checkpoint = containers.open(path)
    net = model_of(checkpoint)
    round_activations(net, checkpoint)
    save_logits(net, text, out)
    found["rounded"] = mean_kl(reference, np.load(out, mmap_mode="r"))
    out.unlink()
    return found


def inside_transformers(bench: Bench, model: str, to: str, method: str) -> Row:
    """KL of the logits that transformers computes with gptqmodel, in float32, from the original's."""
    path, _ = bench.file(model, to, method)
    out = bench.work / "logits.npy"
    bench.peers.run("gptq", "peer_transformers.py", job={"model": str(path), "out": str(out),
                                                         "tokens": bench.windows(model, TEXT).tolist()})
    found = {"inside": mean_kl(bench.reference(model, TEXT).logits, np.load(out, mmap_mode="r"))}
    out.unlink()
    return found


def timed_pair(bench: Bench, model: str, to: str) -> tuple[Row, Row]:
    """Ours, then theirs, each in a process of its own with all threads."""
    from fewbits import quantizing

    out = bench.work / "timed"
    remove(out)
    job = {"model": str(bench.models / model), "out": str(out), "to": to, "solver": "gptq", "samples": bench.samples,
           "length": CONTEXT, "calibration": str(bench.text("c4"))}
    if "finish" in signature(quantizing.quantize).parameters:
        job["finish"] = "off"
    ran = subprocess.run([sys.executable, "-c", OURS, json.dumps(job)], check=True, capture_output=True, text=True)
    ours = json.loads(ran.stdout.splitlines()[-1])
    remove(out)
    bits, group = to.removeprefix("int").split("-g")
    bench.peers.run("gptq", "peer_gptqmodel.py", job={
        "model": job["model"], "out": str(out), "bits": int(bits), "group_size": int(group), "settings": {},
        "tokens": windows(bench.models / model, bench.text("c4"), bench.samples)})
    theirs = json.loads((out / "peer.json").read_text())
    remove(out)
    return ours, theirs


def big(bench: Bench, to: str, samples: int) -> Row:
    """Peak anonymous memory and seconds for the 1.1 B model, in a process of its own."""
    model, out = memory.make(bench.work), bench.work / f"memory-{to}"
    command = [sys.executable, memory.__file__, "--one", str(model), str(out), to, "--calibration",
               str(bench.text("c4")), "--samples", str(samples)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise SystemExit(ran.stderr[-2000:])
    return dict(json.loads(ran.stdout.splitlines()[-1]))


def killed_and_resumed(bench: Bench, model: str, to: str, samples: int) -> Row:
    """An unbroken run; another, killed when a third of its tensors is solved, and run again."""
    whole, broken = bench.work / "unbroken.any", bench.work / "killed.any"
    for out in (whole, broken):
        remove(out)
    began = time.monotonic()
    _finished(_quantize(bench, model, to, whole, samples))
    unbroken = time.monotonic() - began
    work = broken.with_name(f".{broken.name}.work")
    running = _quantize(bench, model, to, broken, samples)
    matrices = sum(len(e.shape) > 1 for e in containers.open(bench.models / model).entries.values())
    while (solved := len(list(work.glob("*.safetensors")))) < matrices // 3 and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    if broken.exists():
        raise SystemExit(f"{to} was done before it could be killed")
    began = time.monotonic()
    _finished(_quantize(bench, model, to, broken, samples))
    found = {"tensors": solved, "unbroken": unbroken, "resumed": time.monotonic() - began}
    a, b = _digests(whole), _digests(broken)
    found["differ"] = sorted(name for name in a | b if a.get(name) != b.get(name))
    for out in (whole, broken):
        remove(out)
    return found


def _quantize(bench: Bench, model: str, to: str, out: Path, samples: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "fewbits", "quantize", str(bench.models / model), "-o", str(out), "--to", to,
               "--calibration", str(bench.text("c4")), "--samples", str(samples)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT, env=dict(os.environ))


def _finished(running: subprocess.Popen[bytes]) -> None:
    _, errors = running.communicate()
    if running.returncode:
        raise SystemExit(errors.decode()[-2000:])


def _digests(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    return {f.relative_to(path).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}

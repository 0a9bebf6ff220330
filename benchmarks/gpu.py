"""What this machine's GPU does, beside the goals that were set for an H100: one command, some minutes.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only products peers      # one or more of: products peers model qlora gptq
    python benchmarks/gpu.py --rehearse                 # without a GPU: all of it, tiny, in Triton's interpreter

The bandwidth of its memory is measured first. Products: every one is checked against the decoded weights before it is
timed; weights rotate over more than four times the level 2 cache, in one CUDA graph a contender; the contenders take
turns; medians. Whole models and training steps are timed from outside, in turns as well. --json is written after every
figure: a run that is stopped leaves what it had. A goal is `reached` or `MISSED` by the figure beside it.
"""

from __future__ import annotations

import gc
import json
import math
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common import parser

if TYPE_CHECKING:
    import torch

    from fewbits.runtime.triton.timing import Timed, Work

SECTIONS = {"products": "gpu_products", "peers": "gpu_peers", "model": "gpu_model", "qlora": "gpu_qlora",
            "gptq": "gpu_gptq"}  # -> the module whose `run` it is
PACKAGES = ("fewbits", "torch", "triton", "transformers", "peft", "bitsandbytes", "gemlite")
BANDWIDTH_BYTES = 2 << 30
REPEATS = 7
NO_GPU = 2  # exit code

Row = dict[str, Any]


class Bench:
    """The device, its clock, and what was found so far."""

    def __init__(self, device: torch.device, rehearsed: bool, layers: int | None = None, target: Path | None = None):
        self.device, self.rehearsed, self.layers, self.target = device, rehearsed, layers, target
        self.rows: list[Row] = []
        self.failures = 0
        self.machine = machine(device)
        self.bandwidth, self.measured_by = math.nan, "-"

    def measure_bandwidth(self) -> None:
        """Bytes a second, the better of a copy (read and written bytes) and a sum (read bytes)."""
        import torch

        size = 1 << 12 if self.rehearsed else BANDWIDTH_BYTES
        source = torch.ones(size // 4, device=self.device)
        target = torch.empty_like(source)
        copy, read = self.medians([[lambda: target.copy_(source)], [source.sum]])
        rates = {"a copy": 2 * size / copy.seconds, "a sum": size / read.seconds}
        self.measured_by = max(rates, key=lambda name: rates[name])
        self.bandwidth = rates[self.measured_by]
        self.row("bandwidth", "device memory", {f"{name}, GB/s": rate / 1e9 for name, rate in rates.items()})

    def medians(self, rounds: Sequence[Sequence[Work]]) -> list[Timed]:
        """By the GPU's clock, a graph a round; in a rehearsal every call is made and no time is taken."""
        from fewbits.runtime.triton.timing import Timed, medians

        found = medians(rounds, self.device, REPEATS)
        return [Timed(math.nan, True) for _ in found] if self.rehearsed else found

    def wall(self, works: Sequence[Callable[[], object]]) -> list[float]:
        """Seconds of each, from outside: they take turns after a warm-up; medians."""
        import torch

        taken: list[list[float]] = [[] for _ in works]
        for _ in range(1 if self.rehearsed else REPEATS + 1):
            for seconds, work in zip(taken, works, strict=True):
                began = time.perf_counter()
                work()
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                seconds.append(math.nan if self.rehearsed else time.perf_counter() - began)
        return [statistics.median(s[1:] or s) for s in taken]

    def row(self, section: str, what: str, figures: dict[str, float], goals: dict[str, float] | None = None,
            note: str = "") -> None:
        """Say a row of figures and keep it. `goals` are what some of them should be at least."""
        goals = goals or {}
        reached = {name: None if math.isnan(figures[name]) else figures[name] >= least for name, least in goals.items()}
        self.rows.append({"section": section, "what": what, "figures": {k: _number(v) for k, v in figures.items()},
                          "goals": goals, "reached": reached, "note": note})
        cells = []
        for name, value in figures.items():
            said = "-" if math.isnan(value) else f"{value:.4g}"
            cells.append(f"{name} {said}" + (f" (goal {goals[name]:g}: {_verdict(reached[name])})" if name in goals
                                             else ""))
        print(f"| {section} | {what} | " + "; ".join(cells or [note]) + (f"; {note}" if cells and note else "") + " |",
              flush=True)
        self.save()

    def failed(self, section: str, what: str, why: str) -> None:
        """Say and keep what could not be measured."""
        self.failures += 1
        self.row(section, what, {}, note=f"FAILED: {why.splitlines()[0]}")

    def save(self) -> None:
        if self.target:
            partial = self.target.with_name(self.target.name + ".part")
            partial.write_text(json.dumps({"machine": self.machine, "rehearsed": self.rehearsed, "bandwidth by":
                                           self.measured_by, "rows": self.rows}, indent=1))
            os.replace(partial, self.target)

    def summary(self) -> str:
        found = [f"{r['what']}: {name}" for r in self.rows for name, good in r["reached"].items() if good is False]
        count = sum(good is not None for r in self.rows for good in r["reached"].values())
        failures = f", {self.failures} FAILED" if self.failures else ""
        return "\n".join([f"{count - len(found)} of {count} goals reached{failures}", *(f"MISSED {w}" for w in found)])


def machine(device: torch.device) -> dict[str, str]:
    """Device, memory, driver and versions."""
    import torch

    found = {"python": platform.python_version(), "date": str(date.today()),
             "cuda": str(torch.version.cuda), "hip": str(torch.version.hip)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"device": properties.name, "memory": f"{properties.total_memory / 2**30:.1f} GiB",
                  "processors": str(properties.multi_processor_count),
                  "cache": f"{properties.L2_cache_size / 2**20:.0f} MiB", "driver": _driver()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _driver() -> str:
    file = Path("/proc/driver/nvidia/version")
    return file.read_text().splitlines()[0] if file.exists() else "unknown"


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _verdict(good: bool | None) -> str:
    return "not measured" if good is None else "reached" if good else "MISSED"


def main() -> int:
    p = parser(__doc__)
    p.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    p.add_argument("--rehearse", action="store_true", help="without a GPU, tiny, in Triton's interpreter: no figures")
    p.add_argument("--layers", type=int, help="of the whole model, in place of all 32")
    args = p.parse_args()
    if args.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print(f"no GPU: torch {torch.__version__} sees none\nhint: --rehearse goes through all of it without one",
              file=sys.stderr)
        return NO_GPU
    torch.manual_seed(0)
    bench = Bench(torch.device("cpu") if args.rehearse else torch.device("cuda", 0), args.rehearse, args.layers,
                  args.json)
    print("; ".join(f"{name} {value}" for name, value in bench.machine.items()), "\n")
    if args.rehearse:
        print("rehearsal: no figures\n")
    bench.measure_bandwidth()
    for name in args.only:
        began = time.perf_counter()
        try:
            import_module(SECTIONS[name]).run(bench)
        except Exception as error:  # the other sections are measured
            traceback.print_exc()
            bench.failed(name, "all that is left of it", f"{type(error).__name__}: {error}")
        gc.collect()
        if not args.rehearse:
            torch.cuda.empty_cache()
        print(f"({name}: {time.perf_counter() - began:.0f} s)", file=sys.stderr, flush=True)
    print(f"\n{bench.summary()}" if not args.rehearse else "\nrehearsal: no figures")
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.modules["gpu"] = sys.modules["__main__"]  # which the sections import
    sys.exit(main())

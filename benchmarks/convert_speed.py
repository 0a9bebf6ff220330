"""Speed of converting beside copying the same files: both end when the data are on the disk (fsync).

A 1.1 B model of random weights goes from layout to layout. Every conversion is timed beside a copy of its source, in
turn, five times; the ratio is that of the medians. The page cache is warm for both.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from common import parser, show
from memory import make

# source, where it goes, container
CASES = [
    ("random-1.1b", "f16.gguf", "gguf"), ("f16.gguf", "floats", "transformers"), ("f16.gguf", "again.gguf", "gguf"),
    ("gptq-g128", "gptq-again", "gptq"), ("gptq-g128", "q4_0.gguf", "gguf"), ("q4_0.gguf", "gptq-g32", "gptq"),
    ("gptq-g128", "compressed", "compressed-tensors"), ("gptq-g128", "awq", "awq"),
]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--repeats", type=int, default=5)
    args = options.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make(args.work)
    gptq(args.work)
    rows = []
    for source, out, container in CASES:
        copying, converting = measure(args.work, source, out, container, args.repeats)
        rows.append([f"{source} → {container}", size(args.work / source) / 1e9, size(args.work / out) / 1e9,
                     copying, converting, copying / converting])
        print(rows[-1], flush=True)
    show("Converting beside copying", ["conversion", "source GB", "result GB", "copying s", "converting s",
                                       "speed of converting / of copying"], rows, args.json)


def gptq(work: Path) -> None:
    """A GPTQ directory whose codes are random too: nothing is solved."""
    import torch

    from fewbits import codecs, containers
    from fewbits.containers.base import write
    from fewbits.qtensor import QTensor

    if (work / "gptq-g128").exists():
        return
    source = containers.open(work / "random-1.1b")
    codec = codecs.get("int4-g128")
    entries = dict(source.entries)
    for name, entry in source.entries.items():
        if name.endswith("proj.weight"):
            def load(shape: tuple[int, ...] = entry.shape, seed: int = len(name)) -> QTensor:
                draw = torch.Generator().manual_seed(seed)
                sizes = codec.planes(shape)
                return QTensor(codec, shape, {
                    "codes": torch.randint(0, 256, sizes["codes"][1], generator=draw, dtype=torch.uint8),
                    "scales": (torch.rand(sizes["scales"][1], generator=draw) * 0.01).half()})
            entries[name] = entry.as_(codec=codec, load=load)
    source.entries = entries
    source.path = work / "none"
    write(containers.by_name("gptq"), work / "gptq-g128", source)


def measure(work: Path, source: str, out: str, container: str, repeats: int) -> tuple[float, float]:
    from fewbits import containers
    from fewbits.converting import convert

    copying, converting = [], []
    for _ in range(repeats):
        remove(work / "copy")
        copying.append(seconds(lambda: copy(work / source, work / "copy")))
        remove(work / "copy")
        remove(work / out)
        converting.append(seconds(lambda: convert(containers.open(work / source), work / out, container)))
    return statistics.median(copying), statistics.median(converting)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def copy(source: Path, out: Path) -> None:
    """The bytes through memory, as `cp --reflink=never`, and onto the disk."""
    if source.is_dir():
        out.mkdir()
        for file in source.iterdir():
            copy(file, out / file.name)
        return
    with open(source, "rb") as old, open(out, "wb") as new:
        shutil.copyfileobj(old, new, 1 << 20)
        new.flush()
        os.fsync(new.fileno())


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def size(path: Path) -> int:
    return sum(f.stat().st_size for f in path.iterdir()) if path.is_dir() else path.stat().st_size


if __name__ == "__main__":
    main()

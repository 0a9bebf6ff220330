"""From a cold process to the first token of a 30-token prompt, and memory that is not the file's: beside llama.cpp.

    python benchmarks/start.py [FILE.gguf …] [--threads 2] [--rounds 5] [--native llama-simple]

Ours is `fewbits run`; theirs is llama-cpp-python's `generate` in a script of a few lines (peer_first.py), and, where
its path is given, llama.cpp's example `simple`, a program without Python. Files are in the page cache on both sides.
The clock runs from the start of the process to the first byte of the answer; processes in turns, medians. Memory is
RssAnon of /proc while COUNT tokens are generated in a context of 2048, its largest value. Ours lays weights out anew,
in fresh memory: what the system takes for 100 MiB of that is measured between the rounds, too.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from common import ROOT, parser, show
from made import plain_gguf

PROMPT = ("Once upon a time there was a little robot who wanted to count all the stars of the sky and tell each one "
          "of them a name that it would")
COUNT, CONTEXT = 48, 2048


def first(command: Sequence[str], said: str = "", threads: int = 2) -> tuple[float, float]:
    """Seconds to the first byte after `said`, and the largest RssAnon, MiB."""
    began, most = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               env=os.environ | {"OMP_NUM_THREADS": str(threads)})
    assert process.stdout is not None
    got = process.stdout.read(len(said.encode()) + 1)
    seconds = time.perf_counter() - began
    if not got:
        raise SystemExit(f"{command[0]} said nothing")
    os.set_blocking(process.stdout.fileno(), False)
    while process.poll() is None:
        process.stdout.read()
        most = max(most, anonymous(process.pid))
        time.sleep(0.005)
    if process.returncode:
        raise SystemExit(f"{' '.join(command[:3])} … stopped with {process.returncode}")
    return seconds, most


def anonymous(pid: int) -> float:
    """Memory of a process that no file backs, MiB."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(x.split()[1]) / 1024 for x in lines if x.startswith("RssAnon")), 0.0)


def fresh() -> float:
    """Seconds until 100 MiB of memory, in large pages, can be written to."""
    whole = mmap.mmap(-1, 102 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole.madvise(mmap.MADV_HUGEPAGE)
    began = time.perf_counter()
    for at in range(0, 100 << 20, mmap.PAGESIZE):
        whole[at] = 1
    return time.perf_counter() - began


def main() -> None:
    p = parser(__doc__)
    p.add_argument("files", nargs="*", type=Path, help="default: SmolLM2 in Q4_K_M and Q8_0")
    p.add_argument("--peers", type=Path, default=ROOT / ".peers")
    p.add_argument("--native", type=Path, help="llama.cpp's example `simple`, built")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--rounds", type=int, default=5)
    args = p.parse_args()
    rows, fresh_ones = list[tuple[Any, ...]](), []
    args.work.mkdir(parents=True, exist_ok=True)
    for file in args.files or [plain_gguf(args.models / "smollm2-135m", args.work, mix) for mix in ("Q4_K_M", "Q8_0")]:
        commands: dict[str, tuple[list[str], str]] = {
            "fewbits": ([sys.executable, "-m", "fewbits", "run", str(file), PROMPT, "--raw", "--max-tokens", str(COUNT),
                         "--context", str(CONTEXT), "--threads", str(args.threads)], ""),
            "llama-cpp-python": ([str(args.peers.absolute() / "llama" / "bin" / "python"),
                                  str(ROOT / "benchmarks" / "peer_first.py"), str(file), PROMPT, str(COUNT),
                                  str(args.threads), str(CONTEXT)], "")}
        if args.native:
            commands["llama.cpp simple"] = ([str(args.native), "-m", str(file), "-n", str(COUNT), PROMPT], PROMPT)
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
        for _ in range(args.rounds):
            fresh_ones.append(fresh())
            for name, (command, said) in commands.items():
                found[name].append(first(command, said, args.threads))
        ours = median(s for s, _ in found["fewbits"])
        for name, taken in found.items():
            seconds = median(s for s, _ in taken)
            rows.append((file.name, file.stat().st_size / 2**20, name, seconds, ours / seconds,
                         median(m for _, m in taken)))
            print(*(f"{v:.4g}" if isinstance(v, float) else v for v in rows[-1]), flush=True)
    show(f"First token, {args.threads} thread(s); 100 MiB of fresh memory take {median(fresh_ones):.3f} s",
         ("file", "MiB", "with", "first token, s", "fewbits / it", "anonymous, MiB"), rows, args.json)


if __name__ == "__main__":
    main()

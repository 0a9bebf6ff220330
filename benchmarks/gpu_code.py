"""What is known of the Triton kernels without a GPU: they are compiled for GPUs that are not there, and looked at.

CALLS are products and steps as they are launched; every kernel that one launches is compiled. Of each: registers,
spilled ones, shared memory, instructions of tensor cores; on NVIDIA's also the loop that loads most, its instructions a
weight, and how its time to issue compares with the time to read the weights, on an H100: above 1, instructions bind.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from common import parser, show  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fewbits.runtime.triton import configs  # noqa: E402

TARGETS = {"sm80": GPUTarget("cuda", 80, 32), "sm90": GPUTarget("cuda", 90, 32),
           "gfx942": GPUTarget("hip", "gfx942", 64)}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PROCESSORS, ISSUES, BYTES = 132, 132 * 4 * 1.7e9, 3.35e12  # of an H100: instructions of warps, and bytes, a second
UNITS = {"cuda": r"\b(?:IMMA|HMMA|IGMMA|HGMMA|QGMMA)\.[\w.]+", "hip": r"\bv_mfma_\w+"}
Weights = Callable[[dict[str, Any]], tuple[int, float]]  # constants -> weights of a loop's turn, their bytes


@dataclass(frozen=True)
class Form:
    """How labels, jumps, instructions and loads from global memory are written; sums of other programs do not count."""

    label: re.Pattern[str]
    jump: re.Pattern[str]
    instruction: re.Pattern[str]
    load: re.Pattern[str]
    nbytes: Callable[[re.Match[str]], int]


PTX = Form(re.compile(r"(\$L\w+):"), re.compile(r"\bbra\S*\s+(\$L\w+)"), re.compile(r";"),
           re.compile(r"\bld\.global(?!\.cg)\S*?(?:\.v(\d))?\.[bsuf](\d+)\b|\bcp\.async\.c[ag]\S*.*\], (0x\w+|\d+)"),
           lambda m: int(m[3], 0) if m[3] else int(m[1] or 1) * int(m[2]) // 8)
SASS = Form(re.compile(r"\s*(\.L_x_\d+):"), re.compile(r"\bBRA\b.*?(\.L_x_\d+)"), re.compile(r"/\*[0-9a-f]{4,}\*/"),
            re.compile(r"\bLDG(?:STS)?\.E(?!\S*STRONG)((?:\.\w+)*)"),
            lambda m: next((size for name, size in WIDTHS.items() if name in m[1].split(".")), 4))
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass
class Loop:
    instructions: int
    turns: int  # of the kernel's own loop in one of the machine's
    per_weight: float  # instructions of warps
    issue_to_memory: float


@dataclass
class Code:
    """A kernel as it was compiled."""

    call: str
    target: str
    kernel: str
    constants: dict[str, Any]
    registers: int
    spilled: int
    shared_bytes: int
    units: dict[str, int] = field(default_factory=dict)  # instruction of tensor cores -> how often it is written
    loop: Loop | None = None


class _Absent:
    """The driver of a GPU that is not there."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int | str:
        """Kernels keep what was compiled for each."""
        return self.target.arch

    def get_current_stream(self, device: int | str) -> int:
        return 0


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[tuple[JITFunction, dict[str, Any], Any]]]:
    """Within it kernels are compiled when they are launched, and not run: each kernel, its constants, its code."""
    found: list[tuple[JITFunction, dict[str, Any], Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        code = run(self, *args, grid=grid, warmup=True, **options)
        named = dict(zip(self.arg_names, args, strict=False)) | options
        constants = {p.name: named[p.name] for p in self.params if p.is_constexpr and p.name in named}
        found.append((self, constants, code))
        return code

    JITFunction.run = compile_only
    driver.set_active(_Absent(target))
    try:
        yield found
    finally:
        JITFunction.run = run


def look(call: str, target: str, kernel: JITFunction, constants: dict[str, Any], code: Any) -> Code:
    seen = Code(call, target, kernel.__name__, constants, 0, 0, int(code.metadata.shared))
    if "cubin" in code.asm:
        usage, text = _dump(code.asm["cubin"])
        seen.registers = int(_first(r"REG:(\d+)", usage))
        seen.spilled = int(_first(r"STACK:(\d+)", usage)) // 4
        if kernel.__name__ in WEIGHTS:
            seen.loop = _loop(code.asm["ptx"], text, *WEIGHTS[kernel.__name__](constants), int(code.metadata.num_warps))
        found = re.findall(UNITS["cuda"], text)
    else:
        text = code.asm["amdgcn"]
        seen.registers = int(_first(r"\.vgpr_count:\s+(\d+)", text))
        seen.spilled = int(_first(r"\.vgpr_spill_count:\s+(\d+)", text))
        found = re.findall(UNITS["hip"], text)
    seen.units = {name: found.count(name) for name in dict.fromkeys(found)}
    return seen


def _dump(cubin: bytes) -> tuple[str, str]:
    """What resources a kernel uses, and its instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ["cuobjdump", "--dump-resource-usage"], ["nvdisasm", "-c"]
        usage, text = (subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True,
                                      check=True).stdout for tool, option in commands)
    return usage, text


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"no {pattern}"
    return match[1]


def _loop(ptx: str, sass: str, weights: int, nbytes: float, warps: int) -> Loop | None:
    """The innermost loop that loads most bytes. `ptxas` may make one turn of several, which its loads tell."""
    before, after = _busiest(ptx, PTX), _busiest(sass, SASS)
    if not before or not after:
        return None
    turns = max(1, round(_loaded(after, SASS) / _loaded(before, PTX)))
    slots = len(after) * warps / (weights * turns)
    return Loop(len(after), turns, slots, slots / ISSUES / (nbytes / weights / BYTES))


def _busiest(text: str, form: Form) -> list[str]:
    """Instructions of the innermost loop that loads most: from a label to a jump back to it."""
    lines = text.splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := form.label.match(line))}
    jumps = [(labels.get(m[1], i), i) for i, line in enumerate(lines) if (m := form.jump.search(line))]
    back = [(to, at) for to, at in jumps if to < at]
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    loops = [[line for line in lines[a:b + 1] if form.instruction.search(line)] for a, b in inner]
    return max(loops, key=lambda loop: _loaded(loop, form), default=[])


def _loaded(lines: list[str], form: Form) -> int:
    """Bytes that a thread loads from global memory."""
    return sum(form.nbytes(m) for line in lines if (m := form.load.search(line)))


def products(name: str, rows: int, dtype: torch.dtype = torch.bfloat16, out: int = 4096, columns: int = 4096) -> None:
    """Weights of few bits; 64 outputs stand for all, which kernels only see in their configuration."""
    from fewbits import codecs
    from fewbits.runtime.triton.kernel import OnGpu
    from fewbits.solvers import solve

    weight = OnGpu.of(solve(torch.randn(64, columns), codecs.get(name)), dtype)
    key = configs.Key("", weight.layout.bits, weight.layout.group, configs.bucket(rows), out, columns)
    chosen = {kernel: configs.default(key._replace(kernel=kernel), PROCESSORS) for kernel in configs.DEFAULTS}
    with configs.trying(chosen, configs.DENSE_ROWS):
        weight.matmul(torch.empty(rows, columns, dtype=dtype), None)


def rowwise(rows: int, outliers: float, dtype: torch.dtype = torch.bfloat16, out: int = 4096, columns: int = 4096,
            asymmetric: bool = False) -> None:
    from fewbits.runtime.triton.rowwise import product

    config = configs.default(configs.Key("rowwise", 8, columns, configs.bucket(rows), out, columns), PROCESSORS)
    zeros = torch.empty(out, 1, dtype=torch.int8) if asymmetric else None
    with configs.trying({"rowwise": config}):
        product(torch.empty(rows, columns, dtype=dtype), torch.empty(out, columns, dtype=torch.int8), torch.empty(out),
                zeros, None, torch.empty(out, dtype=dtype), 127.0, outliers)


def steps(counts: list[int], longest: int, heads: int, kv_heads: int, head: int, dtype: torch.dtype = torch.bfloat16,
          half: int = 0, cap: float = 0.0) -> None:
    """What a decoder does between the products of a layer, for pieces of so many tokens."""
    from fewbits.runtime.triton import attention, rows

    tokens, hidden, narrow = sum(counts), heads * head, kv_heads * head
    shape = attention.Heads(heads, kv_heads, head, dtype)
    queries = shape.few if len(counts) == sum(counts) else shape.queries
    spans = attention.spans(counts, queries // shape.group)
    tiles = attention.Tiles.of(len(spans), queries, longest, shape, PROCESSORS)
    q, k, v = torch.empty(tokens, hidden + 2 * narrow, dtype=dtype).split([hidden, narrow, narrow], 1)
    numbers, base = torch.empty(rows.ROWS, tokens, dtype=torch.int64), torch.empty(64, dtype=dtype)
    turned = rows.keep(q, k, v, torch.empty(tokens, 2, half or head // 2), numbers, base, 3, head)
    seen = attention.attend(turned, numbers, base, tiles, 3, shape, 0.1, 0, cap)
    rows.norm(torch.empty(tokens, hidden), torch.empty(hidden), 1e-5, dtype, added=seen)
    rows.gate("silu", q, q)


CALLS: dict[str, Callable[[], None]] = {
    "int4-g128, 1 row": lambda: products("int4-g128", 1),
    "Q4_K, 1 row": lambda: products("Q4_K", 1),
    "Q6_K, 1 row": lambda: products("Q6_K", 1),
    "nf4, 1 row": lambda: products("nf4", 1),
    "int4-g128, 4 rows": lambda: products("int4-g128", 4),
    "int4-g128, 16 rows": lambda: products("int4-g128", 16),
    "int4-g128, 128 rows": lambda: products("int4-g128", 128),
    "int4-g128, 512 rows": lambda: products("int4-g128", 512),
    "int8, 1 row": lambda: rowwise(1, 6.0),
    "int8, 16 rows": lambda: rowwise(16, 6.0),
    "int8, 64 rows": lambda: rowwise(64, 6.0),
    "int8, 512 rows": lambda: rowwise(512, 6.0),
    "int8, 512 rows, float32": lambda: rowwise(512, 6.0, torch.float32),
    "w8a8, 1 row": lambda: rowwise(1, 0.0),
    "w8a8, 512 rows": lambda: rowwise(512, 0.0),
    "w8a8-asym, 20 rows, 4100 columns": lambda: rowwise(20, 0.0, columns=4100, asymmetric=True),
    "decoder, a token": lambda: steps([1], 4096, 32, 8, 128),
    "decoder, a prompt": lambda: steps([512], 512, 32, 8, 128),
    "decoder, a token, wide heads, capped": lambda: steps([1], 4096, 8, 4, 256, cap=50.0),
    "decoder, a prompt, wide heads, capped": lambda: steps([512], 512, 8, 4, 256, cap=50.0),
    "decoder, a prompt, float32": lambda: steps([512], 512, 8, 2, 80, torch.float32, 10),
}
WEIGHTS: dict[str, Weights] = {  # kernels whose loop over weights is looked at
    "multiply": lambda c: (c["N"] * c["K"], c["N"] * c["K"]),
    "matvec": lambda c: _words(c),
    "tile": lambda c: _words(c),
}


def _words(c: dict[str, Any]) -> tuple[int, float]:
    """Weights of a block of 16 words for `N` outputs, with the bytes of a scale of 16 bits a group."""
    count = c["N"] * 16 * (32 // c["LOWER"])
    return count, count * ((c["LOWER"] + c["UPPER"]) / 8 + 2 / c["GROUP"])


def codes(target: str, only: list[str]) -> list[Code]:
    """Every kernel of the calls that have one of `only` in their names, once for each set of constants."""
    found: dict[str, Code] = {}
    for call in (name for name in CALLS if any(part in name for part in only)):
        with compiling(TARGETS[target]) as launched:
            CALLS[call]()
        for kernel, constants, code in launched:
            if code.hash not in found:
                found[code.hash] = look(call, target, kernel, constants, code)
    return list(found.values())


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    options.add_argument("--only", nargs="+", default=[""], help="calls with one of these in their names")
    args = options.parse_args()
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:  # modules learn their target when they are imported
        found = sum(pool.starmap(codes, [(target, args.only) for target in args.targets], chunksize=1), [])
    rows = [(c.call, c.target, c.kernel, c.registers, c.spilled, f"{c.shared_bytes / 1024:.0f}",
             " ".join(f"{n} {name}" for name, n in c.units.items()),
             *((c.loop.instructions, c.loop.turns, f"{c.loop.per_weight:.3f}", f"{c.loop.issue_to_memory:.2f}")
              if c.loop else ("",) * 4)) for c in found]
    show("Kernels as compiled", ("call", "target", "kernel", "registers", "spilled", "shared KiB", "tensor cores",
                                 "loop", "turns", "a weight", "issue / memory"), rows)
    if args.json:
        args.json.write_text(json.dumps([asdict(c) for c in found], indent=1))


if __name__ == "__main__":
    main()

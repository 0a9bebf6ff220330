"""Float weights beside torch's F.linear, experts in one call beside one by one, gradients beside torch's product alone.

    python benchmarks/other_kernels.py [--threads 1]

4096 x 4096; float weights rotate over 512 MiB, so that no cache holds them. Medians, in turns. Torch gets
activations in the type of the weight, the native kernels in float32. Gradients: torch multiplies with a weight that is
already decoded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import parser, show
from kernels import medians

from fewbits import _native, codecs
from fewbits.qtensor import QTensor
from fewbits.runtime import cpu
from fewbits.runtime.floats import FEW, Floats
from fewbits.runtime.specimen import random_weight

SIZE, ROTATED_BYTES = 4096, 512 << 20
EXPERTS, USED, WIDE, HIGH = 64, 8, 2048, 768


def floats() -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for name in ("BF16", "F16", "F32"):
        codec = codecs.get(name)
        dtype = getattr(torch, codec.DTYPES[name])  # type: ignore[attr-defined]
        weights = [torch.randn(SIZE, SIZE).to(dtype) for _ in range(ROTATED_BYTES // (SIZE * SIZE * dtype.itemsize))]
        layers = [Floats().prepare(QTensor(codec, (SIZE, SIZE), {"data": w}), torch.float32) for w in weights]
        for rows in sorted({1, 4, 16, FEW[dtype]}):
            x = torch.randn(rows, SIZE)
            given = x.to(dtype)
            ours, theirs = medians([[lambda p=p, x=x: p.matmul(x, None) for p in layers],  # type: ignore[misc]
                                    [lambda w=w, x=given: F.linear(x, w) for w in weights]])  # type: ignore[misc]
            found.append((f"{name}, {rows} rows", ours * 1e3, theirs * 1e3, theirs / ours))
    return found


def experts() -> list[tuple[object, ...]]:
    parts = [random_weight(codecs.get("Q4_K"), (HIGH, WIDE)) for _ in range(EXPERTS)]
    planes = {k: torch.cat([p.planes[k] for p in parts]) for k in parts[0].planes}
    native = cpu.Native(QTensor(parts[0].codec, (EXPERTS, HIGH, WIDE), planes), torch.float32)

    def one_by_one(x: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        out = torch.empty(len(x), HIGH)
        for i in torch.unique(which).tolist():
            mine = (which == i).nonzero()[:, 0]
            out[mine] = cpu.multiply([native.matrices[i]], x[mine], [None])[0]
        return out

    found: list[tuple[object, ...]] = []
    for tokens in (1, 4, 64):
        x = torch.randn(tokens, WIDE).repeat_interleave(USED, 0)
        choices = [torch.cat([torch.randperm(EXPERTS)[:USED] for _ in range(tokens)]) for _ in range(16)]
        assert torch.equal(native.grouped(x, choices[0]), one_by_one(x, choices[0]))
        ours, loop = medians([[lambda e=e, f=f, x=x: f(x, e) for e in choices]  # type: ignore[misc]
                              for f in (native.grouped, one_by_one)])
        found.append((f"Q4_K, {tokens} tokens, {USED} of {EXPERTS} experts {HIGH}x{WIDE}", ours * 1e3, loop * 1e3,
                      loop / ours))
    return found


def gradients() -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for name in ("Q4_K", "nf4"):
        q = random_weight(codecs.get(name), (SIZE, SIZE))
        native, weight = cpu.Native(q, torch.float32), q.dequantize()
        for rows in (1, 64, 512):
            g = torch.randn(rows, SIZE)
            ours, product = medians([[lambda g=g, native=native: native.grad_input(g)],  # type: ignore[misc]
                                     [lambda g=g, weight=weight: g @ weight]])  # type: ignore[misc]
            found.append((f"{name}, gradient of {rows} rows", ours * 1e3, product * 1e3, product / ours))
    return found


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = p.parse_args()
    torch.set_num_threads(options.threads)
    rows = floats() + experts() + gradients()
    show(f"Other products on the CPU, {options.threads} thread(s), {_native.current()}",
         ("what", "ms", "beside ms", "times as fast"), rows, options.json)


if __name__ == "__main__":
    main()

"""Which configuration is fastest for a product on this GPU: tried by the clock, one field at a time.

From the configuration that counts so far every field is halved and doubled; the fastest that gives the same result is
the next to start from, until nothing near is faster. What kernels a product takes, kernels say themselves: they ask
for configurations under the keys that are tuned here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

import torch

from fewbits import arch
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.base import Codec
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.runtime.dispatch import KERNELS, choose
from fewbits.runtime.reference import Prepared
from fewbits.runtime.specimen import copies, random_weight
from fewbits.runtime.triton import configs
from fewbits.runtime.triton.configs import Config, Entry, Key, Tuned
from fewbits.runtime.triton.timing import medians, rotation

ROWS = (1, 16, 32, 64, 128, 256)
MANY_ROWS = (32, 64, 128, 256, 512, 1024, 2048)  # among these is the count from which on decoding is faster
FIELDS = {  # of each kernel's configurations, that are tried from the least to the greatest
    "matvec": {"n": (8, 256), "split": (1, 32), "warps": (1, 16), "stages": (1, 5)},
    "tile": {"n": (16, 256), "m": (16, 128), "split": (1, 32), "warps": (1, 16), "stages": (1, 5)},
    "decode": {"n": (8, 256), "warps": (1, 16)},
}
FIELDS["rowwise"] = FIELDS["tile"]
TUNED = ("triton", "rowwise")  # kernels that have configurations
SUMS = 8192  # of a warp, at most: each thread has 255 registers
GAIN = 0.99  # of the best time so far: less is noise
WRONG = 1e-4  # normalised squared error against the configuration before
AS_ONE = {"attn_q": "attn_qkv", "attn_k": "attn_qkv", "attn_v": "attn_qkv", "ffn_gate": "ffn_up"}
LOOKED_UP = ("token_embd", "position_embd", "ffn_gate_inp")  # or too small to matter
NEVER = 1 << 30  # rows: no weight is decoded


def tune(shapes: Sequence[tuple[int, int]], codecs: Sequence[Codec], *, device: torch.device,
         rows: Sequence[int] = ROWS, out: Path | None = None, again: bool = False,
         progress: Progress | None = None) -> Tuned:
    """The fastest configurations for weights `shapes` [out, in] in each of `codecs`, and from how many rows on
    decoding them is faster; written to `out` after every product, by default to the user's cache.

    What the file has already is kept, unless `again`, or another version of Triton measured it.

    Raises:
        FewbitsError: no kernel with configurations takes a codec on this device.
    """
    import triton

    name = configs.name_of(device)
    file = out or configs.own_file(name)
    known = configs.read(file)
    if again or known.triton != triton.__version__:
        known = configs.NOTHING
    known = known._replace(device=name, triton=triton.__version__)
    works = [(rows, NEVER) for rows in sorted(rows)] + ([(max(rows), 1)] if max(rows) >= max(ROWS) else [])
    total, done = len(codecs) * len(shapes) * len(works), 0
    for codec in codecs:
        for shape in shapes:
            bench = _Bench(codec, shape, device)
            for count, dense in works:
                if progress:
                    what = f"{count} rows" if dense == NEVER else "decoding"
                    progress(f"tuning: {codec.name} {shape[0]}x{shape[1]}, {what}", done, total)
                known = bench.tuned(count, dense, known) if dense == NEVER else bench.thresholds(count, known)
                configs.write(file, known)
                done += 1
    if progress:
        progress("tuning: done", total, total)
    return known


class _Bench:
    """A weight to try configurations on."""

    def __init__(self, codec: Codec, shape: tuple[int, int], device: torch.device):
        self.device = device
        self.q = random_weight(codec, shape, device)
        name = next((k.name for k in KERNELS if k.name in TUNED and k.supports(self.q, device) is None), TUNED[0])
        self.kernel = choose(self.q, device, only=name)
        self.one = self.kernel.prepare(self.q, torch.float16)

    @cached_property
    def rotated(self) -> list[Prepared]:
        """As many as no cache holds; made when something is measured."""
        return [self.kernel.prepare(c, torch.float16) for c in copies(self.q, rotation(self.q.nbytes, self.device))]

    def activations(self, rows: int) -> torch.Tensor:
        return torch.randn(rows, self.q.shape[-1], dtype=torch.float16, device=self.device)

    def asks(self, rows: int, dense: int) -> tuple[Key, ...]:
        """The keys under which the product asks whether to decode, where it does, and for a configuration.

        Raises:
            FewbitsError: it asks for none.
        """
        with configs.trying(dense=dense) as asked:
            self.one.matmul(self.activations(rows), None)
        if not asked:
            raise FewbitsError(f"{self.q.codec.name}: the kernel {self.kernel.name} has no configurations on "
                               f"{self.device}")
        return tuple(dict.fromkeys(asked))

    def tuned(self, rows: int, dense: int, known: Tuned) -> Tuned:
        """With the fastest configuration of this product; as it was if it has one."""
        *_, key = self.asks(rows, dense)
        if any(e.key == key for e in known.entries):
            return known
        return known._replace(entries=(*known.entries, self.fastest(key, rows, dense, known)))

    def fastest(self, key: Key, rows: int, dense: int, known: Tuned) -> Entry:
        config, x = self.start(key, known), self.activations(rows)
        with configs.trying({key.kernel: config}, dense):
            meant = self.one.matmul(x, None).float()
        tried = {config: self.seconds({key.kernel: config}, dense, x)}
        while True:
            for near in neighbours(key.kernel, config):
                if near not in tried:
                    tried[near] = self.tried({key.kernel: near}, dense, x, meant)
            best = min(tried, key=lambda c: tried[c])
            if tried[best] >= GAIN * tried[config]:
                return Entry(key, config, tried[config] * 1e6)
            config = best

    def start(self, key: Key, known: Tuned) -> Config:
        return configs.nearest(known, key) or configs.lookup(*key, self.device)

    def tried(self, forced: dict[str, Config], dense: int, x: torch.Tensor, meant: torch.Tensor) -> float:
        """Seconds; infinite for what this GPU has no room for, and for what computes something else."""
        from triton.runtime.errors import TritonError

        try:
            with configs.trying(forced, dense):
                found = self.one.matmul(x, None).float()
            if not float((found - meant).square().sum()) <= WRONG * float(meant.square().sum()):
                return math.inf
            return self.seconds(forced, dense, x)
        except (TritonError, RuntimeError):  # out of registers or shared memory, as Triton or the driver says it
            return math.inf

    def seconds(self, forced: dict[str, Config], dense: int, x: torch.Tensor) -> float:
        with configs.trying(forced, dense):
            return medians([[partial(m.matmul, x, None) for m in self.rotated]], self.device)[0].seconds

    def thresholds(self, rows: int, known: Tuned) -> Tuned:
        """With the fastest way to decode, and from how many rows on it is faster than the product itself."""
        whether, decode = self.asks(rows, 1)[0], self.asks(rows, 1)[-1]
        if whether.kernel != "dense":  # it never decodes
            return known
        known = self.tuned(rows, 1, known)
        if any(_same(key, whether) for key in known.dense):
            return known
        least = 2 * max(MANY_ROWS)
        for count in reversed(MANY_ROWS):
            *_, tile = self.asks(count, NEVER)
            forced, x = {key.kernel: self.start(key, known) for key in (tile, decode)}, self.activations(count)
            if self.seconds(forced, 1, x) >= self.seconds(forced, NEVER, x):
                break
            least = count
        return known._replace(dense=(*known.dense, whether._replace(rows=least)))


def neighbours(kernel: str, config: Config) -> list[Config]:
    """Those that differ in one field, halved or doubled; of the stages there is one more or less."""
    found = []
    for name, (low, high) in FIELDS[kernel].items():
        value = getattr(config, name)
        for other in (value - 1, value + 1) if name == "stages" else (value // 2, value * 2):
            if low <= other <= high:
                found.append(replace(config, **{name: other}))
    return [c for c in found if c.n * c.m <= SUMS * c.warps]


def shapes_of(checkpoint: Checkpoint) -> list[tuple[int, int]]:
    """[out, in] of a model's products: of queries, keys and values as one, of gates and ups as one; not of experts.

    Raises:
        FewbitsError: a family whose tensors are not known.
    """
    table = arch.lookup(checkpoint.config)
    if table is None:
        raise FewbitsError(f"{checkpoint.path}: the products of {checkpoint.architecture} are not known",
                           "give shapes, as --shapes 4096x14336")
    config = arch.complete(table, checkpoint.config, checkpoint.entries)
    found: dict[tuple[int | None, str], tuple[int, int]] = {}
    for tensor in arch.tensors(table, config):
        shape = tensor.shape(config) if tensor.role != "bias" else ()
        if len(shape) == 2 and tensor.role not in LOOKED_UP:
            at = tensor.layer, AS_ONE.get(tensor.role, tensor.role)
            found[at] = found.get(at, (0, 0))[0] + shape[0], shape[1]
    return list(dict.fromkeys(found.values()))


def _same(key: Key, other: Key) -> bool:
    """Whether they are of the same weight."""
    return key._replace(rows=0) == other._replace(rows=0)

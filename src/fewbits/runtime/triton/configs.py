"""How each kernel is cut into programs on a GPU: measured there (`fewbits tune`), packaged for it, or a sane default.

A file per GPU, in the user's cache and in `tuned/` beside this module, says what was fastest for which product. The
nearest product of its kind counts, if it is near. A configuration is about speed alone: every one is right.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fewbits import caching
from fewbits.errors import FewbitsError

PACKAGED = Path(__file__).with_name("tuned")
DENSE_ROWS = 512  # from so many on, the weight is decoded and multiplied by the GPU's own library
WAVES = 5  # programs that a processor holds at once, which a default's split asks for; with large tiles 1
NEAR = 2.0  # how many times as wide or as high a product may be, for its configuration to count


@dataclass(frozen=True)
class Config:
    """What a program computes; all are powers of two, but for the stages. Columns come in the layout's blocks."""

    n: int  # outputs: rows of the weight
    m: int = 1  # rows of activations
    split: int = 1  # programs that share the columns
    warps: int = 4
    stages: int = 3


class Key(NamedTuple):
    """A product: by which kernel, of what weight `[out, columns]`, with how many rows of activations."""

    kernel: str  # "matvec", "tile", "decode", "rowwise"
    bits: int
    group: int  # columns that share a scale
    rows: int
    out: int
    columns: int


class Entry(NamedTuple):
    key: Key
    config: Config
    microseconds: float


class Tuned(NamedTuple):
    """What a file says; of `dense` the key's rows are those from which on decoding is faster."""

    device: str
    triton: str
    entries: tuple[Entry, ...] = ()
    dense: tuple[Key, ...] = ()


NOTHING = Tuned("", "")
LEAST_COLUMNS = 256  # of a program, where a default splits
DEFAULTS: dict[str, dict[int, Config]] = {  # kernel -> up to so many rows -> what is taken; the last for any
    "matvec": {1: Config(128)},
    "tile": {16: Config(128, 16), 32: Config(128, 32), 64: Config(128, 64), 128: Config(128, 128, warps=8),
             256: Config(128, 256, warps=8, stages=2)},
    "decode": {1: Config(128)},
    "rowwise": {16: Config(64, 16), 32: Config(64, 32), 64: Config(64, 64, stages=4), 256: Config(128, 128, warps=8)},
}
_tried: list[_Trial] = []
_instead: dict[tuple[str, Config], Config] = {}  # kernel and what was too large


class _Trial(NamedTuple):
    configs: dict[str, Config]
    dense: int | None
    asked: list[Key]


def lookup(kernel: str, bits: int, group: int, rows: int, out: int, columns: int, device: torch.device) -> Config:
    """The configuration of a product on a device."""
    key = Key(kernel, bits, group, bucket(rows), out, columns)
    if _tried:
        _tried[-1].asked.append(key)
        if kernel in _tried[-1].configs:
            return _tried[-1].configs[kernel]
    return _lookup(key, device)


def fitting(kernel: str, config: Config, launch: Callable[[Config], None]) -> None:
    """Launch with a configuration; with a smaller one, from then on, where the GPU has too little shared memory for
    programs of that size. What is being tried is launched as it is."""
    from triton.runtime.errors import OutOfResources

    while True:
        while (kernel, config) in _instead:
            config = _instead[kernel, config]
        try:
            return launch(config)
        except OutOfResources:
            if _tried and kernel in _tried[-1].configs or config == (smaller := _smaller(config)):
                raise
            _instead[kernel, config] = smaller


def _smaller(config: Config) -> Config:
    """Fewer loads ahead, then fewer outputs; rows stay, which callers have counted on."""
    if config.stages > 1:
        return replace(config, stages=config.stages - 1)
    return replace(config, n=max(16, config.n // 2))


def dense(bits: int, group: int, out: int, columns: int, device: torch.device) -> int:
    """From how many rows of activations on a weight is decoded and multiplied by the GPU's own library."""
    key = Key("dense", bits, group, 0, out, columns)
    if _tried:
        _tried[-1].asked.append(key)
        if _tried[-1].dense is not None:
            return _tried[-1].dense
    return _dense(key, device)


@contextmanager
def trying(configs: dict[str, Config] | None = None, dense: int | None = None) -> Iterator[list[Key]]:
    """Within it these count, kernel by kernel, whatever files say: for tuning, and for tests. It gives a list of all
    that is asked for."""
    trial = _Trial(configs or {}, dense, [])
    _tried.append(trial)
    try:
        yield trial.asked
    finally:
        _tried.pop()


def bucket(rows: int) -> int:
    """What so many rows are tuned as: one, or the power of two from 16 to 256 that is at least as many."""
    return 1 if rows <= 1 else max(16, min(1 << (rows - 1).bit_length(), 256))


def name_of(device: torch.device) -> str:
    """The make of a device; the CPU's is that of Triton's interpreter."""
    return "interpreter" if device.type == "cpu" else str(getattr(torch, device.type).get_device_name(device))


def file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def own_file(device: str) -> Path:
    """Where the user's own measurements of such a device are kept."""
    return caching.folder("triton") / file_name(device)


def read(file: Path) -> Tuned:
    """What a file says; nothing if it isn't there.

    Raises:
        FewbitsError: it is no such file.
    """
    if not file.exists():
        return NOTHING
    try:
        found = json.loads(file.read_text())
        entries = tuple(Entry(_key(e), Config(**e["config"]), float(e["microseconds"])) for e in found["entries"])
        return Tuned(str(found["device"]), str(found["triton"]), entries, tuple(map(_key, found["dense"])))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FewbitsError(f"{file}: no file of tuned configurations: {error}", "delete it; fewbits tune writes "
                           "another") from None


def write(file: Path, tuned: Tuned) -> None:
    """One product a line. What was looked up is forgotten, so that it counts at once."""
    text = json.dumps(to_json(tuned)).replace("[{", "[\n  {").replace("}, {", "},\n  {")
    caching.write(file, lambda out: out.write(f"{text}\n".encode()))
    forget()


def to_json(tuned: Tuned) -> dict[str, Any]:
    """What a file holds."""
    entries = [_fields(e.key) | {"config": asdict(e.config), "microseconds": round(e.microseconds, 2)}
               for e in sorted(tuned.entries, key=lambda e: e.key)]
    return {"device": tuned.device, "triton": tuned.triton, "entries": entries,
            "dense": [_fields(key) for key in sorted(tuned.dense)]}


def forget() -> None:
    """Files are read again."""
    for function in (_lookup, _dense, _files):
        function.cache_clear()


def _key(found: dict[str, Any]) -> Key:
    numbers = (int(found[name]) for name in ("bits", "group", "rows", "out", "in"))
    return Key(str(found["kernel"]), *numbers)


def _fields(key: Key) -> dict[str, Any]:
    found = key._asdict()
    return found | {"in": found.pop("columns")}


@cache
def _files(device: torch.device) -> tuple[Tuned, ...]:
    """The user's own file first."""
    name = name_of(device)
    return read(own_file(name)), read(PACKAGED / file_name(name))


@cache
def _lookup(key: Key, device: torch.device) -> Config:
    found = (nearest(tuned, key) for tuned in _files(device))
    return next((c for c in found if c), None) or default(key, 1 if device.type == "cpu" else _processors(device))


def nearest(tuned: Tuned, key: Key) -> Config | None:
    """What a file has for a product: of the nearest in shape, for as many rows."""
    near = [e for e in tuned.entries if e.key.rows == key.rows and _near(e.key, key)]
    return min(near, key=lambda e: _distance(e.key, key)).config if near else None


@cache
def _dense(key: Key, device: torch.device) -> int:
    for tuned in _files(device):
        near = [k for k in tuned.dense if _near(k, key)]
        if near:
            return min(near, key=lambda k: _distance(k, key)).rows
    return DENSE_ROWS


def _near(one: Key, other: Key) -> bool:
    apart = (max(a / b, b / a) for a, b in ((one.out, other.out), (one.columns, other.columns)))
    return (one.kernel, one.bits) == (other.kernel, other.bits) and max(apart) <= NEAR


def _distance(one: Key, other: Key) -> tuple[float, float]:
    """Groups of another size count more than any distance of shapes."""
    shape = abs(math.log(one.out / other.out)) + abs(math.log(one.columns / other.columns))
    return abs(math.log(one.group / other.group)), shape


def default(key: Key, processors: int) -> Config:
    """Without any file; columns are shared where a product has too few programs for the GPU."""
    table = DEFAULTS[key.kernel]
    config = table[min((r for r in table if r >= key.rows), default=max(table))]
    if key.kernel == "decode":
        return config
    programs = math.ceil(key.out / config.n) * math.ceil(key.rows / config.m)
    waves = WAVES if config.m < 64 else 1
    wanted = min(waves * processors // programs, key.columns // LEAST_COLUMNS, 32)
    return replace(config, split=1 << max(0, wanted.bit_length() - 1))


def _processors(device: torch.device) -> int:
    properties = getattr(torch, device.type).get_device_properties(device)
    return int(getattr(properties, "multi_processor_count", 0) or getattr(properties, "gpu_subslice_count", 64))

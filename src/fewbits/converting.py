"""From one container to another, keeping the codes wherever both can hold them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fewbits import codecs, containers, hub, solvers
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs import floats
from fewbits.codecs.base import Codec
from fewbits.codecs.floats import BF16, F16, F32, Float
from fewbits.containers import experts, gguf_lora
from fewbits.containers.base import Container, Progress, check_output, write
from fewbits.containers.directory import read_json
from fewbits.containers.gguf import SplitGguf
from fewbits.errors import FewbitsError
from fewbits.qtensor import CHUNK, QTensor
from fewbits.recipe.facts import float_of
from fewbits.recoding import candidates, holds, recode

KEPT, RECODED, DECODED, ROUNDED = "kept", "recoded", "decoded", "rounded"
MEANING = {KEPT: "the same codes", RECODED: "the same values in another codec", DECODED: "the same values as floats",
           ROUNDED: "values changed"}
# what a container takes of foreign codes: (up to how many bits a weight, the codec)
CLOSEST: dict[str, tuple[tuple[float, str], ...]] = {
    "gguf": ((2.7, "Q3_K"), (3.7, "Q4_K"), (5.1, "IQ4_NL"), (32, "Q8_0")),
    "gptq": ((5.1, "int4-g32-asym"), (32, "int8-g32")),
    "awq": ((32, "int4-g32-asym"),),
    "compressed-tensors": ((5.1, "int4-g32-asym"), (32, "int8-g32")),
    "bitsandbytes": ((5.1, "nf4"), (32, "int8")),
    "fp8": ((32, "fp8-e4m3-b128"),),
    "mxfp4": ((32, "MXFP4"),),
}
SUCCESSORS = {"Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q4_2": "Q4_0", "Q4_3": "Q4_1", "Q8_0": "Q8_0"}  # of the older GGML
UNIFORM = ("bitsandbytes",)  # one codec for the whole model, chosen by its average
HOLD_FLOATS = ("transformers", "gguf", "fewbits")


@dataclass(frozen=True)
class Step:
    """What becomes of one tensor. `error` is the relative root mean square of the change, 0 where there is none."""

    name: str
    shape: tuple[int, ...]
    before: str
    after: str
    how: str  # kept, recoded, decoded, rounded
    error: float = 0.0

    @property
    def lossless(self) -> bool:
        return self.how != ROUNDED


@dataclass(frozen=True)
class Conversion:
    """What was written, and how each tensor got there."""

    path: Path
    source: str  # container
    container: str
    nbytes: int  # of all tensors
    seconds: float
    tensors: list[Step]
    notes: list[str] = field(default_factory=list)

    @property
    def lossless(self) -> bool:
        return all(step.lossless for step in self.tensors)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "lossless": self.lossless}


def convert(model: str | Path | Checkpoint, out: str | Path, to: str | None = None, *, lossy: bool = False,
            split: int | None = None, base: str | Path | None = None, progress: Progress | None = None) -> Conversion:
    """Write `model` (a path in any format or a hub id) to `out` in another layout, without requantizing.

    `to` is a container ("gguf", "gptq", "transformers" …) or a float type ("f16"), which goes to a Transformers
    directory, or to GGUF where `out` is called so. Left out, it follows from `out`: GGUF for `*.gguf`, else the first
    directory layout that keeps the codes. Codes are kept where the container can hold them, or moved to another codec
    with the same values. A tensor that would change is refused, unless `lossy` allows to quantize it again.

    `split` writes GGUF as a directory of files of at most so many bytes. A LoRA adapter (peft's directory or GGUF) goes
    to the other layout; `base` is then the model that it belongs to.

    Raises:
        FewbitsError: a tensor would change its values, or has no place in the container.
    """
    began = time.monotonic()
    out = Path(out).resolve()
    path = None if isinstance(model, Checkpoint) else hub.locate(model)
    if path is not None and gguf_lora.is_adapter(path):
        return _adapter(path, out, base)
    if base is not None:
        raise FewbitsError(f"{path}: not a LoRA adapter, so it has no base model", "leave --base out")
    source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    check_output(out, source.path)
    target, kind = _target(source, out, to, split)
    steps, entries = [], {}
    done, total = 0, source.nbytes
    for entry in source.entries.values():
        if progress:
            progress("planning", done, total)
        new, how = _choose(source, entry, target, kind, lossy)
        steps.append(Step(entry.name, entry.shape, entry.codec.name, new.codec.name, how))
        entries[entry.name] = new
        done += entry.nbytes
    _refuse_changes(source, target, steps, lossy)
    if target.name not in HOLD_FLOATS and all(isinstance(e.codec, Float) for e in entries.values()):
        raise FewbitsError(f"{source.path}: no tensor would stay quantized in {target.name}", "take another container")
    facts = dict(source.facts)
    if any(s.before != s.after for s in steps):
        facts.pop("file_type", None)  # another mix now
    goal = replace(source, entries=entries, facts=facts)
    written = write(target, out, goal, progress)
    found = experts.unstacked(written.entries.values(), but=source.entries)
    steps = [_measured(s, source.entries[s.name], found[s.name]) for s in steps]
    return Conversion(out, source.container, target.name, written.nbytes, time.monotonic() - began, steps)


# where to ---------------------------------------------------------------------------------------------------------
def _target(source: Checkpoint, out: Path, to: str | None, split: int | None) -> tuple[Container, Codec | None]:
    """The container, and the float type of every tensor where one was asked for."""
    if split is not None:
        if to not in (None, "gguf") or out.suffix:
            raise FewbitsError(f"{out}: only GGUF is split, into a directory of files", "give a directory with -o")
        return SplitGguf(most_bytes=split), None
    gguf = out.suffix == ".gguf"
    if to is None:
        return containers.by_name("gguf" if gguf else _keeping(source)), None
    names = [*(c.name for c in containers.CONTAINERS), *containers.VARIANTS]
    if to in names:
        target, kind = containers.by_name(to), None
    else:
        kind = floats.parse(to)
        if kind is None:
            raise FewbitsError(f"--to {to}: neither a container nor a float type", "one of " + ", ".join(names)
                               + ", f16, bf16, f32; to choose another number format, use fewbits quantize")
        target = containers.by_name("gguf" if gguf else "transformers")
    if gguf != (target.suffix == ".gguf"):
        raise FewbitsError(f"{out}: {target.name} is written to a {'file *.gguf' if target.suffix else 'directory'}",
                           "give another name with -o")
    if target.name not in HOLD_FLOATS and all(isinstance(e.codec, Float) for e in source.entries.values()):
        raise FewbitsError(f"{source.path}: nothing in it is quantized, and {target.name} is for quantized models",
                           "use fewbits quantize")
    return target, kind


def _keeping(source: Checkpoint) -> str:
    """The directory layout that loads in most places and keeps what the tensors are."""
    if all(isinstance(e.codec, Float) for e in source.entries.values()):
        return "transformers"
    for container in containers.CONTAINERS:
        if container.suffix or container.name in HOLD_FLOATS:
            continue
        if all(_exact(source, e, container) for e in source.entries.values()):
            return container.name
    return "fewbits"


def _exact(source: Checkpoint, entry: Entry, container: Container) -> bool:
    """Whether `container` takes the entry's codes, or those of a codec that holds the same values."""
    if container.refuses(source, entry) is None:
        return not _ordered(entry, container)
    return any(container.refuses(source, entry.as_(codec=c)) is None and holds(entry.load(), c)
               for c in candidates(entry.codec, entry.shape[-1]))


def _adapter(path: Path, out: Path, base: str | Path | None) -> Conversion:
    """A LoRA adapter into the other of its two layouts."""
    began = time.monotonic()
    if base is None:
        raise FewbitsError(f"{path}: is a LoRA adapter, whose names and rows follow from its base model",
                           "name the model with --base; its config.json is enough")
    config = _config(hub.locate(base, weights=False))
    to = gguf_lora.to_gguf if path.is_dir() else gguf_lora.to_peft
    if path.is_dir() != (out.suffix == ".gguf"):
        form = "file *.gguf" if path.is_dir() else "directory"
        raise FewbitsError(f"{out}: the adapter {path.name} becomes a {form}", "give another name with -o")
    lora = to(path, config, out)
    sides = [(f"{name} {side}", q) for name, pair in lora.pairs.items() for side, q in (("a", pair.a), ("b", pair.b))]
    steps = [Step(name, q.shape, q.codec.name, q.codec.name, KEPT) for name, q in sides]
    names = ("peft", "gguf-lora") if path.is_dir() else ("gguf-lora", "peft")
    return Conversion(out, *names, sum(q.nbytes for _, q in sides), time.monotonic() - began, steps)


def _config(base: Path) -> dict[str, Any]:
    """The configuration of a model, of which config.json is enough."""
    if base.is_dir() and (base / "config.json").is_file():
        return read_json(base / "config.json")
    return containers.open(base).config


# what becomes of a tensor -----------------------------------------------------------------------------------------
def _choose(source: Checkpoint, entry: Entry, target: Container, kind: Codec | None,
            lossy: bool) -> tuple[Entry, str]:
    """The entry as it will be written, and how it changes; a ROUNDED one is only written where that is allowed."""
    if kind is not None:
        return _as_float(entry, [kind], kind)
    reason = target.refuses(source, entry)
    if reason is None and not _ordered(entry, target):
        return entry, KEPT
    for nearly in (False, True) if lossy else (False,):
        for codec in candidates(entry.codec, entry.shape[-1]):
            if target.refuses(source, entry.as_(codec=codec)) is None and holds(entry.load(), codec, nearly):
                new = entry.as_(codec=codec, load=partial(_recoded, entry, codec))
                return new, ROUNDED if nearly else RECODED
    if isinstance(entry.codec, Float):
        raise FewbitsError(f"{target.name} cannot hold {entry.name} ({entry.codec.name}): {reason}")
    close = _closest(source, entry, target)
    if close is not None and target.refuses(source, entry.as_(codec=close)) is None:
        return entry.as_(codec=close, load=partial(_requantized, entry, close)), ROUNDED
    for codec in (F32, F16, BF16):
        reason = target.refuses(source, entry.as_(codec=codec))
        if reason is None:
            break
    else:
        raise FewbitsError(f"{target.name} cannot hold {entry.name} ({entry.codec.name}): {reason}")
    usual = float_of(source.config)
    return _as_float(entry, [usual] if lossy else [usual, F16, BF16, F32], usual)


def _ordered(entry: Entry, target: Container) -> bool:
    """Whether the tensor has a column order that the container has no place for."""
    return entry.codec.family == "int" and not target.ordered and entry.load().order is not None


def _closest(source: Checkpoint, entry: Entry, target: Container) -> Codec | None:
    """What of the container's own is nearest to the entry's codec: its successor, or of about its size."""
    if entry.codec.family == "ggml-old" and target.name == "gguf":
        return codecs.get(SUCCESSORS[entry.codec.name.split("-")[0]])
    like = [e for e in source.entries.values() if not isinstance(e.codec, Float)] if target.name in UNIFORM else [entry]
    bits = 8 * sum(e.nbytes for e in like) / sum(e.parameters for e in like)
    return next((codecs.get(name) for most, name in CLOSEST.get(target.name, ()) if bits <= most), None)


def _as_float(entry: Entry, kinds: list[Codec], otherwise: Codec) -> tuple[Entry, str]:
    """The entry in the first float type that holds its values exactly, or rounded to `otherwise`."""
    for kind in kinds:
        if kind == entry.codec:
            return entry, KEPT
        if _holds(kind, entry):
            return entry.as_(codec=kind, load=partial(_floats, entry, kind)), DECODED
    return entry.as_(codec=otherwise, load=partial(_floats, entry, otherwise)), ROUNDED


def _holds(kind: Codec, entry: Entry) -> bool:
    """Whether every value of the entry is one of the float type."""
    if kind == F32:
        return True
    for part in _parts(entry.load()):
        values = part.dequantize()
        back = values.to(kind.dtype).float()  # type: ignore[attr-defined]
        if not bool(((values == back) | (values.isnan() & back.isnan())).all()):
            return False
    return True


def _parts(q: QTensor) -> Iterator[QTensor]:
    """A few rows at a time, where the codec allows it."""
    if len(q.shape) < 2 or not q.codec.rows_apart(q.shape):
        yield q
        return
    rows, step = q.codec.matrix(q.shape)[0], max(1, CHUNK // q.shape[-1])
    for at in range(0, rows, step):
        yield q.part(slice(at, at + step))


def _recoded(entry: Entry, codec: Codec) -> QTensor:
    return recode(entry.load(), codec)


def _requantized(entry: Entry, codec: Codec) -> QTensor:
    return solvers.solve(entry.load().dequantize(), codec, "search")


def _floats(entry: Entry, codec: Codec) -> QTensor:
    return solvers.solve(entry.load().dequantize(), codec, "nearest")


# what is said of it -----------------------------------------------------------------------------------------------
def _refuse_changes(source: Checkpoint, target: Container, steps: list[Step], lossy: bool) -> None:
    changed = [s for s in steps if not s.lossless]
    if not changed or lossy:
        return
    kinds = Counter((s.before, s.after) for s in changed)
    (before, after), _ = kinds.most_common(1)[0]
    raise FewbitsError(
        f"{source.path}: {len(changed)} of {len(steps)} tensors would change their values in {target.name}, "
        f"{changed[0].name} for one: {before} would become {after}",
        "allow that with --lossy, or quantize from the original model; --to fewbits and --to f32 keep every value")


def _measured(step: Step, before: Entry, after: Entry) -> Step:
    """The step with what the file holds now (GGUF has vectors in float32), and how far that is from what was."""
    if step.lossless:
        how = DECODED if step.how == KEPT and after.codec != before.codec else step.how
        return replace(step, after=after.codec.name, how=how)
    old, new = before.load().dequantize(), after.load().dequantize()
    change = float((new - old).norm() / old.norm()) if bool(old.any()) else 0.0
    return replace(step, after=after.codec.name, error=change)


def summary(conversion: Conversion) -> list[tuple[str, str, str, int, float]]:
    """(before, after, how, tensors, largest error), most tensors first."""
    groups: dict[tuple[str, str, str], list[Step]] = {}
    for step in conversion.tensors:
        groups.setdefault((step.before, step.after, step.how), []).append(step)
    rows = [(*key, len(steps), max(s.error for s in steps)) for key, steps in groups.items()]
    return sorted(rows, key=lambda row: -row[3])


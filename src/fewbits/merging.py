"""`merge`: an adapter into its base model, tensor by tensor, and how far that is from the model that was fine-tuned."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fewbits import __version__, adapters, containers, hub
from fewbits.calibration import sources
from fewbits.calibration.sources import Batch, Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.codecs import floats
from fewbits.codecs.floats import F32
from fewbits.containers.base import Progress, check_output, write
from fewbits.containers.peft import Adapter
from fewbits.converting import convert
from fewbits.errors import FewbitsError
from fewbits.jobs.store import Store, identity, resumable
from fewbits.memory import available_bytes
from fewbits.quantizing import Result, quantize

SAMPLES, LENGTH = 4, 512  # sequences that divergences are measured on, and their tokens
Text = str | Path | Calibration | Sequence[Batch]


@dataclass(frozen=True)
class Distance:
    """Mean Kullback-Leibler divergence from the fine-tuned model, in nats a token, and its standard error."""

    what: str
    kl: float
    kl_error: float


@dataclass(frozen=True)
class Merged:
    """What was written, and what each step cost."""

    path: Path
    container: str
    recipe: str  # or the float type of what was merged
    nbytes: int  # on disk
    bits_per_weight: float
    changed: int  # tensors that the adapter is about
    rank: int  # the largest
    tuned: str  # the fine-tuned model, in words
    distances: list[Distance]  # of each step from it; none where nothing was measured
    text: str | None  # that they were measured on
    seconds: float
    notes: list[str] = field(default_factory=list)
    quantized: Result | None = None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path), "quantized": self.quantized and self.quantized.to_json()}


def merge(adapter: str | Path, base: str | Path | Checkpoint, out: str | Path, *, to: str | None = None,
          dtype: str | None = None, trained_on: str | Path | Checkpoint | None = None, text: Text | None = None,
          progress: Progress | None = None, **options: Any) -> Merged:
    """Merge a LoRA adapter (peft's directory or llama.cpp's file) into `base` and write the sum to `out`.

    Packed weights are decoded before. The sum is written in the base's float type, or in `dtype`, as a Transformers
    directory or, where `out` is called so, as GGUF; or quantized again by the recipe `to`, for which `options` are
    those of `quantize`.

    Every step's divergence from the fine-tuned model is measured on `text` (see `sources.calibration`; by default what
    the calibration is, else text of the model's own; "none" measures nothing). That is the adapter in exact sum with
    the model that it was trained on: `trained_on`, where the adapter names a directory that is there that one, else
    `base`.

    A killed merge goes on where it stopped when called again.

    Raises:
        FewbitsError: no LoRA adapter, one of another model, or anything that `quantize` refuses.
    """
    began, out = time.monotonic(), Path(out).resolve()
    source = base if isinstance(base, Checkpoint) else containers.open(hub.locate(base))
    found = adapters.read(hub.locate(adapter), source)
    check_output(out, source.path)
    check_output(out, found.path)
    kind = None if dtype is None else floats.parse(dtype)
    if dtype is not None and kind is None:
        raise FewbitsError(f"--dtype {dtype}: not a float type", "one of f16, bf16, f32")
    if to is None and options:
        raise FewbitsError(f"{sorted(options)[0]} is about quantizing, and no recipe is asked for",
                           "give one with --to")
    merged, notes = adapters.applied(source, found, kind)
    trained = _trained(found, source, trained_on)
    notes += _about_base(found, source, trained)
    quantized = None
    if to is None:
        written = containers.open(convert(merged, out, progress=progress).path)
    else:
        work = out.with_name(f".{out.name}.merge")
        with resumable(work):
            stamp = {"adapter": _digest(found), "base": identity(source), "dtype": dtype, "version": __version__}
            store = Store(work, stamp)
            sum_ = work / merged.path.name
            if not sum_.exists():
                write(containers.by_name("transformers"), sum_, merged, progress)
            quantized = quantize(sum_, out, to, progress=progress, **options)
            store.clear()
        written = containers.open(out)
        notes += quantized.notes
    steps = [] if trained is source else [(f"the adapter on {_name(source)} instead", _exact(source, found))]
    steps += [(f"merged as {_kind(merged)}", merged)]
    steps += [(f"quantized as {quantized.recipe}", written)] if quantized else []
    spec = text if text is not None else _spoken(options.get("calibration"))
    distances, told, why = _measured(_exact(trained, found), steps, spec, text is not None, progress)
    return Merged(out, written.container, quantized.recipe if quantized else _kind(merged),
                  quantized.nbytes if quantized else written.nbytes, written.nbytes * 8 / written.parameters,
                  len(found.changes), max((c.pair.rank for c in found.changes.values() if c.pair), default=0),
                  f"{_name(trained)} with {found.path.name}", distances, told, time.monotonic() - began, notes + why,
                  quantized)


# what it was trained on -----------------------------------------------------------------------------------------------
def _trained(adapter: Adapter, base: Checkpoint, asked: str | Path | Checkpoint | None) -> Checkpoint:
    """The model that the adapter was trained on, as far as it is here."""
    if isinstance(asked, Checkpoint):
        return asked
    named = asked or (adapter.base if adapter.base and Path(adapter.base).exists() else None)
    path = base.path if named is None else hub.locate(named)
    return base if path.resolve() == base.path.resolve() else containers.open(path)


def _about_base(adapter: Adapter, base: Checkpoint, trained: Checkpoint) -> list[str]:
    if trained is not base:
        return [f"the adapter was trained on {_name(trained)}, and is merged into {_name(base)}"]
    if adapter.base and Path(adapter.base).name != base.path.name:
        return [f"the adapter says that it was trained on {adapter.base}: divergence is counted from the adapter on "
                f"{base.path}"]
    return []


def _exact(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The sum in float32."""
    return adapters.applied(base, adapter, F32)[0]


def _digest(adapter: Adapter) -> str:
    """SHA-256 of all that the adapter holds."""
    found = hashlib.sha256()
    for name, c in sorted(adapter.changes.items()):
        found.update(f"{name} {c.scale} {c.pair.scale if c.pair else None} {c.columns};".encode())
        for q in (*((c.pair.a, c.pair.b) if c.pair else ()), c.magnitude, c.plus, c.instead):
            found.update(b"none" if q is None else q.dequantize().numpy().tobytes())
    return found.hexdigest()


def _name(checkpoint: Checkpoint) -> str:
    return checkpoint.path.name


def _kind(merged: Checkpoint) -> str:
    """The float type of most of the sum."""
    found = Counter(e.codec.name for e in merged.entries.values() if len(e.shape) > 1)
    return found.most_common(1)[0][0]


# what it cost ---------------------------------------------------------------------------------------------------------
def _spoken(calibration: Any) -> Text:
    return "self" if calibration in (None, "none") else calibration


def _measured(tuned: Checkpoint, steps: list[tuple[str, Checkpoint]], spec: Text, asked: bool,
              progress: Progress | None) -> tuple[list[Distance], str | None, list[str]]:
    """The steps' divergences, the text that they are of, and why there are none."""
    from fewbits.measure.sensitivity import windows_of
    from fewbits.measure.trials import Trials

    if spec == "none":
        return [], None, []
    try:
        _check_measurable(tuned)
        text = sources.calibration(spec, tuned, samples=SAMPLES, length=LENGTH, seed=1, progress=progress)
        trials = Trials(tuned, windows_of(tuned, text.batches))
    except FewbitsError as error:
        if asked:
            raise
        return [], None, [f"divergence was not measured: {error}"]
    found = []
    for i, (what, variant) in enumerate(steps):
        if progress:
            progress(f"measuring: {what}", i, len(steps))
        kl = trials.divergence(variant)
        found.append(Distance(what, float(kl.mean()), float(kl.std(ddof=1)) / math.sqrt(kl.size)))
    return found, text.description, list(text.notes)


def _check_measurable(tuned: Checkpoint) -> None:
    """Refuse what has no logits of tokens, and what does not fit into memory."""
    from fewbits.lazy import transformers

    kind = getattr(transformers, tuned.architecture, None)
    if kind is None or not kind.can_generate() or tuned.config.get("is_encoder_decoder"):
        raise FewbitsError(f"{tuned.architecture} does not continue text")
    needed, free = 2 * tuned.nbytes, available_bytes()
    if needed > free:
        raise FewbitsError(f"two models in float32 need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")

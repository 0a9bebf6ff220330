"""The one loop: every tensor of a checkpoint through its solver, block by block where statistics are needed.

Solved tensors go to a work directory beside the output, so that a killed run continues where it stopped; the container
then streams the result from there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fewbits import containers, hub, solvers
from fewbits.calibrate import Statistics, Walk, sample_tokens
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.base import Codec
from fewbits.codecs.floats import F16, Float
from fewbits.containers import experts
from fewbits.containers.base import Container, Progress, check_output, check_space, remove, write
from fewbits.errors import FewbitsError
from fewbits.qtensor import CHUNK, QTensor
from fewbits.recipe import Choice, ModelFacts, Overrides, Recipe
from fewbits.recipe import get as get_recipe


@dataclass(frozen=True)
class Result:
    """What was written, and what each tensor became."""

    path: Path
    container: str
    recipe: str
    nbytes: int  # on disk
    bits_per_weight: float  # of all tensors
    seconds: float
    tensors: list[dict[str, Any]]  # name, shape, codec, solver, bits_per_weight
    notes: list[str] = field(default_factory=list)  # what differs from what was asked, and why

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def quantize(model: str | Path | Checkpoint, out: str | Path, to: str | Recipe, *, solver: str | None = None,
             calibration: str | Path | None = None, samples: int = 64, length: int = 512,
             overrides: Overrides = None, container: str | None = None, keep_nonfinite: bool = False,
             progress: Progress | None = None) -> Result:
    """Quantize `model` (a path in any format or a hub id) by the recipe `to` into `out`.

    With `calibration`, a UTF-8 text of which `samples` sequences of `length` tokens are taken, the solver is GPTQ
    unless named; without, a search of the parameters of least squared error. A killed run resumes when called again.

    Raises:
        FewbitsError: anything that cannot be done as asked, before work begins where it can be known.
    """
    began = time.monotonic()
    source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
    recipe = get_recipe(to, container) if isinstance(to, str) else replace(to, container=container or to.container)
    target = containers.by_name(recipe.container)
    out = Path(out).resolve()
    check_output(out, source.path)
    solver = solver or recipe.solver or ("gptq" if calibration else "search")
    for named in sorted({solver} | recipe.solvers):
        if named in solvers.NEEDS_STATISTICS and calibration is None:
            raise FewbitsError(f"solver {named} needs calibration text", "give one with --calibration FILE")
    choices = recipe.resolve(ModelFacts.of(source), overrides=overrides, has_importance=calibration is not None,
                             solver=solver)
    choices, notes = _solvable(choices)
    source = replace(source, entries=experts.unstacked(source.entries.values(), but={c.name for c in choices}))
    job = _Job(source, choices, keep_nonfinite, progress)
    goal = job.checkpoint(recipe)
    refusal = target.refusal(goal)
    if refusal:
        raise FewbitsError(f"{target.name} cannot hold {refusal[0].name} as {refusal[0].codec.name}: {refusal[1]}",
                           f"leave it in floats with --override '{refusal[0].name}=f16', or take another recipe")
    check_space(out.parent, 2 * goal.nbytes)
    tokens = None
    if calibration is not None:
        tokens = _tokens(source, calibration, samples, length)
    job.open(out.with_name(f".{out.name}.work"), tokens)
    job.solve(tokens)
    notes += job.notes
    result = write(target, out, job.checkpoint(recipe), progress)
    job.store.clear()
    return _result(out, result, recipe, target, job, notes, time.monotonic() - began)


def _solvable(choices: list[Choice]) -> tuple[list[Choice], list[str]]:
    """Choices whose solver takes their tensor: GPTQ gives way to search where blocks cross rows, and that is said."""
    kept: list[Choice] = []
    refused: dict[str, list[str]] = {}
    for c in choices:
        reason = solvers.refuses("gptq", c.codec, c.shape) if c.solver == "gptq" else None
        if reason:
            refused.setdefault(reason, []).append(c.name)
            c = replace(c, solver="search")
        kept.append(c)
    notes = [f"{_some(names)}: search instead of gptq: {reason}" for reason, names in refused.items()]
    return kept, [c.note for c in choices if c.note] + notes


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, …)"


def _tokens(source: Checkpoint, calibration: str | Path, samples: int, length: int) -> torch.Tensor:
    from fewbits.measure.divergence import read_text
    from fewbits.runtime.build import bos_of, tokenizer_of

    tokenizer = tokenizer_of(source)
    ids = tokenizer(read_text(calibration), add_special_tokens=False, verbose=False)["input_ids"]
    return sample_tokens(ids, samples, length, bos_of(tokenizer), str(calibration))


class _Store:
    """Solved tensors on disk, a file each; complete once it has its name."""

    def __init__(self, folder: Path, job: dict[str, Any]):
        self.folder = folder
        stamp = folder / "job.json"
        text = json.dumps(job, sort_keys=True)
        if not stamp.exists() or stamp.read_text() != text:
            remove(folder)
            folder.mkdir()
            stamp.write_text(text)

    def _file(self, name: str) -> Path:
        return self.folder / (hashlib.sha256(name.encode()).hexdigest()[:24] + ".safetensors")

    def has(self, name: str) -> bool:
        return self._file(name).exists()

    def put(self, name: str, q: QTensor) -> None:
        partial = self._file(name).with_suffix(".partial")
        save_file({k: p.contiguous() for k, p in q.planes.items()}, partial)
        os.replace(partial, self._file(name))

    def get(self, name: str, codec: Codec, shape: tuple[int, ...]) -> QTensor:
        return QTensor(codec, shape, load_file(self._file(name)))

    def clear(self) -> None:
        remove(self.folder)


class _Job:
    """The tensors of one call and what becomes of each."""

    def __init__(self, source: Checkpoint, choices: list[Choice], keep_nonfinite: bool, progress: Progress | None):
        self.source, self.choices = source, {c.name: c for c in choices}
        self.keep_nonfinite, self.progress = keep_nonfinite, progress
        self.notes: list[str] = []
        self.unseen: list[str] = []  # no calibration input reached them: the layer's experts are no linear modules
        self.used: dict[str, str] = {}  # name -> solver
        self.done = 0
        self.total = sum(source.entries[n].parameters for n in self.choices)
        again = [n for n, c in self.choices.items() if c.solver and source.entries[n].codec.family != "float"]
        if again:
            kinds = sorted({source.entries[n].codec.name for n in again})
            self.notes.append(f"{len(again)} tensors were quantized before ({', '.join(kinds)}): their error adds to "
                              "this one")

    def open(self, folder: Path, tokens: torch.Tensor | None) -> None:
        stat = os.stat(self.source.path)
        self.store = _Store(folder, {
            "source": [str(self.source.path), stat.st_size, stat.st_mtime_ns],
            "choices": [[c.name, c.codec.name, c.solver] for c in self.choices.values()],
            "tokens": None if tokens is None else hashlib.sha256(tokens.numpy().tobytes()).hexdigest()})

    # solving --------------------------------------------------------------------------------------------------------
    def solve(self, tokens: torch.Tensor | None) -> None:
        calibrated: set[str] = set()
        if tokens is not None:
            walk = Walk(self.source, tokens)
            for block in walk:
                names = [n for n in self.choices if n.startswith(block.prefix) and self.choices[n].solver]
                missing = [n for n in names if not self.store.has(n)]
                statistics = block.statistics() if missing else {}
                for name in names:
                    if name in missing:
                        self._solve_one(name, statistics.get(name))
                    else:
                        self._skip(name)
                    calibrated.add(name)
                    if self.choices[name].solver:
                        block.replace(name, self._stored(name))
        for name, choice in self.choices.items():
            if name in calibrated:
                continue
            if choice.solver and not self.store.has(name):
                self._solve_one(name, None)
                continue
            if not choice.solver:
                self._check(name)
            self._skip(name)
        if self.unseen:
            self.notes.append(f"{_some(self.unseen)}: search instead of gptq: no calibration input reached it")

    def _solve_one(self, name: str, statistics: Statistics | None) -> None:
        choice = self.choices[name]
        solver = choice.solver or "search"
        if solver in solvers.NEEDS_STATISTICS and statistics is None:
            solver = "search"
            self.unseen.append(name)
        if self._check(name):
            weight = self._weight(name)
            self.store.put(name, solvers.solve(weight, choice.codec, solver, statistics))
            self.used[name] = solver
        self._skip(name)

    def _skip(self, name: str) -> None:
        self.used.setdefault(name, self.choices[name].solver or "")
        self.done += self.source.entries[name].parameters
        if self.progress:
            self.progress("quantizing", self.done, self.total)

    def _weight(self, name: str) -> torch.Tensor:
        """The original weight as the codec sees it, `[..., out, in]`; float tensors stay in their file's type."""
        q = self.source.entries[name].load()
        weight = q.planes["data"].view(q.shape) if isinstance(q.codec, Float) else q.dequantize()
        return weight.T if self.choices[name].transposed else weight

    def _check(self, name: str) -> bool:
        """Refuse NaN and infinities; True where there are none, False where the tensor is kept as it is."""
        entry = self.source.entries[name]
        if not isinstance(entry.codec, Float):
            return True
        flat = entry.load().planes["data"].reshape(-1)
        bad = sum(int((~part.isfinite()).sum()) for part in flat.split(CHUNK))
        if not bad:
            return True
        if not self.keep_nonfinite:
            raise FewbitsError(f"{self.source.path}: {name} has {bad} values that are NaN or infinite",
                               "--keep-nonfinite leaves such tensors unquantized")
        choice = self.choices[name]
        if choice.solver:
            self.notes.append(f"{name}: {bad} values are NaN or infinite: kept as {entry.codec.name}")
            self.choices[name] = replace(choice, codec=entry.codec, solver=None, transposed=False)
        return False

    # the result -----------------------------------------------------------------------------------------------------
    def _stored(self, name: str) -> QTensor:
        choice = self.choices[name]
        return self.store.get(name, choice.codec, choice.shape)

    def _entries(self) -> Iterator[Entry]:
        for name, choice in self.choices.items():
            entry = self.source.entries[name]
            if choice.solver:
                yield Entry(name, choice.shape, choice.codec, lambda name=name: self._stored(name))  # type: ignore[misc]
            elif choice.codec == entry.codec:
                yield entry
            else:
                yield Entry(name, entry.shape, choice.codec, _converter(self.source.path, entry, choice.codec))

    def checkpoint(self, recipe: Recipe) -> Checkpoint:
        facts = {**self.source.facts, "file_type": recipe.file_type, "recipe": recipe.name}
        return replace(self.source, entries={e.name: e for e in self._entries()}, facts=facts)


def _converter(path: Path, entry: Entry, codec: Codec) -> Callable[[], QTensor]:
    """Loads an entry in another float type.

    Raises (when called):
        FewbitsError: a finite value is too large for half precision.
    """
    def load() -> QTensor:
        values = entry.load().dequantize()
        q = solvers.solve(values, codec, "nearest")
        if codec == F16 and bool((values.isfinite() & (values.abs() > 65504)).any()):
            raise FewbitsError(f"{path}: {entry.name} holds {float(values.abs().max()):.3g}, float16 ends at 65504",
                               "override it: --override " + entry.name + "=bf16")
        return q
    return load


def _result(out: Path, written: Checkpoint, recipe: Recipe, target: Container, job: _Job, notes: list[str],
            seconds: float) -> Result:
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else out.stat().st_size
    tensors = [{"name": e.name, "shape": list(e.shape), "codec": e.codec.name, "solver": job.used.get(e.name) or None,
                "bits_per_weight": e.codec.bits_per_weight(e.shape)} for e in written.entries.values()]
    return Result(out, target.name, recipe.name, size, written.nbytes * 8 / written.parameters, seconds, tensors, notes)

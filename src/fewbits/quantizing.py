"""`quantize`: a model, a recipe, a file. What is asked is checked before work begins; `job.Job` is the work itself."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from fewbits import __version__, containers, devices, finishing, hub, solvers, transforms
from fewbits import imatrix as matrices
from fewbits.calibration import sources
from fewbits.calibration.sources import Batch, Calibration
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.affine import IntK
from fewbits.containers import experts
from fewbits.containers.base import Progress, check_output, check_space, write
from fewbits.errors import FewbitsError
from fewbits.imatrix import Imatrix
from fewbits.jobs import distributed
from fewbits.jobs.job import Job, goal, some
from fewbits.jobs.store import Store, identity, resumable
from fewbits.lazy import torch
from fewbits.qtensor import QTensor
from fewbits.recipe import Choice, ModelFacts, Overrides, Recipe
from fewbits.recipe import file as recipe_file
from fewbits.recipe import get as get_recipe
from fewbits.recipe.allocation import Target, target

REORDERS = "gptq-act-order"  # the solver that leaves columns in an order of their own: QTensor.order
# layouts of integers in groups, made for calibrated weights: these are calibrated unless told otherwise
CALIBRATED = ("gptq", "awq", "compressed-tensors")


@dataclass(frozen=True)
class Result:
    """What was written, and what each tensor became."""

    path: Path
    container: str
    recipe: str
    calibration: str | None  # "self, 64 x 512 tokens, seed 0"
    nbytes: int  # on disk
    bits_per_weight: float  # of all tensors
    seconds: float
    tensors: list[dict[str, Any]]  # name, shape, codec, bits_per_weight; where solved: solver, error, error_of, seconds
    notes: list[str] = field(default_factory=list)  # what differs from what was asked, and why
    allocation: dict[str, Any] | None = None  # of a target: what was expected of it and measured, see `allocating`

    @property
    def error(self) -> tuple[float, str] | None:
        """Mean relative squared error of what was solved, and of what: "outputs" of the layers, where their inputs were
        known of any, else "weights"."""
        for what in ("outputs", "weights"):
            found = [t["error"] for t in self.tensors if t.get("error_of") == what]
            if found:
                return sum(found) / len(found), what
        return None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "path": str(self.path)}


def quantize(model: str | Path | Checkpoint, out: str | Path, to: str | Recipe | Target, *, solver: str | None = None,
             calibration: str | Path | Calibration | Sequence[Batch] | None = None, samples: int = 64,
             length: int = 512, seed: int = 0, imatrix: str | Path | Imatrix | None = None,
             transform: str | None = None, finish: str = "off", overrides: Overrides = None,
             container: str | None = None, keep_nonfinite: bool = False, device: str | torch.device | None = None,
             progress: Progress | None = None) -> Result:
    """Quantize `model` (a path in any format or a hub id) by the recipe `to` into `out`.

    `to` may be a target, `4.25bpw` or `Target(nbytes=…)`: then each tensor gets the codec that serves the whole best
    (see `allocating`), losses being found on the calibration's text or, without one, on the model's own. The recipe
    goes to `OUT.recipe.toml`.

    With `calibration` (see `sources.calibration`: `samples` sequences of `length` tokens), the solver is GPTQ unless
    named; without, a search of the parameters of least squared error, weighted by `imatrix` where that is given.
    Recipes for GPTQ, AWQ and compressed-tensors directories of fewer than 8 bits calibrate on the model's own text,
    unless a solver or an importance matrix is named, or `calibration` is "none". `finish` (off, quick, thorough) then
    tunes scales and norms towards the original model's logits, on the calibration text or, without, on the model's own.

    Statistics and solvers run on `device`; by default (None, "auto") on the GPU, if there is one and the largest block
    fits into its memory, else on the CPU. What is written lies on the CPU all the time. Transforms, `finish` and
    targets compute on the CPU.

    Under torchrun the work is shared between the ranks, a GPU each. A killed run resumes when called again. What became
    of each tensor goes to `OUT.quantization.json`, and what happened when to `OUT.log.jsonl`.

    Raises:
        FewbitsError: anything that cannot be done as asked, before work begins where it can be known.
    """
    began = time.monotonic()
    with distributed.joined() as ranks:
        report, place = progress if ranks.leads else None, devices.find(device)
        source = model if isinstance(model, Checkpoint) else containers.open(hub.locate(model))
        out = Path(out).resolve()
        if ranks.leads:
            check_output(out, source.path)
        matrix = imatrix if isinstance(imatrix, Imatrix) or imatrix is None else matrices.read(Path(imatrix))
        importances = matrix.statistics(source) if matrix else {}
        original, shared = source, None
        asked = target(to) or to if isinstance(to, str) else to
        if isinstance(asked, Target):
            from fewbits import allocating

            given = None if calibration == "none" else calibration
            shared = ranks.broadcast(allocating.for_file(
                source, asked, container or allocating.place(out), given, importances, overrides=overrides,
                solver=solver, length=length, seed=seed, progress=report) if ranks.leads else None)
            assert shared is not None
            recipe = shared.recipe
        elif isinstance(asked, Recipe):
            recipe = replace(asked, container=container or asked.container)
        else:
            recipe = get_recipe(asked, container)
        by_default = calibration is None and not (matrix or solver or recipe.solvers) and _is_calibrated(recipe)
        spec = "self" if by_default else None if calibration == "none" else calibration
        if finishing.asked(finish) and calibration is None:
            spec, by_default = "self", False

        choices, notes = _choices(source, recipe, overrides, solver, spec is not None, bool(matrix))
        if transform is not None:
            transforms.check(transform, source)
            if spec is None:
                raise FewbitsError(f"transform {transform} needs calibration text", "give one with --calibration")
            by_default = False  # it was asked for: no text is an error
        if ranks.leads:
            check_space(out.parent, 2 * _goal(source, choices).nbytes)
        used = None
        if spec is not None:
            take = partial(sources.calibration, spec, source, samples=samples, length=length, seed=seed,
                           progress=report)
            gives_way = by_default and transform is None
            used, reason = ranks.broadcast(_calibration(take, gives_way) if ranks.leads else (None, ""))
            if used is None:
                choices, notes = _choices(source, recipe, overrides, solver, False, False)
                notes.append(f"searched, not calibrated on the model's own text: {reason}")
            else:
                notes += [f"calibrated on {used.description}", *used.notes]
        elif calibration is None and not matrix and not solver:
            notes += _advice(recipe, choices)
        if matrix and used is None:
            absent = [c.name for c in choices if c.solver and c.name not in importances]
            notes += [f"{some(absent)}: not in the importance matrix, searched without weights"] if absent else []
        notes += _again(source, choices)

        folder = out.with_name(f".{out.name}.work")
        stamp = {"source": identity(source), "choices": [[c.name, c.codec.name, c.solver] for c in choices],
                 "calibration": used.digest() if used else None, "imatrix": _digest(matrix) if matrix else None,
                 "transform": transform, "version": __version__}
        with resumable(folder):
            store = Store(folder, stamp) if ranks.leads else None
            if transform is not None and used is not None:
                source = transforms.apply(transform, source, choices, used, report, ranks, store)
            job = Job(_apart(source, choices), choices, store, ranks, keep_nonfinite, report, place,
                      may_retreat=device in (None, "auto"))
            job.solve(used, importances)
            result: Result | None = None
            if store:
                solved = _titled(job.checkpoint(), recipe)
                if finishing.asked(finish) and used is not None:
                    text = take(samples=finishing.sequences(finish))  # a new sequence each step
                    solved, told = finishing.tune(source, solved, text, finish, store, report)
                    notes += told
                written = write(containers.by_name(recipe.container), out, solved, report)
                result = Result(out, recipe.container, recipe.name, used.description if used else None, _size(out),
                                written.nbytes * 8 / written.parameters, time.monotonic() - began,
                                _rows(written, job), notes + job.notes())
                if shared:
                    result = _checked(shared, original, written, result)
                _conclude(result, store)
        result = ranks.broadcast(result)
        assert result is not None
        return result


def _is_calibrated(recipe: Recipe) -> bool:
    """Whether a recipe is calibrated on the model's own text where nothing is said of that."""
    few = isinstance(recipe.codec, IntK) and recipe.codec.bits < 8 and recipe.container in CALIBRATED
    return few or (recipe.codec is not None and recipe.codec.blind != recipe.codec)


def _choices(source: Checkpoint, recipe: Recipe, overrides: Overrides, solver: str | None, calibrated: bool,
             weighed: bool) -> tuple[list[Choice], list[str]]:
    """What every tensor gets, and what of it is not as asked.

    Raises:
        FewbitsError: a solver without the statistics that it needs, a tensor that the container cannot hold.
    """
    solver = solver or recipe.solver or ("gptq" if calibrated else "search")
    for named in sorted({solver} | recipe.solvers):
        if named in solvers.NEEDS_STATISTICS and not calibrated:
            raise FewbitsError(f"solver {named} needs calibration text",
                               "give one with --calibration: self, c4, wikitext2 or a file")
    choices = recipe.resolve(ModelFacts.of(source), overrides=overrides, has_importance=calibrated or weighed,
                             solver=solver)
    choices, notes = _solvable(choices)
    for c in choices:
        if c.codec.blind != c.codec and not calibrated:
            raise FewbitsError(f"{c.name} as {c.codec.name}: its scale of activations is found by calibration",
                               f"give text or inputs with --calibration, or take {c.codec.blind.name}")
    target = containers.by_name(recipe.container)
    for c in choices:
        if c.solver == REORDERS and not target.ordered:
            raise FewbitsError(f"{target.name} cannot hold {c.name} by {c.solver}: it has no place for columns in an "
                               "order of their own", "take --solver gptq, or --container gptq")
    refusal = target.refusal(_goal(source, choices))
    if refusal:
        raise FewbitsError(f"{target.name} cannot hold {refusal[0].name} as {refusal[0].codec.name}: {refusal[1]}",
                           f"leave it in floats with --override '{refusal[0].name}=f16', or take another recipe")
    return choices, notes


def _solvable(choices: list[Choice]) -> tuple[list[Choice], list[str]]:
    """Choices whose solver takes their tensor: GPTQ gives way to search where blocks cross rows, and that is said."""
    kept: list[Choice] = []
    refused: dict[str, list[str]] = {}
    for c in choices:
        reason = solvers.refuses(c.solver, c.codec, c.shape) if c.solver in solvers.NEEDS_STATISTICS else None
        if reason:
            refused.setdefault(f"search instead of {c.solver}: {reason}", []).append(c.name)
            c = replace(c, solver="search")
        kept.append(c)
    fallbacks = Counter(c.note for c in choices if c.note)
    return kept, [f"{note} ({count} tensors)" if count > 1 else note for note, count in fallbacks.items()] + [
        f"{some(names)}: {why}" for why, names in refused.items()]


def _calibration(take: Callable[[], Calibration], gives_way: bool) -> tuple[Calibration | None, str]:
    """The calibration; where nobody asked for one it may be none, and why."""
    try:
        return take(), ""
    except FewbitsError as error:
        if not gives_way:
            raise
        return None, str(error)


def _advice(recipe: Recipe, choices: list[Choice]) -> list[str]:
    """What calibration would add, where it can add something."""
    few = [c for c in choices if c.solver and c.codec.bits_per_weight(c.shape) < 8
           and solvers.refuses("gptq", c.codec, c.shape) is None]
    return [f"{recipe.name} was fitted to the weights alone; --calibration self (or c4, or a text file) fits it to "
            "what the layers read: nearer to the original at the same size"] if few else []


def _again(source: Checkpoint, choices: list[Choice]) -> list[str]:
    own = _apart(source, choices).entries
    again = [own[c.name].codec for c in choices if c.solver and own[c.name].codec.family != "float"]
    kinds = ", ".join(sorted({codec.name for codec in again}))
    return [f"{len(again)} tensors were quantized before ({kinds}): their error adds to this one"] if again else []


def _apart(source: Checkpoint, choices: list[Choice]) -> Checkpoint:
    """The source with those experts one by one that get a choice each."""
    return replace(source, entries=experts.unstacked(source.entries.values(), but={c.name for c in choices}))


def _goal(source: Checkpoint, choices: list[Choice]) -> Checkpoint:
    return goal(_apart(source, choices), choices, _unsolved)


def _unsolved(name: str) -> QTensor:
    raise AssertionError(f"{name} is not solved yet")


def _digest(matrix: Imatrix) -> str:
    found = hashlib.sha256()
    for name, sums in sorted(matrix.entries.items()):
        found.update(name.encode() + sums.mean.tobytes())
    return found.hexdigest()


def _titled(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    return replace(checkpoint, facts={**checkpoint.facts, "file_type": recipe.file_type, "recipe": recipe.name})


# the result -----------------------------------------------------------------------------------------------------------
def _size(out: Path) -> int:
    return sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) if out.is_dir() else out.stat().st_size


def _rows(written: Checkpoint, job: Job) -> list[dict[str, Any]]:
    unsolved = {"solver": None}
    return [{"name": e.name, "shape": list(e.shape), "codec": e.codec.name,
             "bits_per_weight": e.codec.bits_per_weight(e.shape), **job.records.get(e.name, unsolved)}
            for e in written.entries.values()]


def _checked(shared: Any, source: Checkpoint, written: Checkpoint, result: Result) -> Result:
    """With what the allocation says of itself, and the divergence measured of the file; the recipe is left beside."""
    from fewbits import allocating

    name = result.path.with_name(f"{result.path.name}.recipe{recipe_file.SUFFIX}")
    name.write_text(recipe_file.text(shared.recipe), encoding="utf-8")
    found = allocating.check(shared, source, written)
    return replace(result, allocation={**shared.to_json(), **found}, notes=[*result.notes, (
        f"KL {found['file_kl']:.4g} +- {found['file_kl_error']:.2g} from the original on {found['file_tokens']} tokens "
        f"that the bits were not shared out by; {shared.expected:.4g} was expected; the recipe is in {name.name}")])


def _conclude(result: Result, store: Store) -> None:
    """Leave the summary and the log beside the output, and nothing else."""
    out = result.path
    store.log(event="ends", seconds=result.seconds, nbytes=result.nbytes)
    summary = out.with_name(f"{out.name}.quantization.json")
    summary.write_text(json.dumps(result.to_json(), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(store.log_file, out.with_name(f"{out.name}.log.jsonl"))
    store.clear()

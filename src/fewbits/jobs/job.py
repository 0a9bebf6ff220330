"""The loop: every tensor of a checkpoint through its solver, block by block where statistics are needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbits import solvers
from fewbits.calibration.sources import Calibration
from fewbits.calibration.statistics import Diagonal, Known
from fewbits.calibration.walk import Batches, Block, Walk
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs import native
from fewbits.codecs.base import Codec
from fewbits.codecs.floats import F16, Float
from fewbits.containers.base import Progress
from fewbits.devices import at_once, free_bytes
from fewbits.errors import FewbitsError
from fewbits.jobs import estimating
from fewbits.jobs.distributed import Ranks
from fewbits.jobs.store import Store
from fewbits.qtensor import QTensor
from fewbits.recipe import Choice, ModelFacts

AHEAD = 4  # tensors outside of blocks that each rank solves before results are exchanged
DRIFTS = 4  # bits below which it pays to carry the original model beside, and correct for how far its activations are


class Job:
    """The tensors of one call and what becomes of each.

    Every rank runs the same job on its share of the calibration; `store` is where the first rank keeps what is solved,
    and None on the others. Blocks and what is solved go to `device`, or to the CPU where `may_retreat` and one does not
    fit.
    """

    def __init__(self, source: Checkpoint, choices: list[Choice], store: Store | None, ranks: Ranks,
                 keep_nonfinite: bool = False, progress: Progress | None = None,
                 device: torch.device | None = None, may_retreat: bool = False):
        self.device, self.may_retreat = device or torch.device("cpu"), may_retreat
        self.source, self.choices, self.store, self.ranks = source, {c.name: c for c in choices}, store, ranks
        self.keep_nonfinite, self.progress = keep_nonfinite, progress
        self.records: dict[str, dict[str, Any]] = {}  # of every tensor that was solved: see `_solve`
        self.kept: dict[str, str] = {}  # tensors left as they are, and why
        self.held: dict[str, QTensor] = {}  # what a rank without a store knows of the block at hand
        self.more: list[str] = []  # notes of the walk
        self.done = self.total = 0
        self.what = "tensors outside of blocks"

    def solve(self, calibration: Calibration | None, importances: Mapping[str, Known] | None = None) -> None:
        """Solve what isn't yet in the store.

        Raises:
            FewbitsError: NaN in a weight or an activation, too little memory for a block, no damping that helps GPTQ.
        """
        importances = importances or {}
        if self.store:
            self.records = {n: self.store.record(n) for n, c in self.choices.items() if c.solver and self.store.has(n)}
        self.records = self.ranks.broadcast(self.records)
        self._log(event="resumes" if self.records else "begins", tensors=len(self.choices), solved=len(self.records))
        self._check()
        walk = None if calibration is None else self._walk(calibration)
        if self.device.type != "cpu":
            alone = {n: estimating.search_bytes(c.shape, c.codec.rows_apart(c.shape), at_once(self.device, 0))
                     for n, c in self.choices.items() if c.solver not in {None, *solvers.NEEDS_STATISTICS}}
            if alone:
                name = max(alone, key=lambda n: alone[n])
                self._room(alone[name], f"{name} {list(self.choices[name].shape)}")
        self._blind({name for names in walk.names for name in names} if walk else set())
        solving = [n for n, c in self.choices.items() if c.solver]
        self.total += sum(self._cost(n) for n in solving)
        inside: set[str] = set()
        for block in walk or ():
            inside.update(block.names)
            self._block(block, importances, len(walk or ()))
        self.more += walk.notes if walk else []
        for name in solving:
            if name in self.records and name not in inside:
                self._advance(self._cost(name))
        rest = [n for n in solving if n not in self.records]
        for at in range(0, len(rest), AHEAD * self.ranks.size):
            self._together(rest[at:at + AHEAD * self.ranks.size], importances)
            self.held.clear()

    def _check(self) -> None:
        """Look through all weights for NaN and infinities, before work begins.

        Raises:
            FewbitsError: there are some, and they were not asked to be kept.
        """
        if self.ranks.leads:
            for name, entry in self.source.entries.items():
                bad = _nonfinite(entry) if name in self.choices and name not in self.records else 0
                if bad and not self.keep_nonfinite:
                    raise FewbitsError(f"{self.source.path}: {name} has {bad} values that are NaN or infinite",
                                       "--keep-nonfinite leaves such tensors unquantized")
                if bad and self.choices[name].solver:
                    self.kept[name] = f"{bad} values are NaN or infinite: kept as {entry.codec.name}"
        self.kept = self.ranks.broadcast(self.kept)
        for name in self.kept:
            codec = self.source.entries[name].codec
            self.choices[name] = replace(self.choices[name], codec=codec, solver=None, transposed=False)

    def _blind(self, inside: set[str]) -> None:
        """Layers outside of the blocks that are walked: nothing is known of their inputs, nor can their codec ask for
        anything."""
        for name, choice in self.choices.items():
            if name not in inside and choice.codec.blind != choice.codec:
                self.choices[name] = replace(choice, codec=choice.codec.blind)
                self.kept[name] = f"{choice.codec.blind.name} instead of {choice.codec.name}: it lies in no block"

    # blocks ---------------------------------------------------------------------------------------------------------
    def _walk(self, calibration: Calibration) -> Walk:
        if len(calibration.batches) < self.ranks.size:
            raise FewbitsError(f"{len(calibration.batches)} calibration sequences for {self.ranks.size} processes",
                               "take more --samples, or fewer processes")
        self.drift = any(c.solver in solvers.NEEDS_STATISTICS and c.codec.integer_bits < DRIFTS
                         for c in self.choices.values())
        walk = Walk(self.source, self.ranks.share(calibration.batches), self.drift, combine=self.ranks.combine,
                    device=self.device)
        blocks = [[self.source.entries[n] for n in names] for names in walk.names]
        tokens = calibration.tokens // self.ranks.size
        self.walk_costs = [estimating.walk_cost(entries, tokens, self.drift) for entries in blocks]
        self.total += sum(self.walk_costs)
        self._rehearse(walk, blocks, tokens, calibration.tokens // len(calibration.batches))
        return walk

    def _rehearse(self, walk: Walk, blocks: list[list[Entry]], tokens: int, length: int) -> None:
        """Try out the block that needs most, before hours go into those before it.

        Raises:
            FewbitsError: it does not fit into the memory that is free.
        """
        hidden = ModelFacts.of(self.source).hidden
        needs = [estimating.block_bytes(entries, tokens, length, hidden, self.drift) for entries in blocks]
        largest = needs.index(max(needs))
        self._room(needs[largest], f"block {largest} with {tokens} calibration tokens")
        walk.device = self.device
        if largest:  # else it comes first anyway
            self._try(largest, walk.batches[:1])

    def _room(self, needed: int, what: str) -> None:
        """See that so many bytes are free where work is done; where it may, it retreats to the CPU, and says so.

        Raises:
            FewbitsError: they are not free.
        """
        free, on = free_bytes(self.device), self.device.type != "cpu"
        if self.ranks.broadcast(on and needed > free and self.may_retreat):
            self.more.append(f"quantized on the CPU: {what} needs about {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
                             f"free on {self.device}")
            self.device, on = torch.device("cpu"), False
            free = free_bytes(self.device)
        self._log(event="memory", device=str(self.device), what=what, needed_bytes=needed, free_bytes=free)
        if needed > free:
            raise FewbitsError(f"{self.source.path}: {what} needs about {needed / 1e9:.2f} GB of memory, "
                               f"{free / 1e9:.2f} GB are free" + (f" on {self.device}" if on else ""),
                               "take fewer --samples, or share them between machines with torchrun"
                               + (", or --device cpu" if on else ""))

    def _try(self, index: int, batches: Batches) -> None:
        """Statistics and the costliest solve of one block, on activations that one batch brings there."""
        for block in Walk(self.source, batches, self.drift, device=self.device):
            names = [n for n in block.names if self.choices[n].solver]
            if block.index == index and names:
                name = max(names, key=self._cost)
                found = block.statistics().get(name)
                solvers.solve(self._weight(name), self.choices[name].codec, self._solver(name, found), found)
                return

    def _block(self, block: Block, importances: Mapping[str, Known], count: int) -> None:
        began = time.monotonic()
        what = f"block {block.index + 1} of {count}"
        self._advance(0, what)
        names = [n for n in block.names if self.choices[n].solver]
        for group in block.groups():
            todo = [n for n in group.names if n in names]
            known: dict[str, Known] = dict(importances)
            if any(n not in self.records for n in todo):
                known |= group.statistics()
            self._together(todo, known)
            for name in todo:
                block.replace(name, self._get(name).to(self.device))
            self.held.clear()
        self._advance(self.walk_costs[block.index])
        errors = [self.records[n]["error"] for n in names]
        mean = sum(errors) / max(1, len(errors))
        self._log(event="block", block=block.index, error=mean, seconds=time.monotonic() - began)
        self._advance(0, f"{what}, error {mean:.3g}")

    # tensors --------------------------------------------------------------------------------------------------------
    def _together(self, names: list[str], statistics: Mapping[str, Known]) -> None:
        """Solve what of `names` isn't solved, shared out between the ranks; then each rank has all of `names`."""
        batches = self._alike(names, statistics)
        owners = self.ranks.owners({batch[0]: sum(map(self._cost, batch)) for batch in batches
                                    if any(n not in self.records for n in batch)})
        for batch in batches:
            if owners.get(batch[0]) == self.ranks.rank:
                self._solve(batch, statistics.get(batch[0]))
            if self.ranks.size == 1 or owners.get(batch[0]) == self.ranks.rank:
                self._advance(sum(map(self._cost, batch)))
        if self.ranks.size == 1:
            return
        for first, name in ((batch[0], name) for batch in batches for name in batch):
            owner = owners.get(first, 0)
            own = owner == self.ranks.rank
            outcome = self.ranks.broadcast((self._get(name), self.records[name]) if own else None, owner)
            if outcome and not own:
                self._put(name, *outcome)
                self._advance(self._cost(name))

    def _alike(self, names: list[str], statistics: Mapping[str, Known]) -> list[list[str]]:
        """Those together that one call can solve: matrices of the same statistics, codec and solver. Ranks share
        them out one by one."""
        found: dict[Any, list[str]] = {}
        for name in names:
            choice, known = self.choices[name], statistics.get(name)
            apart = known is None or len(choice.shape) > 2 or self.ranks.size > 1
            found.setdefault(name if apart else (id(known), choice.codec, choice.solver), []).append(name)
        return list(found.values())

    def _solve(self, names: list[str], statistics: Known | None) -> None:
        """Solve tensors that are alike and note how: their solver, the relative squared error of the layer's outputs
        (of the weights, where nothing is known of the inputs), and their shares of the seconds that it took."""
        began = time.monotonic()
        weights, codec = [self._weight(name) for name in names], self.choices[names[0]].codec
        if isinstance(statistics, Diagonal):
            statistics = statistics.to(self.device)
        solver = self._solver(names[0], statistics)
        solved = solvers.solve_together(weights, codec, solver, statistics)
        seconds = (time.monotonic() - began) / sum(w.numel() for w in weights)
        for name, weight, (q, loss) in zip(names, weights, solved, strict=True):
            if codec.blind != codec:
                q = self._calibrated(name, q, statistics)
            if name not in self.records:
                error = solvers.loss(weight, q, statistics) if loss is None else loss
                self._put(name, q, {"solver": solver, "error": error,
                                    "error_of": "weights" if statistics is None else "outputs",
                                    "seconds": seconds * weight.numel()})

    def _calibrated(self, name: str, q: QTensor, statistics: Known | None) -> QTensor:
        """With what the codec wants to hold of the layer's inputs.

        Raises:
            FewbitsError: nothing is known of them.
        """
        if statistics is None or isinstance(statistics, Diagonal):
            raise FewbitsError(f"{name} as {q.codec.name}: no calibration input reached it",
                               f"calibrate on inputs that use it, or --override '{name}={q.codec.blind.name}'")
        return replace(q, planes=q.codec.calibrated(q.planes, statistics.peaks))

    def _solver(self, name: str, statistics: Known | None) -> str:
        """The tensor's solver; a search where that needs second moments and there are none."""
        solver = self.choices[name].solver or "search"
        diagonal = statistics is None or isinstance(statistics, Diagonal)
        return "search" if diagonal and solver in solvers.NEEDS_STATISTICS else solver

    def _put(self, name: str, q: QTensor, record: dict[str, Any]) -> None:
        q, self.records[name] = q.to(torch.device("cpu")), record
        if self.store:
            self.store.put(name, q, record)
            self._log(event="tensor", name=name, bits_per_weight=q.bits_per_weight, **record)
        else:
            self.held[name] = q

    def _get(self, name: str) -> QTensor:
        choice = self.choices[name]
        return self.store.get(name, choice.codec, choice.shape) if self.store else self.held[name]

    def _weight(self, name: str) -> torch.Tensor:
        """The original weight as the codec sees it, `[..., out, in]`; float tensors stay in their file's type."""
        q = self.source.entries[name].load().to(self.device)
        weight = q.planes["data"].view(q.shape) if isinstance(q.codec, Float) else q.dequantize()
        return weight.T if self.choices[name].transposed else weight

    def _cost(self, name: str) -> int:
        choice = self.choices[name]
        return estimating.solve_cost(choice.shape, choice.solver in solvers.NEEDS_STATISTICS)

    def _advance(self, cost: int, what: str = "") -> None:
        self.done += cost
        if what:
            self.what = what
        if self.progress and self.ranks.leads:
            self.progress(f"quantizing: {self.what}", self.done, self.total)

    def _log(self, **event: Any) -> None:
        if self.store:
            self.store.log(**event)

    # the result -----------------------------------------------------------------------------------------------------
    def notes(self) -> list[str]:
        """What became of tensors that is not what was asked."""
        unseen = [n for n, record in self.records.items() if record["solver"] != self.choices[n].solver]
        return [f"{name}: {reason}" for name, reason in self.kept.items()] + (
            [f"{some(unseen)}: search instead of {self.choices[unseen[0]].solver}: no calibration input reached it"]
            if unseen else []) + self.more

    def checkpoint(self) -> Checkpoint:
        """The model with what is solved; only on the rank that has the store."""
        return goal(self.source, list(self.choices.values()), self._get)


def some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} tensors ({names[0]}, …)"


def goal(source: Checkpoint, choices: Iterable[Choice], load: Callable[[str], QTensor]) -> Checkpoint:
    """The checkpoint that `choices` make of `source`; `load` gives the solved tensors, when asked."""
    def entry(choice: Choice) -> Entry:
        own = source.entries[choice.name]
        if choice.solver:
            return Entry(choice.name, choice.shape, choice.codec, lambda: load(choice.name))
        if choice.codec == own.codec:
            return own
        return Entry(choice.name, own.shape, choice.codec, _converter(source.path, own, choice.codec))

    return replace(source, entries={c.name: entry(c) for c in choices})


def _nonfinite(entry: Entry) -> int:
    """How many values of a float tensor are NaN or infinite."""
    if not isinstance(entry.codec, Float):
        return 0
    return native.nonfinite(entry.load().planes["data"])


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

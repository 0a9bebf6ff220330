"""The walk: a model run block by block on calibration batches, each block on the outputs of those quantized before."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, TypeVar

from fewbits.calibration.blocks import Block, Group
from fewbits.calibration.statistics import Experts, Found, Statistics
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.lazy import torch

__all__ = ["Batches", "Block", "Experts", "Group", "Statistics", "Walk"]


class Done(Exception):
    """A forward pass got as far as needed."""


# what blocks that are not run put out: a tensor, or a tuple with it alone; "run": more, on which later blocks depend:
# they are run while their arguments are recorded, all of the model in memory
Manner = Literal["plain", "tupled", "run"]
MANNERS: tuple[Manner, ...] = ("plain", "tupled", "run")
Batches = list[dict[str, "torch.Tensor"]]  # keyword arguments of the model, one batch each
T = TypeVar("T")


@dataclass
class Stream:
    """Activations on their way through one list of blocks, a batch each."""

    inputs: list[torch.Tensor]  # of the next block
    arguments: list[list[dict[str, Any]]]  # of every block: what it is called with beside them
    manner: Manner = "plain"
    at: torch.Tensor | None = None  # while arguments are recorded: what the last block handed on

    def wrap(self, x: torch.Tensor) -> Any:
        """`x` as a block puts it out."""
        return (x,) if self.manner == "tupled" else x


class Walk:
    """Runs a model block by block on batches of its inputs; memory holds one block, its statistics and activations.

    `for block in walk: for group in block.groups():` ask for `group.statistics()`, hand changed weights to
    `block.replace`. The next group, and the next block, see what this one then puts out. Models with several lists of
    blocks (an encoder, a decoder) have them walked one after the other.

    Blocks, their activations and statistics lie on `device`; what is outside of blocks runs on the CPU.

    With `drift`, the activations of the original model are carried beside. With `sequential`, each group of a block
    sees the groups before it quantized. `combine` gets all statistics as they were collected, before they are used.
    """

    def __init__(self, checkpoint: Checkpoint, batches: Batches, drift: bool = False,
                 sequential: bool = True, combine: Callable[[Found], None] | None = None,
                 device: torch.device | None = None):
        from fewbits.runtime.build import block_lists, empty_model
        from fewbits.runtime.places import Places

        self.checkpoint, self.batches = checkpoint, batches
        self.drift, self.sequential, self.combine = drift, sequential, combine
        self.device = device or torch.device("cpu")
        self.thin: dict[str, tuple[int, int]] = {}  # layer -> experts that saw few tokens, experts
        self.inputs: list[torch.Tensor] = []  # of the block at hand; after the walk what the last one puts out
        self.model = empty_model(checkpoint.config, checkpoint.path)
        self.places = Places(self.model, checkpoint)
        self.lists = block_lists(self.model)
        self._outside = self._names_outside()
        if len(self.lists) > 1:
            self.load_outside()
            self.lists = self._in_order()
        self._ends: list[list[Stream]] = []  # what each list walked puts out

    def __len__(self) -> int:
        return sum(len(modules) for _, modules in self.lists)

    @property
    def names(self) -> list[list[str]]:
        """The entries of every block, in the order of the walk."""
        return [self._names[block] for _, blocks in self.lists for block in blocks]

    @property
    def notes(self) -> list[str]:
        """What to say of the statistics collected so far."""
        few, all_ = (sum(counts) for counts in zip(*self.thin.values(), strict=True)) if self.thin else (0, 0)
        if not few:
            return []
        worst = max(self.thin, key=lambda name: self.thin[name][0])
        return [f"{few} of {all_} experts saw fewer tokens than they have inputs (most in {worst}: "
                f"{self.thin[worst][0]}): they lean on the statistics of all experts of their layer"]

    def __iter__(self) -> Iterator[Block]:
        from fewbits.runtime.passes import Passes

        index = 0
        self.load_outside()
        for at, (prefix, modules) in enumerate(self.lists):
            streams = [self._enter(at, which) for which in range(1 + self.drift)]  # this model's, the original's
            for stream in streams:
                stream.inputs = self._moved(stream.inputs)
            if at == len(self.lists) - 1:
                self._forget_outside()
            for i, module in enumerate(modules):
                names = self._names[module]
                self._load(names)
                module.to(self.device)
                arguments = [self._moved(s.arguments[i]) for s in streams]
                self.inputs = streams[0].inputs
                block = Block(index, f"{prefix}{i}.", names, Passes(module, self.inputs, arguments[0]), self)
                if self.drift:
                    block.original = Passes(copy.deepcopy(module), streams[1].inputs, arguments[1])
                yield block
                block.advance()
                block.original = None
                for stream in streams:
                    stream.arguments[i] = []
                module.to("meta")
                index += 1
            for stream in streams:
                stream.inputs = [x.cpu() for x in stream.inputs]
            self.inputs = streams[0].inputs
            self._ends.append(streams)

    def mask(self, prefix: str, number: int) -> torch.Tensor | None:
        """Which tokens of a batch are no padding `[batch * length]`, in the block of that prefix; None if all are."""
        decoder = getattr(self.model.config, "is_encoder_decoder", False) and "decoder." in prefix
        mask = self.batches[number].get("decoder_attention_mask" if decoder else "attention_mask")
        return None if mask is None or mask.ndim != 2 or bool(mask.all()) else mask.reshape(-1).bool().to(self.device)

    def load_outside(self) -> None:
        """The weights that lie in no block; the walk needs them only where it enters a list of blocks."""
        self._load(self._outside)
        self.places.fill_scalars(torch.float32)

    def _moved(self, x: T) -> T:
        """Tensors, in whatever they lie, where blocks run."""
        from accelerate.utils import send_to_device

        return x if self.device.type == "cpu" else send_to_device(x, self.device)

    # loading --------------------------------------------------------------------------------------------------------
    def _load(self, names: list[str]) -> None:
        self.places.fill([self.checkpoint.entries[n] for n in names], torch.float32)
        self.model.tie_weights()

    def _names_outside(self) -> list[str]:
        """Names of the entries that lie in no block; those that do go to `_names`."""
        owner = {part: block for _, blocks in self.lists for block in blocks for part in block.modules()}
        self._names: dict[torch.nn.Module, list[str]] = {block: [] for _, blocks in self.lists for block in blocks}
        outside: list[str] = []
        for name, entry in self.checkpoint.entries.items():
            block = owner.get(self.places.of(entry).module)
            (outside if block is None else self._names[block]).append(name)
        return outside

    def _forget_outside(self) -> None:
        """Embeddings and heads have no part in what blocks do."""
        inside = {part for _, blocks in self.lists for block in blocks for part in block.modules()}
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if module not in inside and parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    # what blocks are called with ------------------------------------------------------------------------------------
    def _in_order(self) -> list[tuple[str, torch.nn.ModuleList]]:
        """The lists that the first batch runs through, in the order it does; weights of the others are loaded."""
        seen: list[torch.nn.ModuleList] = []

        def first(modules: torch.nn.ModuleList, module: torch.nn.Module, manner: Manner) -> Any:
            def forward(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
                if modules not in seen:
                    seen.append(modules)
                if manner == "run":
                    return type(module).forward(module, x, *rest, **named)
                return (x,) if manner == "tupled" else x
            return forward

        def attempt(manner: Manner) -> None:
            if manner == "run":
                self._load([n for names in self.names for n in names])
            self._run(self.batches[0], {m: first(modules, m, manner) for _, modules in self.lists for m in modules})

        self._first_that_works(attempt)
        for _, modules in self.lists:
            if modules not in seen:
                self._load([n for m in modules for n in self._names[m]])
            else:
                modules.to("meta")
        return sorted((pair for pair in self.lists if pair[1] in seen), key=lambda pair: seen.index(pair[1]))

    def _first_that_works(self, attempt: Callable[[Manner], T]) -> T:
        """What `attempt` makes of the first manner that the model bears.

        Raises:
            FewbitsError: it bears none; what the first said.
        """
        first: FewbitsError | None = None
        for manner in MANNERS:
            try:
                return attempt(manner)
            except FewbitsError as error:
                first = first or error
        assert first is not None
        raise first

    def _enter(self, at: int, which: int) -> Stream:
        """What the blocks of the list `at` are called with; those of lists before it put out what they did in the walk.

        Raises:
            FewbitsError: what runs between two blocks is more than handing on what the first put out.
        """
        def attempt(manner: Manner) -> Stream:
            stream = Stream([], [[] for _ in self.lists[at][1]], manner)
            if manner == "run":
                self._load([n for names in self.names for n in names])
            for number, batch in enumerate(self.batches):
                self._record(stream, at, which, number, batch)
            if manner == "run":
                for _, modules in self.lists:
                    modules.to("meta")
            return stream

        return self._first_that_works(attempt)

    def _record(self, stream: Stream, at: int, which: int, number: int, batch: dict[str, torch.Tensor]) -> None:
        """Runs the model on one batch, to the end on the first, else up to the last block of the list `at`."""
        forwards: dict[torch.nn.Module, Any] = {}
        for (_, modules), ends in zip(self.lists, self._ends, strict=False):
            forwards |= {m: _ending(m, ends[which], ends[which].inputs[number]) for m in modules}
        for _, modules in self.lists[at:] if stream.manner != "run" else ():
            forwards |= {m: lambda x, *_, **__: stream.wrap(x) for m in modules}
        stream.at = None
        forwards |= {m: self._recorder(stream, number, i, m) for i, m in enumerate(self.lists[at][1])}
        self._run(batch, forwards)
        if not all(len(a) == number + 1 for a in stream.arguments):
            raise FewbitsError(f"{type(self.model).__name__} does not run all of its blocks", "use --solver search")

    def _recorder(self, stream: Stream, number: int, index: int, module: torch.nn.Module) -> Any:
        positions = [p.name for p in signature(module.forward).parameters.values()
                     if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
        arguments = stream.arguments[index]

        def forward(x: torch.Tensor, *rest: Any, **named: Any) -> Any:
            if len(rest) > len(positions) or len(arguments) != number or (index and x is not stream.at):
                raise FewbitsError(f"{type(module).__name__} {index} is called in a way that the walk doesn't know",
                                   "use --solver search")
            if index == 0:
                stream.inputs.append(x.detach())
            named |= zip(positions, rest, strict=False)
            named.pop("past_key_values", None)
            arguments.append({**named, "use_cache": False} if "use_cache" in named else named)
            run = stream.manner == "run"
            if number and index == len(stream.arguments) - 1:
                raise Done
            found = type(module).forward(module, x, **named) if run else stream.wrap(x)
            stream.at = found[0] if run and isinstance(found, tuple) else found if run else x
            return found

        return forward

    def _run(self, batch: dict[str, torch.Tensor], forwards: dict[torch.nn.Module, Any]) -> None:
        """One forward pass of the model with some modules' forwards put in place of their own.

        Raises:
            FewbitsError: the batch is not what the model takes.
        """
        more = {"use_cache": False} if hasattr(self.model.config, "use_cache") else {}
        with ExitStack() as stack:
            for module, forward in forwards.items():
                module.forward = forward
                stack.callback(delattr, module, "forward")
            try:
                with torch.no_grad(), suppress(Done):
                    self.model(**more | batch)
            except FewbitsError:
                raise
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in batch.items())
                raise FewbitsError(f"{type(self.model).__name__} does not run block by block on {shapes}: {error}",
                                   "use --solver search") from error


def _ending(module: torch.nn.Module, stream: Stream, end: torch.Tensor) -> Any:
    """A forward that puts out `end`, and beside it what the block itself does where that matters."""
    def forward(*args: Any, **named: Any) -> Any:
        if stream.manner != "run":
            return stream.wrap(end)
        found = type(module).forward(module, *args, **named)
        return (end, *found[1:]) if isinstance(found, tuple) else end
    return forward

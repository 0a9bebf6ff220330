"""One call on several processes, on one machine or many, as `torchrun` starts them.

Every rank runs the same code on its share of the calibration batches; statistics are summed, solves shared out, and
rank 0 alone writes. Tensors go over gloo, or over nccl where they lie on a GPU.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from fewbits.calibration.statistics import Experts, Found
from fewbits.errors import Elsewhere, FewbitsError

T = TypeVar("T")
CALLS = itertools.count()  # a process may quantize several times
PATIENCE = timedelta(days=1)  # a rank may solve one large tensor while the others wait


class Ranks:
    """The processes of a call, `size` of them; this one is `rank`. By itself: a single one, that sends nothing."""

    def __init__(self, rank: int = 0, size: int = 1):
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This rank's part of the items."""
        return list(items[self.rank::self.size])

    def owners(self, costs: dict[str, int]) -> dict[str, int]:
        """Who does which: the costliest first, each to the rank with the least to do."""
        load = [0] * self.size
        found = {}
        for name in sorted(costs, key=lambda n: -costs[n]):
            found[name] = load.index(min(load))
            load[found[name]] += costs[name]
        return found

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of rank `source`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with _talking():
            dist.broadcast_object_list(box, source)
        return box[0]

    def combine(self, found: Found) -> None:
        """Put in the place of this rank's statistics those of the inputs of all ranks."""
        if self.size == 1:
            return
        parts = found.parts if isinstance(found, Experts) else [found]
        own = torch.tensor([part.count for part in parts])
        total = self._sum(own.clone())
        for part, mine, all_ in zip(parts, own.tolist(), total.tolist(), strict=True):
            for tensor in (part.moment, part.drift):
                if tensor is not None:
                    self._sum(tensor.mul_(mine / max(1, all_)))
            if part.peak is not None:
                with _talking():
                    dist.all_reduce(part.peak, dist.ReduceOp.MAX)
            part.count = all_

    def _sum(self, tensor: torch.Tensor) -> torch.Tensor:
        with _talking():
            dist.all_reduce(tensor)
        return tensor


@contextmanager
def _talking() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise FewbitsError("the connection to another rank broke: it ended without a word",
                           "it may have run out of memory; the same command resumes") from error


def speaks() -> bool:
    """Whether this process is the one of its ranks that speaks."""
    return not (dist.is_available() and dist.is_torchelastic_launched()) or os.environ["RANK"] == "0"


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks that torchrun started this process as one of; outside of torchrun, a single one.

    An error on one rank ends all: that one raises it, the others raise `Elsewhere`.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield Ranks()
        return
    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    found, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = dist.PrefixStore(f"fewbits {next(CALLS)}", found)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size)
    except BaseException as error:
        if store.add("failed", 1) > 1:
            raise Elsewhere("another rank failed") from error
        raise
    finally:
        dist.destroy_process_group()

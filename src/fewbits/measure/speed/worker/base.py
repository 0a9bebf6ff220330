"""What engines have in common."""

from __future__ import annotations

from typing import Any

Rows = list[list[int]]  # tokens of every sequence
Json = dict[str, Any]


class Another(ValueError):
    """This engine doesn't know the model; another one may."""


class Engine:
    """What computes. Of several `ways` to do so the fastest counts; the most likely token is always taken."""

    packages: tuple[str, ...] = ()  # whose versions are part of a result
    ways: tuple[str, ...] = ("",)
    kernel = ""  # how it computes, as the result names it
    device: str | None = None  # its name, unless it is the processor

    def __init__(self, job: Json):
        """Imports what is needed."""

    def load(self, job: Json) -> None:
        raise NotImplementedError

    def take(self, way: str) -> None:
        """Compute that way from now on."""

    def make_room(self, sequences: int, tokens: int) -> None:
        """What is done once before sequences of up to `tokens` tokens."""

    def begin(self, rows: Rows, room: int) -> list[int]:
        """The token after each of some prompts of equal length, which may grow to `room` tokens."""
        raise NotImplementedError

    def step(self, tokens: list[int]) -> list[int]:
        """The token after one more of each sequence."""
        raise NotImplementedError

    def whole(self, rows: Rows) -> list[int]:
        """As `begin`, with nothing kept."""
        return self.begin(rows, len(rows[0]))

    def train(self, rows: Rows) -> Json:
        """Seconds of a pass forward, with the loss, and of one back to the embeddings; weights are frozen."""
        raise ValueError("it computes no gradients")

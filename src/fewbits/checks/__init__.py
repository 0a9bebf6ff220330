"""What `verify` looks at, a file each: values, shapes, vocabulary, checksums. Each returns findings, and raises nothing
about the model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One thing about a model that is wrong (`error`), or that is allowed and seldom meant (`warning`)."""

    level: str
    where: str  # a tensor or a file
    what: str

    def __str__(self) -> str:
        return f"{self.level}: {self.where}: {self.what}"


def error(where: str, what: str) -> Finding:
    return Finding("error", where, what)


def warning(where: str, what: str) -> Finding:
    return Finding("warning", where, what)

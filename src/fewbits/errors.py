"""The one error that users see: a line that says what is wrong, and a hint at what to do."""

from __future__ import annotations


class FewbitsError(ValueError):
    """What was asked cannot be done: names the file or tensor, the value and the limit."""

    def __init__(self, message: str, hint: str | None = None):
        super().__init__(message)
        self.hint = hint


class Elsewhere(FewbitsError):
    """Another process of the same call failed, and says why."""


class NotHere(FewbitsError):
    """A device cannot do it, for want of memory or of a driver: another may."""


class Unsupported(FewbitsError):
    """One of several ways to do it does not know how: another may."""

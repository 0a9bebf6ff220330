"""What differs from what was asked, told where there is no result to say it in."""

from __future__ import annotations

import warnings
from collections.abc import Iterable


class Differs(UserWarning):
    """Something is not as it was asked."""


def tell(notes: Iterable[str]) -> None:
    for note in notes:
        warnings.warn(note, Differs, stacklevel=3)

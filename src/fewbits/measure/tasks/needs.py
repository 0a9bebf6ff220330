"""lm-evaluation-harness, which not everyone has installed."""

from __future__ import annotations

import logging
import os

from fewbits.errors import FewbitsError


def harness() -> None:
    """Import it, with its chatter kept off the terminal.

    Raises:
        FewbitsError: it isn't installed.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # the progress that is shown is ours
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FewbitsError(f"tasks are lm-evaluation-harness's, and {error.name} is not installed",
                           "pip install 'fewbits[tasks]'") from None
    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)

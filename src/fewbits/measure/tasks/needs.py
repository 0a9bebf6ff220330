"""lm-evaluation-harness, which not everyone has installed."""

from __future__ import annotations

import logging
import os

from fewbits.errors import FewbitsError


def installed() -> None:
    """Import it.

    Raises:
        FewbitsError: it isn't installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise FewbitsError(f"tasks are lm-evaluation-harness's, and {error.name} is not installed",
                           "pip install 'fewbits[tasks]'") from None


def quiet() -> None:
    """Keep its chatter off the terminal: the progress that is shown is ours."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    import datasets

    datasets.disable_progress_bars()
    for name in ("lm_eval", "datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)

"""lm-evaluation-harness's own command, which knows `--model fewbits` here:

    python -m fewbits.measure.tasks run --model fewbits --model_args pretrained=MODEL --tasks arc_easy
"""

from __future__ import annotations

from fewbits.measure.tasks.needs import harness

harness()

import fewbits.measure.tasks.harness  # noqa: E402, F401  # registers the model
from lm_eval.__main__ import cli_evaluate  # noqa: E402

if __name__ == "__main__":
    cli_evaluate()

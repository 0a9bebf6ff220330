"""lm-evaluation-harness's own command, which knows `--model fewbits` here:

    python -m fewbits.measure.tasks run --model fewbits --model_args pretrained=MODEL --tasks arc_easy
"""

from __future__ import annotations

import sys
from importlib import import_module

from fewbits.errors import FewbitsError
from fewbits.measure.tasks import needs

if __name__ == "__main__":
    try:
        needs.installed()
        import_module("fewbits.measure.tasks.harness")  # registers the model
        import_module("lm_eval.__main__").cli_evaluate()
    except FewbitsError as error:
        sys.exit(f"error: {error}" + (f"\nhint: {error.hint}" if error.hint else ""))

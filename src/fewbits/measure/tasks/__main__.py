"""lm-evaluation-harness's own command, which knows `--model fewbits` here:

    python -m fewbits.measure.tasks run --model fewbits --model_args pretrained=MODEL --tasks arc_easy
"""

from __future__ import annotations

from importlib import import_module

from fewbits.measure.tasks import needs

if __name__ == "__main__":
    needs.installed()
    import_module("fewbits.measure.tasks.harness")  # registers the model
    import_module("lm_eval.__main__").cli_evaluate()

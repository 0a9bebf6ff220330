"""Questions with choices: lm-evaluation-harness's tasks, its scores, our arithmetic."""

from fewbits.measure.tasks.paired import TaskResult
from fewbits.measure.tasks.running import run

__all__ = ["TaskResult", "run"]

"""The loss of learning from another model: how far the next token's distribution is from the teacher's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fewbits.errors import FewbitsError
from fewbits.finetuning.data import IGNORED, Example
from fewbits.finetuning.loss import PROBE, Inputs
from fewbits.finishing.goals import Logits, last_states


class Distillation:
    """Mean Kullback-Leibler divergence from the teacher, over the positions whose next tokens are learnt.

    Raises:
        FewbitsError: logits that are more than a product of the last hidden states, perhaps with a soft cap.
    """

    def __init__(self, teacher: transformers.PreTrainedModel, student: transformers.PreTrainedModel, like: Example):
        few = {"input_ids": like.input_ids[None, :PROBE]}
        with torch.no_grad():
            self.teacher, self.goal = teacher, Logits(teacher, student, [last_states(teacher, few)])
        try:
            self.goal.check(teacher, few)
        except FewbitsError as error:
            raise FewbitsError(str(error), "--no-distill learns from the text alone") from None

    def __call__(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        assert isinstance(model, transformers.PreTrainedModel)
        read = {name: value for name, value in inputs.items() if name != "labels"}
        learnt = F.pad(inputs["labels"][:, 1:] != IGNORED, (0, 1))
        with torch.no_grad():
            meant = last_states(self.teacher, read)[learnt]
        return self.goal.between(last_states(model, read)[learnt].float(), meant.float())

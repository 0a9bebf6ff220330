"""What finishing brings down: how far the model is from the original on the same batch."""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
import transformers

from fewbits.calibration.sources import Batch
from fewbits.errors import FewbitsError

TINY = 1e-38
ROWS = 128  # positions whose logits are held at a time


class Goal(Protocol):
    """A loss of the last hidden states `[batch, length, hidden]` of the batch `number`."""

    def __call__(self, hidden: torch.Tensor, number: int) -> torch.Tensor: ...


class Logits:
    """Mean Kullback-Leibler divergence of the next token's distribution from the original's.

    Of the original only its last hidden states are kept, and its head.
    """

    def __init__(self, original: transformers.PreTrainedModel, student: transformers.PreTrainedModel,
                 hidden: list[torch.Tensor]):
        self.cap = getattr(original.config.get_text_config(), "final_logit_softcapping", None)
        self.original, self.student, self.hidden = _head(original), _head(student), hidden

    def check(self, original: transformers.PreTrainedModel, batch: Batch) -> None:
        """Refuse models whose logits are not what `Logits` takes them for.

        Raises:
            FewbitsError: they are more than a product of the last hidden states, perhaps with a soft cap.
        """
        with torch.no_grad():
            meant = original(**batch).logits[0, -1]
            found = _capped(self.hidden[0][0, -1] @ self.original.T, self.cap)
        if not torch.allclose(meant, found, rtol=1e-3, atol=1e-3 * float(meant.abs().max())):
            raise FewbitsError(f"{type(original).__name__} does more to its logits than fewbits knows",
                               "leave --finish off")

    def __call__(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        return self.between(hidden.flatten(0, -2), self.hidden[number].flatten(0, -2))

    def between(self, hidden: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
        """The loss of last hidden states `[n, hidden]` where the original's are `meant`."""
        loss: torch.Tensor = _Divergence.apply(hidden, self, meant)
        return loss


class States:
    """Mean squared distance of the last hidden states from the original's, over their mean square."""

    def __init__(self, hidden: list[torch.Tensor]):
        self.hidden = hidden

    def __call__(self, hidden: torch.Tensor, number: int) -> torch.Tensor:
        meant = self.hidden[number]
        return F.mse_loss(hidden, meant) / meant.square().mean()


def goal(original: transformers.PreTrainedModel, student: transformers.PreTrainedModel,
         batches: list[Batch]) -> Goal:
    """Logits where the model has a head for tokens, else hidden states.

    Raises:
        FewbitsError: logits that are made in another way than the models known here do.
    """
    with torch.no_grad():
        hidden = [last_states(original, batch) for batch in batches]
    if original.get_output_embeddings() is None:
        return States(hidden)
    found = Logits(original, student, hidden)
    found.check(original, batches[0])
    return found


def last_states(model: transformers.PreTrainedModel, batch: Batch) -> torch.Tensor:
    """What enters the model's head, `[batch, length, hidden]`, with a gradient where that is on."""
    more = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    states: torch.Tensor = model.base_model(**more | batch).last_hidden_state
    return states


def _head(model: transformers.PreTrainedModel) -> torch.Tensor:
    """The weight of the head `[vocabulary, hidden]`, float32."""
    head: Any = model.get_output_embeddings()
    weight = head.prepared.weight() if hasattr(head, "prepared") else head.weight
    return weight.detach().float()


def _capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * torch.tanh(logits / cap)


def _log_sum(logits: torch.Tensor, shares: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """log of the sum of exp(logits), from the softmax at one place of each row."""
    return logits.gather(-1, at) - shares.gather(-1, at).clamp(min=TINY).log()


class _Divergence(torch.autograd.Function):
    """The gradient of the hidden states is made along with the loss, so that logits never lie in memory as a whole."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, goal: Logits, meant: torch.Tensor) -> torch.Tensor:
        total, parts = hidden.new_zeros(()), []
        for x, y in zip(hidden.split(ROWS), meant.split(ROWS), strict=True):  # in few passes over the logits
            s, t = (_capped(z @ w.T, goal.cap) for z, w in ((x, goal.student), (y, goal.original)))
            q, p = s.softmax(-1), t.softmax(-1)
            top = p.argmax(-1, keepdim=True)
            slope = None if goal.cap is None else 1 - (s / goal.cap).square()
            total += (_log_sum(s, q, top) - _log_sum(t, p, top)).sum() + t.sub_(s).mul_(p).sum()
            if ctx.needs_input_grad[0]:
                part = q.sub_(p)
                parts.append((part if slope is None else part.mul_(slope)) @ goal.student)
        if parts:
            ctx.save_for_backward(torch.cat(parts) / len(hidden))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        return ctx.saved_tensors[0] * grads[0], None, None

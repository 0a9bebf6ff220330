"""The loss of a language model: cross-entropy of the next token, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fewbits.finetuning.data import IGNORED

ROWS = 128  # positions whose logits are held at a time
PROBE = 16  # tokens on which the loss made here is compared with the model's own

Inputs = dict[str, Any]


class CausalLoss:
    """Mean cross-entropy of the learnt tokens of a batch of `input_ids`, `attention_mask` and `labels`.

    The model's own loss where its head is trained too, or where its logits turn out to be more than a product of the
    last hidden states, perhaps with a soft cap.
    """

    def __init__(self) -> None:
        self.checked: nn.Module | None = None  # the model that was compared
        self.own = False

    def __call__(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        inner = innermost(model)
        if self.checked is not inner:
            self.own, self.checked = not self._same(inner, inputs), inner
        return _whole(model, inputs) if self.own else _in_parts(inner, inputs)

    def _same(self, inner: nn.Module, inputs: Inputs) -> bool:
        """Whether the loss made here is the model's."""
        head = isinstance(inner, transformers.PreTrainedModel) and inner.get_output_embeddings()
        if not isinstance(head, nn.Module) or any(p.requires_grad for p in head.parameters()):
            return False
        few = {name: value[:1, :PROBE] for name, value in inputs.items()}
        few["labels"] = few["input_ids"]
        training = inner.training
        inner.eval()
        with torch.no_grad():
            meant, found = _whole(inner, few), _in_parts(inner, few)
        inner.train(training)
        return bool(torch.isclose(meant.float(), found, rtol=0.02))


def innermost(model: nn.Module) -> nn.Module:
    """The Transformers model under an adapter's wrapper."""
    bare: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return bare() if bare else model


def _whole(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    loss: torch.Tensor = model(**inputs, **_uncached(innermost(model))).loss
    return loss


def _in_parts(inner: Any, inputs: Inputs) -> torch.Tensor:
    more = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = inner.base_model(**more, **_uncached(inner)).last_hidden_state
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).reshape(-1)
    learnt = labels != IGNORED
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    head = inner.get_output_embeddings()
    loss: torch.Tensor = _CrossEntropy.apply(hidden.flatten(0, 1)[learnt], labels[learnt], head, cap)
    return loss


def _uncached(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


class _CrossEntropy(torch.autograd.Function):
    """The gradient of the hidden states `[n, hidden]` is made along with the loss, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: nn.Module,
                cap: float | None) -> torch.Tensor:
        total = torch.zeros((), device=hidden.device)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for at in range(0, len(hidden), ROWS):
            rows = slice(at, at + ROWS)
            with torch.set_grad_enabled(slopes is not None):
                x = hidden[rows].detach().requires_grad_(slopes is not None)
                logits = head(x).float()
                if cap is not None:
                    logits = cap * torch.tanh(logits / cap)
                part = F.cross_entropy(logits, labels[rows], reduction="sum") / len(hidden)
            if slopes is not None:
                slopes[rows] = torch.autograd.grad(part, x)[0]
            total += part.detach()
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0].to(slopes.dtype), None, None, None

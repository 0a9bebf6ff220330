"""The loss of a language model: cross-entropy of the next token, without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from fewbits.finetuning.data import IGNORED
from fewbits.runtime.linear import QLinear

ROWS = 128  # positions whose logits are held at a time
PART = 4096  # rows of a head of 16 bits that are in float32 at a time
PROBE = 16  # tokens on which the loss made here is compared with the model's own

Inputs = dict[str, Any]


class CausalLoss:
    """Mean cross-entropy of the learnt tokens of a batch of `input_ids`, `attention_mask` and `labels`.

    The model's own loss where its head is trained too, or where its logits turn out to be more than a product of the
    last hidden states, perhaps with a soft cap.
    """

    def __init__(self) -> None:
        self.checked: nn.Module | None = None  # the model that was compared
        self.head: _Head | None = None  # if the loss is made here

    def __call__(self, model: nn.Module, inputs: Inputs) -> torch.Tensor:
        inner = innermost(model)
        if self.checked is not inner:
            self.head, self.checked = self._head(inner, inputs), inner
        return _whole(model, inputs) if self.head is None else _in_parts(inner, inputs, self.head)

    def _head(self, inner: nn.Module, inputs: Inputs) -> _Head | None:
        """The model's head, if the loss made with it is the model's."""
        head = inner.get_output_embeddings() if isinstance(inner, transformers.PreTrainedModel) else None
        if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, QLinear) or any(
                p.requires_grad for p in head.parameters()):
            return None
        found = _Head(head)
        few = {name: value[:1, :PROBE] for name, value in inputs.items()}
        few["labels"] = few["input_ids"]
        training = inner.training
        inner.eval()
        with torch.no_grad():
            meant, made = _whole(inner, few), _in_parts(inner, few, found)
        inner.train(training)
        return found if bool(torch.isclose(meant.float(), made, rtol=0.02)) else None


def innermost(model: nn.Module) -> nn.Module:
    """The Transformers model under an adapter's wrapper."""
    bare: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return bare() if bare else model


def _whole(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    loss: torch.Tensor = model(**inputs, **_uncached(innermost(model))).loss
    return loss


def _in_parts(inner: Any, inputs: Inputs, head: _Head) -> torch.Tensor:
    more = {name: value for name, value in inputs.items() if name != "labels"}
    hidden = inner.base_model(**more, **_uncached(inner)).last_hidden_state
    labels = F.pad(inputs["labels"][:, 1:], (0, 1), value=IGNORED).reshape(-1)
    learnt = labels != IGNORED
    cap = getattr(inner.config.get_text_config(), "final_logit_softcapping", None)
    loss: torch.Tensor = _CrossEntropy.apply(hidden.flatten(0, 1)[learnt], labels[learnt], head, cap)
    return loss


def _uncached(model: Any) -> dict[str, bool]:
    return {"use_cache": False} if hasattr(model.config, "use_cache") else {}


class _Head:
    """Products with the weight of a frozen head `[vocabulary, hidden]`, in float32; of 16 bits, a part at a time."""

    def __init__(self, head: nn.Linear):
        self.packed = head.prepared if isinstance(head, QLinear) and head.prepared.codec.family != "float" else None
        self.bias = head.bias
        if self.packed is None:
            self.weight = head.prepared.q.planes["data"] if isinstance(head, QLinear) else head.weight.detach()
        self.size = head.out_features
        self.room: torch.Tensor | None = None

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """`[n, hidden]` -> `[n, vocabulary]`, good until the next call."""
        if self.packed is not None:
            return self.packed.matmul(x, self.bias)
        self.room = x.new_empty(ROWS, self.size) if self.room is None else self.room
        out = self.room[:len(x)]
        for part in self._parts():
            torch.mm(x, self.weight[part].T.float(), out=out[:, part])
        return out if self.bias is None else out.add_(self.bias)

    def slope(self, g: torch.Tensor) -> torch.Tensor:
        """`[n, vocabulary]` -> `[n, hidden]`."""
        if self.packed is not None:
            return self.packed.grad_input(g)
        out = g.new_zeros(len(g), self.weight.shape[1])
        for part in self._parts():
            out.addmm_(g[:, part], self.weight[part].float())
        return out

    def _parts(self) -> list[slice]:
        step = self.size if self.weight.dtype == torch.float32 else PART
        return [slice(at, min(at + step, self.size)) for at in range(0, self.size, step)]


class _CrossEntropy(torch.autograd.Function):
    """The gradient of the hidden states `[n, hidden]` is made along with the loss, some rows at a time."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, labels: torch.Tensor, head: _Head, cap: float | None) -> torch.Tensor:
        total, parts = torch.zeros((), device=hidden.device), []
        for x, label in zip(hidden.split(ROWS), labels[:, None].split(ROWS), strict=True):
            z = head.logits(x.float())  # all that follows happens in its place
            if cap is not None:
                z.div_(cap).tanh_().mul_(cap)
            slope = 1 - (z / cap).square_() if cap is not None and ctx.needs_input_grad[0] else None
            top, meant = z.amax(-1, keepdim=True), z.gather(-1, label)
            sums = z.sub_(top).exp_().sum(-1, keepdim=True)
            total += (sums.log() + top - meant).sum()
            if ctx.needs_input_grad[0]:
                z.div_(sums * len(hidden)).scatter_add_(-1, label, torch.full_like(meant, -1 / len(hidden)))
                parts.append(head.slope(z if slope is None else z.mul_(slope)).to(hidden.dtype))
        if parts:
            ctx.save_for_backward(torch.cat(parts))
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0].to(slopes.dtype), None, None, None

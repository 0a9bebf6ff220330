"""LoRA layers in fewer passes, and halved activations, against peft and autograd as they are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fewbits
from fewbits.finetuning.fused import fuse
from fewbits.finetuning.saving import LEAST, halved

X = torch.randint(3, 200, (2, 40), generator=torch.Generator().manual_seed(0))


def adapted(tiny: Path, recipe: str | None, dropout: float = 0.0, kernel: str | None = None) -> Any:
    torch.manual_seed(0)
    net = fewbits.load(tiny, recipe=recipe, kernel=kernel)
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules="all-linear")
    tuned = peft.get_peft_model(net, config)
    for name, p in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return tuned


def gradients(tuned: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    logits = tuned(input_ids=X).logits
    return logits, list(torch.autograd.grad(logits.square().sum(), [p for p in tuned.parameters() if p.requires_grad]))


@pytest.mark.parametrize(("recipe", "kernel"), [(None, None), ("nf4", None), ("Q8_0", None), ("int8", "decode")])
def test_the_same_values_and_gradients(recipe: str | None, kernel: str | None, tiny: Path) -> None:
    tuned = adapted(tiny, recipe, kernel=kernel)
    logits, want = gradients(tuned)
    fuse(tuned)
    fused, got = gradients(tuned)
    torch.testing.assert_close(fused, logits, rtol=1e-4, atol=1e-4)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    assert len(got) == 2 * 7 * 2


def test_what_is_out_of_the_ordinary_is_pefts(tiny: Path) -> None:
    tuned = adapted(tiny, "nf4", dropout=0.5)
    fuse(tuned)
    tuned.train()
    torch.manual_seed(1)
    one = tuned(input_ids=X).logits
    assert not torch.equal(one, tuned(input_ids=X).logits), "dropout draws anew"
    tuned.eval()
    assert torch.equal(tuned(input_ids=X).logits, tuned(input_ids=X).logits)
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(input_ids=X).logits, fewbits.load(tiny, recipe="nf4")(input_ids=X).logits)


def test_halved_activations() -> None:
    """Gradients to bfloat16's rounding."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 512, bias=False)
    same = copy.deepcopy(layer)
    x = torch.randn(256, 512, requires_grad=True)
    assert x.numel() > LEAST

    def forward(net: torch.nn.Module) -> torch.Tensor:
        hidden = net(x).tanh()
        return (hidden * torch.sigmoid(hidden)).sum()

    want = torch.autograd.grad(forward(same), [x, same.weight])
    with halved(layer):
        total = forward(layer)
    got = torch.autograd.grad(total, [x, layer.weight])
    for a, b in zip(got, want, strict=True):
        assert 0 < (a - b).norm() / b.norm() < 2 ** -7


def test_small_tensors_and_other_types_stay() -> None:
    x = torch.randn(8, 8, requires_grad=True)
    wide = torch.randn(400, 400, dtype=torch.float64, requires_grad=True)
    with halved(torch.nn.Identity()):
        total = x.exp().sum() + wide.exp().sum()
    for got, leaf in zip(torch.autograd.grad(total, [x, wide]), (x, wide), strict=True):
        torch.testing.assert_close(got, leaf.exp(), rtol=0, atol=0)

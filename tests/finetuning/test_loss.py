"""The loss that never holds all logits: Transformers' own value and gradient, whatever the head is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import fewbits
from fewbits.finetuning import loss as module
from fewbits.finetuning.data import IGNORED
from fewbits.finetuning.loss import CausalLoss
from fewbits.runtime.linear import QLinear


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 16)
    monkeypatch.setattr(module, "PART", 100)


def batch(vocabulary: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, vocabulary, (2, 50))
    labels = ids.clone()
    labels[0, :30], labels[1, 40:] = IGNORED, IGNORED
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def check(net: transformers.PreTrainedModel, tolerance: float) -> CausalLoss:
    """Value and gradients against the model's own loss."""
    for p in net.parameters():
        p.requires_grad_(False)
    norms = [m.weight.requires_grad_() for m in net.modules() if type(m).__name__.endswith("Norm")]
    inputs, loss = batch(net.config.vocab_size), CausalLoss()
    meant = net(**inputs).loss
    want = torch.autograd.grad(meant, norms)
    made = loss(net, inputs)
    torch.testing.assert_close(made, meant, rtol=tolerance, atol=0)
    for a, b in zip(torch.autograd.grad(3 * made, norms), want, strict=True):
        torch.testing.assert_close(a, 3 * b, rtol=0.02, atol=tolerance * float(b.abs().max()))
    with torch.no_grad():
        torch.testing.assert_close(loss(net, inputs), meant, rtol=tolerance, atol=0)
    return loss


@pytest.mark.parametrize("recipe", [None, "nf4", "Q8_0"])
def test_heads_in_floats_in_16_bits_and_packed(recipe: str | None, tiny: Path, tmp_path: Path) -> None:
    half = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    net = fewbits.load(tmp_path / "half", recipe=recipe)
    head = net.get_output_embeddings()
    kinds = {None: nn.Linear, "nf4": QLinear, "Q8_0": QLinear}
    assert type(head) is kinds[recipe]
    if recipe is not None:
        assert (head.prepared.codec.family == "float") == (recipe == "nf4")
    assert check(net, 1e-5).head is not None


def test_a_capped_head_with_another_tokenizer() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                       num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=64,
                                       final_logit_softcapping=2.0, initializer_range=0.5, pad_token_id=0)
    assert check(transformers.Gemma2ForCausalLM(config).eval(), 1e-5).head is not None


def test_logits_that_are_more_than_a_product_are_the_models_own() -> None:
    torch.manual_seed(0)
    config = transformers.CohereConfig(vocab_size=200, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                                       num_attention_heads=2, num_key_value_heads=1, logit_scale=0.25,
                                       initializer_range=0.5, pad_token_id=0)
    assert check(transformers.CohereForCausalLM(config).eval(), 1e-6).head is None


def test_a_head_that_is_trained_is_the_models_own(tiny: Path) -> None:
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    loss, inputs = CausalLoss(), batch(net.config.vocab_size)
    loss(net, inputs).backward()
    assert loss.head is None and net.get_output_embeddings().weight.grad is not None

"""The divergence that finishing brings down, against Transformers' logits in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from fewbits.finishing import goals


def pair(kind: Any, config: Any) -> tuple[Any, Any]:
    """Two random models that differ a little."""
    torch.manual_seed(0)
    original, student = kind(config).eval(), kind(config).eval()
    student.load_state_dict({k: v + 0.05 * torch.randn_like(v) if v.is_floating_point() else v
                             for k, v in original.state_dict().items()})
    return original, student


def llama(**more: Any) -> tuple[Any, Any]:
    return pair(transformers.LlamaForCausalLM, transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=300, **more))


def gemma() -> tuple[Any, Any]:
    """With a soft cap small enough to matter."""
    return pair(transformers.Gemma2ForCausalLM, transformers.Gemma2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=300, final_logit_softcapping=0.5))


@pytest.mark.parametrize("models", [llama, gemma, lambda: llama(tie_word_embeddings=True)])
def test_divergence_and_its_gradient(models: Any) -> None:
    original, student = models()
    batches = [{"input_ids": torch.randint(0, 300, (2, 150))}]
    goal = goals.goal(original, student, batches)
    hidden = goals.last_states(student, batches[0]).detach().requires_grad_()
    goal(hidden, 0).backward()

    with torch.no_grad():
        p = original(**batches[0]).logits.double().log_softmax(-1).flatten(0, 1)
    again = hidden.detach().double().requires_grad_()
    logits = again @ student.get_output_embeddings().weight.double().T
    cap = getattr(student.config, "final_logit_softcapping", None)
    q = (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1).flatten(0, 1)
    want = F.kl_div(q, p, log_target=True, reduction="batchmean")
    want.backward()
    assert float(goal(hidden.detach(), 0)) == pytest.approx(float(want.detach()), rel=1e-4)
    assert torch.allclose(hidden.grad.double(), again.grad, rtol=1e-3, atol=1e-3 * float(again.grad.abs().max()))


def test_a_model_is_at_no_distance_from_itself() -> None:
    original, _ = llama()
    batches = [{"input_ids": torch.randint(0, 300, (1, 20))}]
    goal = goals.goal(original, original, batches)
    assert float(goal(goals.last_states(original, batches[0]).detach(), 0)) == pytest.approx(0, abs=1e-6)


def test_logits_made_in_another_way_are_refused() -> None:
    original, student = pair(transformers.CohereForCausalLM, transformers.CohereConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=300,
        logit_scale=0.1))
    with pytest.raises(goals.FewbitsError, match="more to its logits"):
        goals.goal(original, student, [{"input_ids": torch.randint(0, 300, (1, 20))}])


def test_models_without_a_head_are_measured_at_their_last_states() -> None:
    original, student = pair(transformers.BertModel, transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=300))
    batch = {"input_ids": torch.randint(0, 300, (1, 20))}
    goal = goals.goal(original, student, [batch])
    a, b = (m(**batch).last_hidden_state.double() for m in (original, student))
    want = float(((a - b).square().sum() / a.square().sum()).detach())
    assert float(goal(goals.last_states(student, batch).detach(), 0)) == pytest.approx(want, rel=1e-4)

"""The walk: what it collects is what naive hooks see on the whole model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from transformers.pytorch_utils import Conv1D

from fewbits import codecs, containers, solvers
from fewbits.calibrate import Batches, Walk
from fewbits.runtime.build import is_linear

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SMALL, "vocab_size": 90, "max_position_embeddings": 64, "initializer_range": 0.2}


def ids(batches: int, length: int, seed: int = 0) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 90, (1, length), generator=generator)} for _ in range(batches)]


def padded() -> Batches:
    found = []
    for batch in ids(3, 12):
        mask = torch.ones(2, 12, dtype=torch.long)
        mask[1, 7:] = 0
        found.append({"input_ids": batch["input_ids"].repeat(2, 1), "attention_mask": mask})
    return found


def sounds() -> Batches:
    torch.manual_seed(1)
    return [{"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.randint(0, 90, (1, n))}
            for n in (6, 9)]


def images() -> Batches:
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(2, 3, 28, 28)} for _ in range(2)]


MODELS: dict[str, tuple[Any, Callable[[], Any], Callable[[], Batches]]] = {
    "llama": (t.LlamaForCausalLM, lambda: t.LlamaConfig(**TEXT, num_key_value_heads=2), lambda: ids(3, 20)),
    "gpt2": (t.GPT2LMHeadModel, lambda: t.GPT2Config(vocab_size=90, n_embd=64, n_layer=2, n_head=4, n_positions=64),
             lambda: ids(2, 20)),
    "bert": (t.BertForMaskedLM, lambda: t.BertConfig(**TEXT), padded),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**SMALL, image_size=28, patch_size=14), images),
    "whisper": (t.WhisperForConditionalGeneration, lambda: t.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=48, vocab_size=90, max_source_positions=20, max_target_positions=20,
        num_mel_bins=8, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1), sounds),
}


@pytest.fixture(scope="module", params=MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Batches]:
    kind, config, batches = MODELS[request.param]
    torch.manual_seed(0)
    model = kind(config()).eval()
    path = tmp_path_factory.mktemp(request.param) / "m"
    model.save_pretrained(path)
    return model, path, batches()


def naive(model: torch.nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """Second moments in float64 of what every linear layer reads, padding left out."""
    rows: dict[str, list[torch.Tensor]] = {}
    keep: list[torch.Tensor] = []

    def hook(name: str) -> Any:
        def see(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].double()
            rows.setdefault(name, []).append(x[keep[-1]] if keep else x.reshape(-1, x.shape[-1]))
        return see

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if is_linear(m)]
    with torch.no_grad():
        for batch in batches:
            if "attention_mask" in batch:
                keep.append(batch["attention_mask"].bool())
            model(**batch)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for n, x in rows.items()}


def module_of(walk: Walk, name: str) -> str:
    """What Transformers calls the module of a weight; files of ViT have older names."""
    module = walk.places.of(walk.checkpoint.entries[name]).module
    return next(n for n, m in walk.model.named_modules() if m is module)


@pytest.mark.parametrize("sequential", [False, True])
def test_statistics_are_those_of_the_whole_model(family: tuple[Any, Path, Batches], sequential: bool) -> None:
    model, path, batches = family
    walk, want = Walk(containers.open(path), batches, sequential=sequential), naive(model, batches)
    got = {}
    for block in walk:
        groups = list(block.groups())
        assert sorted(n for g in groups for n in g.names) == sorted(block.names), "every entry once"
        for group in groups:
            found = group.statistics()
            assert found.keys() <= set(group.names)
            got |= found
    inside = {n for n in want if any(n.startswith(prefix) for prefix, _ in walk.lists)}
    assert {module_of(walk, name) for name in got} == inside and len(inside) == sum(
        is_linear(m) for _, blocks in walk.lists for b in blocks for m in b.modules())
    for name, statistics in got.items():
        torch.testing.assert_close(statistics.moment.double(), want[module_of(walk, name)], rtol=1e-4, atol=1e-5)


def test_later_layers_see_the_earlier_ones_quantized(family: tuple[Any, Path, Batches]) -> None:
    """Sequential or not, on whatever the model is made of: against hooks on the model with the same weights in it."""
    model, path, batches = family
    source = containers.open(path)
    changed = type(model)(model.config).eval()
    changed.load_state_dict(model.state_dict())
    modules = dict(changed.named_modules())
    walk = Walk(source, batches)
    for block in walk:
        for group in block.groups():
            want = naive(changed, batches)
            for name, statistics in group.statistics().items():
                at = module_of(walk, name)
                torch.testing.assert_close(statistics.moment.double(), want[at], rtol=1e-3, atol=1e-4)
                q = solvers.solve(source.entries[name].load().dequantize(), codecs.get("int3-g32"), "nearest")
                block.replace(name, q)
                module = modules[at]
                module.weight.data.copy_(q.dequantize().T if isinstance(module, Conv1D) else q.dequantize())


# the original beside --------------------------------------------------------------------------------------------------
def rows_read(model: torch.nn.Module, batches: Batches) -> dict[str, torch.Tensor]:
    """What every linear layer reads `[tokens, in]`, in float64."""
    rows: dict[str, list[torch.Tensor]] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs: rows.setdefault(name, []).append(inputs[0].double().flatten(0, -2))

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if is_linear(m)]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    return {n: torch.cat(x) for n, x in rows.items()}


@pytest.mark.parametrize("name", ["llama", "whisper"])
@pytest.mark.parametrize("sequential", [False, True])
def test_drift_is_how_far_inputs_are_from_the_originals(name: str, sequential: bool, tmp_path: Path) -> None:
    kind, config, given = MODELS[name]
    torch.manual_seed(0)
    model, changed = kind(config()).eval(), kind(config()).eval()
    changed.load_state_dict(model.state_dict())
    model.save_pretrained(tmp_path / "m")
    batches = given()
    source, originals = containers.open(tmp_path / "m"), rows_read(model, batches)
    modules, moved = dict(changed.named_modules()), 0
    for block in Walk(source, batches, drift=True, sequential=sequential):
        for group in block.groups():
            now = rows_read(changed, batches)
            found = group.statistics()
            for key, statistics in found.items():
                at = key.removesuffix(".weight")
                want = (originals[at] - now[at]).T @ now[at] / len(now[at])
                assert statistics.drift is not None
                torch.testing.assert_close(statistics.drift.double(), want, rtol=1e-3, atol=1e-5)
                moved += bool(want.abs().max() > 1e-4)
            for key in found:
                q = solvers.solve(source.entries[key].load().dequantize(), codecs.get("int3-g32"), "nearest")
                block.replace(key, q)
                modules[key.removesuffix(".weight")].weight.data.copy_(q.dequantize())
    assert moved > 5, "inputs did drift"

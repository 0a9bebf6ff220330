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
from fewbits.calibration.walk import Batches, Statistics, Walk
from fewbits.errors import FewbitsError
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
    "gptj": (t.GPTJForCausalLM, lambda: t.GPTJConfig(  # its blocks put out tuples, and run side by side inside
        vocab_size=90, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64), lambda: ids(2, 20)),
    "bert": (t.BertForMaskedLM, lambda: t.BertConfig(**TEXT), padded),
    "vit": (t.ViTForImageClassification, lambda: t.ViTConfig(**SMALL, image_size=28, patch_size=14), images),
    "whisper": (t.WhisperForConditionalGeneration, lambda: t.WhisperConfig(
        d_model=64, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=48, vocab_size=90, max_source_positions=20, max_target_positions=20,
        num_mel_bins=8, pad_token_id=1, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1), sounds),
}


def _blip2() -> t.Blip2Config:
    return t.Blip2Config(
        vision_config={**SMALL, "image_size": 28, "patch_size": 14, "initializer_range": 0.2},
        qformer_config={**TEXT, "encoder_hidden_size": 64, "cross_attention_frequency": 2},
        text_config={"model_type": "opt", "vocab_size": 90, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64,
                     "pad_token_id": 1, "init_std": 0.2}, num_query_tokens=4, image_token_index=89)


def questions() -> Batches:
    """A picture, the places of its four tokens and some words."""
    torch.manual_seed(1)
    return [{"pixel_values": torch.randn(1, 3, 28, 28),
             "input_ids": torch.cat([torch.full((1, 4), 89), torch.randint(3, 88, (1, n))], 1)} for n in (8, 5)]


# an encoder, a bridge and a decoder; and blocks that hand on more than their output: T5's share a bias of positions
MODELS["blip2"] = t.Blip2ForConditionalGeneration, _blip2, questions
MODELS["t5"] = (t.T5ForConditionalGeneration, lambda: t.T5Config(
    vocab_size=90, d_model=64, d_ff=96, num_layers=2, num_heads=4, d_kv=16, decoder_start_token_id=0,
    feed_forward_proj="gated-gelu"), lambda: [b | {"decoder_input_ids": b["input_ids"][:, :n]}
                                              for b, n in zip(ids(2, 12), (5, 7), strict=True)])


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


# numbers ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("mean", [0, 30, 1000])
def test_sums_in_single_precision_are_good_enough(mean: float) -> None:
    """64 batches of 512 tokens whose means are far above what varies: the error stays below 1 % of GPTQ's least damping
    (it was 0.6 % at width 512)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0] * torch.logspace(-3, 0, 128)
    common = torch.randn(128, generator=generator) * mean
    found, exact = Statistics.zeros(128), torch.zeros(128, 128, dtype=torch.float64)
    for _ in range(64):
        x = torch.randn(512, 128, generator=generator) @ directions + common
        found.add(x)
        exact += x.double().T @ x.double()
    exact /= 64 * 512
    error = torch.linalg.matrix_norm(found.moment.double() - exact, 2)
    assert found.count == 64 * 512 and error < 0.01 * (0.01 * exact.diagonal().mean())


# bad input ----------------------------------------------------------------------------------------------------------
def walk_of(model: Any, path: Path, batches: Batches) -> Walk:
    model.save_pretrained(path)
    return Walk(containers.open(path), batches)


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    kind, config, batches = MODELS["llama"]
    model = kind(config())
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3] = 1e30
        model.model.layers[1].mlp.gate_proj.weight[3] = 1e30
    walk = walk_of(model, tmp_path / "m", batches())
    with pytest.raises(FewbitsError, match=r"entering model\.layers\.1\.mlp\.down_proj\.weight are not finite"):
        for block in walk:
            block.statistics()


def test_batches_that_the_model_does_not_take(tmp_path: Path) -> None:
    kind, config, _ = MODELS["vit"]
    with pytest.raises(FewbitsError, match=r"ViTForImageClassification does not run block by block on input_ids"):
        next(iter(walk_of(kind(config()), tmp_path / "m", ids(1, 8))))


def test_blocks_that_run_more_than_once_are_refused(tmp_path: Path) -> None:
    config = t.AlbertConfig(**SMALL, vocab_size=90, embedding_size=64, num_hidden_groups=1)
    with pytest.raises(FewbitsError, match=r"is called in a way that the walk doesn't know"):
        next(iter(walk_of(t.AlbertForMaskedLM(config), tmp_path / "m", ids(1, 8))))

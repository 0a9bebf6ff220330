"""SmoothQuant's scales beside the paper's formula in float64, and what they do for rounded activations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import fewbits
from fewbits import containers, transforms
from fewbits.calibration.sources import Calibration
from fewbits.errors import FewbitsError
from fewbits.recipe import ModelFacts, get
from fewbits.transforms import smoothquant
from fewbits.transforms.sites import sites

FAR = (7, 40)  # channels that are much larger than the others


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose norms make two channels very large, and whose layers read them with small weights."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=90, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, initializer_range=0.2)).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for norm, readers in ((layer.input_layernorm, ("q_proj", "k_proj", "v_proj")),
                                  (layer.post_attention_layernorm, ("gate_proj", "up_proj"))):
                norm.weight[list(FAR)] *= 60
                for part in readers:
                    getattr(layer.self_attn if part[0] in "qkv" else layer.mlp, part).weight[:, list(FAR)] /= 60
    path = tmp_path_factory.mktemp("uneven") / "m"
    model.save_pretrained(path)
    return path


def tokens(seed: int = 0) -> Calibration:
    generator = torch.Generator().manual_seed(seed)
    return Calibration([{"input_ids": torch.randint(0, 90, (1, 40), generator=generator)} for _ in range(4)], "random")


def peaks(path: Path) -> dict[str, torch.Tensor]:
    """Module name -> the largest magnitude of each of its inputs, seen by hooks on the whole model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str, x: torch.Tensor) -> None:
        found = x.abs().flatten(0, -2).amax(0)
        seen[name] = torch.maximum(seen.get(name, found), found)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: hook(name, x[0]))
    with torch.no_grad():
        for batch in tokens().batches:
            model(**batch)
    return seen


@pytest.mark.parametrize("alpha", [0.5, 0.8])
def test_the_papers_scales_after_norms_only(uneven: Path, alpha: float) -> None:
    source, seen = containers.open(uneven), peaks(uneven)
    choices = {c.name: c for c in get("w8a8").resolve(ModelFacts.of(source))}
    found = smoothquant.scales(source, sites(source), choices, tokens().batches, alpha=alpha)
    assert sorted(found) == sorted(f"model.layers.{i}.{n}.weight" for i in (0, 1)
                                   for n in ("input_layernorm", "post_attention_layernorm"))
    for site in sites(source):
        if site.producer in found:
            weights = torch.cat([source.entries[c].load().dequantize() for c in site.consumers]).double()
            x = seen[site.consumers[0].removesuffix(".weight")].double()
            want = x ** alpha / weights.abs().amax(0) ** (1 - alpha)
            torch.testing.assert_close(found[site.producer].double(), want / want.log().mean().exp(), rtol=1e-4, atol=0)


def test_the_model_stays_the_same(uneven: Path) -> None:
    source = containers.open(uneven)
    after = transforms.apply("smoothquant", source, get("w8a8").resolve(ModelFacts.of(source)), tokens())
    with torch.no_grad():
        want, got = (fewbits.load(c)(tokens(1).batches[0]["input_ids"]).logits for c in (source, after))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
    assert sum(after.entries[n] is not e for n, e in source.entries.items()) == 14


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-static"])
def test_rounded_activations_lose_less(recipe: str, uneven: Path, tmp_path: Path) -> None:
    batch, off = tokens(1).batches[0], {}
    with torch.no_grad():
        want = fewbits.load(uneven)(**batch).logits
        for transform in (None, "smoothquant"):
            out = fewbits.quantize(uneven, tmp_path / str(transform), recipe, calibration=tokens(), transform=transform,
                                   solver="search").path
            off[transform] = float((fewbits.load(out)(**batch).logits - want).norm() / want.norm())
    assert off["smoothquant"] < 0.6 * off[None], off


def test_alphas(uneven: Path) -> None:
    source = containers.open(uneven)
    transforms.check("smoothquant:0.75", source)
    for name in ("smoothquant:2", "smoothquant:x", "smoothquant:"):
        with pytest.raises(FewbitsError, match="alpha"):
            transforms.check(name, source)
    with pytest.raises(FewbitsError, match="unknown transform 'awq:0.5'"):
        transforms.check("awq:0.5", source)

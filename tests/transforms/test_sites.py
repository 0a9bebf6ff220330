"""Scales moved through every site of every family: the outputs stay, the weights don't."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import transformers

import fewbits
from fewbits import containers
from fewbits.checkpoint import Checkpoint
from fewbits.codecs.floats import BF16, F16, Float
from fewbits.errors import FewbitsError
from fewbits.transforms.scaling import plain, scaled
from fewbits.transforms.sites import Site, sites
from tests.arch.models import MODELS, VOCAB, directories

OPT = {"vocab_size": VOCAB, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 64, "word_embed_proj_dim": 64}
FAMILIES = MODELS | {
    "opt": transformers.OPTConfig(**OPT),
    "opt-after": transformers.OPTConfig(**OPT, do_layer_norm_before=False, activation_function="gelu")}
# sites a layer: norms before attention and feed-forward, values, the linear half of the feed-forward part
COUNTS = {"gpt2": 3, "gpt2-inner": 3, "gpt_neox": 3, "gpt_neox-sequential": 3, "olmo2": 2, "mixtral": 3, "qwen3_moe": 3,
          "gpt_oss": 3, "gpt_oss-yarn": 3, "opt-after": 1}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    make = directories(FAMILIES, tmp_path_factory, None)
    return lambda name: containers.open(make(name))


def logits(checkpoint: Checkpoint) -> torch.Tensor:
    tokens = torch.randint(0, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return fewbits.load(checkpoint)(tokens).logits


def random_scales(found: list[Site], checkpoint: Checkpoint) -> Iterator[tuple[Site, torch.Tensor]]:
    """From 1/4 to 4 for every output of a producer that is read, 1 for the others."""
    torch.manual_seed(1)
    for site in found:
        scale = torch.ones(checkpoint.entries[site.producer].shape[0])
        read = site.rows.unique()
        scale[read] = torch.exp2(torch.rand(len(read)) * 4 - 2)
        yield site, scale


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_stay(name: str, source: Callable[[str], Checkpoint]) -> None:
    before = source(name)
    found = sites(before)
    assert len(found) == COUNTS.get(name, 4) * before.config.get("num_hidden_layers", before.config.get("n_layer"))
    after = scaled(before, random_scales(found, before), {})
    changed = {n for site in found for n in (site.producer, *site.consumers, site.bias) if n}
    for n, entry in after.entries.items():
        same = torch.equal(entry.load().dequantize(), before.entries[n].load().dequantize())
        assert same == (n not in changed), n
        assert n in changed or entry is before.entries[n]
    wanted = logits(before)
    torch.testing.assert_close(logits(after), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("codec", [F16, BF16], ids=lambda c: c.name)
def test_norms_are_rounded_to_their_type_and_consumers_make_up_for_it(
        name: str, codec: Float, source: Callable[[str], Checkpoint]) -> None:
    before = source(name)
    found = [s for s in sites(before) if len(before.entries[s.producer].shape) == 1]
    after = scaled(before, random_scales(found, before), {s.producer: codec for s in found})
    rounded = False
    for site in found:
        value = after.entries[site.producer].load().dequantize()
        assert torch.equal(value, value.to(codec.dtype).float())
        plain = scaled(before, random_scales([site], before), {}).entries[site.producer].load().dequantize()
        rounded |= not torch.equal(value, plain)
    assert rounded
    wanted = logits(before)
    torch.testing.assert_close(logits(after), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_norm_too_small_for_its_type_stays(source: Callable[[str], Checkpoint]) -> None:
    before = source("llama")
    site = sites(before)[0]
    norm = torch.tensor([0.0, 1e-7, 1.0, -2.0]).repeat(16)
    small = replace(before, entries=before.entries | {site.producer: before.entries[site.producer].as_(
        load=lambda: plain(norm))})
    after = scaled(small, [(site, torch.full((64,), 4.0))], {site.producer: F16})
    got = after.entries[site.producer].load().dequantize()
    torch.testing.assert_close(got[:4], torch.tensor([0, 1e-7, 0.25, -0.5]))
    consumer = site.consumers[0]
    ratio = after.entries[consumer].load().dequantize() / before.entries[consumer].load().dequantize()
    torch.testing.assert_close(ratio[0, :4], torch.tensor([1.0, 1.0, 4.0, 4.0]))


def test_what_cannot_be_scaled(source: Callable[[str], Checkpoint]) -> None:
    before = source("llama")
    with pytest.raises(FewbitsError, match="no table of where scales can move through MambaForCausalLM"):
        sites(replace(before, config={"architectures": ["MambaForCausalLM"], "model_type": "mamba"}))
    with pytest.raises(FewbitsError, match="none of the tensors"):
        sites(replace(before, entries={n: e for n, e in before.entries.items() if "layers" not in n}))
    odd = "model.layers.1.self_attn.o_proj.weight"
    entries = before.entries | {odd: before.entries[odd].as_(shape=(64, 48))}
    with pytest.raises(FewbitsError, match=r"o_proj.weight has 48 inputs, .* 32 outputs of .*v_proj"):
        sites(replace(before, entries=entries))

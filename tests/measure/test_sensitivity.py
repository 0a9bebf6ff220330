"""Losses of single tensors beside Transformers' own logits; estimates beside them; the ledger that keeps them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

from fewbits import caching, codecs, containers, solvers
from fewbits.calibration import sources
from fewbits.errors import FewbitsError
from fewbits.measure import sensitivity as module
from fewbits.measure.curvature import Curvature, importances
from fewbits.measure.ledger import Ledger, Loss
from fewbits.measure.sensitivity import sensitivity

NAME = "model.layers.1.mlp.up_proj.weight"
TIED = "model.embed_tokens.weight"
SETTINGS = {"samples": 2, "length": 64}


@pytest.fixture(scope="module")
def text(tiny: Path, english: Path) -> sources.Calibration:
    return sources.calibration(english, containers.open(tiny), **SETTINGS)


def by_transformers(tiny: Path, text: sources.Calibration, name: str, codec: str) -> float:
    """Mean KL with one tensor quantized, in float32 and with nothing of ours but the codec."""
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    ids = torch.cat([b["input_ids"] for b in text.batches])
    with torch.no_grad():
        p = net(ids).logits[:, :-1].log_softmax(-1)
        weight = net.get_parameter(name)
        weight.copy_(solvers.solve(weight, codecs.get(codec)).dequantize())
        q = net(ids).logits[:, :-1].log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize(("name", "codec"), [(NAME, "Q4_0"), (TIED, "Q4_0"), (NAME, "int3-g32")])
def test_measured_loss_is_that_of_the_model_with_one_tensor_quantized(name: str, codec: str, tiny: Path, english: Path,
                                                                      text: sources.Calibration) -> None:
    found = sensitivity(tiny, [codec], text=english, **SETTINGS).table()[name][codec]
    assert found.measured and found.error is not None
    assert found.kl == pytest.approx(by_transformers(tiny, text, name, codec), rel=0.1)


def test_every_matrix_has_a_loss_in_each_codec_that_takes_it_and_the_worst_comes_first(tiny: Path, english: Path
                                                                                      ) -> None:
    found = sensitivity(tiny, ["Q8_0", "Q4_0"], text=english, **SETTINGS)
    table = found.table()
    assert found.codecs == ["Q8_0", "Q4_0"] and found.tokens == 126
    assert len(table) == 13 and "model.layers.0.mlp.down_proj.weight" not in table, "32 does not divide 172"
    worst = [max(loss.kl for loss in row.values()) for row in table.values()]
    assert worst == sorted(worst, reverse=True)
    assert all(row["Q8_0"].kl < row["Q4_0"].kl for row in table.values())
    assert found.to_json()["circumstances"]["models"][0]["sha256"]


def test_estimates_are_near_what_is_measured(tiny: Path, english: Path) -> None:
    """Together: a single one may be off by a third. The tied embedding has no estimate."""
    measured = sensitivity(tiny, ["Q4_0"], text=english, **SETTINGS).table()
    estimated = sensitivity(tiny, ["Q4_0"], text=english, estimate=True, **SETTINGS).table()
    assert [n for n, row in estimated.items() if row["Q4_0"].measured] == [TIED]
    ratios = torch.tensor([estimated[n]["Q4_0"].kl / measured[n]["Q4_0"].kl for n in measured if n != TIED])
    assert 0.7 < ratios.log().mean().exp() < 1.4 and ratios.log().abs().max() < 1


def test_curvature_beside_gradients_taken_token_by_token(tiny: Path, text: sources.Calibration) -> None:
    """Half the mean of (g . D x)^2, with autograd's own x and g of one layer and the same tokens drawn."""
    source = containers.open(tiny)
    ids = text.batches[0]["input_ids"]
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    layer, held = net.get_submodule(NAME.removesuffix(".weight")), {}

    def see(_: object, inputs: tuple[torch.Tensor], out: torch.Tensor) -> None:
        out.retain_grad()
        held.update(x=inputs[0], out=out)

    layer.register_forward_hook(see)
    logits = net(ids).logits[0]
    random = torch.Generator().manual_seed(3)
    torch.randperm(ids.shape[1], generator=random)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)
    logits.log_softmax(-1).gather(1, drawn).sum().backward()
    q = solvers.solve(layer.weight.detach(), codecs.get("Q4_0"))
    change = q.dequantize() - layer.weight.detach()
    expected = ((held["x"][0].detach() @ change.T) * held["out"].grad[0]).sum(1).square().mean() / 2
    found = Curvature(source, ids, seed=3).losses(NAME, layer.weight.detach(), [q])
    assert found == [pytest.approx(float(expected), rel=0.02)], "kept in bfloat16"


def test_importances_are_mean_squares_of_inputs(tiny: Path, text: sources.Calibration) -> None:
    ids = text.batches[0]["input_ids"]
    net = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    expected = net.model.layers[0].input_layernorm(net.model.embed_tokens(ids))[0].square().mean(0)
    found = importances(containers.open(tiny), ids)["model.layers.0.self_attn.q_proj.weight"].values
    assert torch.allclose(found, expected, rtol=1e-4)


def test_a_killed_run_goes_on_after_the_last_whole_line(tiny: Path, english: Path, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWBITS_CACHE", str(tmp_path))
    whole = sensitivity(tiny, ["Q5_0"], text=english, **SETTINGS)
    file = next(caching.folder("sensitivity").glob("*.jsonl"))
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:5]) + lines[5][:20])
    solved: list[str] = []
    quantized = module.Losses.quantized

    def counted(self: module.Losses, name: str, codec: str):
        solved.append(name)
        return quantized(self, name, codec)

    monkeypatch.setattr(module.Losses, "quantized", counted)
    again = sensitivity(tiny, ["Q5_0"], text=english, **SETTINGS)
    assert again.losses == whole.losses and len(solved) == len(lines) - 5
    assert [json.loads(line) for line in file.read_text().splitlines()] == [json.loads(line) for line in lines]


def test_what_is_not_in_a_file_is_not_kept() -> None:
    ledger = Ledger(None)
    ledger.add([Loss("a", "Q4_0", 0.1, None, False)])
    assert ledger.file is None and ledger.losses[("a", "Q4_0", False)].kl == 0.1


def test_bad_input(tiny: Path, english: Path) -> None:
    with pytest.raises(FewbitsError, match="unknown"):
        sensitivity(tiny, ["Q9_9"], text=english)
    with pytest.raises(FewbitsError, match="no such file|No such file"):
        sensitivity(tiny, ["Q4_0"], text=english.with_name("missing.txt"))

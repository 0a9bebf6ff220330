"""W8A8: a weight by hand, and what calibration leaves in its planes."""

from __future__ import annotations

import torch

from fewbits import codecs
from fewbits.qtensor import QTensor


def test_by_hand() -> None:
    planes = {"codes": torch.tensor([[127, -128, 1, 0]], dtype=torch.int8), "scales": torch.tensor([[0.5]]).half(),
              "zeros": torch.tensor([[-2]], dtype=torch.int8), "inputs": torch.tensor([[0.25]])}
    codec = codecs.get("w8a8-static-asym")
    q = QTensor(codec, (1, 4), planes)
    assert q.dequantize().tolist() == [[64.5, -63.0, 1.5, 1.0]]
    again = QTensor.pack(codec, (1, 4), *q.unpack())
    assert again.planes.keys() == planes.keys() and all(torch.equal(again.planes[k], planes[k]) for k in planes)


def test_scales_of_activations() -> None:
    """One a layer, in every row; of a stack one an expert. Zero would be a divisor."""
    codec = codecs.get("w8a8-static")
    q = QTensor.pack(codec, (4, 8), torch.zeros(4, 8, dtype=torch.uint8),
                     codec.fit(torch.randn(4, 1, 8), None))
    assert codec.calibrated(q.planes, torch.tensor([255.0]))["inputs"].tolist() == [[2.0]] * 4
    assert codec.calibrated(q.planes, torch.tensor([127.5, 51.0]))["inputs"][:, 0].tolist() == [1.0, 1.0] + [
        torch.tensor(51.0).div(127.5).item()] * 2
    assert bool((codec.calibrated(q.planes, torch.zeros(1))["inputs"] > 0).all())
    assert codecs.get("w8a8").calibrated(q.planes, torch.ones(1)) is q.planes


def test_without_inputs_it_is_another_codec() -> None:
    assert codecs.get("w8a8-static-sf32").blind == codecs.get("w8a8-sf32")
    assert codecs.get("w8a8").blind == codecs.get("w8a8") and codecs.get("int8").blind == codecs.get("int8")

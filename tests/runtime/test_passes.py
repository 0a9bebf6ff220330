"""Passes that stop half-way: equal to whole ones, with the weights as they are when a layer runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fewbits.runtime.passes import Passes


class Three(nn.Module):
    """Counts how often its first layer ran."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.runs = 0

    def forward(self, x: torch.Tensor, scale: float) -> tuple[torch.Tensor]:
        self.runs += 1
        return (self.c(self.b(self.a(x).relu()).relu()) * scale,)


@pytest.fixture
def passes() -> Passes:
    torch.manual_seed(0)
    return Passes(Three(), list(torch.randn(5, 3, 8)), [{"scale": float(i)} for i in range(5)])


def double(layer: nn.Linear) -> None:
    layer.weight.data.mul_(2)


def test_each_layer_sees_those_before_it_changed(passes: Passes) -> None:
    net, inputs = passes.module, passes.inputs
    for name in "abc":
        layer = getattr(net, name)
        for i, x in enumerate(inputs):
            with torch.no_grad():
                want = x if name == "a" else net.a(x).relu() if name == "b" else net.b(net.a(x).relu()).relu()
            (reading,) = passes.readings(i, {(layer, "weight")}, 1)
            torch.testing.assert_close(reading.x, want)
        double(layer)
        passes.changed((layer, "weight"))
    assert net.runs == 5 and len(passes.stopped) == 5, "one pass for all layers"
    found = [passes.finish(i) for i in range(5)]
    assert net.runs == 5 and not passes.stopped and torch.is_grad_enabled()
    torch.testing.assert_close(found, [passes.output(i).detach() for i in range(5)])


def test_passes_that_used_a_weight_begin_anew(passes: Passes) -> None:
    net = passes.module
    for i in range(5):
        passes.readings(i, {(net.b, "weight")}, 1)
    double(net.a)
    passes.changed((net.a, "weight"))
    (reading,) = passes.readings(2, {(net.c, "weight")}, 1)
    torch.testing.assert_close(reading.x, net.b(net.a(passes.inputs[2]).relu()).relu().detach())
    (again,) = passes.readings(2, {(net.b, "weight")}, 1)
    torch.testing.assert_close(again.x, net.a(passes.inputs[2]).relu().detach())
    double(net.c)
    passes.changed(None)
    assert not passes.stopped
    torch.testing.assert_close(passes.finish(2), passes.output(2).detach())


def test_nothing_waits_without_memory_or_after_several_layers(passes: Passes) -> None:
    net = passes.module
    assert len(passes.readings(0, {(net.a, "weight"), (net.b, "weight")}, 2)) == 2 and not passes.stopped
    passes.wait = False
    (reading,) = passes.readings(0, {(net.b, "weight")}, 1)
    assert not passes.stopped and not net.a._forward_pre_hooks, "no tap is left"
    torch.testing.assert_close(reading.x, net.a(passes.inputs[0]).relu().detach())


def test_errors_of_the_module_come_out_of_the_pass(passes: Passes) -> None:
    passes.arguments[1] = {"scale": "many"}
    with pytest.raises(TypeError):
        passes.readings(1, {(passes.module.c, "bias")})

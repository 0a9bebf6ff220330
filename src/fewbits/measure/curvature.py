"""What quantizing each linear layer costs, estimated for all layers and codecs at once from one backward pass.

To second order, the divergence that a change D of a layer's weight causes is half the mean of (g . D x)^2 over tokens,
where x is what the layer reads and g the gradient, at its output, of the log-likelihood of tokens that the model itself
draws: Fisher's information, without the terms between tokens. At the original weights it is the loss of a layer that is
quantized alone; at the weights of a quantized model, that of one which loses more in company.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fewbits.calibration.statistics import Diagonal
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.codecs.floats import F32
from fewbits.containers.base import Progress
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

TOKENS = 1024  # of all that are read; so many are looked at, which memory and time go by


class Curvature:
    """Inputs and gradients of a model's linear layers, at some tokens."""

    def __init__(self, checkpoint: Checkpoint, windows: torch.Tensor, seed: int = 0, progress: Progress | None = None):
        """One pass forward and backward over `windows` `[windows, tokens]`.

        Raises:
            FewbitsError: a model that doesn't write text, logits or gradients that are not finite.
        """
        self.inputs: dict[str, list[torch.Tensor]] = {}  # by the name of the entry; bfloat16 `[tokens, in]`
        self.gradients: dict[str, list[torch.Tensor]] = {}  # `[tokens, out]`
        random = torch.Generator().manual_seed(seed)
        keep = torch.randperm(windows.shape[1], generator=random)[:max(1, TOKENS // len(windows))].sort().values
        net = _decoded(checkpoint)
        hooks = [m.register_forward_hook(self._hook(name, keep)) for name, m in _layers(net, checkpoint)]
        for i, window in enumerate(windows):
            if progress:
                progress("estimating: one pass back", i, len(windows))
            _backward(net, window, random, checkpoint)
        for hook in hooks:
            hook.remove()

    def _hook(self, name: str, keep: torch.Tensor) -> Any:
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            x = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

            def back(gradient: torch.Tensor) -> None:
                g = gradient.reshape(-1, gradient.shape[-1])
                if not bool(g.isfinite().all()):
                    raise FewbitsError(f"gradients at {name} are not finite", "is the model intact?")
                self.inputs.setdefault(name, []).append(x[keep].bfloat16())
                self.gradients.setdefault(name, []).append(g[keep].bfloat16())
            out.register_hook(back)
        return see

    def losses(self, name: str, original: torch.Tensor, candidates: Iterable[QTensor]) -> list[float]:
        """Nats a token that each of `candidates` costs in the place of the `original` weight `[out, in]`."""
        x, g = (torch.cat(parts[name]).float() for parts in (self.inputs, self.gradients))
        return [float(((x @ (q.dequantize() - original).T) * g).sum(1).square().mean() / 2) for q in candidates]


def importances(checkpoint: Checkpoint, windows: torch.Tensor) -> dict[str, Diagonal]:
    """Mean squares of what the linear layers read, to weigh a search by."""
    squares: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        def see(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].reshape(-1, inputs[0].shape[-1])
            squares[name] = squares.get(name, torch.zeros(x.shape[1])) + x.square().sum(0)
        return see

    net = _decoded(checkpoint)
    hooks = [m.register_forward_pre_hook(hook(name)) for name, m in _layers(net, checkpoint)]
    with torch.inference_mode():
        for window in windows:
            net(input_ids=window[None], use_cache=False)
    for one in hooks:
        one.remove()
    return {name: Diagonal((total / windows.numel()).clone()) for name, total in squares.items()}


def _decoded(checkpoint: Checkpoint) -> nn.Module:
    """The model in float32, whatever its entries are packed in."""
    from fewbits.loading import load

    def entry(e: Entry) -> Entry:
        def values() -> QTensor:
            return QTensor(F32, e.shape, {"data": e.load().dequantize().view(F32.matrix(e.shape))})
        return e if e.codec.family == "float" else e.as_(codec=F32, load=values)

    net: nn.Module = load(replace(checkpoint, entries={n: entry(e) for n, e in checkpoint.entries.items()}))
    return net.eval().requires_grad_(False)


def _layers(net: nn.Module, checkpoint: Checkpoint) -> Iterable[tuple[str, nn.Module]]:
    """The linear layers whose weight is an entry of its own, but for the head: its errors are no small ones."""
    from fewbits.runtime.places import Places

    places, head = Places(net, checkpoint), _head(net)
    for entry in checkpoint.entries.values():
        if len(entry.shape) == 2:
            place = places.of(entry)
            if isinstance(place.module, nn.Linear) and not place.shared and place.module is not head:
                yield entry.name, place.module


def _head(net: Any) -> nn.Module | None:
    found: nn.Module | None = net.get_output_embeddings() if hasattr(net, "get_output_embeddings") else None
    return found


def _backward(net: Any, window: torch.Tensor, random: torch.Generator, checkpoint: Checkpoint) -> None:
    """Gradients of the log-likelihood of tokens that the model draws, one after each token of the window."""
    read = net.get_input_embeddings()(window[None]).requires_grad_(True)  # where the gradients' way ends
    try:
        logits = net(inputs_embeds=read, use_cache=False).logits[0].float()
    except (AttributeError, TypeError):
        raise FewbitsError(f"{checkpoint.path}: {checkpoint.architecture} writes no text",
                           "bits are shared out by what a model says: take a recipe") from None
    if not bool(logits.isfinite().all()):
        raise FewbitsError(f"{checkpoint.path}: logits are NaN or infinite", "fewbits verify says where")
    drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)
    logits.log_softmax(-1).gather(1, drawn).sum().backward()



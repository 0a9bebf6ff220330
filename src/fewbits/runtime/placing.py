"""Where the parts of a model lie: on one device, or by a `device_map` on several, and whether they fit there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from fewbits import devices
from fewbits.devices import free_bytes
from fewbits.errors import FewbitsError
from fewbits.memory import gb

INFERRED = ("auto", "balanced", "balanced_low_0", "sequential")
SHARE = 0.9  # of a device's free memory that weights may take where they are shared out: activations need some
Map = str | int | torch.device | Mapping[str, str | int | torch.device]


@dataclass(frozen=True)
class Placing:
    """Names of modules, or how they begin, and their device; "" stands for all of the model."""

    parts: Mapping[str, torch.device]

    def of(self, name: str) -> torch.device:
        """The device of a module or a parameter: that of the longest beginning of its name."""
        found = self._find(name)
        if found is None:
            raise FewbitsError(f"device_map says nothing of {name}", 'give "" a device for all that is not named')
        return found

    def _find(self, name: str) -> torch.device | None:
        while name and name not in self.parts:
            name = name.rpartition(".")[0]
        return self.parts.get(name)

    def apart(self, module: nn.Module, name: str = "") -> dict[str, torch.device]:
        """The modules that lie whole on one device, as large as they are, in `module` that is called `name`."""
        inside = {to for part, to in self.parts.items() if part.startswith(f"{name}." if name else "")}
        own = self._find(name)
        if not inside - {own}:
            return {} if own is None else {name: own}
        return {part: to for child, below in module.named_children()
                for part, to in self.apart(below, f"{name}.{child}".lstrip(".")).items()}

    @property
    def devices(self) -> list[torch.device]:
        return list(dict.fromkeys(self.parts.values()))

    @property
    def gpu(self) -> torch.device | None:
        return next((d for d in self.devices if d.type != "cpu"), None)


class Sizes:
    """What each parameter takes once it is loaded, for those who ask as Transformers does."""

    def __init__(self, nbytes: Mapping[str, int]):
        self.nbytes = nbytes

    @classmethod
    def of(cls, parts: Iterable[tuple[str, int]]) -> Sizes:
        """Of parameters that consist of several parts."""
        found: Counter[str] = Counter()
        for name, nbytes in parts:
            found[name] += nbytes
        return cls(found)

    def on(self, device: torch.device, placed: Placing) -> int:
        """Bytes that lie on a device."""
        return sum(n for name, n in self.nbytes.items() if placed.of(name) == device)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        return self.nbytes.get(param_name, param.nbytes) / max(1, param.numel())


def placing(net: transformers.PreTrainedModel, device: str | torch.device | None, device_map: Map | None,
            sizes: Sizes) -> Placing:
    """What `device` or `device_map` asks for; nothing: all of it on the CPU.

    Raises:
        FewbitsError: both are given, no such device, a map that leaves modules out or names none of the model's; all
            devices together have too little memory.
    """
    if device is not None and device_map is not None:
        raise FewbitsError(f"device {device} and device_map {device_map}: one of them")
    if isinstance(device_map, Mapping):
        return _given(net, device_map)
    if isinstance(device_map, str) and device_map in INFERRED:
        return _inferred(net, device_map, sizes)
    wanted = device if device_map is None else device_map
    return Placing({"": torch.device("cpu") if wanted is None else device_of(wanted)})


def wanted_gpu(device: str | torch.device | None, device_map: Map | None) -> torch.device | None:
    """A GPU that some of the model is meant for."""
    if isinstance(device_map, str) and device_map in INFERRED:
        named: list[Any] = ["auto"]
    else:
        named = [*device_map.values()] if isinstance(device_map, Mapping) else [device, device_map]
    return next((d for d in (device_of(n) for n in named if n is not None) if d.type != "cpu"), None)


def device_of(name: str | int | torch.device) -> torch.device:
    """The device of that name, or GPU of that number."""
    if name == "disk":
        raise FewbitsError("device_map: weights are not offloaded to disk", 'a device, or "cpu"')
    return devices.find(f"{devices.accelerator() or 'cuda'}:{name}" if isinstance(name, int) else name)


def _given(net: transformers.PreTrainedModel, parts: Mapping[str, Any]) -> Placing:
    made = Placing({name: device_of(to) for name, to in parts.items()})
    names = {name for name, _ in net.named_modules()} | {name for name, _ in net.named_parameters()}
    for name in parts:
        if name not in names:
            raise FewbitsError(f"device_map: {type(net).__name__} has no part {name!r}",
                               "parts are called as net.named_modules() says")
    for name, _ in net.named_parameters():
        made.of(name)
    for name, module in net.named_modules():
        if type(module).__name__ in (net._no_split_modules or ()) and len(made.apart(module, name)) > 1:
            raise FewbitsError(f"device_map splits {name}, a {type(module).__name__}", "give all of it one device")
    return made


def _inferred(net: transformers.PreTrainedModel, manner: str, sizes: Sizes) -> Placing:
    """As Transformers shares a model out, blocks whole; what GPUs have no room for stays on the CPU."""
    from transformers.integrations.accelerate import get_balanced_memory, infer_auto_device_map

    kind, cpu = devices.accelerator(), torch.device("cpu")
    if kind is None:
        return Placing({"": cpu})
    count = getattr(torch, kind).device_count()
    room: dict[int | str, Any] = {i: int(SHARE * free_bytes(torch.device(kind, i))) for i in range(count)}
    room["cpu"] = int(SHARE * free_bytes(cpu))
    whole = set(net._no_split_modules or ())
    asked: Any = sizes  # in the place of a quantizer, of which only sizes are asked
    limits = dict(room) if manner == "sequential" else get_balanced_memory(
        net, dict(room), whole, asked, low_zero=manner == "balanced_low_0")
    parts = infer_auto_device_map(net, limits, whole, hf_quantizer=asked, offload_buffers=True)
    if "disk" in parts.values():
        needed, free = sum(sizes.nbytes.values()), sum(room.values())
        raise FewbitsError(f"{gb(needed)} are needed for the weights, {gb(free)} are free on all devices together")
    return Placing({name: cpu if to == "cpu" else torch.device(kind, to) for name, to in parts.items()})


def short(placed: Placing, sizes: Sizes) -> tuple[torch.device, int, int] | None:
    """The first GPU that has too little memory: bytes that the weights need there, and that are free."""
    for device in placed.devices:
        needed = sizes.on(device, placed)
        if device.type != "cpu" and needed > (free := free_bytes(device)):
            return device, needed, free
    return None


def settle(net: transformers.PreTrainedModel, placed: Placing) -> None:
    """Bring buffers to where their modules lie; of a model on several devices, let inputs follow."""
    for name, module in net.named_modules():
        for key, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[key] = buffer.to(placed.of(name))
    if len(placed.devices) == 1:
        return
    from accelerate.hooks import attach_align_device_hook_on_blocks

    apart = placed.apart(net)
    attach_align_device_hook_on_blocks(net, {"": placed.gpu, **apart}, dict.fromkeys(apart, False),
                                       skip_keys=getattr(net, "_skip_keys_device_placement", None))
    vars(net)["hf_device_map"] = apart

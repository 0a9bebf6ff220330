"""What Transformers calls while it loads and saves a model: modules become layers of packed weights.

A model in full precision is quantized one parameter after the other, as Transformers reads them. Packed weights, in any
layout that `containers` knows, are read by our own readers in the place of Transformers' (`stored.py`).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import ConversionOps, revert_weight_conversion
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from fewbits import containers, zeroshot
from fewbits.checkpoint import Checkpoint, Entry
from fewbits.containers.directory import WEIGHTS, turned
from fewbits.devices import accelerator
from fewbits.errors import FewbitsError
from fewbits.hf import saving
from fewbits.hf.config import METHOD, FewbitsConfig
from fewbits.hf.stored import Stored
from fewbits.loading import threshold, tie
from fewbits.memory import forget
from fewbits.notes import tell
from fewbits.recipe import Choice, ModelFacts
from fewbits.recipe.facts import float_of
from fewbits.runtime.dispatch import prepare, prepared_bytes
from fewbits.runtime.linear import QEmbedding, QLinear, holds_packed, packed
from fewbits.runtime.placing import Placing, device_of
from fewbits.runtime.shown import show_types


@register_quantizer(METHOD)
class FewbitsQuantizer(HfQuantizer):
    """One model that is being loaded, or was."""

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.asked = _asked(quantization_config, self.pre_quantized)
        self.choices: dict[str, Choice] = {}
        self.stored: Stored | None = None
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.conversions: list[Any] | None = None  # of names and parts, by which Transformers read the files
        self.where, self.dtype, self.packed = "the model", torch.float32, False
        self.files: list[str] = []
        self.placed, self.calibrates_on = Placing({"": torch.device("cpu")}), "cpu"

    # before loading -------------------------------------------------------------------------------------------------
    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Called with the map that was asked for, and once more with what Transformers made of `auto` and the like."""
        device_map = kwargs.get("device_map")
        if not isinstance(device_map, dict):
            self.calibrates_on = "auto" if isinstance(device_map, str) else "cpu"
            return
        self.placed = Placing({name: device_of(to) for name, to in device_map.items()})
        self.calibrates_on = str(self.placed.gpu or "cpu")
        if self.placed.gpu and any(d.type == "cpu" for d in self.placed.devices):
            raise FewbitsError("device_map: Transformers would copy to a GPU, at each use, what it leaves on the CPU",
                               'fewbits.load(…, device_map="auto") computes there where weights lie')

    def update_device_map(self, device_map: Any) -> Any:
        return {"": "cpu"} if device_map is None or accelerator() is None else device_map

    def param_element_size(self, model: Any, param_name: str, param: torch.Tensor) -> float:
        """Bytes of each value, by which Transformers shares the model out."""
        known: Choice | Entry | None = self.choices.get(param_name)
        if self.stored:
            known = self.stored.packed(param_name)
        if known is None:
            return param.element_size()
        device = self.placed.gpu or torch.device(accelerator() or "cpu")
        return prepared_bytes(known, device, self.dtype, self.asked.kernel) / max(1, param.numel())

    def _process_model_before_weight_loading(self, model: Any, dtype: torch.dtype = torch.float32,
                                             checkpoint_files: list[str] | None = None, **kwargs: Any) -> Any:
        model.quantization_method = METHOD
        self.where, self.dtype, self.files = model.name_or_path or type(model).__name__, dtype, checkpoint_files or []
        self.packed, self.pre_quantized = self.pre_quantized, False  # Transformers then reads nothing ahead
        if self.packed:
            return model
        if self.asked.wish is None:
            raise FewbitsError(f"{self.where}: not quantized, and FewbitsConfig names no recipe",
                               'FewbitsConfig("nf4")')
        facts, names = _facts(model)

        def held(name: str) -> bool:
            owner, _, leaf = names.get(name, "").rpartition(".")
            return leaf == "weight" and holds_packed(model.get_submodule(owner))

        plan = zeroshot.plan(self.asked.wish, facts, model, held, self.asked.calibration is not None)
        tell(plan.notes)
        if self.asked.calibration is None:
            self.choices = {names[name]: choice for name, choice in plan.choices.items()}
        return model

    def _opened(self, model: Any) -> Checkpoint | None:
        """The packed weights of a model that came with some, or that were made of it here."""
        if not self.packed and self.asked.calibration is None:
            return None
        if not self.files:
            raise FewbitsError(f"{self.where}: is read from files here", "give no state_dict")
        first = Path(self.files[0])
        found = containers.open(first.parent if len(self.files) > 1 or first.name == WEIGHTS else first)
        if self.packed:
            return found
        from fewbits.hf.calibrated import calibrated

        self.folder = tempfile.TemporaryDirectory(prefix="fewbits-")
        return calibrated(found, self.asked, Path(self.folder.name) / "model", self.calibrates_on)

    # while loading --------------------------------------------------------------------------------------------------
    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.choices

    def get_quantize_ops(self) -> ConversionOps:
        return Quantize(self)

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        checkpoint = self._opened(model)
        if checkpoint is None:
            return weight_conversions
        self.stored = Stored(checkpoint, model, self.make)
        return [self.stored.converter(weight_conversions), *weight_conversions]

    def make(self, model: nn.Module, name: str, q: Any) -> nn.Parameter:
        """Let `q` take the place of the parameter `name`; returns the parameter that holds its codes."""
        owner = name.rpartition(".")[0]
        outliers = threshold(self.asked.outliers, self.stored.checkpoint if self.stored else None)
        prepared = prepare(q, self.placed.of(name), self.dtype, self.asked.kernel, (), outliers)
        made = packed(prepared, model.get_submodule(owner))
        model.set_submodule(owner, made)
        for buffer in made.buffers(recurse=False):
            buffer._is_hf_initialized = True  # type: ignore[attr-defined]
        weight = made.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    # after loading --------------------------------------------------------------------------------------------------
    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        tie(model, self.placed, self.asked.kernel)
        show_types(model, self.dtype)
        self.conversions = model._weight_conversions
        if self.folder:
            self.folder.cleanup()
        elif self.stored:
            vars(model)["checkpoint"] = self.stored.checkpoint
        self.stored, self.folder = None, None
        return model

    @property
    def is_trainable(self) -> bool:
        """Adapters on packed weights are: gradients flow to the inputs of a layer."""
        return True

    def is_serializable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        if getattr(model, "_hf_peft_config_loaded", False):  # of an adapter nothing of the base is saved
            return None, {}
        model._weight_conversions = self.conversions
        found, config = saving.state_dict(model)
        model.config.quantization_config = config
        model._weight_conversions = []  # those are the names in files
        return found, {}

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, module in list(model.named_modules()):
            if isinstance(module, (QLinear, QEmbedding)):
                model.set_submodule(name, saving.unpacked(module, dtype or self.dtype))
        model.tie_weights()
        return model


class Quantize(ConversionOps):
    """One parameter of floats becomes a layer of packed weights."""

    def __init__(self, quantizer: FewbitsQuantizer):
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        found, model = {}, kwargs["model"]
        for name, value in input_dict.items():
            weight, choice = value[0] if isinstance(value, list) else value, self.quantizer.choices[name]
            if isinstance(model.get_submodule(name.rpartition(".")[0]), Conv1D) and not choice.transposed:
                weight = weight.T  # of families that the table knows to be so
            q = zeroshot.solved(weight, choice, self.quantizer.where)
            if weight.device.type == "cpu":
                forget(weight.data_ptr(), weight.numel() * weight.element_size())
            found[name] = self.quantizer.make(model, name, q)
        return found


def attach(model: transformers.PreTrainedModel) -> None:
    """Let a model that `fewbits.load` made save itself, and Transformers know that its weights are packed."""
    config = FewbitsConfig()
    config.saved = {"quant_method": METHOD}
    quantizer = FewbitsQuantizer(config, pre_quantized=False)
    vars(model).update(hf_quantizer=quantizer, is_quantized=True, quantization_method=METHOD)


def _asked(config: Any, stored: bool) -> FewbitsConfig:
    if isinstance(config, FewbitsConfig):
        return config
    from fewbits.hf.takeover import translated

    return translated(config, stored)


def _facts(model: transformers.PreTrainedModel) -> tuple[ModelFacts, dict[str, str]]:
    """What recipes know of a model whose weights are not there yet; and its parameters by their names in files."""
    config = model.config.to_dict() | {"architectures": [type(model).__name__]}
    codec, tied = float_of(config), getattr(model, "all_tied_weights_keys", {})
    own: dict[str, torch.Tensor] = {n: p for n, p in model.named_parameters() if n not in tied}
    named = {id(p): n for n, p in own.items()}
    filed: dict[str, torch.Tensor] = revert_weight_conversion(model, own)
    entries = {n: Entry(n, tuple(t.shape), codec, _nothing) for n, t in filed.items()}
    checkpoint = Checkpoint(Path(model.name_or_path or "model"), "transformers", config, turned(config, entries))
    return ModelFacts.of(checkpoint, model), {n: named[id(t)] for n, t in filed.items() if id(t) in named}


def _nothing() -> Any:
    raise AssertionError("only what is known of a tensor was asked")

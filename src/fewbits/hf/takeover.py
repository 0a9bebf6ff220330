"""Transformers' own configurations for bitsandbytes, GPTQ and others, loaded by fewbits: `enable()`, `disable()`.

Transformers refuses to register a method twice, so its tables are changed in place, and changed back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import BitsAndBytesConfig, GPTQConfig
from transformers.quantizers import auto

from fewbits.errors import FewbitsError
from fewbits.hf.config import FewbitsConfig
from fewbits.hf.quantizer import FewbitsQuantizer

METHODS = ("bitsandbytes_4bit", "bitsandbytes_8bit", "gptq", "awq", "compressed-tensors")
QUANTIZERS: dict[str, Any] = auto.AUTO_QUANTIZER_MAPPING  # Transformers' own tables
CONFIGS: dict[str, Any] = auto.AUTO_QUANTIZATION_CONFIG_MAPPING
_before: dict[str, tuple[Any, Any]] = {}  # method -> Transformers' own quantizer and configuration


def enable(force: bool = False, kernel: str | None = None) -> None:
    """Let fewbits load what Transformers' `BitsAndBytesConfig` and `GPTQConfig` ask for, and checkpoints that carry
    these or AWQ's or compressed-tensors', where Transformers' own way cannot: its package is missing, or has no kernel
    for this machine. With `force`, always. `kernel` is that of `fewbits.load`.
    """
    for method in METHODS:
        own = _before.setdefault(method, (QUANTIZERS[method], CONFIGS[method]))
        QUANTIZERS[method], CONFIGS[method] = _Chosen(own[0], force, kernel), _Described(own[1])


def disable() -> None:
    """Transformers as it was before `enable`."""
    for method, (quantizer, config) in _before.items():
        QUANTIZERS[method], CONFIGS[method] = quantizer, config
    _before.clear()


@dataclass(frozen=True)
class _Chosen:
    """In the place of a quantizer's class: makes Transformers' own if that works here, else ours."""

    own: Callable[..., Any]
    force: bool
    kernel: str | None

    def __call__(self, config: Any, **kwargs: Any) -> Any:
        if not self.force and not isinstance(config, FewbitsConfig):
            try:
                made = self.own(config, **kwargs)
                made.validate_environment(device_map=None)
                return made
            except (ImportError, RuntimeError, ValueError):
                pass  # what it lacks, ours doesn't need
        found = FewbitsQuantizer(config, **kwargs)
        found.asked.kernel = self.kernel
        return found


@dataclass(frozen=True)
class _Described:
    """In the place of a configuration's class: what a checkpoint says, also where its package is missing."""

    own: Any

    def from_dict(self, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        try:
            return self.own.from_dict(config_dict, **kwargs)
        except ImportError:
            return FewbitsConfig.from_dict(config_dict, **kwargs)


def translated(config: Any, stored: bool) -> FewbitsConfig:
    """What another method's configuration asks for, in our words; of `stored` weights their files say the rest.

    Raises:
        FewbitsError: it asks for what we have no way to do.
    """
    if isinstance(config, BitsAndBytesConfig):
        return _bitsandbytes(config)
    if stored:
        return FewbitsConfig()
    if config.quant_method == "gptq":
        return _gptq(config)
    raise FewbitsError(f"{type(config).__name__} describes weights that are quantized already, and these are not",
                       'quantize them first, or take FewbitsConfig("int4-g128")')


def _bitsandbytes(config: BitsAndBytesConfig) -> FewbitsConfig:
    if config.llm_int8_has_fp16_weight:
        raise FewbitsError("llm_int8_has_fp16_weight keeps a copy in 16 bits, which fewbits has no use for",
                           "leave it out")
    if not (config.load_in_8bit or config.load_in_4bit):
        raise FewbitsError("BitsAndBytesConfig asks for nothing", "load_in_8bit=True or load_in_4bit=True")
    if config.load_in_4bit and config.bnb_4bit_quant_type not in ("nf4", "fp4"):
        raise FewbitsError(f"bnb_4bit_quant_type {config.bnb_4bit_quant_type!r}", "nf4 or fp4")
    four = config.bnb_4bit_quant_type + ("-dq" if config.bnb_4bit_use_double_quant else "")
    return FewbitsConfig("int8" if config.load_in_8bit else four, config.llm_int8_skip_modules or (),
                         outliers=config.llm_int8_threshold)


def _gptq(config: GPTQConfig) -> FewbitsConfig:
    group = "row" if config.group_size == -1 else f"g{config.group_size}"
    texts = "self" if config.dataset is None else config.dataset
    return FewbitsConfig(f"int{config.bits}-{group}{'' if config.sym else '-asym'}",
                         solver="gptq-act-order" if config.desc_act else "gptq",
                         calibration="c4" if texts == "c4-new" else texts, tokenizer=config.tokenizer)

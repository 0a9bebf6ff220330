"""LoRA adapters on a loaded model: made, taken from a directory, saved. peft does the work."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from fewbits.errors import FewbitsError

ALL = "all-linear"  # but the head


@dataclass(frozen=True)
class Lora:
    """The shape of an adapter."""

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    targets: str | tuple[str, ...] = ALL  # ends of modules' names, or a regular expression


def attach(net: transformers.PreTrainedModel, lora: Lora, start: str | Path | None, base: str) -> Any:
    """The model with a trainable adapter: a new one, or the one in the directory `start`. `base` is what the adapter
    will call the model.

    Raises:
        FewbitsError: peft is not installed, no module of the model is meant, an adapter of another model.
    """
    try:
        import peft

        from fewbits.finetuning.fused import fuse
    except ImportError:
        raise FewbitsError("fine-tuning needs peft, which is not installed",
                           "pip install 'fewbits[finetune]'") from None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    if start is None:
        config: Any = peft.LoraConfig(
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets,
            task_type="CAUSAL_LM")
    else:
        config = _config(Path(start))
    vars(net)["name_or_path"] = base  # which peft writes down
    config.base_model_name_or_path, config.inference_mode = base, False
    try:
        tuned = peft.get_peft_model(net, config)
    except ValueError as error:
        names = ",".join([targets] if isinstance(targets, str) else targets)
        what = f"--targets {names}" if start is None else f"{start}: of another model"
        raise FewbitsError(f"{what}: {str(error).splitlines()[0]}") from None
    if start is not None:
        _fill(tuned, Path(start))
    fuse(tuned)
    return tuned


def save(tuned: Any, folder: Path) -> None:
    """Write the adapter as peft does; nothing of the base is in it."""
    tuned.save_pretrained(folder, save_embedding_layers=False)


def _config(start: Path) -> Any:
    import peft

    if not (start / "adapter_config.json").is_file():
        raise FewbitsError(f"{start}: no adapter_config.json in it", "fewbits convert makes a peft directory of a GGUF")
    config = peft.PeftConfig.from_pretrained(str(start))
    if not isinstance(config, peft.LoraConfig):
        raise FewbitsError(f"{start}: {config.peft_type}, where LoRA is expected")
    return config


def _fill(tuned: Any, start: Path) -> None:
    """Put the weights of a peft directory into the adapter.

    Raises:
        FewbitsError: names or shapes that the model does not have.
    """
    import peft
    from peft.utils.save_and_load import load_peft_weights

    found: dict[str, torch.Tensor] = load_peft_weights(str(start), device="cpu")
    meant = peft.get_peft_model_state_dict(tuned, save_embedding_layers=False)
    for name in [*found, *meant]:
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (found, meant)]
        if shapes[0] != shapes[1]:
            said = "missing" if shapes[0] is None else str(shapes[0])
            wanted = "does not have it" if shapes[1] is None else f"takes {shapes[1]}"
            raise FewbitsError(f"{start}: {name} is {said}, and the model {wanted}", "it belongs to another model")
    peft.set_peft_model_state_dict(tuned, found)

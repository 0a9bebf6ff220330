"""What users hand to `from_pretrained`, and what config.json says of a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from fewbits.recipe import Overrides, Recipe
from fewbits.zeroshot import Wish

METHOD = "fewbits"


@register_quantization_config(METHOD)
class FewbitsConfig(QuantizationConfigMixin):
    """Quantize while loading by `recipe`: `nf4`, `int8`, `int4-g128`, `Q4_K`, any other of `fewbits quantize`.

    `skip` names modules to leave alone, besides those that the recipe does (by name, its beginning or end, or as a
    regular expression); `overrides`, `solver`, `kernel` and `outliers` are those of `fewbits.load`. With `calibration`
    (`self`, `c4`, a file, a list of texts or of batches) the model goes through `fewbits.quantize` first, by GPTQ
    unless `solver` says otherwise. Texts are read by the model's tokenizer, or `tokenizer`, a name or itself.
    """

    def __init__(self, recipe: str | Recipe | None = None, skip: Sequence[str] = (), *, overrides: Overrides = None,
                 solver: str | None = None, kernel: str | None = None, outliers: float | None = None,
                 calibration: Any = None, tokenizer: Any = None):
        self.quant_method: Any = METHOD
        self.recipe, self.skip, self.overrides, self.solver = recipe, list(skip), overrides, solver
        self.kernel, self.outliers, self.calibration, self.tokenizer = kernel, outliers, calibration, tokenizer
        self.saved: dict[str, Any] | None = None

    @property
    def wish(self) -> Wish | None:
        """What is asked of a model in full precision."""
        return None if self.recipe is None else Wish(self.recipe, self.skip, self.overrides, self.solver)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From a config.json: what is stored there says the layout of the weights."""
        found = config_dict | kwargs
        if "recipe" in found:
            made = cls(**{k: v for k, v in found.items() if k != "quant_method"})
        else:
            made = cls()
            made.saved = dict(config_dict)
        return (made, {}) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """What config.json says: of weights that were loaded or saved, their layout; else what was asked."""
        if self.saved is not None:
            return dict(self.saved)
        recipe = self.recipe.name if isinstance(self.recipe, Recipe) else self.recipe
        overrides = self.overrides if self.overrides is None or isinstance(self.overrides, dict) else [*self.overrides]
        return {"quant_method": METHOD, "recipe": recipe, "skip": self.skip, "overrides": overrides,
                "solver": self.solver, "kernel": self.kernel, "outliers": self.outliers}

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

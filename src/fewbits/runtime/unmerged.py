"""peft adds an adapter to `weight.data` when it merges; where that holds packed codes, it must not."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fewbits.errors import FewbitsError


@functools.cache
def refuse_merging(packed: type[nn.Module]) -> None:
    """Have peft's `merge_adapter` and `merge_and_unload` refuse modules of the kind `packed`. `unload` works."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    allowed = BaseTuner._check_merge_allowed

    @functools.wraps(allowed)
    def checked(self: Any) -> None:
        for name, module in self.model.named_modules():
            if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), packed):
                raise FewbitsError(f"{name}: nothing can be merged into packed codes",
                                   "save the adapter; fewbits merge puts it into the original's or the decoded weights")
        allowed(self)

    tuner: Any = BaseTuner
    tuner._check_merge_allowed = checked

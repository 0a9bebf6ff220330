"""Names of a Checkpoint's tensors, for the families of the table: those of the model with its head, and only weights.

Files of the base model leave its prefix out (`h.0.` for `transformer.h.0.`), older ones hold masks and rotary
frequencies beside the weights, which follow from the configuration.
"""

from __future__ import annotations

from typing import Any

from fewbits import arch
from fewbits.checkpoint import Entry


def named(config: dict[str, Any], entries: dict[str, Entry]) -> dict[str, Entry]:
    """The entries of a directory under the names of a Checkpoint."""
    family = arch.lookup(config)
    if family is None:
        return entries
    kept = {n: e for n, e in entries.items() if not n.endswith(family.skipped)}
    if any(n.startswith(family.base) for n in kept):
        return kept
    longer = [e if e.name == family.head else e.as_(name=family.base + e.name) for e in kept.values()]
    return {e.name: e for e in longer}

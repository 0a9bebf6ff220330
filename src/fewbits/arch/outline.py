"""Families of which only the roles of weights are known: enough for Transformers-style layouts, which keep names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fewbits.arch.base import Config

LAYER = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Outline:
    """Roles by name, `{i}` for the layer. What no row names has no role and is left alone."""

    name: str
    model_types: tuple[str, ...]
    roles: Mapping[str, str]
    reason: str  # why it does not go to GGUF
    prefixes: tuple[tuple[str, str], ...] = ()  # (as files begin a name, as rows do); the first that fits counts

    def role(self, name: str) -> tuple[str, int | None]:
        """Role and layer of the tensor `name`; an empty role where it has none."""
        prefix, instead = next((p for p in self.prefixes if name.startswith(p[0])), ("", ""))
        row = instead + name.removeprefix(prefix)
        layer = LAYER.search(row)
        role = self.roles.get(LAYER.sub(".{i}.", row, count=1), "")
        return role, int(layer[1]) if role and layer else None


def linear(prefix: str, **roles: str) -> dict[str, str]:
    """Rows of the linear layers below `prefix`: name with `__` for dots -> role."""
    return {f"{prefix}{name.replace('__', '.')}.weight": role for name, role in roles.items()}


def of_type(outlines: Iterable[Outline], config: Config) -> Outline | None:
    return next((o for o in outlines if config.get("model_type") in o.model_types), None)

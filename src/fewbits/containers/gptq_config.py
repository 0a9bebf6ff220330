"""What `quantization_config` of a GPTQ directory says: bits and group size of each layer, and the version."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.errors import FewbitsError

Kind = tuple[int, int, bool]  # bits, group size (-1: one group a row), symmetric


@dataclass(frozen=True)
class Rules:
    """Bits and group size by layer: those of the model, and overrides by pattern, of which the first match counts."""

    where: Path
    version: str
    bits: int
    group: int
    dynamic: tuple[tuple[re.Pattern[str], dict[str, Any]], ...]

    @classmethod
    def parse(cls, folder: Path, config: Mapping[str, Any]) -> Rules:
        """
        Raises:
            FewbitsError: a value that is none of this layout.
        """
        where = folder / "config.json"

        def bad(key: str, value: object, hint: str) -> FewbitsError:
            return FewbitsError(f"{where}: quantization_config: {key} {value!r}", hint)

        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            raise bad("checkpoint_format", version, "read are gptq and gptq_v2")
        if config.get("pack_dtype", "int32") != "int32":
            raise bad("pack_dtype", config["pack_dtype"], "only codes packed in int32 are read")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise bad("dynamic", dynamic, "an object of patterns was expected")
        patterns = []
        for pattern, override in dynamic.items():
            if pattern.startswith("-:"):
                continue  # layers left in floats: the file shows which
            if not isinstance(override, dict):
                raise bad(f"dynamic[{pattern!r}]", override, "an object was expected")
            try:
                patterns.append((re.compile(pattern.removeprefix("+:")), override))
            except re.error as error:
                raise bad("dynamic", pattern, f"not a regular expression: {error}") from None
        rules = cls(where, version, config.get("bits", 4), config.get("group_size", 128), tuple(patterns))
        rules.of("")
        return rules

    def of(self, module: str) -> tuple[int, int]:
        """Bits and group size of a layer."""
        override = next((o for pattern, o in self.dynamic if pattern.match(module)), {})
        bits, group = override.get("bits", self.bits), override.get("group_size", self.group)
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise FewbitsError(f"{self.where}: quantization_config: {module or 'bits'}: {bits!r} bits", "2, 3, 4 or 8")
        if type(group) is not int or (group < 1 and group != -1):
            raise FewbitsError(f"{self.where}: quantization_config: {module or 'group_size'}: groups of {group!r}",
                               "a number of columns, or -1 for one group a row")
        return bits, group


def dynamic_rules(kinds: Mapping[str, Kind], common: Kind, skipped: list[str]) -> dict[str, dict[str, Any]]:
    """Overrides for layers unlike `common`, and exclusions for layers left in floats."""
    rules: dict[str, dict[str, Any]] = {f"-:^{re.escape(module)}$": {} for module in skipped}
    for module, (bits, group, symmetric) in kinds.items():
        if (bits, group, symmetric) != common:
            rules[f"+:^{re.escape(module)}$"] = {"bits": bits, "group_size": group, "sym": symmetric}
    return rules

"""A recipe as a TOML file: a base, and a codec, perhaps a solver, for every pattern of names.

    base = "Q4_K_M"
    solver = "search"

    [tensors]
    "*.v_proj.weight" = "Q8_0"
    "blk.0.*" = { codec = "Q6_K", solver = "nearest" }
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.errors import FewbitsError
from fewbits.recipe import patterns
from fewbits.recipe.patterns import Override

if TYPE_CHECKING:
    from fewbits.recipe import Recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KEYS = ("base", "container", "solver", "tensors")
SUFFIX = ".toml"
EXAMPLE = '"*.v_proj.weight" = "Q8_0", or "*.v_proj.weight" = { codec = "Q8_0", solver = "nearest" }'


def read(path: str) -> tuple[str, str | None, str | None, tuple[Override, ...]]:
    """Base, container, solver and overrides of the recipe at `path`.

    Raises:
        FewbitsError: no such file, no TOML, an unknown key, solver or codec, or a value of another type than expected.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise FewbitsError(f"{path}: {error.strerror or error}", "a recipe is a name (Q4_K_M, nf4) or a TOML file") \
            from None
    except ValueError as error:  # not UTF-8, or not TOML
        raise FewbitsError(f"{path}: not TOML: {error}") from None
    _known(path, found, KEYS)
    texts = {key: _text(path, key, found.get(key)) for key in ("base", "container", "solver")}
    if texts["base"] is None:
        raise FewbitsError(f"{path}: no base", 'a preset or a codec: base = "Q4_K_M"')
    tensors = found.get("tensors", {})
    if not isinstance(tensors, dict):
        raise FewbitsError(f"{path}: tensors is no table", f"[tensors] and lines like {EXAMPLE}")
    overrides = tuple(_override(path, pattern, value) for pattern, value in tensors.items())
    return texts["base"], texts["container"], _solver(path, texts["solver"]), overrides


def text(recipe: Recipe) -> str:
    """The TOML file that a recipe of one base and overrides is read back from; each override has a name or a glob."""
    base = recipe.codec.name if recipe.codec else recipe.mix.base if recipe.mix else ""
    lines = [f"base = {json.dumps(base)}", f"container = {json.dumps(recipe.container)}"]
    lines += [f"solver = {json.dumps(recipe.solver)}"] * (recipe.solver is not None) + ["", "[tensors]"]
    for o in recipe.overrides:
        value = json.dumps(o.codec.name) if o.solver is None else \
            f"{{ codec = {json.dumps(o.codec.name)}, solver = {json.dumps(o.solver)} }}"
        lines.append(f"{json.dumps(o.pattern)} = {value}")
    return "\n".join(lines) + "\n"


def _known(where: str, found: dict[str, Any], keys: Collection[str]) -> None:
    unknown = [key for key in found if key not in keys]
    if unknown:
        raise FewbitsError(f"{where}: unknown key {unknown[0]!r}", "there are " + ", ".join(keys))


def _text(where: str, key: str, value: Any) -> str | None:
    if value is not None and not (isinstance(value, str) and value):
        raise FewbitsError(f"{where}: {key} is {value!r}; a text in quotes is expected")
    return value


def _solver(where: str, name: str | None) -> str | None:
    from fewbits.solvers import SOLVERS

    if name is not None and name not in SOLVERS:
        raise FewbitsError(f"{where}: unknown solver {name!r}", "one of: " + ", ".join(SOLVERS))
    return name


def _override(path: str, pattern: str, value: Any) -> Override:
    where = f"{path}: tensors.{pattern!r}"
    if isinstance(value, str):
        value = {"codec": value}
    if not isinstance(value, dict):
        raise FewbitsError(f"{where} is {value!r}", EXAMPLE)
    if any(isinstance(v, dict) for v in value.values()):
        raise FewbitsError(f"{where} is a table of tables", f"a pattern with dots needs quotes: {EXAMPLE}")
    _known(where, value, ("codec", "solver"))
    name = _text(where, "codec", value.get("codec"))
    if name is None:
        raise FewbitsError(f"{where} names no codec", EXAMPLE)
    try:
        return patterns.one(pattern, name, _solver(where, _text(where, "solver", value.get("solver"))), f"{path}:")
    except FewbitsError as error:
        raise error if str(error).startswith(path) else FewbitsError(f"{where}: {error}", error.hint) from None

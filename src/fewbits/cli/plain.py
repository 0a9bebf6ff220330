"""Plain command lines, parsed in no time: typer's way of making values takes a tenth of a second.

What is not plain (`--help`, mistakes, anything unusual) is left to typer, which has the same signature, and explains.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from typer.models import ArgumentInfo

VALUES: dict[Any, Callable[[str], Any]] = {int: int, float: float, str: str, Path: Path}


def parse(command: Callable[..., None], words: Sequence[str]) -> dict[str, Any] | None:
    """The arguments of `command`, or None where typer is to parse the words."""
    arguments, options = list[inspect.Parameter](), dict[str, inspect.Parameter]()
    parameters = inspect.signature(command, eval_str=True).parameters
    for p in parameters.values():
        info = _info(p)
        if isinstance(info, ArgumentInfo):
            arguments.append(p)
            continue
        named = [n for n in (info.default, *(info.param_decls or ())) if isinstance(n, str)]
        for name in named or ["--" + p.name.replace("_", "-")]:
            options[name] = p
    given = {p.name: p.default for p in parameters.values() if p.default is not inspect.Parameter.empty}
    given |= {name: list(value) for name, value in given.items() if isinstance(value, list)}
    rest, left = list(words), list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "-" or not word.startswith("-"):
            if not left:
                return None
            given[left.pop(0).name] = word
            continue
        name, equals, value = word.partition("=")
        option = options.get(name)
        if option is None or _kind(option) is bool and equals:
            return None
        if _kind(option) is bool:
            given[option.name] = True
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                return None
            value = rest.pop(0)
        try:
            made = VALUES[_kind(option)](value)
        except (KeyError, ValueError):
            return None
        if not _within(option, made):
            return None
        if isinstance(given[option.name], list):
            given[option.name].append(made)
        else:
            given[option.name] = made
    return None if left else given


def _info(p: inspect.Parameter) -> Any:
    return get_args(p.annotation)[1]


def _kind(p: inspect.Parameter) -> Any:
    """The type of one value: of `int | None` and `list[int]` it is int."""
    kind = get_args(p.annotation)[0]
    if get_origin(kind) in (types.UnionType, list):
        kind = get_args(kind)[0]
    return kind


def _within(p: inspect.Parameter, value: Any) -> bool:
    info = _info(p)
    return (info.min is None or value >= info.min) and (info.max is None or value <= info.max)

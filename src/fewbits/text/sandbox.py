"""Jinja for chat templates: what they expect to find, no way out, and bounds on what they take.

Jinja's sandbox keeps templates from Python's insides. Beyond that every turn of a loop, every call, filter and operator
is a step; steps, time, and the length of every text and list that comes to be are bounded, here and not in Jinja.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

STEPS = 500_000  # a message takes some tens
SECONDS = 5.0
LENGTH = 1 << 24  # characters of a text, items of a list
WRITTEN = 4 * LENGTH  # characters in all, kept or not
WIDE = re.compile(r"\d{7}")  # in a format: a field that wide
GIVEN = re.compile(r"%[^%a-zA-Z]*\*|\{[^}]*\{")  # in a format: a width that is an argument


class Refused(Exception):
    """A template cannot be compiled, or its rendering ended with an error; the message is one line."""


class _Exceeded(Exception):
    """A bound was met. No TemplateError, which Jinja may take for a template's own."""


class _Budget:
    def __init__(self) -> None:
        self.steps, self.until, self.written = STEPS, time.monotonic() + SECONDS, 0

    def step(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise _Exceeded(f"takes more than {STEPS} steps")
        if time.monotonic() > self.until:
            raise _Exceeded(f"takes more than {SECONDS:.0f} seconds")


_budget: ContextVar[_Budget] = ContextVar("budget")  # of the rendering that this thread does


def compile(source: str) -> jinja2.Template:
    """A template, ready to run.

    Raises:
        Refused: it is none.
    """
    token = _budget.set(_Budget())
    try:
        return ENVIRONMENT.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise Refused(f"line {error.lineno}: {_line(error)}") from None
    except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, _Exceeded) as error:
        raise Refused(f"cannot be compiled: {_line(error)}") from None
    finally:
        _budget.reset(token)


def run(template: jinja2.Template, **values: Any) -> str:
    """What a template makes of `values`, which are plain data.

    Raises:
        Refused: it raised an error of its own, failed, or met a bound.
    """
    token = _budget.set(_Budget())
    parts, length = [], 0
    try:
        for part in template.generate(**values):
            length += len(part)
            if length > LENGTH:
                raise _Exceeded(f"writes more than {LENGTH} characters")
            parts.append(part)
        return "".join(parts)
    except _Exceeded as error:
        raise Refused(str(error)) from None
    except RecursionError:
        raise Refused("calls itself too often") from None
    except MemoryError:
        raise Refused("takes more memory than there is") from None
    except jinja2.TemplateError as error:
        raise Refused(_line(error)) from None
    except Exception as error:  # anything: filters of Jinja and methods of data raise what they like
        raise Refused(f"fails: {type(error).__name__}: {_line(error)}") from None
    finally:
        _budget.reset(token)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# bounds ---------------------------------------------------------------------------------------------------------------
def _step(value: Any = None) -> bool:
    _budget.get().step()
    return True


def _checked(value: Any) -> Any:
    if isinstance(value, (str, list, tuple, dict)) and len(value) > LENGTH:
        raise _Exceeded(f"makes more than {LENGTH} characters or items")
    return value


def _write(value: Any) -> Any:
    """What is written, into the text or a variable."""
    if isinstance(value, str):
        budget = _budget.get()
        budget.written += len(value)
        if budget.written > WRITTEN:
            raise _Exceeded(f"writes more than {WRITTEN} characters")
    return value


def _before(name: str, owner: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Refuse what would make something too long, before it does."""
    _step()
    every = (*arguments, *named.values())
    formats = name == "format" and isinstance(owner, str)
    if any(isinstance(a, (int, float)) and abs(a) > LENGTH for a in every) and (
            GIVEN.search(owner) if formats else name not in HARMLESS):
        raise _Exceeded(f"{name} of a number beyond {LENGTH}")
    if formats and WIDE.search(owner):
        raise _Exceeded("has a format wider than 999999 characters")
    length = 0
    if name == "replace" and isinstance(owner, str) and len(every) > 1:
        length = owner.count(str(every[0])) * len(str(every[1]))
    elif name == "join":
        items, between = (every[0], owner) if isinstance(owner, str) and every else (owner, (*every, "")[0])
        if isinstance(items, (list, tuple, str)):
            length = len(items) * len(str(between)) + sum(len(i) for i in items if isinstance(i, str))
    elif name in ("format", "indent", "safe", "translate"):
        breaks = owner.count("\n") + 1 if isinstance(owner, str) else 1
        length = sum(len(a) for a in every if isinstance(a, str)) * breaks
        length += sum(a for a in every if isinstance(a, int)) * breaks if name == "indent" else 0
    if length > LENGTH:
        raise _Exceeded(f"makes more than {LENGTH} characters or items")


HARMLESS = ("abs", "default", "d", "int", "float", "string", "tojson", "round", "strftime_now", "append",
            "dict", "namespace", "get", "equalto", "raise_exception")


def _filter(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    hidden = 1 if hasattr(plain, "jinja_pass_arg") else 0  # arguments that Jinja puts first

    @wraps(plain)
    def bounded(*arguments: Any, **named: Any) -> Any:
        owner, *rest = (*arguments[hidden:], None)
        _before(name, owner, tuple(rest[:-1]), named)
        return _checked(plain(*arguments, **named))

    return bounded


class _Bounded(NodeTransformer):
    """Makes turns of loops steps, and `a ~ b` a filter, whose result is checked; blocks that are kept are checked."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.Filter(nodes.Const(None), STEP, [], [], None, None)
        node.body.insert(0, nodes.ExprStmt(tick))
        if node.test is not None:
            node.test = nodes.And(tick, node.test)
        return node

    def visit_AssignBlock(self, node: nodes.AssignBlock) -> nodes.Node:
        self.generic_visit(node)
        node.filter = nodes.Filter(node.filter, CHECK, [], [], None, None)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(nodes.List(node.nodes), "join", [], [], None, None, lineno=node.lineno)


STEP, CHECK = "counted step", "checked block"  # no names that a template can write
OPERATORS = frozenset(("+", "*", "**", "%", "//"))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    intercepted_binops = OPERATORS

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Bounded().visit(super()._parse(source, name, filename))
        tree.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        _step()
        sizes = [len(side) for side in (left, right) if isinstance(side, (str, list, tuple))]
        numbers = [abs(side) for side in (left, right) if isinstance(side, (int, float))]
        if operator == "*" and sizes and numbers and sizes[0] * numbers[0] > LENGTH or operator == "+" and sum(
                sizes) > LENGTH:
            raise _Exceeded(f"makes more than {LENGTH} characters or items")
        if operator == "**" and any(n > 1024 for n in numbers) or operator == "*" and max(numbers, default=0) > 1e300:
            raise _Exceeded("computes with numbers that are too large")
        if operator == "%" and isinstance(left, str):
            _before("format", left, right if isinstance(right, tuple) else (right,), {})
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805, as Jinja has it
        name = getattr(__obj, "__name__", "")
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps str.format
        _before(name, getattr(method, "__self__", None), args, kwargs)
        return _checked(super().call(__context, __obj, *args, **kwargs))


# what templates expect ------------------------------------------------------------------------------------------------
class _Generation(jinja2.ext.Extension):
    """`{% generation %}` … `{% endgeneration %}` marks an answer, for training; here it is what it encloses."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None,
            separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _environment() -> _Environment:
    made = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols],
                        optimized=False, finalize=_write)
    del made.globals["lipsum"], made.globals["cycler"]
    made.filters["tojson"] = _tojson
    made.filters = {name: _filter(name, plain) for name, plain in made.filters.items()}
    made.filters |= {STEP: _step, CHECK: _checked}
    made.globals["raise_exception"] = _raise
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


ENVIRONMENT = _environment()

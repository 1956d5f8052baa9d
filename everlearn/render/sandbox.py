"""Jinja for templates that came with a model: sandboxed, and bounded in time and size.

Jinja's immutable sandbox keeps a template away from Python's internals and from changing what it is given; it doesn't keep it from
looping for hours or from doubling a text forty times. So every turn of a loop, call, filter and concatenation passes a checkpoint here,
and what could multiply a text is measured before it is made. Filters and functions are those that `transformers` gives chat templates.
"""

from __future__ import annotations

import contextvars
import functools
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, pass_eval_context
from jinja2.visitor import NodeTransformer

from everlearn.errors import InvalidRequest

__all__ = ["Template", "attempt", "compile_template", "parse", "run"]

SECONDS = 2.0  # of processor time
MAX_CHARS = 4 * 2**20  # of the prompt, and of every text on the way to it
MAX_COUNT = 100_000  # the largest number that a call or a filter is given

# In the processor time of the thread that renders: what else the machine has to do is no fault of a template.
_deadline: contextvars.ContextVar[float] = contextvars.ContextVar("deadline", default=float("inf"))


class OverLimit(TemplateError):
    """The template ran for too long or makes too much."""


class OutOfTime(OverLimit):
    """It ran for too long."""


def run(template: Template, variables: Mapping[str, Any], seconds: float = SECONDS) -> str:
    """The rendered text. Raises InvalidRequest(param="messages") with what the template, or a limit, said."""
    try:
        return _run(template, variables, seconds)
    except OutOfTime as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error.message}", param="messages") from None


def attempt(template: Template, variables: Mapping[str, Any], seconds: float) -> str | None:
    """The same for who can't wait: None where the time isn't enough."""
    try:
        return _run(template, variables, seconds)
    except OutOfTime:
        return None


def _run(template: Template, variables: Mapping[str, Any], seconds: float) -> str:
    token = _deadline.set(time.thread_time() + seconds)
    try:
        pieces, num_chars = [], 0
        for piece in template.generate(variables):
            pieces.append(piece)
            num_chars += len(piece)
            _check(num_chars)
        return "".join(pieces)
    except OutOfTime:
        raise
    except TemplateError as error:
        raise InvalidRequest(f"the model's chat template refuses these messages: {error.message}", param="messages") from None
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        # A template that expects something else of messages fails as any program does.
        raise InvalidRequest(
            f"the model's chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
        ) from None
    finally:
        _deadline.reset(token)


def compile_template(source: str) -> Template:
    """Raises jinja2.TemplateError on a syntax error."""
    return _ENVIRONMENT.from_string(source)


def parse(source: str) -> nodes.Template:
    """The syntax tree as written."""
    return Parser(_ENVIRONMENT, source).parse()


# ---- checkpoints ----


def _check(size: int = 0) -> None:
    if size > MAX_CHARS:
        raise OverLimit(f"it makes more than {MAX_CHARS} characters")
    if time.thread_time() > _deadline.get():
        raise OutOfTime("it ran for too long")


def _weight(value: Any) -> int:
    """How many characters `value` shows as, roughly; a list that holds the same list twice counts it twice, as printing does."""
    total, left, turns = 0, [value], 0
    while left and total <= MAX_CHARS:
        turns += 1
        if turns % 4096 == 0:
            _check()
        item = left.pop()
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, Mapping):
            left += [*item.keys(), *item.values()]
            total += 8
        elif isinstance(item, (list, tuple)):
            left += item
            total += 8
        total += 1
    return total


def _bounded(value: Any) -> Any:
    if not isinstance(value, (str, int, float, bool, type(None))):
        _check(_weight(value))
    return value


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _check()
        yield value


@pass_eval_context
def _joined(_: Any, values: list[Any]) -> str:
    _check(_weight(values))
    return "".join(map(str, values))


def _measure(name: str, values: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Before a filter or a method `name` runs on `values` (the first is what it is applied to): what it could make."""
    text, *rest = values if values else ("",)
    numbers = [value for value in (*rest, *options.values()) if isinstance(value, int)]
    if any(abs(number) > MAX_COUNT for number in numbers):
        raise OverLimit(f"it calls {name} with {max(numbers, key=abs)}")
    if name == "join":  # the filter has the list first, the method the text between
        items, between = (text, rest[0] if rest else "") if not isinstance(text, str) else (rest[0] if rest else "", text)
        _check(_weight(items) + (len(between) * len(items) if isinstance(between, str) and isinstance(items, (list, tuple)) else 0))
    elif name == "replace" and len(rest) > 1:
        _check(len(str(text)) + str(text).count(str(rest[0])) * len(str(rest[1])))
    elif name in ("indent", "expandtabs", "tojson"):
        widths = [len(value) if isinstance(value, str) else value for value in (*rest, *options.values()) if isinstance(value, (int, str))]
        places = str(text).count("\n") if name == "indent" else _weight(text)
        _check(_weight(text) + places * max(widths, default=4 if name == "indent" else 0))
    elif name == "format" and re.search(r"\d{6}", str(text)):
        raise OverLimit("it formats to a width of six digits")
    elif name in ("string", "tojson", "pprint", "sum", "list", "unique", "sort"):
        _bounded(text)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter behind a checkpoint. `wraps` keeps the mark that has Jinja pass a context as first argument."""
    given_context = hasattr(function, "jinja_pass_arg")

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        _check()
        _measure(name, args[1:] if given_context else args, kwargs)
        value = function(*args, **kwargs)
        _check(len(value) if isinstance(value, (str, list, tuple)) else 0)
        return value

    return guarded


# ---- the environment ----


class _Generation(Extension):
    """`{% generation %}` marks the assistant's text for training masks; here it is its body alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Checkpoints(NodeTransformer):
    """Puts a checkpoint into the syntax tree where Jinja has no hook of its own."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_each")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno), "_joined")

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filter(node.expr, "_bounded")
        for operand in node.ops:
            operand.expr = _filter(operand.expr, "_bounded")
        return node


def _filter(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Checkpoints().visit(super()._parse(source, name, filename))
        return tree.set_environment(self)  # type: ignore[return-value]

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _check()
        owner = getattr(obj, "__self__", None)
        _measure(getattr(obj, "__name__", ""), (owner, *args) if isinstance(owner, str) else ("", *args), kwargs)
        value = super().call(context, obj, *args, **kwargs)
        _check(len(value) if isinstance(value, (str, list, tuple, dict)) else 0)
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int) and isinstance(right, int)
        if operator == "**" and numbers and (left.bit_length() * abs(right) > 1024):
            raise OverLimit(f"it computes {left} ** {right}")
        if operator == "*":
            for one, other in ((left, right), (right, left)):
                if isinstance(one, (str, list, tuple)) and isinstance(other, int):
                    _check(len(one) * other)
            if numbers and left.bit_length() + right.bit_length() > 1024:
                raise OverLimit("it multiplies numbers of hundreds of digits")
        if operator == "%" and isinstance(left, str):
            _measure("format", (left, *(right if isinstance(right, tuple) else (right,))), {})
        value = super().call_binop(context, operator, left, right)
        _check(len(value) if isinstance(value, (str, list, tuple)) else 0)
        return value

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _measure("format", (value.__self__,), {})
        return wrapped


class _Namespace(Namespace):
    """As in `transformers`: no name with an underscore, which would reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        attributes = dict(*rest, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}")


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own escapes HTML, which a prompt isn't."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_environment() -> _Environment:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_bounded)
    environment.filters["tojson"] = _to_json
    environment.filters = {name: _guarded(name, function) for name, function in environment.filters.items()}
    environment.filters |= {"_each": _each, "_joined": _joined, "_bounded": _bounded}
    environment.globals.pop("lipsum")
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda pattern: datetime.now().strftime(pattern),
        "namespace": _Namespace,
    }
    return environment


_ENVIRONMENT = _make_environment()

"""A Jinja environment in which foreign code can neither reach out nor hold the server up.

Jinja's own sandbox keeps a template from Python's internals, but not from computing for ever or filling the memory.
Here every operation is paid for from the budget of its render: loop iterations, attributes and items, calls, filters,
operators, literals and output. What can be neither bounded nor paid for does not exist: methods and filters are those
of a list. Nothing is computed while a template is compiled.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace, pass_context

from rekindle.gateway.template_budget import (
    MAX_PADDING,
    PIECE_CHARS,
    Budget,
    TemplateTooCostly,
    check_number,
    check_padding,
    check_power,
    num_lines,
    replaced_chars,
    size_of,
    split_chars,
)
from rekindle.gateway.template_compiler import BoundedCodeGenerator
from rekindle.gateway.template_filters import FILTERS, INSTANT, SHALLOW, SPLITTING, pay_for_filter, to_json

_STRING_METHODS = frozenset({
    "capitalize", "casefold", "count", "endswith", "find", "format", "format_map", "index", "isalnum", "isalpha",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join", "lower", "lstrip",
    "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
})  # fmt: skip
_QUADRATIC_METHODS = frozenset({"lstrip", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "strip"})
"""Their time grows with the text times the argument."""
_COMPARING_TESTS = frozenset({
    "!=", "<", "<=", "==", ">", ">=", "eq", "equalto", "ge", "greaterthan", "gt", "in", "le", "lessthan", "lower", "lt",
    "divisibleby", "ne", "upper",
})  # fmt: skip


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """See the module. Templates run within `limited()` only, in any number of threads at a time."""

    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, **options)
        self.code_generator_class = BoundedCodeGenerator
        self.finalize = self.output
        self._thread = threading.local()
        self.globals["namespace"] = _OpaqueNamespace
        del self.globals["lipsum"], self.globals["cycler"]
        offered = {**self.filters, "tojson": to_json}
        self.filters = {name: self._paid_filter(name, offered[name]) for name in FILTERS}
        tests: dict[str, Any] = self.tests
        tests.update({name: self._paid_test(tests[name]) for name in _COMPARING_TESTS})

    @contextmanager
    def limited(self) -> Iterator[None]:
        """One render in this thread, with a budget of its own."""
        self._thread.budget = Budget()
        try:
            yield
        finally:
            del self._thread.budget

    @property
    def budget(self) -> Budget:
        budget: Budget | None = getattr(self._thread, "budget", None)
        if budget is None:
            raise TemplateTooCostly("nothing is computed while a template is compiled")
        return budget

    def tick(self) -> bool:
        """A loop begins an iteration, or tests an item."""
        self.budget.spend(1)
        return True

    def literal(self, num_chars: int) -> None:
        """Text of the template itself is put out."""
        self.budget.build(num_chars)

    @pass_context
    def output(self, context: Context | None, value: Any) -> Any:
        """A value is put out. Jinja calls nothing that asks for the context while it compiles."""
        del context
        self._pay_text(value)
        return value

    def compared(self, value: Any) -> Any:
        """A value is compared or hashed."""
        self.budget.look_at(value)
        return value

    def searched(self, value: Any) -> Any:
        """The right side of `in`: a mapping is not gone through."""
        return value if isinstance(value, Mapping) else self.compared(value)

    def built(self, value: Any) -> Any:
        """A container is made of what exists."""
        self.budget.build(size_of(value))
        return value

    def concatenated(self, parts: Sequence[Any]) -> str:
        """The operator ~."""
        self._pay_text(parts)
        return "".join(map(str, parts))

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend(1)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._pay_text(argument)  # it may stand in the message of an error
        return super().getitem(obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _STRING_METHODS
        if isinstance(obj, int | float | complex | bytes | type):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        form, takes_mapping = str(value.__self__), value.__name__ == "format_map"

        def bounded_format(*args: Any, **named: Any) -> str:
            self.literal(len(form))
            if takes_mapping:
                return _BoundedFormatter(self).vformat(form, (), *args)
            return _BoundedFormatter(self).vformat(form, args, named)

        return bounded_format

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        check_number(left)
        check_number(right)
        if operator == "%" and isinstance(left, str):
            return self._percent(left, right)
        if operator == "**":
            check_power(left, right)
        elif operator == "*":
            self.budget.build(_repeated_size(left, right) + _repeated_size(right, left))
        else:
            self.budget.build(size_of(left) + size_of(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, function: Any, /, *args: Any, **named: Any) -> Any:
        self.budget.spend(1 + len(args) + len(named))
        if isinstance(function, Macro | LoopContext):
            return super().call(context, function, *args, **named)
        arguments_chars = self._pay_text((*args, *named.values()))
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            args = self._pay_method(owner, function.__name__, args, arguments_chars)
        elif isinstance(owner, list | tuple | range):
            self.budget.look_at(owner)
        return self._paid_result(super().call(context, function, *args, **named))

    def _pay_text(self, value: Any) -> int:
        """Pay for the text of a value; returns its characters at most."""
        num_chars = self.budget.look_at(value)
        self.budget.build(num_chars)
        return num_chars

    def _pay_method(self, owner: str, name: str, args: tuple[Any, ...], args_chars: int) -> tuple[Any, ...]:
        """Pay for a method of a text; returns its arguments, iterators read to their end."""
        budget = self.budget
        budget.build(len(owner))
        if name == "join" and len(args) == 1:
            budget.build(PIECE_CHARS * len(args[0]) if isinstance(args[0], str) else 0)
            items = list(args[0])
            budget.build(self._pay_text(items) + len(owner) * len(items))
            return (items,)
        if name == "replace" and len(args) >= 2:
            budget.build(replaced_chars(owner, *args[:2]))
        elif name in _QUADRATIC_METHODS:
            budget.read(len(owner) * args_chars)
        if name in ("split", "rsplit"):
            budget.build(split_chars(owner, *args[:1]))
        elif name == "splitlines":
            budget.build(PIECE_CHARS * num_lines(owner))
        return args

    def _percent(self, form: str, values: Any) -> str:
        """The operator % on a text."""
        check_padding(form.partition("%")[2])
        values_chars = self._pay_text(values)
        self.budget.build(len(form) + form.count("%") * (values_chars + MAX_PADDING))
        return str(form % values)

    def _paid_result(self, result: Any) -> Any:
        check_number(result)
        return self._counted(result) if isinstance(result, Iterator) else self.built(result)

    def _counted(self, items: Iterable[Any]) -> Iterator[Any]:
        for item in items:
            self.budget.spend(1)
            yield item

    def _paid_test(self, test: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(test)
        def paid(*args: Any, **named: Any) -> Any:
            self.budget.look_at((*args, *named.values()))
            return test(*args, **named)

        return paid

    def _paid_filter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        num_leading = int(hasattr(function, "jinja_pass_arg"))

        @wraps(function)
        def paid(*args: Any, **named: Any) -> Any:
            value, given = args[num_leading], args[num_leading + 1 :]
            if name in INSTANT:
                self.budget.look_at((*given, *named.values()))
                return function(*args, **named)
            self._pay_text((*given, *named.values()))
            if name == "format":
                self._pay_text(value)
                return self._percent(str(value), named or given)
            value = self._pay_filter(name, value, given, named)
            return self._paid_result(function(*args[:num_leading], value, *given, **named))

        return paid

    def _pay_filter(self, name: str, value: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Pay for a filter; returns its argument, an iterator read to its end."""
        if name in SPLITTING and isinstance(value, str):
            self.budget.build(PIECE_CHARS * len(value))
        if name in SHALLOW:
            self.budget.read(size_of(value))
            return value
        if isinstance(value, Iterator):
            value = list(value)
        pay_for_filter(self.budget, name, value, self._pay_text(value), args, named)
        return value


class _OpaqueNamespace(Namespace):
    """A namespace may come to hold itself, so its text does not show what it holds."""

    def __repr__(self) -> str:
        return "<namespace>"


class _BoundedFormatter(SandboxedFormatter):
    """`str.format` that pays for each field."""

    def __init__(self, environment: BoundedEnvironment) -> None:
        super().__init__(environment)
        self._environment = environment

    def convert_field(self, value: Any, conversion: Any) -> Any:
        self._environment.output(None, value)
        return super().convert_field(value, conversion)

    def format_field(self, value: Any, format_spec: str) -> str:
        check_padding(format_spec)
        self._environment.literal(MAX_PADDING if format_spec else 0)
        return str(super().format_field(value, format_spec))


def _repeated_size(value: Any, times: Any) -> int:
    return size_of(value) * max(times, 0) if isinstance(times, int) else 0

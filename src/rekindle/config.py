"""Settings as typed trees: frozen dataclasses filled from TOML and `--set section.key=value`.

A component owns the dataclass of its settings and gives each field a sentence with `setting`; this module only reads.
Unknown keys, wrong types and values out of range are errors that name the key and what would be right.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rekindle.errors import ConfigurationError
from rekindle.units import parse_bytes

T = TypeVar("T")

Bytes = typing.NewType("Bytes", int)
"""A size in bytes; in a settings file a number or a text such as "4GiB"."""


def setting(default: Any, doc: str) -> Any:
    """A field of a settings dataclass: its default, and the sentence its reference entry shows."""
    return dataclasses.field(default=default, metadata={"doc": doc})


def section(cls: type[T]) -> T:
    """A field that is itself a settings dataclass with defaults throughout."""
    return dataclasses.field(default_factory=cls)


def check_range(name: str, value: float, least: float, most: float = math.inf) -> None:
    """For `__post_init__` of a settings dataclass: raise ValueError if a value is out of its range."""
    if value < least or value > most:
        limits = f"be at least {least}" if most == math.inf else f"lie in [{least}, {most}]"
        raise ValueError(f"{name} must {limits}, got {value}")


def load(cls: type[T], path: Path | None, overrides: Sequence[str] = ()) -> T:
    """Read settings of type `cls` from a TOML file, if any, then apply `section.key=value` overrides.

    Raises:
        ConfigurationError: the file cannot be read, or a key or value is wrong.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise ConfigurationError(f"cannot read settings from {path}: {error}") from error
    for override in overrides:
        _apply(data, override)
    return _build(cls, data, "")


def reference(cls: type[Any], prefix: str = "") -> list[tuple[str, str, str]]:
    """(key, default, sentence) of every setting, in order, for the reference page."""
    rows: list[tuple[str, str, str]] = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            rows += reference(typing.cast("type[Any]", hints[field.name]), key + ".")
        else:
            rows.append((key, _shown(field.default), field.metadata["doc"]))
    return rows


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigurationError(f"--set {override!r} is not of the form section.key=value")
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        section_data = data.setdefault(parent, {})
        if not isinstance(section_data, dict):
            raise ConfigurationError(
                f"--set {override!r}: {parent} is a section, but the settings already give it the value "
                f"{section_data!r}; remove that"
            )
        data = section_data
    try:
        data[leaf] = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        data[leaf] = text


def _build(cls: type[T], data: Mapping[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(sorted(fields))}"
            raise ConfigurationError(f"unknown setting {prefix}{key}{hint}")
    values = {key: _convert(hints[key], value, prefix + key) for key, value in data.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigurationError(f"{prefix.rstrip('.') or 'settings'}: {error}") from error


def _convert(hint: Any, value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigurationError(f"{key} is a section, not a value")
        return _build(typing.cast("type[Any]", hint), value, key + ".")
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        choices = [choice for choice in typing.get_args(hint) if choice is not type(None)]
        return _convert(choices[0], value, key)
    if hint is Bytes:
        return _convert_bytes(value, key)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise ConfigurationError(f"{key} must be a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, key) for item in value)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _convert_float(value, key)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigurationError(f"{key} must be of type {hint.__name__}, got {value!r}")
    return value


def _convert_float(value: float, key: str) -> float:
    if not math.isfinite(value):
        raise ConfigurationError(f"{key} must be a finite number, got {value}")
    return float(value)


def _convert_bytes(value: Any, key: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str):
        raise ConfigurationError(f"{key} must be a number of bytes or a text such as 4GiB, got {value!r}")
    try:
        return parse_bytes(value)
    except ValueError as error:
        raise ConfigurationError(f"{key}: {error}") from error


def _shown(value: Any) -> str:
    if value is None:
        return "automatic"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""What the catalog answers with, and the rules for names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rekindle.catalog.tables import MAX_NAME_CHARS
from rekindle.errors import InvalidRequest
from rekindle.protocol.adapters import AdapterManifest
from rekindle.protocol.identity import ModelDigest
from rekindle.protocol.models import ModelManifest


@dataclass(frozen=True, slots=True)
class ModelRecord:
    """A name of a base model. `path` is the model's directory, `created_s` in Unix seconds."""

    name: str
    manifest: ModelManifest
    path: Path
    created_s: int


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter's name and one version of it, counted from 1. `path` is the stored file, `source` where it was
    imported from, `created_s` in Unix seconds."""

    name: str
    base_name: str
    version: int
    manifest: AdapterManifest
    path: Path
    source: str
    created_s: int


@dataclass(frozen=True, slots=True)
class AdapterName:
    """What a list of many adapters says of each: its name, its base, and when its version came, in Unix seconds."""

    name: str
    base: ModelDigest
    created_s: int


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a request's `model` field means at this moment. `adapter` is None for a base model."""

    base_name: str
    base_digest: ModelDigest
    adapter: AdapterRecord | None = None


def check_name(name: str) -> None:
    """Raise `InvalidRequest` unless `name` can name a model or an adapter.

    It may hold `/`, `:` and single spaces, anything that shows in print, in at most 256 characters.
    """
    problem = None
    if not name:
        problem = "is empty"
    elif len(name) > MAX_NAME_CHARS:
        problem = f"has {len(name)} characters; at most {MAX_NAME_CHARS} are allowed"
    elif name in (".", ".."):
        problem = "means a directory in a URL and could not be asked for"
    elif name != name.strip():
        problem = "begins or ends with a space"
    elif not name.isprintable():
        problem = "holds characters that do not print"
    if problem:
        raise InvalidRequest(f"name {name[:80]!r} {problem}", field="name")

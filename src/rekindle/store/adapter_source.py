"""A PEFT adapter directory as it lies on disk: which files are read, and which directories may be named at all.

Only JSON, text and safetensors are opened, never a pickle. Reading a file that is absent, cut short or unreadable is an
`AdapterRejected` that names the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import AdapterRejected, InvalidRequest
from rekindle.store.model_source import NUMPY_DTYPES, PIECE_ELEMENTS, Piece, SourceTensor
from rekindle.store.safetensors_file import TensorEntry, tensor_index
from rekindle.store.wording import listed
from rekindle.units import MIB, format_bytes

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
TEMPLATE_NAME, TOKENIZER_CONFIG_NAME = "chat_template.jinja", "tokenizer_config.json"

_FILES = (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME, TOKENIZER_CONFIG_NAME)
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_MAX_CONFIG_BYTES = 4 * MIB
_MAX_TOKENIZER_CONFIG_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter's files: adapter_config.json as it is, the index of its tensors, its chat template if it has one."""

    path: Path
    config: bytes
    tensors: dict[str, TensorEntry]
    chat_template: str | None

    def tensor(self, name: str) -> SourceTensor:
        """One tensor, to be read in pieces. Its type must be one of `NUMPY_DTYPES`."""
        return file_tensor(self.path / WEIGHTS_NAME, name, self.tensors[name])


def open_source(directory: Path) -> AdapterSource:
    """Open a PEFT adapter directory; tensors are left for later.

    Raises:
        AdapterRejected: a file is missing, damaged, too large or of a kind that is not opened.
    """
    if not directory.is_dir():
        raise AdapterRejected(f"{directory} is not a directory; give the directory that holds {CONFIG_NAME}")
    if not (directory / CONFIG_NAME).is_file():
        also = "; it holds a whole model, not an adapter" if (directory / "config.json").is_file() else ""
        raise AdapterRejected(f"{directory} has no {CONFIG_NAME}{also}")
    if not (directory / WEIGHTS_NAME).is_file():
        raise AdapterRejected(_missing_weights(directory))
    config = _read(directory / CONFIG_NAME, _MAX_CONFIG_BYTES)
    with _readable(WEIGHTS_NAME):
        tensors = tensor_index(directory / WEIGHTS_NAME, rejected=AdapterRejected)
    return AdapterSource(directory, config, tensors, _chat_template(directory))


def file_tensor(path: Path, name: str, entry: TensorEntry) -> SourceTensor:
    """A tensor of any safetensors file, read in pieces of `PIECE_ELEMENTS`."""
    return SourceTensor(name, entry.dtype, entry.shape, partial(_pieces, path, name, entry))


def resolve_source(source: str, allowed_roots: Sequence[Path]) -> Path:
    """The directory that `source` names, symbolic links resolved; a relative one is looked for under each root.

    It must lie under a root, and so must every file that an import would read from it. What lies elsewhere is answered
    alike whether it exists or not.

    Raises:
        InvalidRequest: the directory is not under a root, or does not exist there.
    """
    roots = [root for root in map(_resolved, allowed_roots) if root is not None]
    candidates = [_resolved(root / source) for root in roots] if "\0" not in source else []
    inside = [path for path in candidates if path is not None and _is_under(path, roots)]
    if not inside:
        rule = "no directory is allowed yet" if not roots else "it must lie under one of the allowed adapter roots"
        raise InvalidRequest(
            f"source {source[:200]!r} is not allowed: {rule} (setting server.adapter_roots)",
            field="source",
            code="source_not_allowed",
        )
    directory = next((path for path in inside if path.is_dir()), None)
    if directory is None:
        raise InvalidRequest(f"source {source[:200]!r} is not a directory", field="source", code="source_not_found")
    for name in _FILES:
        path = _resolved(directory / name)
        if path is None or not _is_under(path, roots):
            raise InvalidRequest(
                f"{name} in source {source[:200]!r} is a link out of the allowed adapter roots; copy the file there",
                field="source",
                code="source_not_allowed",
            )
    return directory


def _resolved(path: Path) -> Path | None:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a loop of links: RuntimeError before Python 3.13
        return None


def _is_under(path: Path, roots: Sequence[Path]) -> bool:
    return any(path.is_relative_to(root) for root in roots)


def _missing_weights(directory: Path) -> str:
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if not pickles:
        return f"{directory} has no {WEIGHTS_NAME}"
    return (
        f"the adapter has its weights only in {listed(pickles)}: pickles can run code and are never opened; load it "
        f"with PEFT and save it with save_pretrained, which writes {WEIGHTS_NAME}"
    )


def _chat_template(directory: Path) -> str | None:
    if (path := directory / TEMPLATE_NAME).is_file():
        try:
            return _read(path, _MAX_CONFIG_BYTES).decode()
        except UnicodeDecodeError as error:
            raise AdapterRejected(f"{TEMPLATE_NAME} is not UTF-8 text: {error}") from error
    if not (path := directory / TOKENIZER_CONFIG_NAME).is_file():
        return None
    try:
        settings = json.loads(_read(path, _MAX_TOKENIZER_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"{TOKENIZER_CONFIG_NAME} is not JSON: {error}") from error
    stored: Any = settings.get("chat_template") if isinstance(settings, dict) else None
    if isinstance(stored, list):
        named = [entry for entry in stored if isinstance(entry, dict) and entry.get("name") == "default"]
        stored = named[0].get("template") if named else None
    if stored is not None and not isinstance(stored, str):
        raise AdapterRejected(f"chat_template in {TOKENIZER_CONFIG_NAME} is not text")
    return stored


def _read(path: Path, max_bytes: int) -> bytes:
    with _readable(path.name), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise AdapterRejected(f"{path.name} is larger than {format_bytes(max_bytes)}")
    return content


def _pieces(path: Path, name: str, entry: TensorEntry) -> Iterator[Piece]:
    item = NUMPY_DTYPES[entry.dtype]
    left = entry.num_bytes // item.itemsize
    with _readable(path.name), path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while left:
            piece = np.fromfile(file, item, count=min(left, PIECE_ELEMENTS))
            if not len(piece):
                raise AdapterRejected(f"{path.name} was cut short while {name} was read from it")
            left -= len(piece)
            yield piece


@contextmanager
def _readable(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterRejected(f"{name} cannot be read: {error.strerror}") from error

"""What directories of models and of adapters have in common: JSON, chat templates, tensors read in pieces.

Only JSON, text and safetensors are opened, never a pickle. A file that is cut short, too large, unreadable or not what
it should be is refused by its name, with the error that the caller chooses.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import RequestError
from rekindle.store.model_source import NUMPY_DTYPES, PIECE_ELEMENTS, Piece, SourceTensor
from rekindle.store.safetensors_file import TensorEntry
from rekindle.store.wording import listed
from rekindle.units import MIB, format_bytes

TEMPLATE_NAME, TEMPLATE_JSON_NAME = "chat_template.jinja", "chat_template.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"

MAX_FILE_BYTES = 256 * MIB
"""Of one file of text or JSON; the largest tokenizer.json known has 33 MiB."""

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")

Rejected = type[RequestError]


def read_file(path: Path, rejected: Rejected, max_bytes: int = MAX_FILE_BYTES) -> bytes:
    """All of a file; raises `rejected` if it cannot be read or is larger than `max_bytes`."""
    with readable(path.name, rejected), path.open("rb") as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise rejected(f"{path.name} is larger than {format_bytes(max_bytes)}")
    return content


def read_json_object(path: Path, rejected: Rejected, max_bytes: int = MAX_FILE_BYTES) -> dict[str, Any]:
    """The JSON object a file holds; raises `rejected` if it holds anything else."""
    try:
        value = json.loads(read_file(path, rejected, max_bytes))
    except (ValueError, RecursionError) as error:
        raise rejected(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise rejected(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value


def chat_template(directory: Path, rejected: Rejected, max_bytes: int = MAX_FILE_BYTES) -> str | None:
    """The chat template that comes with a tokenizer: a file of its own, else a setting of the tokenizer, else None.

    Of several named ones it is that named "default", or the only one; raises `rejected` where neither exists.
    """
    if (path := directory / TEMPLATE_NAME).is_file():
        try:
            return read_file(path, rejected, max_bytes).decode()
        except UnicodeDecodeError as error:
            raise rejected(f"{path.name} is not UTF-8: {error}") from error
    for name in (TEMPLATE_JSON_NAME, TOKENIZER_CONFIG_NAME):
        if (path := directory / name).is_file():
            stored = read_json_object(path, rejected, max_bytes).get("chat_template")
            if stored is not None and stored != []:
                return _chosen_template(stored, name, rejected)
    return None


def pickled_weights(directory: Path) -> list[str]:
    """Names of the files in a directory that hold weights as pickles."""
    return sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))


def file_tensor(path: Path, name: str, entry: TensorEntry, rejected: Rejected) -> SourceTensor:
    """A tensor of any safetensors file, read in pieces of `PIECE_ELEMENTS`; its type must be one of `NUMPY_DTYPES`."""
    return SourceTensor(name, entry.dtype, entry.shape, partial(_pieces, path, name, entry, rejected))


@contextmanager
def readable(name: str, rejected: Rejected) -> Iterator[None]:
    """Turn an operating system's error in the block into `rejected`."""
    try:
        yield
    except OSError as error:
        raise rejected(f"{name} cannot be read: {error.strerror}") from error


def _chosen_template(stored: Any, file_name: str, rejected: Rejected) -> str:
    if isinstance(stored, list):
        named = {}
        for entry in stored:
            match entry:
                case {"name": str(name), "template": template}:
                    named[name] = template
                case _:
                    raise rejected(
                        f"chat_template in {file_name} must list objects with a name and a template, "
                        f"not {str(entry)[:80]}"
                    )
        if "default" not in named and len(named) > 1:
            raise rejected(f"none of the chat templates {listed(sorted(named))} is named 'default'; name one so")
        stored = named["default"] if "default" in named else next(iter(named.values()))
    if not isinstance(stored, str):
        raise rejected(
            f"chat_template in {file_name} must be text or a list of named ones, not {type(stored).__name__}"
        )
    try:
        stored.encode()
    except UnicodeEncodeError as error:
        raise rejected(f"chat_template in {file_name} is not valid Unicode: {error}") from error
    return stored


def _pieces(path: Path, name: str, entry: TensorEntry, rejected: Rejected) -> Iterator[Piece]:
    item = NUMPY_DTYPES[entry.dtype]
    left = entry.num_bytes // item.itemsize
    with readable(path.name, rejected), path.open("rb", buffering=0) as file:
        file.seek(entry.offset)
        while left:
            piece = np.fromfile(file, item, count=min(left, PIECE_ELEMENTS))
            if not len(piece):
                raise rejected(f"{path.name} was cut short while {name} was read from it")
            left -= len(piece)
            yield piece

"""A PEFT adapter directory as it lies on disk: which files are read, and which directories may be named at all.

Only JSON, text and safetensors are opened, never a pickle. Reading a file that is absent, cut short or unreadable is an
`AdapterRejected` that names the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rekindle.errors import AdapterRejected, InvalidRequest
from rekindle.store.model_source import SourceTensor
from rekindle.store.safetensors_file import TensorEntry, tensor_index
from rekindle.store.source_files import (
    TEMPLATE_JSON_NAME,
    TEMPLATE_NAME,
    TOKENIZER_CONFIG_NAME,
    chat_template,
    file_tensor,
    pickled_weights,
    read_file,
    readable,
)
from rekindle.store.wording import listed
from rekindle.units import MIB

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"

MAX_HEADER_BYTES = 4 * MIB
"""Of the weights' header; an adapter of every matrix of a model with 126 layers has 0.3 MiB."""

_FILES = (CONFIG_NAME, WEIGHTS_NAME, TEMPLATE_NAME, TEMPLATE_JSON_NAME, TOKENIZER_CONFIG_NAME)
_MAX_CONFIG_BYTES = 4 * MIB
_MAX_TEMPLATE_FILE_BYTES = 64 * MIB


@dataclass(frozen=True, slots=True)
class AdapterSource:
    """An adapter's files: adapter_config.json as it is, the index of its tensors, its chat template if it has one."""

    path: Path
    config: bytes
    tensors: dict[str, TensorEntry]
    chat_template: str | None

    def tensor(self, name: str) -> SourceTensor:
        """One tensor, to be read in pieces. Its type must be one of `NUMPY_DTYPES`."""
        return file_tensor(self.path / WEIGHTS_NAME, name, self.tensors[name], AdapterRejected)


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
    config = read_file(directory / CONFIG_NAME, AdapterRejected, _MAX_CONFIG_BYTES)
    with readable(WEIGHTS_NAME, AdapterRejected):
        tensors = tensor_index(directory / WEIGHTS_NAME, rejected=AdapterRejected, max_header_bytes=MAX_HEADER_BYTES)
    template = chat_template(directory, AdapterRejected, _MAX_TEMPLATE_FILE_BYTES)
    return AdapterSource(directory, config, tensors, template)


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
    pickles = pickled_weights(directory)
    if not pickles:
        return f"{directory} has no {WEIGHTS_NAME}"
    return (
        f"the adapter has its weights only in {listed(pickles)}: pickles can run code and are never opened; load it "
        f"with PEFT and save it with save_pretrained, which writes {WEIGHTS_NAME}"
    )

"""Import of a base model into the home directory, from a Hugging Face directory or a GGUF file.

Whatever the source, the result is the same: one directory named after the digest of its content, holding plain
safetensors in the order of first use in a single element type, and Hugging Face's own files beside it. It appears whole
or not at all. One tensor is in memory at a time, in pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from rekindle.errors import ConfigurationError, ModelRejected
from rekindle.protocol.identity import ModelDigest
from rekindle.protocol.models import ModelManifest
from rekindle.store.checksums import write_checked_tensors
from rekindle.store.home import Home
from rekindle.store.huggingface import read_huggingface
from rekindle.store.model_config import resolve_config
from rekindle.store.model_layout import context_length, modules, tensor_shapes
from rekindle.store.model_source import NUMPY_DTYPES, ModelSource, SourceTensor, converted
from rekindle.store.safetensors_file import Bytes, TensorStream
from rekindle.store.wording import listed
from rekindle.units import MIB

Progress = Callable[[int, int], None]
"""Called with tensor bytes written so far and in all."""

WEIGHTS_NAME = "model.safetensors"
MANIFEST_NAME = "manifest.json"

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_CONFIG_NOISE = ("_name_or_path", "_model_name_or_path", "transformers_version")


def import_model(source: Path, home: Home, progress: Progress | None = None) -> ModelManifest:
    """Copy a model into `home`; importing the same content again changes nothing.

    All tensors are stored in one element type: that of the source's matrices, or BF16 where they differ or are
    quantised.

    Raises:
        ModelRejected: the source is damaged, incomplete or of an unsupported kind. Nothing is left behind.
        ConfigurationError: the disk is full, or the source needs a library that is not installed.
    """
    try:
        model = _complete(_open_source(source))
    except OSError as error:
        raise ModelRejected(f"{error.filename or source} cannot be read: {error.strerror}") from error
    streams = [
        TensorStream(name, model.dtype, shape, partial(converted, model.tensors[name], model.dtype))
        for name, shape in tensor_shapes(model.config).items()
    ]
    num_bytes = sum(stream.num_bytes for stream in streams)
    home.require_free(num_bytes + sum(map(len, model.files.values())) + MIB)
    files = {**model.files, "config.json": json.dumps(model.config, indent=2, sort_keys=True).encode()}
    digest = hashlib.sha256(_canonical_description(streams, files))
    done = 0

    def observe(piece: Bytes) -> None:
        nonlocal done
        digest.update(piece)
        done += memoryview(piece).nbytes
        if progress is not None:
            progress(done, num_bytes)

    with home.atomic_directory() as staging:
        write_checked_tensors(staging.path / WEIGHTS_NAME, streams, metadata={"format": "pt"}, observe=observe)
        manifest = _manifest(ModelDigest(digest.hexdigest()), model, streams)
        files[MANIFEST_NAME] = msgspec.json.format(msgspec.json.encode(manifest))
        for name, content in files.items():
            (staging.path / name).write_bytes(content)
        _drop_outdated(home, manifest)
        staging.publish(home.model_directory(manifest.digest))
    return manifest


def read_manifest(directory: Path) -> ModelManifest:
    """The manifest of an imported model.

    Raises:
        ModelRejected: the directory holds no readable manifest.
    """
    try:
        return msgspec.json.decode((directory / MANIFEST_NAME).read_bytes(), type=ModelManifest)
    except (OSError, msgspec.DecodeError) as error:
        raise ModelRejected(f"{directory} holds no imported model: {error}; import it again") from error


def _drop_outdated(home: Home, manifest: ModelManifest) -> None:
    """Remove an import of the same content whose manifest an earlier version wrote differently."""
    directory = home.model_directory(manifest.digest)
    try:
        is_current = not directory.exists() or read_manifest(directory) == manifest
    except ModelRejected:
        is_current = False
    if not is_current:
        home.remove(directory)


def _open_source(source: Path) -> ModelSource:
    if source.is_dir():
        return read_huggingface(source)
    if not source.is_file():
        raise ModelRejected(f"{source} does not exist; give a Hugging Face model directory or a GGUF file")
    with source.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelRejected(f"{source} is neither a directory nor a GGUF file")
    # Not at the top: a process that only reads manifests must not load the GGUF and tokenizer libraries.
    try:
        from rekindle.store.gguf_model import read_gguf
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"reading GGUF needs {error.name}: pip install 'rekindle[import]'") from error
    return read_gguf(source)


def _complete(model: ModelSource) -> ModelSource:
    """The model with a resolved configuration and exactly the tensors that one asks for, or `ModelRejected`."""
    config = {name: value for name, value in resolve_config(model.config).items() if name not in _CONFIG_NOISE}
    tensors = {name: tensor for name, tensor in model.tensors.items() if not name.endswith(_DERIVED_SUFFIX)}
    if _HEAD in tensors and _EMBEDDING in tensors:
        if _same_content(tensors[_HEAD], tensors[_EMBEDDING]):
            config["tie_word_embeddings"] = True
            del tensors[_HEAD]
        elif config["tie_word_embeddings"]:
            raise ModelRejected(
                f"config.json ties {_HEAD} to {_EMBEDDING}, but the file stores another matrix; "
                "set tie_word_embeddings to false to use it, or remove it from the file"
            )
    shapes = tensor_shapes(config)
    missing = [name for name in shapes if name not in tensors]
    unknown = [name for name in tensors if name not in shapes]
    if missing or unknown:
        raise ModelRejected(
            f"the tensors do not make a complete {config['model_type']} model of {config['num_hidden_layers']} layers; "
            f"missing: {listed(missing)}; not recognised: {listed(unknown)}"
        )
    for name, shape in shapes.items():
        if tensors[name].dtype not in NUMPY_DTYPES:
            raise ModelRejected(
                f"{name} has dtype {tensors[name].dtype}; supported are {', '.join(NUMPY_DTYPES)}; import the model "
                "unquantised, or a GGUF file of it"
            )
        if tensors[name].shape != shape:
            raise ModelRejected(
                f"{name} has shape {list(tensors[name].shape)}, the configuration asks for {list(shape)}"
            )
    return replace(model, config=config, tensors=tensors)


def _same_content(left: SourceTensor, right: SourceTensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape) or left.dtype not in NUMPY_DTYPES:
        return False
    pieces = zip(left.read(), right.read(), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in pieces)


def _canonical_description(streams: list[TensorStream], files: dict[str, bytes]) -> bytes:
    """What the digest covers beside the tensor bytes: their names, types and shapes, and every file."""
    description = {
        "tensors": [[stream.name, stream.dtype, list(stream.shape)] for stream in streams],
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    raw = json.dumps(description, sort_keys=True, separators=(",", ":")).encode()
    return len(raw).to_bytes(8, "little") + raw


def _manifest(digest: ModelDigest, model: ModelSource, streams: list[TensorStream]) -> ModelManifest:
    config = model.config
    return ModelManifest(
        digest=digest,
        family=config["model_type"],
        dtype=streams[0].dtype,
        num_parameters=sum(stream.num_elements for stream in streams),
        num_bytes=sum(stream.num_bytes for stream in streams),
        num_layers=config["num_hidden_layers"],
        vocab_size=config["vocab_size"],
        context_length=context_length(config),
        eos_token_ids=_eos_token_ids(model),
        tied_embeddings=config["tie_word_embeddings"],
        modules=modules(config),
    )


def _eos_token_ids(model: ModelSource) -> tuple[int, ...]:
    """End-of-text tokens from the generation settings, else the configuration, else the tokenizer."""
    generation = json.loads(model.files.get("generation_config.json", b"{}"))
    for file_name, settings in (("generation_config.json", generation), ("config.json", model.config)):
        stated: Any = settings.get("eos_token_id")
        ids = stated if isinstance(stated, list) else [stated]
        if ids and all(type(token_id) is int for token_id in ids):
            return _in_vocabulary(ids, file_name, model.config["vocab_size"])
    token_id = _tokenizers_eos_id(model)
    return () if token_id is None else _in_vocabulary([token_id], "tokenizer.json", model.config["vocab_size"])


def _tokenizers_eos_id(model: ModelSource) -> int | None:
    token = json.loads(model.files.get("tokenizer_config.json", b"{}")).get("eos_token")
    tokenizer: dict[str, Any] = json.loads(model.files["tokenizer.json"])
    vocabulary = tokenizer["model"].get("vocab")
    known = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for entry in tokenizer.get("added_tokens") or []:
        known[entry.get("content")] = entry.get("id")
    token_id = known.get(token) if isinstance(token, str) else None
    return token_id if type(token_id) is int else None


def _in_vocabulary(ids: list[int], file_name: str, vocab_size: int) -> tuple[int, ...]:
    """The ids that the model has a row for; some checkpoints list tokens of a tokenizer larger than their own."""
    usable = tuple(token_id for token_id in ids if 0 <= token_id < vocab_size)
    if not usable:
        raise ModelRejected(
            f"{file_name} gives the end of text as {listed([str(token_id) for token_id in ids])}, but the model's "
            f"vocab_size is {vocab_size}; correct eos_token_id there"
        )
    return usable

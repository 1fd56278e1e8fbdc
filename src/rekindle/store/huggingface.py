"""Reading a Hugging Face model directory: safetensors, single or in shards, and the files beside them.

Only safetensors and JSON are opened, never a pickle. Tensors are read in pieces; a shard is never held whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rekindle.errors import ModelRejected
from rekindle.store.model_source import NUMPY_DTYPES, PIECE_ELEMENTS, ModelSource, Piece, SourceTensor, common_dtype
from rekindle.store.safetensors_file import TensorEntry, tensor_index
from rekindle.store.wording import listed

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_huggingface(directory: Path) -> ModelSource:
    """Open a model directory: headers are read and checked, tensors are left for later.

    Raises:
        ModelRejected: a file is missing, damaged or of an unsupported kind.
    """
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise ModelRejected(f"{directory} holds an adapter, not a model; add it with `rekindle adapters add`")
        raise ModelRejected(f"{directory} has no config.json; give a Hugging Face model directory or a GGUF file")
    config = read_json_object(directory / "config.json")
    tokenizer_config = _tokenizer_config(directory)
    template = _chat_template(directory, tokenizer_config)
    tokenizer_config.pop("chat_template", None)
    files = {
        "tokenizer.json": _tokenizer(directory),
        "tokenizer_config.json": json.dumps(tokenizer_config, indent=2, ensure_ascii=False).encode(),
    }
    if template is not None:
        files["chat_template.jinja"] = template.encode()
    if (directory / "generation_config.json").exists():
        generation = read_json_object(directory / "generation_config.json")
        files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    tensors = _tensors(directory)
    dtype = common_dtype(tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2)
    return ModelSource(config, dtype, tensors, files)


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object a file holds; raises `ModelRejected` if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelRejected(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelRejected(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value


def _tensors(directory: Path) -> dict[str, SourceTensor]:
    if (directory / _INDEX).exists():
        return _sharded_tensors(directory)
    if (directory / _SINGLE).exists():
        return _file_tensors(directory / _SINGLE)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ModelRejected(
            f"{directory} has its weights only in {listed(pickles)}: pickles can run code and are never opened; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise ModelRejected(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _sharded_tensors(directory: Path) -> dict[str, SourceTensor]:
    weight_map = read_json_object(directory / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelRejected(f"{_INDEX} has no weight_map from tensor names to file names")
    shards = sorted(set(weight_map.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise ModelRejected(f"{_INDEX} names files outside the directory: {listed(outside)}")
    if missing := [name for name in shards if not (directory / name).is_file()]:
        raise ModelRejected(f"{len(missing)} of {len(shards)} shards are missing: {listed(missing)}; download them")
    found = {shard: _file_tensors(directory / shard) for shard in shards}
    if absent := [f"{name} ({shard})" for name, shard in weight_map.items() if name not in found[shard]]:
        raise ModelRejected(f"{_INDEX} places tensors in shards that lack them: {listed(sorted(absent))}")
    if unlisted := [name for shard in shards for name in found[shard] if weight_map.get(name) != shard]:
        raise ModelRejected(f"shards hold tensors that {_INDEX} does not place there: {listed(unlisted)}")
    return {name: found[shard][name] for name, shard in weight_map.items()}


def _file_tensors(path: Path) -> dict[str, SourceTensor]:
    return {name: _source_tensor(path, name, entry) for name, entry in tensor_index(path).items()}


def _source_tensor(path: Path, name: str, entry: TensorEntry) -> SourceTensor:
    def read() -> Iterator[Piece]:
        item = NUMPY_DTYPES[entry.dtype]
        left = entry.num_bytes // item.itemsize
        with path.open("rb", buffering=0) as file:
            file.seek(entry.offset)
            while left:
                piece = np.fromfile(file, item, count=min(left, PIECE_ELEMENTS))
                if not len(piece):
                    raise ModelRejected(f"{path.name} was cut short while {name} was read from it")
                left -= len(piece)
                yield piece

    return SourceTensor(name, entry.dtype, entry.shape, read)


def _tokenizer(directory: Path) -> bytes:
    path = directory / "tokenizer.json"
    if not path.exists():
        only = "only tokenizer.model" if (directory / "tokenizer.model").exists() else "no tokenizer"
        raise ModelRejected(
            f"{directory} has {only}; tokenizer.json is needed: load it with transformers' AutoTokenizer and "
            "write it there with save_pretrained"
        )
    if not isinstance(read_json_object(path).get("model"), dict):
        raise ModelRejected("tokenizer.json describes no tokenizer: it has no 'model'")
    return path.read_bytes()


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json with its special tokens as plain strings, completed from special_tokens_map.json."""
    settings, older = (
        read_json_object(directory / name) if (directory / name).exists() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    for name in _SPECIAL_TOKENS:
        token = settings.get(name) or older.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            settings[name] = token
    return settings


def _chat_template(directory: Path, tokenizer_config: dict[str, Any]) -> str | None:
    if (path := directory / "chat_template.jinja").exists():
        try:
            return path.read_text("utf-8")
        except UnicodeDecodeError as error:
            raise ModelRejected(f"{path.name} is not UTF-8: {error}") from error
    stored: Any = tokenizer_config.get("chat_template")
    if (path := directory / "chat_template.json").exists():
        stored = read_json_object(path).get("chat_template", stored)
    if isinstance(stored, list):
        named = {entry["name"]: entry["template"] for entry in stored if {"name", "template"} <= entry.keys()}
        stored = named.get("default") or (next(iter(named.values())) if len(named) == 1 else None)
        if stored is None:
            raise ModelRejected(f"none of the chat templates {listed(sorted(named))} is named 'default'; name one so")
    if stored is not None and not isinstance(stored, str):
        raise ModelRejected(f"the chat template must be text or a list of named ones, not {type(stored).__name__}")
    return stored

"""Reading a Hugging Face model directory: safetensors, single or in shards, and the files beside them.

Only safetensors and JSON are opened, never a pickle. Tensors are read in pieces; a shard is never held whole.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

from rekindle.errors import ModelRejected
from rekindle.store import source_files
from rekindle.store.model_source import ModelSource, SourceTensor, common_dtype
from rekindle.store.safetensors_file import tensor_index
from rekindle.store.source_files import TEMPLATE_NAME, TOKENIZER_CONFIG_NAME, file_tensor, pickled_weights
from rekindle.store.wording import listed

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

_read_json = partial(source_files.read_json_object, rejected=ModelRejected)


def read_huggingface(directory: Path) -> ModelSource:
    """Open a model directory: headers are read and checked, tensors are left for later.

    Raises:
        ModelRejected: a file is missing, damaged or of an unsupported kind.
    """
    if not (directory / "config.json").exists():
        if (directory / "adapter_config.json").exists():
            raise ModelRejected(f"{directory} holds an adapter, not a model; add it with `rekindle adapters add`")
        raise ModelRejected(f"{directory} has no config.json; give a Hugging Face model directory or a GGUF file")
    config = _read_json(directory / "config.json")
    tokenizer_config = _tokenizer_config(directory)
    template = source_files.chat_template(directory, ModelRejected)
    tokenizer_config.pop("chat_template", None)
    files = {
        "tokenizer.json": _tokenizer(directory),
        TOKENIZER_CONFIG_NAME: json.dumps(tokenizer_config, indent=2, ensure_ascii=False).encode(),
    }
    if template is not None:
        files[TEMPLATE_NAME] = template.encode()
    if (directory / "generation_config.json").exists():
        generation = _read_json(directory / "generation_config.json")
        files["generation_config.json"] = json.dumps(generation, indent=2).encode()
    tensors = _tensors(directory)
    dtype = common_dtype(tensor.dtype for tensor in tensors.values() if len(tensor.shape) == 2)
    return ModelSource(config, dtype, tensors, files)


def _tensors(directory: Path) -> dict[str, SourceTensor]:
    if (directory / _INDEX).exists():
        return _sharded_tensors(directory)
    if (directory / _SINGLE).exists():
        return _file_tensors(directory / _SINGLE)
    if pickles := pickled_weights(directory):
        raise ModelRejected(
            f"{directory} has its weights only in {listed(pickles)}: pickles can run code and are never opened; "
            "convert them with transformers' save_pretrained, which writes safetensors"
        )
    raise ModelRejected(f"{directory} has neither {_SINGLE} nor {_INDEX}")


def _sharded_tensors(directory: Path) -> dict[str, SourceTensor]:
    weight_map = _read_json(directory / _INDEX).get("weight_map")
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
    return {name: file_tensor(path, name, entry, ModelRejected) for name, entry in tensor_index(path).items()}


def _tokenizer(directory: Path) -> bytes:
    path = directory / "tokenizer.json"
    if not path.exists():
        only = "only tokenizer.model" if (directory / "tokenizer.model").exists() else "no tokenizer"
        raise ModelRejected(
            f"{directory} has {only}; tokenizer.json is needed: load it with transformers' AutoTokenizer and "
            "write it there with save_pretrained"
        )
    if not isinstance(_read_json(path).get("model"), dict):
        raise ModelRejected("tokenizer.json describes no tokenizer: it has no 'model'")
    return source_files.read_file(path, ModelRejected)


def _tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json with its special tokens as plain strings, completed from special_tokens_map.json."""
    settings, older = (
        _read_json(directory / name) if (directory / name).exists() else {}
        for name in (TOKENIZER_CONFIG_NAME, "special_tokens_map.json")
    )
    for name in _SPECIAL_TOKENS:
        token = settings.get(name) or older.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            settings[name] = token
    return settings

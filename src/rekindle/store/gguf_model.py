"""Reading a GGUF file as a Hugging Face model.

Quantised tensors are dequantised by the `gguf` library, a block of rows at a time. What its exporter changes is undone:
Llama's query and key rows, which GGUF stores for another rotary convention, and the 1 it adds to Gemma's norms.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, dequantize, get_tensor_name_map
from numpy.typing import NDArray

from rekindle.errors import ModelRejected
from rekindle.store.gguf_config import config_from_gguf
from rekindle.store.gguf_file import GgufFile, GgufTensor, open_gguf
from rekindle.store.gguf_tokenizer import tokenizer_files
from rekindle.store.model_config import resolve_config
from rekindle.store.model_layout import tensor_shapes
from rekindle.store.model_source import NUMPY_DTYPES, PIECE_ELEMENTS, ModelSource, Piece, SourceTensor, common_dtype
from rekindle.store.wording import listed

_PLAIN = {GGMLQuantizationType[name]: name for name in ("F32", "F16", "BF16")}
_QUANTISED = tuple(
    GGMLQuantizationType[name]
    for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
)
_USED_ELSEWHERE = {"rope_freqs.weight"}


def read_gguf(path: Path) -> ModelSource:
    """Open a GGUF file: metadata is read and translated, tensors are left for later.

    Quantised tensors are given as F32 values, to be stored in BF16.

    Raises:
        ModelRejected: the file is damaged, or its architecture, tokenizer or quantisation is not supported.
    """
    file = open_gguf(path)
    if (num_parts := file.metadata.get("split.count", 0)) not in (0, 1):
        raise ModelRejected(f"{path.name} is one of {str(num_parts)[:80]} parts; merge them with gguf-split")
    if unsupported := sorted({t.kind.name for t in file.tensors.values() if t.kind not in (*_PLAIN, *_QUANTISED)}):
        supported = [kind.name for kind in (*_PLAIN, *_QUANTISED)]
        raise ModelRejected(
            f"{path.name} holds tensors of type {listed(unsupported)}; supported: {', '.join(supported)}"
        )
    config = resolve_config(config_from_gguf(file))
    dtype = common_dtype(_PLAIN.get(t.kind, "BF16") for t in file.tensors.values() if len(t.shape) == 2)
    return ModelSource(config, dtype, _tensors(file, config), tokenizer_files(file.metadata))


def _tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, SourceTensor]:
    architecture = file.metadata["general.architecture"]
    (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(arch, config["num_hidden_layers"])
    tensors: dict[str, SourceTensor] = {}
    unused = set(file.tensors) - _USED_ELSEWHERE
    for name in tensor_shapes({**config, "tie_word_embeddings": False}):
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored in file.tensors:
            tensors[name] = _source_tensor(name, file.tensors[stored], config, architecture)
            unused.discard(stored)
    if unused:
        raise ModelRejected(f"{file.name} holds tensors that no {architecture} model has: {listed(sorted(unused))}")
    return tensors


def _source_tensor(name: str, tensor: GgufTensor, config: dict[str, Any], architecture: str) -> SourceTensor:
    order = _row_order(name, config) if architecture == "llama" else None
    offset = -1.0 if architecture.startswith("gemma") and name.endswith("norm.weight") else 0.0
    dtype = "F32" if offset else _PLAIN.get(tensor.kind, "F32")
    return SourceTensor(name, dtype, tensor.shape, partial(_read, tensor, dtype, order, offset))


def _row_order(name: str, config: dict[str, Any]) -> NDArray[np.int64] | None:
    """Which stored row becomes each row of a query or key projection: GGUF has the two halves of a head interleaved."""
    if ".q_proj." in name:
        num_heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        num_heads = config["num_key_value_heads"]
    else:
        return None
    dim = config["head_dim"]
    return np.arange(num_heads * dim).reshape(num_heads, dim // 2, 2).swapaxes(1, 2).ravel()


def _read(tensor: GgufTensor, dtype: str, order: NDArray[np.int64] | None, offset: float) -> Iterator[Piece]:
    rows = tensor.rows
    if len(tensor.shape) == 1 and tensor.kind in _PLAIN:
        rows = rows.reshape(tensor.shape[0], -1)
    columns = max(1, tensor.shape[-1]) if len(tensor.shape) > 1 else 1
    step = max(1, PIECE_ELEMENTS // columns)
    for start in range(0, len(rows), step):
        block = rows[start : start + step] if order is None else rows[order[start : start + step]]
        if tensor.kind in _PLAIN and _PLAIN[tensor.kind] == dtype:
            values: Piece = np.ascontiguousarray(block).reshape(-1).view(NUMPY_DTYPES[dtype])
        else:
            values = dequantize(np.ascontiguousarray(block), tensor.kind).reshape(-1)
        yield values + np.float32(offset) if offset else values

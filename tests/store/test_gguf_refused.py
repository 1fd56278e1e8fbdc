"""Import of GGUF files written by the `gguf` library: what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekindle.errors import ModelRejected
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.gguf_files import (
    VOCAB,
    GgufModel,
)


def with_metadata(name: str, value: Any) -> Callable[[GgufModel], None]:
    return lambda model: model.metadata.__setitem__(name, value)


def with_tensor(name: str, tensor: np.ndarray[Any, Any], kind: Kind | None = None) -> Callable[[GgufModel], None]:
    def change(model: GgufModel) -> None:
        model.tensors[name] = tensor
        if kind is not None:
            model.kinds[name] = kind

    return change


def without(name: str) -> Callable[[GgufModel], None]:
    def change(model: GgufModel) -> None:
        del model.tensors[name]

    return change


def of_architecture(name: str) -> Callable[[GgufModel], None]:
    return lambda model: setattr(model, "architecture", name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (of_architecture("mamba"), "architecture 'mamba'; supported in GGUF files are llama, qwen2"),
        (without("blk.1.attn_v.weight"), r"missing: model\.layers\.1\.self_attn\.v_proj\.weight"),
        (without("token_embd.weight"), r"no tensor token_embd\.weight"),
        (with_tensor("v.patch.weight", np.ones((2, 2), np.float32)), r"no llama model has: v\.patch\.weight"),
        (with_tensor("rope_freqs.weight", np.linspace(1, 5, 16, dtype=np.float32)), "follows no Llama 3 scaling"),
        (with_tensor("output.weight", np.ones((VOCAB, 66), np.uint8), Kind.IQ2_XXS), "of type IQ2_XXS; supported"),
        (with_metadata("llama.expert_count", 8), "mixture of experts"),
        (with_metadata("split.count", 3), "one of 3 parts"),
        (with_metadata("llama.rope.dimension_count", 16), r"rope\.dimension_count is 16, only 32"),
        (with_metadata("llama.attention.value_length", 16), r"attention\.value_length is 16, only 32"),
        (with_metadata("llama.attention.head_count_kv", [4, 2]), "head_count_kv differs between layers"),
        (with_metadata("llama.rope.scaling.type", "longrope"), "rope scaling 'longrope'"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    home: Home, model: GgufModel, left_in: Callable[[Home], list[str]], change: Callable[[GgufModel], None], reason: str
) -> None:
    change(model)
    with pytest.raises(ModelRejected, match=reason):
        import_model(model.write(), home)
    assert left_in(home) == []


def test_a_missing_number_is_named(home: Home, model: GgufModel) -> None:
    raw = model.write().read_bytes()
    model.path.write_bytes(raw.replace(b"llama.block_count", b"llama.bloke_count"))
    with pytest.raises(ModelRejected, match=r"lacks the metadata llama\.block_count"):
        import_model(model.path, home)


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return GgufModel(tmp_path_factory.mktemp("whole") / "model.gguf").write().read_bytes()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(part=st.floats(0, 1, exclude_max=True), in_header=st.booleans())
def test_a_truncated_file_is_refused_wherever_it_ends(
    home: Home, whole_file: bytes, tmp_path: Path, part: float, in_header: bool
) -> None:
    path = tmp_path / "cut.gguf"
    kept = 4 + int(part * (2000 if in_header else len(whole_file) - 4))
    path.write_bytes(whole_file[:kept])
    with pytest.raises(ModelRejected, match=r"cut\.gguf is not a usable GGUF file"):
        import_model(path, home)


@pytest.mark.parametrize(
    ("position", "content", "reason"),
    [
        (4, b"\x01\x00\x00\x00", "version 1 "),
        (4, b"\x00\x00\x00\x03", "big-endian"),
        (8, b"\xff" * 8, "truncated"),
        (16, b"\xff" * 8, "truncated"),
        (24, b"\xff" * 8, "truncated"),
    ],
)
def test_a_header_that_lies_is_refused(
    home: Home, whole_file: bytes, tmp_path: Path, position: int, content: bytes, reason: str
) -> None:
    path = tmp_path / "lies.gguf"
    path.write_bytes(whole_file[:position] + content + whole_file[position + len(content) :])
    with pytest.raises(ModelRejected, match=reason):
        import_model(path, home)

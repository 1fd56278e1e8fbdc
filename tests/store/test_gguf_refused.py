"""Import of GGUF files written by the `gguf` library: what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekindle.errors import ModelRejected
from rekindle.store.gguf_config import config_from_gguf
from rekindle.store.gguf_file import open_gguf
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
        (with_metadata("llama.expert_count", 8), r"sets llama\.expert_count to 8, a mixture of experts"),
        (with_metadata("llama.use_parallel_residual", True), r"llama\.use_parallel_residual to True.* must be False"),
        (with_metadata("llama.logit_scale", 0.0625), r"llama\.logit_scale to 0\.0625.* must be 0 or 1 or absent"),
        (with_metadata("llama.residual_scale", 0.22), r"llama\.residual_scale"),
        (with_metadata("llama.embedding_scale", 12.0), r"llama\.embedding_scale"),
        (with_metadata("llama.attention.scale", 0.015625), r"llama\.attention\.scale to 0\.015625"),
        (with_metadata("llama.attention.causal", False), r"attention\.causal to False, attention to later tokens"),
        (with_metadata("llama.attention.clamp_kqv", 8.0), r"llama\.attention\.clamp_kqv"),
        (with_metadata("llama.attention.max_alibi_bias", 8.0), r"llama\.attention\.max_alibi_bias"),
        (with_metadata("llama.rope.scaling.attn_factor", 1.19), r"llama\.rope\.scaling\.attn_factor"),
        (with_metadata("llama.rope.scaling.yarn_attn_factor", 2.0), r"llama\.rope\.scaling\.yarn_attn_factor"),
        (with_metadata("llama.rope.scaling.yarn_log_multiplier", 0.1), r"llama\.rope\.scaling\.yarn_log_multiplier"),
        (with_metadata("llama.rope.scaling.yarn_ext_factor", 1.0), r"yarn_ext_factor to 1\.0.* must be 0 or less"),
        (with_metadata("general.alignment", [32, 32]), r"general\.alignment must be a positive integer, not \[32, 32"),
        (with_metadata("tokenizer.ggml.bos_token_id", "a"), r"bos_token_id must be an integer, not 'a'"),
        (with_metadata("split.count", [2, 3]), r"one of \[2, 3\] parts"),
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


def test_a_list_of_architectures_is_refused_and_no_internal_error(model: GgufModel) -> None:
    file = replace(open_gguf(model.write()), metadata={"general.architecture": ["llama", "llama"]})
    with pytest.raises(
        ModelRejected, match=r"architecture \"\['llama', 'llama'\]\"; supported in GGUF files are llama"
    ):
        config_from_gguf(file)


@pytest.mark.parametrize("count", [0, 5, 1_000_000])
def test_a_tensor_with_no_or_too_many_dimensions_is_refused_before_their_product(
    home: Home, model: GgufModel, count: int
) -> None:
    raw, name = model.write().read_bytes(), b"token_embd.weight"
    at = raw.index(name) + len(name)
    model.path.write_bytes(raw[:at] + count.to_bytes(4, "little") + b"\xff" * 8 * count + raw[at + 4 + 16 :])
    with pytest.raises(ModelRejected, match=f"token_embd.weight has {count} dimensions; 1 to 4 are supported"):
        import_model(model.path, home)


@pytest.mark.parametrize(
    ("divisors", "reason"),
    [
        (np.ones(8, np.float32), r"must hold 16 numbers of type F32, not \[8\] of F32"),
        (np.ones(16, np.float16), r"not \[16\] of F16"),
        (np.zeros(16, np.float32), "positive numbers only"),
        (np.full(16, np.nan, np.float32), "positive numbers only"),
    ],
)
def test_rope_divisors_that_fit_no_head_are_refused(
    home: Home, model: GgufModel, divisors: np.ndarray[Any, Any], reason: str
) -> None:
    model.tensors["rope_freqs.weight"] = divisors
    with pytest.raises(ModelRejected, match=reason):
        import_model(model.write(), home)


def test_a_window_pattern_that_is_not_made_of_flags_is_refused(home: Home, model: GgufModel) -> None:
    model.change_to("gemma3")
    model.metadata["gemma3.attention.sliding_window_pattern"] = ["yes", "no"]
    with pytest.raises(ModelRejected, match=r"sliding_window_pattern must list booleans, not \['yes', 'no'\]"):
        import_model(model.write(), home)


def test_gemma_2_with_another_window_pattern_is_refused(home: Home, model: GgufModel) -> None:
    model.change_to("gemma2")
    model.metadata["gemma2.attention.sliding_window_pattern"] = 3
    with pytest.raises(ModelRejected, match=r"gemma2\.attention\.sliding_window_pattern is 3, only 2"):
        import_model(model.write(), home)


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

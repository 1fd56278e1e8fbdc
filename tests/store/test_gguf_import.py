"""Import of GGUF files written by the `gguf` library: tensors and configuration."""

from __future__ import annotations

import json
import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors.torch import load_file

from rekindle.errors import ModelRejected
from rekindle.protocol.models import ModelManifest
from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.gguf_files import (
    HEAD_DIM,
    HEADS,
    HF_NAMES,
    HIDDEN,
    INNER,
    KV_HEADS,
    LAYERS,
    NORMS,
    SHAPES,
    VOCAB,
    GgufModel,
)


def stored(home: Home, manifest: ModelManifest) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(home.model_directory(manifest.digest) / "model.safetensors")
    return tensors


def stored_config(home: Home, manifest: ModelManifest) -> Any:
    return json.loads((home.model_directory(manifest.digest) / "config.json").read_text())


def exporter_permutation(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter does to query and key rows of Llama models."""
    halves = weight.reshape(num_heads, 2, len(weight) // num_heads // 2, *weight.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weight.shape))


def random_blocks(kind: Kind, shape: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """Random bytes that are valid blocks: the half-precision scales among them are made moderate."""
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_blocks = shape[0] * shape[1] // block_elements
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (num_blocks, block_bytes), np.uint8)
    scale_offsets = {Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.Q4_1: (0, 2)}.get(kind, (0,))
    for offset in scale_offsets:
        scales = random.uniform(-0.1, 0.1, num_blocks).astype(np.float16)
        blocks[:, offset : offset + 2] = scales.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(shape[0], -1)


@pytest.mark.parametrize(
    "kind", [Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q4_K, Kind.Q5_K, Kind.Q6_K], ids=lambda k: k.name
)
def test_quantised_matrices_become_the_nearest_bfloat16(
    home: Home, model: GgufModel, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rekindle.store.gguf_model.PIECE_ELEMENTS", 5 * HIDDEN)
    expected = {}
    for seed, (name, shape) in enumerate(SHAPES.items()):
        blocks = random_blocks(kind, shape, seed)
        values = gguf.dequantize(blocks, kind)
        num_heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name)
        if num_heads:
            undone = values.reshape(num_heads, HEAD_DIM // 2, 2, HIDDEN).swapaxes(1, 2).reshape(shape)
            assert np.array_equal(exporter_permutation(undone, num_heads), values)
            values = undone
        expected[HF_NAMES[name]] = torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
        model.tensors[f"blk.1.{name}.weight"] = blocks
        model.kinds[f"blk.1.{name}.weight"] = kind
    manifest = import_model(model.write(), home)
    tensors = stored(home, manifest)
    assert manifest.dtype == "BF16"
    for name, tensor in expected.items():
        assert torch.equal(tensors[f"model.layers.1.{name}.weight"], tensor), name
    embedding = torch.from_numpy(model.tensors["token_embd.weight"]).bfloat16()
    assert torch.equal(tensors["model.embed_tokens.weight"], embedding)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_unquantised_files_keep_their_element_type_and_bits(home: Home, model: GgufModel, dtype: str) -> None:
    expected: dict[str, torch.Tensor] = {}
    torch_dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    for name, values in list(model.tensors.items()):
        expected[name] = torch.from_numpy(values).to(torch_dtype)
        if values.ndim == 1:
            continue
        num_heads = HEADS if "attn_q" in name else KV_HEADS if "attn_k" in name else None
        exported = values if num_heads is None else exporter_permutation(values, num_heads)
        model.kinds[name] = Kind[dtype]
        model.tensors[name] = exported if dtype == "F32" else gguf.quantize(exported, Kind[dtype])
    manifest = import_model(model.write(), home)
    tensors = stored(home, manifest)
    assert manifest.dtype == dtype
    assert torch.equal(tensors["model.norm.weight"], expected["output_norm.weight"])
    for layer in range(LAYERS):
        for ours, theirs in HF_NAMES.items():
            name = f"model.layers.{layer}.{theirs}.weight"
            assert torch.equal(tensors[name], expected[f"blk.{layer}.{ours}.weight"]), name


@pytest.mark.parametrize("architecture", NORMS)
def test_every_architecture_gets_its_configuration_and_names(home: Home, model: GgufModel, architecture: str) -> None:
    model.change_to(architecture)
    manifest = import_model(model.write(), home)
    tensors, config = stored(home, manifest), stored_config(home, manifest)
    assert len(tensors) == len(model.tensors)
    assert config["model_type"] == {"gemma3": "gemma3_text"}.get(architecture, architecture)
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    assert [config[name] for name in sizes] == [HIDDEN, INNER, LAYERS, HEADS, KV_HEADS]
    assert (config["head_dim"], config["vocab_size"], config["max_position_embeddings"]) == (HEAD_DIM, VOCAB, 128)
    rope = config["rope_parameters"].get("full_attention", config["rope_parameters"])
    assert (config["rms_norm_eps"], rope) == (1e-06, {"rope_type": "default", "rope_theta": 10_000.0})
    assert config["tie_word_embeddings"] is manifest.tied_embeddings is True
    assert manifest.eos_token_ids == (4,)

    is_gemma = architecture.startswith("gemma")
    norm = torch.from_numpy(model.tensors["blk.1.ffn_norm.weight"]) - (1.0 if is_gemma else 0.0)
    name = "pre_feedforward_layernorm" if is_gemma else "post_attention_layernorm"
    assert torch.equal(tensors[f"model.layers.1.{name}.weight"], norm)
    query = torch.from_numpy(model.tensors["blk.0.attn_q.weight"])
    assert torch.equal(tensors["model.layers.0.self_attn.q_proj.weight"], query) == (architecture != "llama")


def test_gemma_gets_what_its_metadata_says_and_what_it_leaves_out(home: Home, model: GgufModel) -> None:
    model.change_to("gemma2")
    model.metadata = {
        "gemma2.attn_logit_softcapping": 25.0,
        "gemma2.final_logit_softcapping": 15.0,
        "gemma2.attention.sliding_window": 64,
    }
    config = stored_config(home, import_model(model.write(), home))
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (25.0, 15.0)
    assert (config["sliding_window"], config["query_pre_attn_scalar"]) == (64, HEAD_DIM)
    assert config["hidden_activation"] == "gelu_pytorch_tanh"


def test_gemma_2_whose_file_states_no_soft_caps_has_those_of_its_family(home: Home, model: GgufModel) -> None:
    model.change_to("gemma2")
    config = stored_config(home, import_model(model.write(), home))
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50.0, 30.0)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (None, ["sliding_attention", "sliding_attention"]),
        (2, ["sliding_attention", "full_attention"]),
        (1, ["full_attention", "full_attention"]),
        ([False, True], ["full_attention", "sliding_attention"]),
    ],
)
def test_gemma_3_has_windows_in_the_layers_that_its_pattern_names(
    home: Home, model: GgufModel, pattern: int | list[bool] | None, expected: list[str]
) -> None:
    model.change_to("gemma3")
    if pattern is not None:
        model.metadata["gemma3.attention.sliding_window_pattern"] = pattern
    assert stored_config(home, import_model(model.write(), home))["layer_types"] == expected


def test_settings_that_leave_the_mathematics_alone_may_be_stated(home: Home, model: GgufModel) -> None:
    plain = import_model(model.write(), home)
    model.metadata = {
        "llama.expert_count": 0,
        "llama.use_parallel_residual": False,
        "llama.logit_scale": 1.0,
        "llama.attention.scale": 0.0,
        "llama.attention.causal": True,
        "llama.rope.scaling.attn_factor": 1.0,
        "llama.rope.scaling.yarn_ext_factor": -1.0,
        "llama.rope.scale_linear": 1.0,
    }
    assert import_model(model.write(), home) == plain


def test_a_llama_file_with_a_sliding_window_is_a_mistral(home: Home, model: GgufModel) -> None:
    model.metadata["llama.attention.sliding_window"] = 4096
    manifest = import_model(model.write(), home)
    assert manifest.family == "mistral"
    assert stored_config(home, manifest)["sliding_window"] == 4096


def test_a_file_with_an_output_matrix_is_untied(home: Home, model: GgufModel) -> None:
    model.tensors["output.weight"] = np.ones((VOCAB, HIDDEN), np.float32)
    manifest = import_model(model.write(), home)
    assert not manifest.tied_embeddings
    assert stored(home, manifest)["lm_head.weight"].eq(1).all()


def llama3_divisors(base: float, factor: float, low: float, high: float, trained: float, size: int) -> Any:
    divisors = []
    for index in range(0, size, 2):
        wavelength = 2 * math.pi * base ** (index / size)
        if wavelength < trained / high:
            divisors.append(1.0)
        elif wavelength > trained / low:
            divisors.append(factor)
        else:
            smooth = (trained / wavelength - low) / (high - low)
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


@pytest.mark.parametrize(
    ("factor", "low", "high", "trained"), [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 16.0, 600)]
)
def test_llama3_rope_scaling_is_read_off_its_divisors(
    home: Home, model: GgufModel, factor: float, low: float, high: float, trained: int
) -> None:
    model.tensors["rope_freqs.weight"] = llama3_divisors(10_000.0, factor, low, high, trained, HEAD_DIM)
    assert stored_config(home, import_model(model.write(), home))["rope_parameters"] == {
        "rope_theta": 10_000.0,
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": trained,
    }


def test_two_rope_scalings_in_one_file_are_refused_and_not_chosen_between(home: Home, model: GgufModel) -> None:
    model.tensors["rope_freqs.weight"] = llama3_divisors(10_000.0, 8.0, 1.0, 4.0, 8192, HEAD_DIM)
    model.metadata["llama.rope.scaling.factor"] = 2.0
    with pytest.raises(ModelRejected, match=r"scales rope by rope_freqs\.weight and by metadata \(linear\)"):
        import_model(model.write(), home)


@pytest.mark.parametrize(
    ("fields", "expected", "context"),
    [
        ({"scaling.type": "none"}, {"rope_type": "default"}, 128),
        ({"scaling.type": "none", "scaling.factor": 2.0}, {"rope_type": "default"}, 128),
        ({"scaling.type": "linear", "scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, 256),
        ({"scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}, 256),
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}, 256),
        (
            {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
            128,
        ),
    ],
)
def test_rope_scalings_are_read_as_llama_cpp_reads_them(
    home: Home, model: GgufModel, fields: dict[str, Any], expected: Any, context: int
) -> None:
    model.metadata = {f"llama.rope.{name}": value for name, value in fields.items()}
    manifest = import_model(model.write(), home)
    assert stored_config(home, manifest)["rope_parameters"] == {"rope_theta": 10_000.0, **expected}
    assert manifest.context_length == context


@pytest.mark.parametrize("architecture", NORMS)
def test_the_imported_directory_opens_in_transformers(home: Home, model: GgufModel, architecture: str) -> None:
    transformers = pytest.importorskip("transformers")
    model.change_to(architecture)
    manifest = import_model(model.write(), home)
    oracle, report = transformers.AutoModelForCausalLM.from_pretrained(
        home.model_directory(manifest.digest), dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    tensors = stored(home, manifest)
    assert all(torch.equal(oracle.state_dict()[name], tensor) for name, tensor in tensors.items())


def test_transformers_turns_the_llama3_scaling_back_into_its_divisors(home: Home, model: GgufModel) -> None:
    transformers = pytest.importorskip("transformers")
    divisors = llama3_divisors(10_000.0, 8.0, 1.0, 4.0, 8192, HEAD_DIM)
    model.tensors["rope_freqs.weight"] = divisors
    directory = home.model_directory(import_model(model.write(), home).digest)
    oracle = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    unscaled = 10_000.0 ** -(np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    np.testing.assert_allclose(oracle.model.rotary_emb.inv_freq.numpy(), unscaled / divisors, rtol=1e-5)

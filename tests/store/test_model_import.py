"""Import of Hugging Face directories: what is stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rekindle.errors import ModelRejected
from rekindle.protocol.models import ModelManifest, ModuleShape
from rekindle.store.home import Home
from rekindle.store.model_import import import_model, read_manifest
from rekindle.store.model_source import SourceTensor, converted
from rekindle.store.safetensors_file import tensor_index
from support.llama_directory import LlamaDirectory

LeftIn = Callable[[Home], list[str]]

LAYER_ORDER = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def stored(home: Home, manifest: ModelManifest) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(home.model_directory(manifest.digest) / "model.safetensors")
    return tensors


def stored_json(home: Home, manifest: ModelManifest, name: str) -> Any:
    return json.loads((home.model_directory(manifest.digest) / name).read_text())


def test_tensors_are_stored_bit_for_bit_in_the_order_of_first_use(home: Home, llama: LlamaDirectory) -> None:
    manifest = import_model(llama.write(), home)
    tensors = stored(home, manifest)
    assert tensors.keys() == llama.weights.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in llama.weights.items())

    index = tensor_index(home.model_directory(manifest.digest) / "model.safetensors")
    layers = [f"model.layers.{layer}.{name}.weight" for layer in (0, 1) for name in LAYER_ORDER]
    assert list(index) == ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


def test_the_manifest_tells_what_was_imported_and_reads_back(home: Home, llama: LlamaDirectory) -> None:
    manifest = import_model(llama.write(), home)
    num_parameters = sum(tensor.numel() for tensor in llama.weights.values())
    assert replace(manifest, modules=()) == ModelManifest(
        digest=manifest.digest,
        family="llama",
        dtype="BF16",
        num_parameters=num_parameters,
        num_bytes=2 * num_parameters,
        num_layers=2,
        vocab_size=11,
        context_length=64,
        eos_token_ids=(2,),
        tied_embeddings=False,
        modules=(),
    )
    assert manifest.modules[:3] == (
        ModuleShape("model.embed_tokens", "embedding", in_features=11, out_features=16),
        ModuleShape("model.layers.0.self_attn.q_proj", "linear", in_features=16, out_features=16),
        ModuleShape("model.layers.0.self_attn.k_proj", "linear", in_features=16, out_features=8),
    )
    assert manifest.modules[-1] == ModuleShape("lm_head", "linear", in_features=16, out_features=11)
    assert len(manifest.modules) == 2 + 2 * 7
    assert read_manifest(home.model_directory(manifest.digest)) == manifest


def test_shards_and_a_single_file_of_the_same_model_have_one_digest(
    home: Home, llama: LlamaDirectory, left_in: LeftIn, tmp_path: Path
) -> None:
    single = import_model(llama.write(), home)
    llama.path = tmp_path / "sharded"
    sharded = import_model(llama.write(num_shards=3), home)
    assert sharded == single
    assert left_in(home) == [single.digest]


def test_the_digest_follows_weights_and_templates_but_not_the_tools_that_wrote_them(
    home: Home, llama: LlamaDirectory
) -> None:
    first = import_model(llama.write(), home).digest
    llama.config |= {"transformers_version": "9.9", "_name_or_path": "elsewhere"}
    assert import_model(llama.write(), home).digest == first

    llama.files["chat_template.jinja"] = "{{ messages }}"
    with_template = import_model(llama.write(), home).digest
    llama.weights["model.norm.weight"][0] += 1
    with_other_weights = import_model(llama.write(), home).digest
    assert len({first, with_template, with_other_weights}) == 3


@pytest.mark.parametrize("content", ["{}", None])
def test_an_import_whose_manifest_another_version_wrote_is_replaced(
    home: Home, llama: LlamaDirectory, content: Any
) -> None:
    manifest = import_model(llama.write(), home)
    stale = home.model_directory(manifest.digest) / "manifest.json"
    stale.write_text(content or json.dumps(json.loads(stale.read_text()) | {"context_length": 1}))
    assert import_model(llama.path, home) == manifest
    assert read_manifest(home.model_directory(manifest.digest)) == manifest


def test_progress_rises_to_the_number_of_bytes(home: Home, llama: LlamaDirectory) -> None:
    seen: list[tuple[int, int]] = []
    manifest = import_model(llama.write(), home, lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (manifest.num_bytes, manifest.num_bytes)


@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "F32"), (torch.float16, "F16")])
def test_other_element_types_are_kept(home: Home, llama: LlamaDirectory, dtype: torch.dtype, name: str) -> None:
    llama.weights = {key: tensor.to(dtype) for key, tensor in llama.weights.items()}
    manifest = import_model(llama.write(), home)
    assert manifest.dtype == name
    assert all(torch.equal(tensor, llama.weights[key]) for key, tensor in stored(home, manifest).items())


def test_a_mixture_of_element_types_becomes_bfloat16(home: Home, llama: LlamaDirectory) -> None:
    llama.weights["model.norm.weight"] = torch.randn(16)
    llama.weights["model.layers.0.self_attn.q_proj.weight"] = torch.randn(16, 16)
    llama.weights["model.layers.1.self_attn.q_proj.weight"] = torch.randn(16, 16).half()
    manifest = import_model(llama.write(), home)
    assert manifest.dtype == "BF16"
    for name, tensor in stored(home, manifest).items():
        assert torch.equal(tensor, llama.weights[name].to(torch.bfloat16)), name


def test_norms_in_another_type_follow_the_matrices(home: Home, llama: LlamaDirectory) -> None:
    llama.weights = {key: tensor.half() for key, tensor in llama.weights.items()}
    llama.weights["model.norm.weight"] = torch.randn(16)
    assert import_model(llama.write(), home).dtype == "F16"
    llama.weights["model.norm.weight"][3] = 1e6
    with pytest.raises(ModelRejected, match=r"model\.norm\.weight holds values too large for F16"):
        import_model(llama.write(), home)


@settings(max_examples=100, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
def test_rounding_to_bfloat16_is_that_of_torch(bits: list[int]) -> None:
    values = np.array(bits, np.uint32).view(np.float32)
    tensor = SourceTensor("x", "F32", (len(bits),), lambda: iter([values]))
    ours = torch.frombuffer(bytearray(b"".join(converted(tensor, "BF16"))), dtype=torch.bfloat16)
    theirs = torch.from_numpy(values.copy()).to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


def test_a_head_equal_to_the_embedding_is_stored_once(home: Home, llama: LlamaDirectory) -> None:
    llama.weights["lm_head.weight"] = llama.weights["model.embed_tokens.weight"].clone()
    manifest = import_model(llama.write(), home)
    assert manifest.tied_embeddings
    assert "lm_head.weight" not in stored(home, manifest)
    assert stored_json(home, manifest, "config.json")["tie_word_embeddings"] is True
    assert manifest.modules[-1].name == "lm_head"


def test_a_head_that_contradicts_the_configuration_is_refused(home: Home, llama: LlamaDirectory) -> None:
    llama.config["tie_word_embeddings"] = True
    with pytest.raises(ModelRejected, match=r"ties lm_head\.weight .* set tie_word_embeddings to false"):
        import_model(llama.write(), home)


def test_rotary_buffers_are_dropped(home: Home, llama: LlamaDirectory) -> None:
    llama.weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    assert "inv_freq" not in " ".join(stored(home, import_model(llama.write(), home)))


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "expected"),
    [
        ({"eos_token_id": [5, 6]}, 2, "c", (5, 6)),
        ({"eos_token_id": 7}, 2, "c", (7,)),
        ({"eos_token_id": [11, 5, -1]}, 2, "c", (5,)),
        ({"temperature": 0.5}, [2, 3], "c", (2, 3)),
        (None, None, "d", (3,)),
        (None, None, {"content": "e"}, (4,)),
        (None, None, None, ()),
    ],
)
def test_the_end_of_text_is_taken_from_the_most_specific_file(
    home: Home, llama: LlamaDirectory, generation: Any, config: Any, tokenizer: Any, expected: tuple[int, ...]
) -> None:
    llama.config["eos_token_id"] = config
    llama.files["tokenizer_config.json"] = {"eos_token": tokenizer}
    if generation is not None:
        llama.files["generation_config.json"] = generation
    assert import_model(llama.write(), home).eos_token_ids == expected


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_scaling": None}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 256),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, 64),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}}, 128),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}}, 64),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "rope_theta": 1e4,
                }
            },
            64,
        ),
    ],
)
def test_the_context_length_counts_rope_scaling(home: Home, llama: LlamaDirectory, scaling: Any, expected: int) -> None:
    llama.config |= scaling
    assert import_model(llama.write(), home).context_length == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"chat_template.jinja": "J", "tokenizer_config.json": {"chat_template": "T"}}, "J"),
        ({"chat_template.json": {"chat_template": "O"}, "tokenizer_config.json": {"chat_template": "T"}}, "O"),
        ({"tokenizer_config.json": {"chat_template": "T"}}, "T"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tool_use", "template": "U"}, {"name": "default", "template": "D"}]
                }
            },
            "D",
        ),
        ({"tokenizer_config.json": {"chat_template": [{"name": "only", "template": "1"}]}}, "1"),
    ],
)
def test_the_chat_template_is_found_in_every_form(home: Home, llama: LlamaDirectory, files: Any, expected: str) -> None:
    llama.files |= files
    manifest = import_model(llama.write(), home)
    assert (home.model_directory(manifest.digest) / "chat_template.jinja").read_text() == expected
    assert "chat_template" not in stored_json(home, manifest, "tokenizer_config.json")


def test_special_tokens_are_kept_as_plain_text(home: Home, llama: LlamaDirectory) -> None:
    llama.files |= {
        "tokenizer_config.json": {"eos_token": {"content": "c", "lstrip": False}, "add_bos_token": True},
        "special_tokens_map.json": {"bos_token": "b", "eos_token": "z"},
    }
    settings = stored_json(home, import_model(llama.write(), home), "tokenizer_config.json")
    assert settings == {"bos_token": "b", "eos_token": "c", "add_bos_token": True}


FAMILY_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 8},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
}


@pytest.mark.parametrize("family", FAMILY_SETTINGS)
def test_every_family_saved_by_transformers_is_complete(home: Home, llama: LlamaDirectory, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {name: llama.config[name] for name in llama.config if name not in ("architectures", "model_type")}
    tied = family.startswith("gemma")
    settings = sizes | FAMILY_SETTINGS[family] | {"tie_word_embeddings": tied, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    llama.write()
    model.save_pretrained(llama.path)
    manifest = import_model(llama.path, home)
    expected = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    tensors = stored(home, manifest)
    assert (manifest.family, manifest.tied_embeddings) == (family, tied)
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    linears = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {module.name for module in manifest.modules if module.kind == "linear"} == linears

    index = tensor_index(home.model_directory(manifest.digest) / "model.safetensors")
    for fused in (("q_proj.weight", "k_proj.weight", "v_proj.weight"), ("gate_proj.weight", "up_proj.weight")):
        entries = [next(entry for name, entry in index.items() if name.endswith(part)) for part in fused]
        ends = [entry.offset + entry.num_bytes for entry in entries]
        assert [entry.offset for entry in entries[1:]] == ends[:-1]


def test_a_family_member_that_leaves_its_defaults_out_gets_them(home: Home, llama: LlamaDirectory) -> None:
    del llama.config["num_key_value_heads"]
    llama.weights |= {
        f"model.layers.{layer}.self_attn.{name}_proj.weight": torch.ones(16, 16).bfloat16()
        for layer in (0, 1)
        for name in "kv"
    }
    manifest = import_model(llama.write(), home)
    config = stored_json(home, manifest, "config.json")
    assert (config["num_key_value_heads"], config["head_dim"]) == (4, 4)


def test_a_safetensors_file_beside_unrelated_ones_is_the_one_used(home: Home, llama: LlamaDirectory) -> None:
    llama.write()
    save_file({"x": torch.ones(1)}, llama.path / "consolidated.safetensors")
    assert import_model(llama.path, home).num_layers == 2

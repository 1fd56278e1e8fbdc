"""Import of Hugging Face directories: what is refused, and that a refusal leaves nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.errors import ConfigurationError, ModelRejected
from rekindle.store.home import Home
from rekindle.store.model_import import import_model, read_manifest
from support.llama_directory import LlamaDirectory

LeftIn = Callable[[Home], list[str]]


def without(name: str) -> Callable[[LlamaDirectory], None]:
    def change(llama: LlamaDirectory) -> None:
        del llama.weights[name]

    return change


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[LlamaDirectory], None]:
    return lambda llama: llama.weights.__setitem__(name, tensor)


def with_config(**fields: Any) -> Callable[[LlamaDirectory], None]:
    return lambda llama: llama.config.update(fields)


def with_file(name: str, content: Any) -> Callable[[LlamaDirectory], None]:
    return lambda llama: llama.files.__setitem__(name, content)


Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (without(Q_PROJ), r"missing: model\.layers\.1\.self_attn\.q_proj\.weight; not recognised: none"),
        (without("lm_head.weight"), r"missing: lm_head\.weight"),
        (with_config(num_hidden_layers=1), r"not recognised: model\.layers\.1\."),
        (with_config(num_hidden_layers=3), r"missing: model\.layers\.2\..* and 1 more"),
        (with_tensor("vision_tower.weight", torch.ones(2)), r"not recognised: vision_tower\.weight"),
        (with_tensor(Q_PROJ, torch.ones(16, 8)), r"has shape \[16, 8\], the configuration asks for \[16, 16\]"),
        (with_tensor(Q_PROJ, torch.ones(16, 16, dtype=torch.int8)), "has dtype I8; supported are F32, F16, BF16"),
        (with_tensor(Q_PROJ, torch.ones(16, 16).to(torch.float8_e4m3fn)), "has dtype F8_E4M3"),
        (with_config(quantization_config={"quant_method": "gptq"}), r"quantised \(gptq\)"),
        (with_config(model_type="mixtral"), "model_type 'mixtral' is not supported; supported are llama, mistral"),
        (with_config(hidden_size="16"), "hidden_size as a positive integer, not '16'"),
        (with_config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; at most 4096"),
        (with_config(num_attention_heads=0), "num_attention_heads as a positive integer, not 0"),
        (with_config(rope_scaling={"type": "longrope"}), "rope scaling 'longrope' is not supported"),
        (with_config(rope_scaling="linear"), "rope_scaling as an object, not 'linear'"),
        (with_config(eos_token_id=11), r"config\.json gives the end of text as 11, but .* vocab_size is 11; correct"),
        (with_file("generation_config.json", {"eos_token_id": [-1, 99]}), r"generation_config\.json .* as -1, 99, but"),
        (with_file("config.json", "{"), r"config\.json is not JSON"),
        (with_file("config.json", "[]"), r"config\.json must hold a JSON object, not list"),
        (with_file("tokenizer.json", "{}"), r"tokenizer\.json describes no tokenizer"),
        (
            with_file("tokenizer_config.json", {"chat_template": [{"name": n, "template": "T"} for n in "ab"]}),
            "none of the chat templates a, b is named 'default'",
        ),
        (with_file("tokenizer_config.json", {"chat_template": ["T"]}), "must list objects with a name and a template"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name_and_leaves_nothing(
    home: Home, llama: LlamaDirectory, left_in: LeftIn, change: Callable[[LlamaDirectory], None], reason: str
) -> None:
    change(llama)
    with pytest.raises(ModelRejected, match=reason):
        import_model(llama.write(), home)
    assert left_in(home) == []


def test_a_missing_shard_is_named(home: Home, llama: LlamaDirectory) -> None:
    llama.write(num_shards=3)
    (llama.path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelRejected, match=r"1 of 3 shards are missing: model-00002-of-00003\.safetensors"):
        import_model(llama.path, home)


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(home: Home, llama: LlamaDirectory, left_in: LeftIn, kept_bytes: int) -> None:
    llama.write(num_shards=2)
    shard = llama.path / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:kept_bytes])
    with pytest.raises(ModelRejected, match=r"model-00002-of-00002\.safetensors"):
        import_model(llama.path, home)
    assert left_in(home) == []


def test_a_file_cut_short_while_it_is_read_is_named(home: Home, llama: LlamaDirectory, left_in: LeftIn) -> None:
    weights = llama.write() / "model.safetensors"

    def cut(done: int, total: int) -> None:
        weights.write_bytes(weights.read_bytes()[:2000])

    with pytest.raises(ModelRejected, match=r"model\.safetensors was cut short while .* was read"):
        import_model(llama.path, home, cut)
    assert left_in(home) == []


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"x": "../model.safetensors"}, r"outside the directory: \.\./model\.safetensors"),
        ({"x": "model.safetensors"}, r"in shards that lack them: x \(model\.safetensors\)"),
        ({"lm_head.weight": "model.safetensors"}, "does not place there: "),
        ({"x": 1}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_an_index_that_lies_is_refused(home: Home, llama: LlamaDirectory, weight_map: Any, reason: str) -> None:
    llama.write()
    llama.write_json("model.safetensors.index.json", {"weight_map": weight_map})
    with pytest.raises(ModelRejected, match=reason):
        import_model(llama.path, home)


def test_pickles_are_refused_unopened(home: Home, llama: LlamaDirectory) -> None:
    llama.write()
    (llama.path / "model.safetensors").rename(llama.path / "pytorch_model.bin")
    with pytest.raises(ModelRejected, match=r"only in pytorch_model\.bin: pickles can run code"):
        import_model(llama.path, home)
    (llama.path / "pytorch_model.bin").unlink()
    with pytest.raises(ModelRejected, match=r"has neither model\.safetensors nor"):
        import_model(llama.path, home)


def test_a_tokenizer_without_its_fast_form_is_refused_with_the_remedy(home: Home, llama: LlamaDirectory) -> None:
    (llama.write() / "tokenizer.json").rename(llama.path / "tokenizer.model")
    with pytest.raises(ModelRejected, match=r"only tokenizer\.model; .* save_pretrained"):
        import_model(llama.path, home)


def test_a_file_that_cannot_be_read_is_named(home: Home, llama: LlamaDirectory) -> None:
    (llama.write() / "config.json").unlink()
    (llama.path / "config.json").mkdir()
    with pytest.raises(ModelRejected, match=r"config\.json cannot be read: Is a directory"):
        import_model(llama.path, home)


def test_a_path_that_is_no_model_is_refused(home: Home, tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match="does not exist"):
        import_model(tmp_path / "absent", home)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelRejected, match="neither a directory nor a GGUF file"):
        import_model(tmp_path / "text", home)
    with pytest.raises(ModelRejected, match=r"has no config\.json"):
        import_model(tmp_path, home)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelRejected, match="holds an adapter, not a model"):
        import_model(tmp_path, home)


def test_a_disk_that_fills_up_leaves_nothing(home: Home, llama: LlamaDirectory, left_in: LeftIn) -> None:
    def fill(done: int, total: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigurationError, match="is full"):
        import_model(llama.write(), home, fill)
    assert left_in(home) == []


def test_a_directory_without_a_manifest_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelRejected, match=r"holds no imported model: .*manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ModelRejected, match=r"holds no imported model: .*digest"):
        read_manifest(tmp_path)

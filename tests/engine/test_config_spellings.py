"""Configurations as people find them, old spellings and missing fields included, against what transformers makes of
the same `config.json`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rekindle.errors import ModelRejected
from rekindle.store.home import Home
from rekindle.store.model_config import resolve_config
from rekindle.store.model_import import import_model
from support.engines import LocalEngine, greedy
from support.oracle import oracle_greedy, oracle_prompt_logprobs, random_prompts
from support.tiny import SIZES, make_tokenizer, make_visible

transformers = pytest.importorskip("transformers")

LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
MANY_LAYERS = {"num_hidden_layers": 30, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}

SPELLINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "old theta": ("llama", {"rope_theta": 500.0}),
    "old linear": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_theta": 500.0}),
    "both rope fields": ("llama", {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}),
    "trained length beside yarn": ("llama", {"original_max_position_embeddings": 64, "rope_scaling": YARN}),
    "llama3 without trained length": ("llama", {"rope_scaling": LLAMA3}),
    "stray activation": ("llama", {"hidden_activation": "gelu_pytorch_tanh"}),
    "no epsilon at all": ("llama", {"rms_norm_eps": 0.0}),
    "head size not a multiple of 8": ("llama", {"head_dim": 12}),
    "mistral with mixed layers": ("mistral", {"sliding_window": 7, "layer_types": MIXED}),
    "qwen2 without first windowed layer": ("qwen2", {**MANY_LAYERS, "use_sliding_window": True, "sliding_window": 9}),
    "gemma2 without soft caps": ("gemma2", {"query_pre_attn_scalar": 16}),
    "gemma2 with soft caps off": ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    "gemma3 old": ("gemma3_text", {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": LINEAR}),
    "gemma3 null": ("gemma3_text", {"rope_parameters": None, "rope_scaling": LINEAR, "sliding_window": 8}),
    "gemma3 without theta": (
        "gemma3_text",
        {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default"}}},
    ),
    "gemma3 with one kind": ("gemma3_text", {"rope_parameters": {"full_attention": LINEAR}, "rope_theta": 5e5}),
    "gemma3 with a cap nobody applies": ("gemma3_text", {"attn_logit_softcapping": 1.0, "sliding_window": 8}),
    "gemma3 with an internal field": ("gemma3_text", {"_sliding_window_pattern": 2, "sliding_window": 8}),
}


def write_model(directory: Path, family: str, changes: dict[str, Any]) -> Any:
    """A random model of what transformers reads from the configuration."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({**SIZES, "model_type": family, **changes}))
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    make_visible(model)
    written = (directory / "config.json").read_text()
    model.save_pretrained(directory)
    (directory / "config.json").write_text(written)
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return model


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_configuration_means_what_transformers_takes_it_for(spelling: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", *SPELLINGS[spelling])
    home = Home(tmp_path / "home")
    manifest = import_model(tmp_path / "source", home)
    engine = LocalEngine(home.model_directory(manifest.digest), manifest)
    for i, prompt in enumerate(random_prompts()):
        output = engine.run([greedy(f"p{i}", prompt, 6, prompt_logprobs=0)])[f"p{i}"]
        assert output.token_ids == oracle_greedy(model, prompt, 6)
        found = [entry.logprob for entry in (output.prompt_logprobs or [])[1:] if entry is not None]
        assert found == pytest.approx(oracle_prompt_logprobs(model, prompt), abs=2e-4)
    engine.close()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_resolving_a_resolved_configuration_changes_nothing(spelling: str) -> None:
    family, changes = SPELLINGS[spelling]
    resolved = resolve_config({**SIZES, "model_type": family, **changes})
    assert resolve_config(resolved) == resolved


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"rope_scaling": {"rope_type": "longrope"}}, "rope scaling 'longrope'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor as a positive number, not None"),
        ("llama", {"rope_scaling": {**LLAMA3, "low_freq_factor": "1"}}, "low_freq_factor"),
        ("llama", {"rope_parameters": {"full_attention": LINEAR}}, "full_attention"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ("llama", {"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
        ("mistral", {"layer_types": ["chunked_attention"] * 3}, "layer_types"),
        ("gemma3_text", {"rope_parameters": LINEAR}, "found rope_type, factor beside them"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type, not in type"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only causal attention"),
    ],
)
def test_what_is_not_built_is_refused_by_name(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelRejected, match=message):
        resolve_config({**SIZES, "model_type": family, **changes})


def test_a_stretched_context_can_be_used_whole(tmp_path: Path) -> None:
    model = write_model(tmp_path / "source", "llama", {"rope_scaling": LINEAR})
    home = Home(tmp_path / "home")
    manifest = import_model(tmp_path / "source", home)
    engine = LocalEngine(home.model_directory(manifest.digest), manifest)
    assert engine.engine.ready.max_context_tokens == manifest.context_length == 4 * SIZES["max_position_embeddings"]
    prompt = torch.randint(3, 200, (300,)).tolist()
    assert engine.run([greedy("long", prompt, 4)])["long"].token_ids == oracle_greedy(model, prompt, 4)
    engine.close()

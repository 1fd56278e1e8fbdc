"""adapter_config.json: what is read from it, what is refused by name, and which modules it selects."""

import json
import re
from collections.abc import Sequence
from typing import Any

import pytest

from rekindle.errors import AdapterRejected
from rekindle.protocol.models import ModuleShape
from rekindle.store import peft_patterns
from rekindle.store.peft_config import Target, parse_peft_config, resolve_targets
from rekindle.store.peft_patterns import Pattern
from support.adapter_files import base_manifest

MODULES = base_manifest().modules


def targets(**config: Any) -> tuple[Target, ...]:
    parsed = parse_peft_config(json.dumps({"peft_type": "LORA", **config}).encode())
    return resolve_targets(parsed, MODULES)


def names(**config: Any) -> list[str]:
    return [target.module.name for target in targets(**config)]


def refusal(**config: Any) -> str:
    with pytest.raises(AdapterRejected) as caught:
        targets(**{"target_modules": ["q_proj"], **config})
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("layer_replication", [[0, 1], [0, 2]]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("trainable_token_indices", [1, 2]),
        ("alora_invocation_tokens", [5]),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {"beta": 0.1}),
        ("monteclora_config", {"num_samples": 2}),
        ("velora_config", {"num_groups": 2}),
        ("enable_lora", [True, False, True]),
        ("fan_in_fan_out", True),
        ("bias", "lora_only"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", ["pissa"]),
        ("peft_type", "IA3"),
        ("modules_to_save", ["score"]),
        ("a_field_of_tomorrow", 0.5),
        ("r", 0),
        ("r", 2.5),
        ("r", True),
        ("r", 10**400),
        ("rank_pattern", {"q_proj": 10**400}),
        ("target_modules", "\ud800("),
        ("lora_alpha", "16"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("use_rslora", "yes"),
        ("target_modules", {"q_proj": 1}),
        ("target_modules", [1]),
        ("target_modules", "(q_proj"),
        ("exclude_modules", 7),
        ("layers_to_transform", ["0"]),
        ("layers_to_transform", True),
        ("rank_pattern", [["q_proj", 4]]),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"q_proj\\": 1}),
        ("alpha_pattern", {"q_proj": None}),
    ],
)
def test_a_field_that_cannot_be_honoured_is_refused_by_its_name(field: str, value: Any) -> None:
    assert field in refusal(**{field: value})


def test_switches_that_are_off_and_fields_of_training_are_ignored() -> None:
    config = {
        "use_dora": False, "lora_bias": False, "layer_replication": None, "target_parameters": [], "bias": "none",
        "arrow_config": None, "fan_in_fan_out": False, "lora_dropout": 0.1, "task_type": "CAUSAL_LM",
        "loftq_config": {}, "megatron_core": "megatron.core", "init_lora_weights": "gaussian", "inference_mode": True,
        "revision": "main", "peft_version": "0.21.2", "base_model_name_or_path": "someone/else",
        "an_unknown_switch": False, "qalora_group_size": 16, "eva_config": {"rho": 2.0}, "auto_mapping": {"x": 1},
    }  # fmt: skip
    assert len(targets(target_modules=["q_proj"], **config)) == 2


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"[" * 100_000, b"\xff\xfe"])
def test_what_is_not_a_json_object_is_refused_with_the_file_name(raw: bytes) -> None:
    with pytest.raises(AdapterRejected, match=r"adapter_config\.json"):
        parse_peft_config(raw)


def test_a_list_matches_whole_last_parts_and_full_names() -> None:
    assert names(target_modules=["proj", "mlp.up_proj", "model.layers.1.self_attn.k_proj"]) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_text_is_a_pattern_of_the_full_name() -> None:
    assert names(target_modules="q_proj") == []
    assert names(target_modules=r".*\.[qk]_proj") == [
        f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"
    ]
    assert names(target_modules=r"(?i).*LAYERS\.1.*(?<!down)_proj")[0] == "model.layers.1.self_attn.q_proj"
    assert len(names(target_modules=r"^(?!.*self_attn).*layers.*")) == 6


@pytest.mark.parametrize("text", ["all-linear", "ALL-Linear"])
def test_all_linear_is_every_linear_layer_but_the_output_head(text: str) -> None:
    found = names(target_modules=text)
    assert len(found) == 14
    assert "lm_head" not in found
    assert "model.embed_tokens" not in found


def test_no_targets_at_all_means_queries_and_values() -> None:
    assert names() == names(target_modules=["q_proj", "v_proj"])
    assert names(target_modules=None) == names()


def test_exclusions_beat_targets() -> None:
    assert names(target_modules=["q_proj", "o_proj"], exclude_modules=["o_proj", "layers.0.self_attn.q_proj"]) == [
        "model.layers.1.self_attn.q_proj"
    ]
    assert names(target_modules=["q_proj"], exclude_modules=r".*\.1\..*") == ["model.layers.0.self_attn.q_proj"]
    assert names(target_modules=["q_proj"], exclude_modules=r"layers") == names(target_modules=["q_proj"])
    assert names(target_modules=["lm_head", "q_proj"], modules_to_save=["lm_head"]) == names(target_modules=["q_proj"])


def test_layers_to_transform_narrows_endings_but_not_full_names() -> None:
    full = "model.layers.0.mlp.up_proj"
    assert names(target_modules=["q_proj", full], layers_to_transform=1) == [full, "model.layers.1.self_attn.q_proj"]
    assert names(target_modules=["q_proj"], layers_to_transform=[0]) == ["model.layers.0.self_attn.q_proj"]
    assert names(target_modules=["q_proj"], layers_to_transform=[]) == names(target_modules=["q_proj"])
    assert names(target_modules=["q_proj", "lm_head"], layers_to_transform=[0, 1], layers_pattern="layers") == names(
        target_modules=["q_proj", "lm_head"], layers_to_transform=[0, 1]
    )
    assert names(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=["h", "lay.*s"]) == [
        "model.layers.0.self_attn.q_proj"
    ]
    assert names(target_modules=["q_proj"], layers_to_transform=[0], layers_pattern="blocks") == []


def test_layer_fields_that_peft_itself_refuses_are_refused() -> None:
    assert "layers_to_transform" in refusal(target_modules="all-linear", layers_to_transform=[0])
    assert "layers_pattern" in refusal(layers_pattern="layers")


def test_the_first_matching_pattern_gives_rank_and_alpha() -> None:
    found = targets(
        r=8,
        lora_alpha=16,
        target_modules=["q_proj", "up_proj"],
        rank_pattern={"q_proj": 2, r"layers\.1.*": 5, "proj": 7},
        alpha_pattern={r"layers\.0\..*": 3.5},
    )
    assert [(target.module.name[13:], target.rank, target.scale) for target in found] == [
        ("0.self_attn.q_proj", 2, 3.5 / 2),
        ("0.mlp.up_proj", 8, 3.5 / 8),
        ("1.self_attn.q_proj", 2, 8.0),
        ("1.mlp.up_proj", 5, 16 / 5),
    ]


def test_rslora_divides_by_the_root_of_each_rank() -> None:
    found = targets(use_rslora=True, r=9, lora_alpha=6, target_modules=["q_proj"], rank_pattern={r"0\.self_attn.*": 16})
    assert [target.scale for target in found] == [6 / 4, 6 / 3]


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": r"((\w|\.)+)+!"},
        {"exclude_modules": ".*" * 30 + "!"},
        {"rank_pattern": {r"(.|\w)" * 30 + "!": 4}},
        {"target_modules": "(" * 5000 + ")" * 5000},
    ],
    ids=["nested", "many-stars", "alternatives", "deep"],
)
def test_a_pattern_that_would_never_end_is_refused_in_bounded_time(config: dict[str, Any]) -> None:
    assert "regular expression" in refusal(**config)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"rank_pattern": {f"m{i}": 4 for i in range(20_000)}}, "20000 patterns .* at most 2048 with 262144"),
        ({"layers_to_transform": [0], "layers_pattern": ["x"] * 5000}, r"5000 patterns .*\(layers_pattern\)"),
        ({"target_modules": "a" * 300_000}, r"1 patterns .* with 300000 characters \(target_modules\)"),
        ({"target_modules": [f"m{i}" for i in range(20_000)]}, "target_modules lists 20000 entries; at most 10000"),
        ({"exclude_modules": ["m"] * 20_000}, "exclude_modules lists 20000 entries"),
        ({"layers_to_transform": [0] * 20_000}, "layers_to_transform lists 20000 entries"),
    ],
    ids=["rank", "layers", "long", "targets", "excluded", "numbers"],
)
def test_more_patterns_and_names_than_any_base_has_are_refused_unmatched(config: dict[str, Any], reason: str) -> None:
    assert re.search(reason, refusal(**config))


def test_every_matrix_of_a_large_model_may_have_its_own_rank_and_alpha() -> None:
    modules = [ModuleShape(f"model.layers.{i // 7}.mlp.m{i % 7}", "linear", 8, 8) for i in range(126 * 7)]
    ranks = {module.name: 1 + i % 50 for i, module in enumerate(modules)}
    raw = {"peft_type": "LORA", "target_modules": list(ranks), "rank_pattern": ranks, "alpha_pattern": ranks}
    found = resolve_targets(parse_peft_config(json.dumps(raw).encode()), modules)
    assert {target.module.name: target.rank for target in found} == ranks
    assert {target.scale for target in found} == {1.0}


@pytest.mark.parametrize("text", [r"\b" * 40_000, r"\B" * 40_000, "^" * 80_000])
def test_patterns_that_take_no_letters_do_not_hold_up_the_process_itself(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matched: list[Sequence[Pattern]] = []
    monkeypatch.setattr(peft_patterns, "_match_in_child", lambda patterns, names: matched.append(patterns))
    peft_patterns.match_all([Pattern("rank_pattern", text, text)], ["model.layers.0"])
    assert len(matched) == 1

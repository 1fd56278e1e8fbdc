"""adapter_config.json of a PEFT LoRA adapter: what of it is served, and which modules it targets.

Follows PEFT 0.21 to the letter in how fields select modules, ranks and scales (peft/tuners/tuners_utils.py and
tuners/lora). A field that would change the mathematics in a way that is not built is refused by its name; fields that
only matter in training are ignored. Knows names and shapes, not tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rekindle.errors import AdapterRejected
from rekindle.protocol.models import ModuleShape
from rekindle.store.peft_patterns import Pattern, match_all
from rekindle.store.wording import listed

T = TypeVar("T")

HEAD, EMBEDDING = "lm_head", "model.embed_tokens"

_DEFAULT_TARGETS = frozenset({"q_proj", "v_proj"})
"""PEFT's targets for every family that is served, where the configuration names none."""

_SAVEABLE = {"lm_head": HEAD, "embed_tokens": EMBEDDING, "model.embed_tokens": EMBEDDING}
_ALL_LINEAR = "all-linear"
_MAX_ALPHA = 1e9
_MAX_RANK = 1 << 20
"""Far beyond any matrix; only keeps numbers that a float cannot hold out of the arithmetic."""
_MAX_LISTED = 10_000
"""Names or layers in one list; the largest models have a thousand matrices."""

_READ = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "modules_to_save", "init_lora_weights", "bias", "fan_in_fan_out",
    "ensure_weight_tying",
}  # fmt: skip
_IGNORED = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "merge_weights", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
}  # fmt: skip
"""Of use in training only. Initialisations that matter afterwards are known by `init_lora_weights`."""

_NOT_BUILT = {
    "use_dora": "DoRA rescales every output row",
    "lora_bias": "it adds a bias to each update",
    "layer_replication": "it makes another model by repeating layers",
    "target_parameters": "it adapts parameters outside linear layers",
    "trainable_token_indices": "it replaces rows of the embedding",
    "alora_invocation_tokens": "aLoRA switches the adapter on in mid-sequence",
    "use_bdlora": "BD-LoRA's matrices are block-diagonal",
    "use_qalora": "QA-LoRA pools the inputs",
    "arrow_config": "Arrow routes each token to another adapter",
    "kasa_config": "KaSA puts a diagonal between A and B and truncates the base",
    "monteclora_config": "MonteCLoRA samples its weights",
    "velora_config": "VeLoRA's layers are not plain LoRA",
    "enable_lora": "it adapts parts of a fused projection",
}
_HARMLESS_INITS = ("gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields of adapter_config.json that matter, checked.

    A text in `target_modules` or `exclude_modules` is a regular expression, a set holds names. Patterns keep the file's
    order: the first that matches counts. `modules_to_save` holds full names of matrices.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: tuple[tuple[str, int], ...]
    alpha_pattern: tuple[tuple[str, float], ...]
    target_modules: frozenset[str] | str
    exclude_modules: frozenset[str] | str
    layers_to_transform: frozenset[int]
    layers_pattern: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ties_embeddings: bool


@dataclass(frozen=True, slots=True)
class Target:
    """A module that the configuration says has a low-rank update, with its rank and scale."""

    module: ModuleShape
    rank: int
    scale: float


def parse_peft_config(raw: bytes) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        AdapterRejected: it is not a LoRA configuration, a field is wrong, or a field asks for what is not built.
    """
    try:
        config = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterRejected(f"adapter_config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterRejected(f"adapter_config.json must hold a JSON object, not {type(config).__name__}")
    _refuse_what_is_not_built(config)
    targets = config.get("target_modules")
    layers = config.get("layers_to_transform")
    parsed = PeftConfig(
        rank=_rank("r", config.get("r", 8)),
        alpha=_number("lora_alpha", config.get("lora_alpha", 8)),
        use_rslora=_flag("use_rslora", config),
        rank_pattern=_pattern_values("rank_pattern", config, _rank),
        alpha_pattern=_pattern_values("alpha_pattern", config, _number),
        target_modules=_DEFAULT_TARGETS if targets is None else _names_or_pattern("target_modules", targets),
        exclude_modules=_names_or_pattern("exclude_modules", config.get("exclude_modules") or []),
        layers_to_transform=_layers([layers] if isinstance(layers, int) else layers or []),
        layers_pattern=_layers_pattern(config.get("layers_pattern")),
        modules_to_save=_modules_to_save(config.get("modules_to_save") or []),
        ties_embeddings=_flag("ensure_weight_tying", config),
    )
    if isinstance(targets, str) and (layers is not None or config.get("layers_pattern") is not None):
        raise AdapterRejected(
            "layers_to_transform and layers_pattern only go with a list of target_modules; "
            "put the layers into the pattern of target_modules instead"
        )
    if parsed.layers_pattern and layers is None:
        raise AdapterRejected("layers_pattern is set without layers_to_transform; set both or neither")
    return parsed


def resolve_targets(config: PeftConfig, modules: Sequence[ModuleShape]) -> tuple[Target, ...]:
    """Which of a base's modules have a low-rank update, in the order given.

    Raises:
        AdapterRejected: a pattern is not a valid regular expression or takes too long to match.
    """
    names = [module.name for module in modules]
    patterns = _patterns(config)
    found: dict[str, list[list[str | None]]] = {}
    for pattern, matches in zip(patterns, match_all(patterns, names), strict=True):
        found.setdefault(pattern.field, []).append(matches)
    targets = []
    for i, module in enumerate(modules):
        matched = {field: [matches[i] for matches in rows] for field, rows in found.items()}
        if _is_excluded(config, module.name, matched) or not _is_target(config, module, matched):
            continue
        rank = _first_value(config.rank_pattern, matched.get("rank_pattern", ()), config.rank)
        alpha = _first_value(config.alpha_pattern, matched.get("alpha_pattern", ()), config.alpha)
        targets.append(Target(module, rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)))
    return tuple(targets)


def _patterns(config: PeftConfig) -> list[Pattern]:
    """Every regular expression of the configuration, in the forms PEFT applies them."""
    patterns = []
    if isinstance(config.target_modules, str) and config.target_modules.lower() != _ALL_LINEAR:
        patterns.append(Pattern("target_modules", config.target_modules, config.target_modules, is_full=True))
    if isinstance(config.exclude_modules, str):
        patterns.append(Pattern("exclude_modules", config.exclude_modules, config.exclude_modules, is_full=True))
    if config.layers_to_transform:
        if not config.layers_pattern:
            patterns.append(Pattern("layers_pattern", "", r".*?\.[^.]*\.(?P<idx>\d+)\.", group="idx"))
        patterns += [
            Pattern("layers_pattern", text, rf"(?:^|.*?\.){text}\.(?P<idx>\d+)\.", group="idx")
            for text in config.layers_pattern
        ]
    for field, keys in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        patterns += [Pattern(field, text, rf"(.*\.)?({text})$") for text, _ in keys]
    return patterns


def _is_excluded(config: PeftConfig, name: str, matched: Mapping[str, list[str | None]]) -> bool:
    if name in config.modules_to_save:
        return True
    if isinstance(config.exclude_modules, str):
        return matched["exclude_modules"][0] is not None
    return _is_named(name, config.exclude_modules)


def _is_target(config: PeftConfig, module: ModuleShape, matched: Mapping[str, list[str | None]]) -> bool:
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == _ALL_LINEAR:
            return module.kind == "linear" and module.name != HEAD
        return matched["target_modules"][0] is not None
    if module.name in targets:
        return True  # PEFT: a full name is a target whatever layers_to_transform says
    if not _is_named(module.name, targets):
        return False
    if not config.layers_to_transform:
        return True
    layer = next((found for found in matched["layers_pattern"] if found is not None), None)
    return layer is not None and int(layer) in config.layers_to_transform


def _is_named(name: str, endings: frozenset[str]) -> bool:
    """Whether one of `endings` is the whole name or what follows one of its dots."""
    return name in endings or any(name[i + 1 :] in endings for i, letter in enumerate(name) if letter == ".")


def _first_value(values: Sequence[tuple[str, T]], matches: Sequence[str | None], default: T) -> T:
    pairs = zip(values, matches, strict=True)
    return next((value for (_, value), match in pairs if match is not None), default)


def _refuse_what_is_not_built(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterRejected(f"peft_type is {kind!r}; only 'LORA' is served")
    for name, reason in _NOT_BUILT.items():
        if _is_on(config.get(name)):
            raise AdapterRejected(f"{name} is set: {reason}, which is not built; train without it, or merge it first")
    if _is_on(config.get("fan_in_fan_out")):
        raise AdapterRejected("fan_in_fan_out is set, but no served family stores its weights transposed; set it false")
    if config.get("bias", "none") not in ("none", None):
        raise AdapterRejected(f"bias is {config['bias']!r}: trained biases are not built; train with bias='none'")
    init = config.get("init_lora_weights", True)
    if init is not None and not isinstance(init, bool) and init not in _HARMLESS_INITS:
        raise AdapterRejected(
            f"init_lora_weights is {init!r}: it changes the base's own weights, or is unknown; save the adapter with "
            "path_initial_model_for_weight_conversion, which turns it into a plain one"
        )
    unknown = [name for name, value in config.items() if name not in _READ | _IGNORED | _NOT_BUILT.keys()
               and _is_on(value)]  # fmt: skip
    if unknown:
        raise AdapterRejected(
            f"adapter_config.json sets fields that are not known here and may change the result: {listed(unknown)}; "
            "remove those that only matter in training"
        )


def _is_on(value: Any) -> bool:
    """Whether a switch or setting differs from what leaves it out: null, false, nothing."""
    return value is not None and value is not False and value not in ("", [], {})


def _rank(field: str, value: Any) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_RANK:
        raise AdapterRejected(f"{field} must be an integer from 1 to {_MAX_RANK}, not {str(value)[:80]!r}")
    return value


def _number(field: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -_MAX_ALPHA <= value <= _MAX_ALPHA:
        raise AdapterRejected(
            f"{field} must be a number between -{_MAX_ALPHA:g} and {_MAX_ALPHA:g}, not {str(value)[:80]!r}"
        )
    return float(value)


def _flag(field: str, config: Mapping[str, Any]) -> bool:
    value = config.get(field)
    if value not in (None, False, True):
        raise AdapterRejected(f"{field} must be true or false, not {value!r}")
    return bool(value)


def _pattern_values(field: str, config: Mapping[str, Any], read: Callable[[str, Any], T]) -> tuple[tuple[str, T], ...]:
    value = config.get(field) or {}
    if not isinstance(value, dict):
        raise AdapterRejected(f"{field} must map patterns of module names to numbers, not be {value!r}")
    return tuple((key, read(f"{field}[{key!r}]", number)) for key, number in value.items())


def _names_or_pattern(field: str, value: Any) -> frozenset[str] | str:
    return value if isinstance(value, str) else frozenset(_strings(field, value))


def _strings(field: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterRejected(f"{field} must be a list of names, not {str(value)[:200]}")
    _refuse_too_many(field, value)
    return tuple(value)


def _layers(value: Any) -> frozenset[int]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise AdapterRejected(f"layers_to_transform must be a layer or a list of layers, not {str(value)[:200]}")
    _refuse_too_many("layers_to_transform", value)
    return frozenset(value)


def _refuse_too_many(field: str, value: Sequence[Any]) -> None:
    if len(value) > _MAX_LISTED:
        raise AdapterRejected(
            f"{field} lists {len(value)} entries; at most {_MAX_LISTED} are accepted: name what the base has, or use a "
            "pattern"
        )


def _layers_pattern(value: Any) -> tuple[str, ...]:
    if not value:
        return ()
    return (value,) if isinstance(value, str) else _strings("layers_pattern", value)


def _modules_to_save(value: Any) -> tuple[str, ...]:
    names = _strings("modules_to_save", value)
    if others := [name for name in names if name not in _SAVEABLE]:
        raise AdapterRejected(
            f"modules_to_save names {listed(others)}; only lm_head and embed_tokens can be replaced by an adapter"
        )
    return tuple(dict.fromkeys(_SAVEABLE[name] for name in names))

"""A base model's configuration in one form, read as transformers reads it.

`config.json` has spelled the same thing in several ways over the years, and leaves much to the defaults of a family.
What `resolve_config` returns states all that the mathematics depends on, in one spelling each: `rope_parameters`, flat,
or for Gemma 3 one record for each kind of layer; `layer_types` and `sliding_window` where a family has windows; sizes
and soft caps. Other spellings are gone from it. Resolving a resolved configuration changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rekindle.errors import ModelRejected

Config = Mapping[str, Any]
"""What `config.json` holds."""

_MAX_LAYERS = 4096
_FULL, _SLIDING = "full_attention", "sliding_attention"
_LAYER_TYPES = (_FULL, _SLIDING)

_GEMMA: Config = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_QWEN: Config = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
FAMILY_DEFAULTS: Mapping[str, Config] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "gemma2": {**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
    "gemma3_text": _GEMMA,
}
"""Supported families by `model_type`, with the defaults of their configuration classes in transformers."""

_ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Rope scalings that are built, with the numbers each must state once it is resolved."""

_GEMMA3_THETAS = {_FULL: ("rope_theta", 1_000_000.0), _SLIDING: ("rope_local_base_freq", 10_000.0)}
_OLD_SPELLINGS = (
    "rope_scaling",
    "rope_theta",
    "rope_local_base_freq",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "sliding_window_pattern",
    "_sliding_window_pattern",
)


def resolve_config(config: Config) -> dict[str, Any]:
    """The configuration in the form described above.

    Raises:
        ModelRejected: the family, a quantisation, a rope scaling or another feature is not supported, or a field is
            missing or wrong.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILY_DEFAULTS:
        raise ModelRejected(f"model_type {family!r} is not supported; supported are {', '.join(FAMILY_DEFAULTS)}")
    _refuse_unbuilt(config)
    resolved = {**FAMILY_DEFAULTS[family], **config}
    _resolve_sizes(resolved)
    resolved["tie_word_embeddings"] = bool(resolved.get("tie_word_embeddings", False))
    resolved["rope_parameters"] = _gemma3_rope(config) if family == "gemma3_text" else _rope(config)
    if family != "llama":
        resolved["layer_types"] = _layer_types(resolved)
    if family == "gemma3_text":
        resolved["attn_logit_softcapping"] = None  # transformers has the field and does not use it
    return {name: value for name, value in resolved.items() if name not in _OLD_SPELLINGS}


def rope_parameters(config: Config) -> list[Config]:
    """The rope records of a resolved configuration: one, or one for each kind of layer."""
    parameters: Config = config["rope_parameters"]
    nested: list[Config] = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _refuse_unbuilt(config: Config) -> None:
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelRejected(
            f"the model is quantised ({method}); import the original in BF16, F16 or F32, or a GGUF file of it"
        )
    if config.get("use_bidirectional_attention"):
        raise ModelRejected("use_bidirectional_attention is set; only causal attention is supported")


def _resolve_sizes(config: dict[str, Any]) -> None:
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        _size(config, name)
    if config["num_hidden_layers"] > _MAX_LAYERS:
        raise ModelRejected(f"num_hidden_layers is {config['num_hidden_layers']}; at most {_MAX_LAYERS} are supported")
    num_heads = _size(config, "num_attention_heads")
    fallbacks = {"num_key_value_heads": num_heads, "head_dim": config["hidden_size"] // num_heads}
    for name, fallback in fallbacks.items():
        if config.get(name) is None:
            config[name] = fallback
        _size(config, name)
    if num_heads % config["num_key_value_heads"]:
        raise ModelRejected(
            f"num_attention_heads is {num_heads}, not a multiple of num_key_value_heads {config['num_key_value_heads']}"
        )


def _layer_types(config: Config) -> list[str]:
    """The kind of each layer, after the families' own rules; a layer without a window is one of full attention."""
    family, num_layers = config["model_type"], config["num_hidden_layers"]
    types = config.get("layer_types")
    if types is None:
        types = [_SLIDING if _has_window(family, config, layer) else _FULL for layer in range(num_layers)]
    if not isinstance(types, list) or len(types) != num_layers or not set(types) <= set(_LAYER_TYPES):
        raise ModelRejected(
            f"config.json must give layer_types as {num_layers} names, each {' or '.join(_LAYER_TYPES)}, not {types!r}"
        )
    if _SLIDING not in types:
        return types
    if family.startswith("qwen") and not config["use_sliding_window"]:
        return [_FULL] * num_layers
    if config["sliding_window"] is None and family in ("mistral", "qwen2", "qwen3"):
        return [_FULL] * num_layers
    _size(config, "sliding_window")
    return types


def _has_window(family: str, config: Config, layer: int) -> bool:
    match family:
        case "gemma2":
            return layer % 2 == 0
        case "gemma3_text":
            return bool((layer + 1) % int(config.get("sliding_window_pattern") or 6))
        case "qwen2" | "qwen3":
            return bool(layer >= config["max_window_layers"])
        case _:
            return True


def _rope(config: Config) -> dict[str, Any]:
    """As `RotaryEmbeddingConfigMixin` of transformers: `rope_scaling`, if there is one, replaces `rope_parameters`."""
    parameters = _record(config, "rope_scaling") or _record(config, "rope_parameters")
    _refuse_nested(parameters)
    parameters.setdefault("rope_theta", config.get("rope_theta") or 10_000.0)
    if (trained := config.get("original_max_position_embeddings")) is not None:
        parameters["original_max_position_embeddings"] = trained
    return _completed(config, parameters)


def _gemma3_rope(config: Config) -> dict[str, Any]:
    """As `Gemma3TextConfig` of transformers: `rope_scaling` is that of the layers of full attention."""
    parameters = _record(config, "rope_parameters")
    if flat := [name for name, value in parameters.items() if not isinstance(value, dict | None)]:
        raise ModelRejected(
            f"Gemma 3 has rope_parameters for {' and '.join(_LAYER_TYPES)}, each an object; found {', '.join(flat)} "
            "beside them"
        )
    resolved = {}
    for kind, (field, theta) in _GEMMA3_THETAS.items():
        own = dict(parameters.get(kind) or {})
        if kind == _FULL:
            own |= _record(config, "rope_scaling")
        if "type" in own and "rope_type" not in own:
            raise ModelRejected("Gemma 3 names its rope scaling in rope_type, not in type")
        _refuse_nested(own)
        own.setdefault("rope_theta", config.get(field) or theta)
        own.pop("truncate", None)  # transformers looks for it elsewhere
        resolved[kind] = _completed(config, own)
    return resolved


def _record(config: Config, name: str) -> dict[str, Any]:
    value = config.get(name)
    if not isinstance(value, dict | None):
        raise ModelRejected(f"config.json must give {name} as an object, not {value!r}")
    return dict(value or {})


def _refuse_nested(parameters: Config) -> None:
    if nested := [name for name, value in parameters.items() if isinstance(value, dict)]:
        raise ModelRejected(f"rope settings of their own for {', '.join(nested)} are not supported in this family")


def _completed(config: Config, parameters: dict[str, Any]) -> dict[str, Any]:
    """The parameters with what their type needs, checked."""
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind not in _ROPE_KEYS:
        raise ModelRejected(f"rope scaling {kind!r} is not supported; supported are {', '.join(_ROPE_KEYS)}")
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ModelRejected(f"partial_rotary_factor is {partial!r}; only 1 is supported")
    completed = {name: value for name, value in parameters.items() if name not in ("type", "partial_rotary_factor")}
    completed["rope_type"] = kind
    length = config["max_position_embeddings"]
    if kind in ("llama3", "yarn") and completed.get("original_max_position_embeddings") is None:
        completed["original_max_position_embeddings"] = length
    if kind == "yarn" and completed.get("factor") is None:
        completed["factor"] = length / _positive(completed, "original_max_position_embeddings")
    for name in ("rope_theta", *_ROPE_KEYS[kind]):
        _positive(completed, name)
    return completed


def _positive(parameters: Config, name: str) -> float:
    value = parameters.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise ModelRejected(f"the rope settings must give {name} as a positive number, not {value!r}")
    return value


def _size(config: Config, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelRejected(f"config.json must give {name} as a positive integer, not {value!r}")
    return value

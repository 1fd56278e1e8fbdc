"""Which tensors a model of each family has, in the order in which a forward pass first uses them.

Tensors that an engine fuses (queries, keys and values; gate and up) are adjacent. Knows configurations and names, not
bytes. The mathematics of a family is the engine's; this module only has what a complete and well-formed file needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from rekindle.errors import ModelRejected
from rekindle.protocol.models import ModuleShape

Config = Mapping[str, Any]

_MAX_LAYERS = 4096
_ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """What sets one model family's files apart. `defaults` are those of its Hugging Face configuration class, for
    fields a config.json may leave out. `qkv_bias` None: as `attention_bias` says, output projection included."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    qkv_bias: bool | None = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False


_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(qkv_bias=None, mlp_bias=True),
    "mistral": Family({"num_key_value_heads": 8, "sliding_window": 4096}),
    "qwen2": Family({"num_key_value_heads": 32}, qkv_bias=True),
    "qwen3": Family({"num_key_value_heads": 32, "head_dim": 128}, qkv_bias=None, qk_norm=True),
    "gemma2": Family(_GEMMA, sandwich_norms=True),
    "gemma3_text": Family({**_GEMMA, "rope_theta": 1_000_000.0}, qk_norm=True, sandwich_norms=True),
}
"""Supported families by `model_type`."""


def resolve_config(config: Config) -> dict[str, Any]:
    """The configuration with what its family leaves to defaults filled in.

    Raises:
        ModelRejected: the family, a quantisation or a rope scaling is not supported, or a size is missing or wrong.
    """
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelRejected(f"model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}")
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else quantization
        raise ModelRejected(
            f"the model is quantised ({method}); import the original in BF16, F16 or F32, or a GGUF file of it"
        )
    resolved = {**FAMILIES[family].defaults, **config}
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"):
        _size(resolved, name)
    if resolved["num_hidden_layers"] > _MAX_LAYERS:
        raise ModelRejected(
            f"num_hidden_layers is {resolved['num_hidden_layers']}; at most {_MAX_LAYERS} are supported"
        )
    num_heads = _size(resolved, "num_attention_heads")
    for name, fallback in (
        ("num_key_value_heads", num_heads),
        ("head_dim", resolved["hidden_size"] // num_heads),
    ):
        if resolved.get(name) is None:
            resolved[name] = fallback
        _size(resolved, name)
    resolved["tie_word_embeddings"] = bool(resolved.get("tie_word_embeddings", False))
    for rope in _rope_parameters(resolved):
        if _rope_type(rope) not in _ROPE_TYPES:
            raise ModelRejected(
                f"rope scaling {_rope_type(rope)!r} is not supported; supported are {', '.join(_ROPE_TYPES)}"
            )
    return resolved


def tensor_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model, in the order of first use. `config` is resolved."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    in_layer = _layer_shapes(config)
    for layer in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in in_layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, hidden)
    return shapes


def modules(config: Config) -> tuple[ModuleShape, ...]:
    """Every matrix an adapter may target, in network order; lm_head also where it is tied. `config` is resolved."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    linears = [
        ModuleShape(name.removesuffix(".weight"), "linear", in_features=shape[1], out_features=shape[0])
        for name, shape in tensor_shapes(config).items()
        if len(shape) == 2 and name.startswith("model.layers.")
    ]
    return (
        ModuleShape("model.embed_tokens", "embedding", in_features=vocab, out_features=hidden),
        *linears,
        ModuleShape("lm_head", "linear", in_features=hidden, out_features=vocab),
    )


def context_length(config: Config) -> int:
    """How many tokens the model was made for. Linear and YaRN scaling stretch `max_position_embeddings`, except in
    Gemma 3, whose figure has the stretch in it already. `config` is resolved."""
    length: int = config["max_position_embeddings"]
    if config["model_type"] == "gemma3_text":
        return length
    for rope in _rope_parameters(config):
        factor = float(rope.get("factor") or 1.0)
        if _rope_type(rope) == "linear":
            return int(length * factor)
        if _rope_type(rope) == "yarn":
            return max(length, int(factor * (rope.get("original_max_position_embeddings") or length)))
    return length


def _layer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    family = FAMILIES[config["model_type"]]
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    query, key = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    attention_bias = bool(config.get("attention_bias"))
    qkv_bias = attention_bias if family.qkv_bias is None else family.qkv_bias
    mlp_bias = family.mlp_bias and bool(config.get("mlp_bias"))

    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
        shapes[f"self_attn.{name}.weight"] = (rows, hidden)
    if qkv_bias:
        for name, rows in (("q_proj", query), ("k_proj", key), ("v_proj", key)):
            shapes[f"self_attn.{name}.bias"] = (rows,)
    if family.qk_norm:
        shapes["self_attn.q_norm.weight"] = shapes["self_attn.k_norm.weight"] = (dim,)
    shapes["self_attn.o_proj.weight"] = (hidden, query)
    if family.qkv_bias is None and attention_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    if family.sandwich_norms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (inner, hidden)
    if mlp_bias:
        shapes["mlp.gate_proj.bias"] = shapes["mlp.up_proj.bias"] = (inner,)
    shapes["mlp.down_proj.weight"] = (hidden, inner)
    if mlp_bias:
        shapes["mlp.down_proj.bias"] = (hidden,)
    if family.sandwich_norms:
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes


def _size(config: Config, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise ModelRejected(f"config.json must give {name} as a positive integer, not {value!r}")
    return value


def _rope_parameters(config: Config) -> list[Config]:
    """The rotary settings: one, or one for each layer type."""
    parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(parameters, dict):
        raise ModelRejected(f"config.json must give the rope settings as an object, not {parameters!r}")
    nested: list[Config] = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rope_type(rope: Config) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")

"""Readings of a Hugging Face configuration that several families share."""

from __future__ import annotations

from typing import Any

from rekindle.engine.kernels.interface import AttentionShape
from rekindle.engine.models.architecture import Config
from rekindle.engine.models.rope import Rope, rope_type
from rekindle.errors import ModelRejected


def required(config: Config, name: str) -> Any:
    """The configuration's `name`, which must be present."""
    if config.get(name) is None:
        raise ModelRejected(f"config.json lacks {name!r}")
    return config[name]


def head_dim(config: Config) -> int:
    """Size of one attention head."""
    return int(config.get("head_dim") or required(config, "hidden_size") // required(config, "num_attention_heads"))


def attention_shape(
    config: Config, *, window: int = 0, softcap: float = 0.0, scale: float | None = None
) -> AttentionShape:
    """The attention of one layer; `scale` defaults to 1 / sqrt(head size)."""
    num_heads = int(required(config, "num_attention_heads"))
    dim = head_dim(config)
    return AttentionShape(
        num_heads=num_heads,
        num_kv_heads=int(config.get("num_key_value_heads") or num_heads),
        head_dim=dim,
        scale=dim**-0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
    )


def rope(config: Config, layer_type: str | None = None) -> Rope:
    """The rotary embedding, from `rope_parameters` (which may be given per layer type) or the older fields."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    if layer_type in parameters:
        parameters = dict(parameters[layer_type])
    rope_type(parameters)
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0) != 1.0:
        raise ModelRejected("partial_rotary_factor other than 1 is not supported")
    return Rope(
        theta=float(parameters.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        dim=head_dim(config),
        max_positions=int(required(config, "max_position_embeddings")),
        scaling=parameters,
    )


def layer_types(config: Config, default: list[str]) -> list[str]:
    """`config["layer_types"]` when given, else `default`: "full_attention" or "sliding_attention" for each layer."""
    types = list(config.get("layer_types") or default)
    if len(types) != required(config, "num_hidden_layers"):
        raise ModelRejected(f"layer_types names {len(types)} layers, num_hidden_layers {config['num_hidden_layers']}")
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise ModelRejected(f"layer_types not supported: {', '.join(unknown)}")
    return types


def activation(config: Config) -> str:
    """The MLP's gate: "silu" or "gelu_tanh"."""
    name = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    known = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
    if name not in known:
        raise ModelRejected(f"activation {name!r} is not supported; supported: {', '.join(known)}")
    return known[name]


def dense(config: Config) -> dict[str, Any]:
    """The sizes and flags every family states in the same fields."""
    return {
        "vocab_size": int(required(config, "vocab_size")),
        "hidden_size": int(required(config, "hidden_size")),
        "intermediate_size": int(required(config, "intermediate_size")),
        "norm_eps": float(config.get("rms_norm_eps") or 1e-6),
        "activation": activation(config),
        "max_positions": int(required(config, "max_position_embeddings")),
    }

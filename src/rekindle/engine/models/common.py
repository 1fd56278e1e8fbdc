"""Readings of a resolved configuration (`rekindle.store.model_config`) that several families share."""

from __future__ import annotations

from typing import Any

from rekindle.engine.kernels.interface import AttentionShape
from rekindle.engine.models.rope import Rope
from rekindle.errors import ModelRejected
from rekindle.store.model_config import Config

_ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def attention_shape(
    config: Config, *, window: int = 0, softcap: float = 0.0, scale: float | None = None
) -> AttentionShape:
    """The attention of one layer; `scale` defaults to 1 / sqrt(head size)."""
    return AttentionShape(
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        scale=config["head_dim"] ** -0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
    )


def windows(config: Config) -> list[int]:
    """Each layer's window, 0 for none."""
    return [config["sliding_window"] if kind == "sliding_attention" else 0 for kind in config["layer_types"]]


def rope(config: Config, layer_type: str | None = None) -> Rope:
    """The rotary embedding, or that of one kind of layer."""
    parameters = config["rope_parameters"]
    return Rope(dim=config["head_dim"], parameters=parameters if layer_type is None else parameters[layer_type])


def dense(config: Config, activation: str = "hidden_act") -> dict[str, Any]:
    """The sizes and flags every family states in the same fields; `activation` names the field of the MLP's gate."""
    eps = config.get("rms_norm_eps")
    gate = config.get(activation) or "silu"
    if gate not in _ACTIVATIONS:
        raise ModelRejected(f"{activation} {gate!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "norm_eps": 1e-6 if eps is None else float(eps),
        "activation": _ACTIVATIONS[gate],
        "tied_embeddings": config["tie_word_embeddings"],
    }

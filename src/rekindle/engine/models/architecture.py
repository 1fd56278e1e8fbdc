"""What distinguishes one decoder-only transformer from another, as data.

A family module turns a Hugging Face configuration into an `Architecture`; `tensor_shapes` says which tensors such a
model must have, so that missing and left-over names are errors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rekindle.engine.kernels.interface import AttentionShape
from rekindle.engine.models.rope import Rope

Config = Mapping[str, Any]
"""The parsed `config.json` of a model."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder-only transformer.

    `attention[i]` and `ropes[rope_of[i]]` belong to layer i. `norm_offset` is added to every norm weight (Gemma stores
    weight - 1). `sandwich_norms`: the outputs of attention and MLP are normed before they join the residual. `qk_norm`:
    each query and key head is normed before rotation. `embed_scale` multiplies embeddings; `logit_softcap` > 0 bounds
    logits.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    attention: tuple[AttentionShape, ...]
    ropes: tuple[Rope, ...]
    rope_of: tuple[int, ...]
    norm_eps: float
    activation: str
    tied_embeddings: bool
    max_positions: int
    norm_offset: float = 0.0
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    embed_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def norm_names(self) -> tuple[str, ...]:
        """A layer's norms: before attention, after attention's output or before the MLP, and so on in order of use."""
        if self.sandwich_norms:
            return (
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
            )
        return ("input_layernorm", "post_attention_layernorm")

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the model must have, by Hugging Face name, with its shape."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer, attention in enumerate(self.attention):
            prefix = f"model.layers.{layer}."
            shapes |= {prefix + name: shape for name, shape in self._layer_shapes(attention).items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tied_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self, attention: AttentionShape) -> dict[str, tuple[int, ...]]:
        hidden, inner = self.hidden_size, self.intermediate_size
        query = attention.num_heads * attention.head_dim
        key_value = attention.num_kv_heads * attention.head_dim
        linears = {
            "self_attn.q_proj": (query, hidden, self.qkv_bias),
            "self_attn.k_proj": (key_value, hidden, self.qkv_bias),
            "self_attn.v_proj": (key_value, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, query, self.output_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns, has_bias) in linears.items():
            shapes[name + ".weight"] = (rows, columns)
            if has_bias:
                shapes[name + ".bias"] = (rows,)
        for norm in self.norm_names:
            shapes[norm + ".weight"] = (hidden,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (attention.head_dim,)
            shapes["self_attn.k_norm.weight"] = (attention.head_dim,)
        return shapes

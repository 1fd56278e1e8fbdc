"""What distinguishes one decoder-only transformer from another, as data.

A family module turns a resolved configuration into an `Architecture`; `rekindle.store.model_layout` says which tensors
such a model has.
"""

from __future__ import annotations

from dataclasses import dataclass

from rekindle.engine.kernels.interface import AttentionShape
from rekindle.engine.models.rope import Rope


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
    norm_offset: float = 0.0
    qk_norm: bool = False
    sandwich_norms: bool = False
    embed_scale: float = 1.0
    logit_softcap: float = 0.0

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def query_size(self) -> int:
        """Outputs of the query projection."""
        return self.attention[0].num_heads * self.attention[0].head_dim

    @property
    def key_value_size(self) -> int:
        """Outputs of the key projection, and of the value projection."""
        return self.attention[0].num_kv_heads * self.attention[0].head_dim

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

"""Gemma 2: norms around both halves of a layer, soft-capped scores and logits, windows on every other layer."""

from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.models.common import attention_shape, dense, layer_types, required, rope


def architecture(config: Config) -> Architecture:
    """Read a `Gemma2ForCausalLM` configuration."""
    num_layers = required(config, "num_hidden_layers")
    default = ["full_attention" if i % 2 else "sliding_attention" for i in range(num_layers)]
    window = int(config.get("sliding_window") or 4096)
    attention = tuple(
        attention_shape(
            config,
            window=window if kind == "sliding_attention" else 0,
            softcap=float(config.get("attn_logit_softcapping") or 0.0),
            scale=float(config.get("query_pre_attn_scalar") or 256) ** -0.5,
        )
        for kind in layer_types(config, default)
    )
    return Architecture(
        **dense(config),
        attention=attention,
        ropes=(rope(config),),
        rope_of=(0,) * num_layers,
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        norm_offset=1.0,
        sandwich_norms=True,
        embed_scale=required(config, "hidden_size") ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )

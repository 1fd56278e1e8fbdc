"""Gemma 2: norms around both halves of a layer, soft-capped scores and logits, windows on every other layer."""

from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.common import attention_shape, dense, rope, windows
from rekindle.store.model_config import Config


def architecture(config: Config) -> Architecture:
    """Read a `Gemma2ForCausalLM` configuration."""
    softcap = float(config.get("attn_logit_softcapping") or 0.0)
    scale = float(config["query_pre_attn_scalar"]) ** -0.5
    attention = tuple(
        attention_shape(config, window=window, softcap=softcap, scale=scale) for window in windows(config)
    )
    return Architecture(
        **dense(config, activation="hidden_activation"),
        attention=attention,
        ropes=(rope(config),),
        rope_of=(0,) * len(attention),
        norm_offset=1.0,
        sandwich_norms=True,
        embed_scale=config["hidden_size"] ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )

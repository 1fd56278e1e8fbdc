"""Gemma 3, text only: Gemma 2 with normed heads instead of soft caps, and a rotary base of its own for local layers."""

from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.models.common import attention_shape, dense, layer_types, required, rope
from rekindle.engine.models.rope import Rope


def architecture(config: Config) -> Architecture:
    """Read a `Gemma3ForCausalLM` (text) configuration."""
    num_layers = required(config, "num_hidden_layers")
    pattern = int(config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6)
    default = ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(num_layers)]
    types = layer_types(config, default)
    window = int(config.get("sliding_window") or 4096)
    scale = float(config.get("query_pre_attn_scalar") or 256) ** -0.5
    softcap = float(config.get("attn_logit_softcapping") or 0.0)
    return Architecture(
        **dense(config),
        attention=tuple(
            attention_shape(config, window=window if kind == "sliding_attention" else 0, softcap=softcap, scale=scale)
            for kind in types
        ),
        ropes=(_global_rope(config), _local_rope(config)),
        rope_of=tuple(1 if kind == "sliding_attention" else 0 for kind in types),
        tied_embeddings=bool(config.get("tie_word_embeddings", True)),
        norm_offset=1.0,
        qk_norm=True,
        sandwich_norms=True,
        embed_scale=required(config, "hidden_size") ** 0.5,
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
    )


def _global_rope(config: Config) -> Rope:
    if "rope_parameters" in config:
        return rope(config, "full_attention")
    return rope({"rope_theta": 1_000_000.0, **config})


def _local_rope(config: Config) -> Rope:
    if "rope_parameters" in config:
        return rope(config, "sliding_attention")
    unscaled = {**config, "rope_scaling": None, "rope_theta": config.get("rope_local_base_freq") or 10_000.0}
    return rope(unscaled)

"""Qwen2 and Qwen2.5: biases on queries, keys and values; a sliding window on the upper layers when switched on."""

from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.models.common import attention_shape, dense, layer_types, required, rope


def windows(config: Config) -> list[int]:
    """Each layer's window, 0 for none."""
    num_layers = required(config, "num_hidden_layers")
    first_windowed = config.get("max_window_layers", num_layers) if config.get("use_sliding_window") else num_layers
    default = ["full_attention" if i < first_windowed else "sliding_attention" for i in range(num_layers)]
    window = int(config.get("sliding_window") or 0)
    return [window if kind == "sliding_attention" else 0 for kind in layer_types(config, default)]


def architecture(config: Config) -> Architecture:
    """Read a `Qwen2ForCausalLM` configuration."""
    layer_windows = windows(config)
    return Architecture(
        **dense(config),
        attention=tuple(attention_shape(config, window=window) for window in layer_windows),
        ropes=(rope(config),),
        rope_of=(0,) * len(layer_windows),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=True,
    )

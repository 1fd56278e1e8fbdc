"""Mistral: Llama with a sliding window on every layer, where the configuration sets one."""

from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.models.common import attention_shape, dense, required, rope


def architecture(config: Config) -> Architecture:
    """Read a `MistralForCausalLM` configuration."""
    num_layers = required(config, "num_hidden_layers")
    return Architecture(
        **dense(config),
        attention=(attention_shape(config, window=int(config.get("sliding_window") or 0)),) * num_layers,
        ropes=(rope(config),),
        rope_of=(0,) * num_layers,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
    )

"""Llama 1, 2 and 3.x, and models of their shape such as SmolLM2."""

from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.models.common import attention_shape, dense, required, rope


def architecture(config: Config) -> Architecture:
    """Read a `LlamaForCausalLM` configuration."""
    num_layers = required(config, "num_hidden_layers")
    bias = bool(config.get("attention_bias"))
    return Architecture(
        **dense(config),
        attention=(attention_shape(config),) * num_layers,
        ropes=(rope(config),),
        rope_of=(0,) * num_layers,
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )

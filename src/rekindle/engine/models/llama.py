"""Llama 1, 2 and 3.x, and models of their shape such as SmolLM2."""

from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.common import attention_shape, dense, rope
from rekindle.store.model_config import Config


def architecture(config: Config) -> Architecture:
    """Read a `LlamaForCausalLM` configuration."""
    num_layers = config["num_hidden_layers"]
    return Architecture(
        **dense(config),
        attention=(attention_shape(config),) * num_layers,
        ropes=(rope(config),),
        rope_of=(0,) * num_layers,
    )

"""Mistral: Llama with sliding windows. Qwen2 and Qwen2.5 differ only in having biases, which the weights show."""

from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.common import attention_shape, dense, rope, windows
from rekindle.store.model_config import Config


def architecture(config: Config) -> Architecture:
    """Read a `MistralForCausalLM` or `Qwen2ForCausalLM` configuration."""
    attention = tuple(attention_shape(config, window=window) for window in windows(config))
    return Architecture(**dense(config), attention=attention, ropes=(rope(config),), rope_of=(0,) * len(attention))

"""Qwen3 (dense): Qwen2 with normed query and key heads and, by default, no biases."""

from dataclasses import replace

from rekindle.engine.models import qwen2
from rekindle.engine.models.architecture import Architecture, Config


def architecture(config: Config) -> Architecture:
    """Read a `Qwen3ForCausalLM` configuration; its head size defaults to 128, not to hidden size / heads."""
    bias = bool(config.get("attention_bias"))
    base = qwen2.architecture({**config, "head_dim": config.get("head_dim") or 128})
    return replace(base, qkv_bias=bias, output_bias=bias, qk_norm=True)

"""Qwen3 (dense): Mistral with normed query and key heads."""

from dataclasses import replace

from rekindle.engine.models import mistral
from rekindle.engine.models.architecture import Architecture
from rekindle.store.model_config import Config


def architecture(config: Config) -> Architecture:
    """Read a `Qwen3ForCausalLM` configuration."""
    return replace(mistral.architecture(config), qk_norm=True)

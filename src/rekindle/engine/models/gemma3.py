"""Gemma 3, text only: Gemma 2 with normed heads and, for layers with a window, a rotary embedding of their own."""

from dataclasses import replace

from rekindle.engine.models import gemma2
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.models.common import rope
from rekindle.store.model_config import Config


def architecture(config: Config) -> Architecture:
    """Read a `Gemma3ForCausalLM` (text) configuration."""
    kinds = ("full_attention", "sliding_attention")
    base = gemma2.architecture({**config, "rope_parameters": config["rope_parameters"][kinds[0]]})
    return replace(
        base,
        ropes=tuple(rope(config, kind) for kind in kinds),
        rope_of=tuple(kinds.index(kind) for kind in config["layer_types"]),
        qk_norm=True,
    )

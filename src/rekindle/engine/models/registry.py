"""Which family reads which configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rekindle.engine.models import gemma2, gemma3, llama, mistral, qwen2, qwen3
from rekindle.engine.models.architecture import Architecture, Config
from rekindle.engine.weights import check_tensors
from rekindle.errors import ModelRejected

FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": llama.architecture,
    "mistral": mistral.architecture,
    "qwen2": qwen2.architecture,
    "qwen3": qwen3.architecture,
    "gemma2": gemma2.architecture,
    "gemma3_text": gemma3.architecture,
}
"""Reader of each `model_type`."""


def read_architecture(config: Config) -> Architecture:
    """The architecture a `config.json` describes; raises `ModelRejected` for an unknown family or bad fields."""
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ModelRejected(f"model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[family](config)


def check_model(directory: Path) -> None:
    """See that the model in `directory` can be served: its family is known and its tensors are what the family needs.

    Raises:
        ModelRejected: it cannot; the message lists what is missing or left over.
    """
    architecture = read_architecture(json.loads((directory / "config.json").read_text()))
    check_tensors(directory / "model.safetensors", architecture.tensor_shapes())

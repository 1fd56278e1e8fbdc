"""Which family reads which configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rekindle.engine.models import gemma2, gemma3, llama, mistral, qwen3
from rekindle.engine.models.architecture import Architecture
from rekindle.engine.weights import check_tensors
from rekindle.errors import ModelRejected
from rekindle.store.model_config import Config, resolve_config
from rekindle.store.model_layout import tensor_shapes

FAMILIES: dict[str, Callable[[Config], Architecture]] = {
    "llama": llama.architecture,
    "mistral": mistral.architecture,
    "qwen2": mistral.architecture,
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


def read_config(directory: Path) -> Config:
    """The configuration of an imported model, which may be from before a field was resolved on import."""
    return resolve_config(json.loads((directory / "config.json").read_text()))


def check_model(directory: Path) -> None:
    """See that the imported model in `directory` can be served; raises `ModelRejected` otherwise."""
    config = read_config(directory)
    read_architecture(config)
    check_tensors(directory / "model.safetensors", tensor_shapes(config))

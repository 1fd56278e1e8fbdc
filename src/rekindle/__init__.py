"""Rekindle: many LoRA adapters served from one resident base model."""

from rekindle.version import VERSION as __version__

__all__ = ["__version__"]

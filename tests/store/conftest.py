"""Homes to import into, and models to import."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rekindle.store.home import Home
from support.gguf_files import GgufModel
from support.llama_directory import LlamaDirectory


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path / "home")


@pytest.fixture
def llama(tmp_path: Path) -> LlamaDirectory:
    return LlamaDirectory(tmp_path / "llama")


@pytest.fixture
def model(tmp_path: Path) -> GgufModel:
    return GgufModel(tmp_path / "model.gguf")


@pytest.fixture
def left_in() -> Callable[[Home], list[str]]:
    """Names of everything a home holds besides its fixed layout."""

    def names(home: Home) -> list[str]:
        return [path.name for place in (home.models, home.adapters, home.temporary) for path in place.iterdir()]

    return names


@pytest.fixture(scope="session")
def demo_gguf() -> Path:
    """The demo model, where the environment or an earlier download provides it."""
    cached = Path(__file__).parents[2] / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    path = Path(os.environ.get("REKINDLE_TEST_GGUF", cached))
    if not path.exists():
        pytest.skip(f"the demo model is not at {path}; `make test` downloads it")
    return path

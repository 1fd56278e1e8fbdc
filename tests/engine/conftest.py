"""Fixtures of the tests that merge adapters."""

from collections.abc import Callable, Iterator

import pytest

from rekindle.engine import engine as engine_module
from support.merging import MergingEngine, Served
from support.policies import ToldPolicy


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served(tmp_path_factory.mktemp("merging"), "llama")


@pytest.fixture
def engine_of(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., MergingEngine]]:
    monkeypatch.setattr(engine_module, "MergePolicy", ToldPolicy)
    engines: list[MergingEngine] = []

    def make(served: Served, kind: type[MergingEngine] = MergingEngine, **changes: object) -> MergingEngine:
        engines.append(kind(served, **changes))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()

"""Every family against transformers in float32: log-probabilities at each prompt position, and greedy text."""

from pathlib import Path
from typing import Any

import pytest

from rekindle.store.home import Home
from rekindle.store.model_import import import_model
from support.engines import LocalEngine, greedy
from support.oracle import oracle_greedy, oracle_prompt_logprobs, random_prompts
from support.tiny import CONFIGS, make_model

pytest.importorskip("transformers")

TOLERANCE = 2e-4


@pytest.fixture(scope="module", params=list(CONFIGS))
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, LocalEngine]:
    directory = tmp_path_factory.mktemp(request.param)
    model = make_model(request.param, directory / "source")
    home = Home(directory / "home")
    manifest = import_model(directory / "source", home)
    engine = LocalEngine(home.model_directory(manifest.digest), manifest)
    request.addfinalizer(engine.close)
    return model, engine


def test_greedy_text_and_prompt_logprobs_equal_the_oracle(served: tuple[Any, LocalEngine]) -> None:
    model, engine = served
    prompts = random_prompts()
    requests = [greedy(f"p{i}", prompt, 12, prompt_logprobs=3) for i, prompt in enumerate(prompts)]
    outputs = engine.run(requests)
    for i, prompt in enumerate(prompts):
        output = outputs[f"p{i}"]
        assert output.token_ids == oracle_greedy(model, prompt, 12)
        assert output.prompt_logprobs is not None
        assert output.prompt_logprobs[0] is None
        found = [entry.logprob for entry in output.prompt_logprobs[1:] if entry is not None]
        assert found == pytest.approx(oracle_prompt_logprobs(model, prompt), abs=TOLERANCE)


def test_a_prefix_hit_changes_nothing(served: tuple[Any, LocalEngine]) -> None:
    model, engine = served
    prompt = random_prompts(seed=1)[-1]
    first = engine.run([greedy("cold", prompt, 6)])["cold"]
    again = engine.run([greedy("warm", prompt, 6)])["warm"]
    assert first.cached_tokens == 0
    assert again.cached_tokens == 96
    assert first.token_ids == again.token_ids == oracle_greedy(model, prompt, 6)


def test_preemption_changes_nothing(served: tuple[Any, LocalEngine], tmp_path: Path) -> None:
    model, roomy = served
    settings = roomy.engine.ready
    tight = LocalEngine(roomy.model_dir, roomy.manifest, memory_bytes=settings.page_bytes * 12)
    prompts = [random_prompts(seed)[2] for seed in range(4)]
    outputs = tight.run([greedy(f"p{i}", prompt, 30) for i, prompt in enumerate(prompts)])
    assert tight.engine.stats().preemptions_total > 0
    for i, prompt in enumerate(prompts):
        assert outputs[f"p{i}"].token_ids == oracle_greedy(model, prompt, 30)
    tight.close()

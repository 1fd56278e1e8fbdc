"""What lies beside a model's weights, read and checked once at the start."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from dataclasses import replace

import pytest

from rekindle.errors import ConfigurationError
from rekindle.gateway.app import create_app
from rekindle.gateway.sampling_defaults import SamplingDefaults
from rekindle.gateway.served_model import INLINE_ENCODE_CHARS
from rekindle.gateway.state import NUM_TEXT_THREADS


@pytest.fixture
def start(make_services, model_dir, tmp_path):
    """Create an application over a copy of the model with some of its files replaced; returns its model."""

    def start(**files: str):
        directory = shutil.copytree(model_dir, tmp_path / "copy")
        for name, content in files.items():
            (directory / name.replace("__", ".")).write_text(content)
        services = make_services()
        base = replace(services.bases[0], directory=directory)
        app = create_app(replace(services, bases=(base,)))
        return app.state.gateway.models[base.manifest.digest]

    return start


def test_whole_numbers_written_with_a_point_are_the_integers_the_engine_wants(start):
    advice = {"top_k": 50.0, "temperature": 1, "top_p": None, "do_sample": True}
    defaults = start(generation_config__json=json.dumps(advice)).defaults
    assert defaults == SamplingDefaults(temperature=1.0, top_k=50)
    assert [type(value) for value in (defaults.top_k, defaults.temperature)] == [int, float]


def test_no_limit_on_the_most_likely_tokens_may_be_written_as_minus_one(start):
    assert start(generation_config__json='{"top_k": -1}').defaults.top_k == 0


@pytest.mark.parametrize(
    "advice",
    [
        {"top_k": 50.5}, {"top_k": "50"}, {"top_k": -2}, {"top_p": 0}, {"top_p": 1.5}, {"temperature": -1},
        {"temperature": True}, {"temperature": float("nan")}, {"top_k": float("inf")}, {"min_p": [0.1]},
        {"repetition_penalty": 0},
    ],
)  # fmt: skip
def test_advice_no_engine_can_follow_is_refused_at_the_start_with_its_file_and_field(start, advice):
    with pytest.raises(ConfigurationError, match=f"generation_config.json: {next(iter(advice))}"):
        start(generation_config__json=json.dumps(advice))


@pytest.mark.parametrize("source", ["{% if %}", "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}"])
def test_a_base_whose_chat_template_is_not_valid_does_not_start(start, source):
    with pytest.raises(ConfigurationError, match=r"chat_template\.jinja .* not valid"):
        start(chat_template__jinja=source)


class SlowTemplate:
    """Renders only once it is allowed to."""

    def __init__(self) -> None:
        self.turn = asyncio.Lock()
        self.may_end = threading.Event()

    def render(self, messages, **_: object) -> str:
        self.may_end.wait(30)
        return "slow"


async def test_a_slow_template_leaves_threads_to_other_requests(start):
    model = start()
    options = {"add_generation_prompt": True, "continue_final_message": False, "extra": None}
    slow = SlowTemplate()
    waiting = [asyncio.create_task(model.render(slow, [], **options)) for _ in range(2 * NUM_TEXT_THREADS)]
    await asyncio.sleep(0)
    text = await model.render(await model.chat_template(None), [{"role": "user", "content": "hi"}], **options)
    assert "hi" in text
    assert await model.encode(["a" * INLINE_ENCODE_CHARS, "b"], add_special_tokens=False)
    assert not any(task.done() for task in waiting)
    slow.may_end.set()
    assert await asyncio.gather(*waiting) == ["slow"] * len(waiting)

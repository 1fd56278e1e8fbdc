"""Settings from files and from the command line: what is wrong is said by name, and never a traceback."""

from pathlib import Path

import pytest

from rekindle import config
from rekindle.cli.settings import Settings
from rekindle.errors import ConfigurationError
from rekindle.units import GIB


@pytest.fixture
def load(tmp_path: Path):
    def load(content: str | bytes = "", *overrides: str) -> Settings:
        path = tmp_path / "rekindle.toml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return config.load(Settings, path, overrides)

    return load


def test_an_override_wins_over_the_file_and_the_file_over_the_default(load) -> None:
    settings = load('[server]\nport = 1\ndrain_s = 2\n[engine]\nmemory = "4GiB"\n', "server.port=3", "engine.threads=2")
    assert (settings.server.port, settings.server.drain_s, settings.server.host) == (3, 2.0, "127.0.0.1")
    assert (settings.engine.memory, settings.engine.threads, settings.engine.step_limit_s) == (4 * GIB, 2, 600.0)


def test_a_section_given_as_a_value_is_refused_whether_overridden_or_not(load) -> None:
    with pytest.raises(ConfigurationError, match="server is a section"):
        load("server = 1")
    with pytest.raises(ConfigurationError, match=r"server is a section, but the settings already give it the value 1"):
        load("server = 1", "server.port=2")


@pytest.mark.parametrize("content", [b"\xff\xfe", b"port = ", b"[server]\nhost = '\xe9'\n"])
def test_a_file_that_is_no_toml_is_refused_with_its_name(load, content) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read settings from .*rekindle\.toml"):
        load(content)


@pytest.mark.parametrize(
    "override",
    [
        "engine.memory=true", "engine.memory=1.5", "engine.memory=-1", "engine.memory=[1]", "engine.memory=much",
        "engine.threads=-1", "engine.threads=0", "engine.threads=true", "engine.threads=1.5", "engine.page_tokens=0",
        "engine.step_limit_s=0", "engine.step_limit_s=inf", "engine.deterministic=1", "server.drain_s=nan",
        "server.drain_s=-1", "server.drain_s=true", "server.port=-1", "server.port=65536", "server.port=http",
        "server.max_body_bytes=0", "server.adapter_roots=1", "server.adapter_roots=[1]",
    ],
)  # fmt: skip
def test_a_value_of_a_wrong_type_or_out_of_its_range_is_refused_by_name(load, override) -> None:
    name = override.partition("=")[0].partition(".")[2]
    with pytest.raises(ConfigurationError, match=name):
        load("", override)


def test_an_unknown_setting_is_refused_with_the_nearest_known_one(load) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting server\.prot; did you mean server\.port\?"):
        load("", "server.prot=1")
    with pytest.raises(ConfigurationError, match=r"not of the form section\.key=value"):
        load("", "server.port")

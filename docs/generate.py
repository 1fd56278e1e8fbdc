"""Write the reference pages that follow from the code: `python docs/generate.py`. A test holds them up to date."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rekindle import config
from rekindle.cli.main import make_parser
from rekindle.cli.settings import Settings

REFERENCE = Path(__file__).parent / "reference"
_WIDTH = "100"


def settings_page() -> str:
    """Every setting with its default and its sentence."""
    lines = [
        "# Settings",
        "",
        "`rekindle serve --config FILE` reads TOML; `--set section.key=value` overrides one setting. Unknown keys are",
        "errors. Sizes may be written as `4GiB`.",
        "",
        "| setting | default | meaning |",
        "|---|---|---|",
    ]
    lines += [f"| `{key}` | {default} | {doc} |" for key, default, doc in config.reference(Settings)]
    return "\n".join(lines) + "\n"


def cli_page() -> str:
    """The help of every command."""
    os.environ["COLUMNS"] = _WIDTH
    parts = ["# Command line", ""]
    for command in _commands(make_parser()):
        parts += [f"## `{command.prog}`", "", "```text", command.format_help().rstrip(), "```", ""]
    return "\n".join(parts)


def _commands(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    found = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                found += _commands(child)
    return found


PAGES = {"settings.md": settings_page, "cli.md": cli_page}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page())

"""What an installation brings: the extras name what the commands import, and a missing compiler is said early."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "rekindle"


OWN_EXTRAS = {PACKAGE / "store" / "codecs": "store"}
"""Packages whose libraries are in an extra of their own, and are imported when they are used."""
COMPARED_WITH = {"blosc2", "nvidia"}
"""Codecs that are used where they happen to be installed."""


def imported_libraries(directory: Path) -> set[str]:
    found = set()
    for path in directory.rglob("*.py"):
        if any(path.is_relative_to(package) for package in OWN_EXTRAS if package != directory):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"rekindle"}


def provided_by(extra: str) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = project["dependencies"] + project["optional-dependencies"][extra]
    return {re.split(r"[<>=\[;]", requirement)[0] for requirement in requirements}


def test_the_import_extra_brings_all_that_models_and_adapters_commands_import() -> None:
    assert imported_libraries(PACKAGE / "store") | imported_libraries(PACKAGE / "catalog") <= provided_by("import")


def test_packages_with_an_extra_of_their_own_import_no_more_than_it_brings() -> None:
    for package, extra in OWN_EXTRAS.items():
        assert imported_libraries(package) - COMPARED_WITH <= provided_by(extra)


def test_a_machine_without_a_cpp_compiler_is_told_what_to_install(tmp_path: Path) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    command = [make, "--directory", str(ROOT), "PYTHON=python3", "SHELL=/bin/sh", "compiler"]
    done = subprocess.run(command, env={"PATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "no C++ compiler found" in done.stderr
    assert "install g++" in done.stderr

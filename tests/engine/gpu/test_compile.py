"""Every kernel compiles for the GPUs Rekindle is meant for, within what a block may take there.

See `support.gpu_compile` for how a kernel is added.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support import gpu_compile

LAUNCH_FILES = sorted(Path(__file__).parent.glob("launches_*.py"))
MAX_SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""Of a block, by compute capability. 8.6 and 8.9 are given what 8.0 is, and have less than its 163 KiB."""
MAX_REGISTERS = 255


@pytest.fixture(scope="module", params=LAUNCH_FILES, ids=lambda path: path.stem.removeprefix("launches_"))
def launch_file(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module", params=sorted(MAX_SHARED_BYTES), ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest, launch_file: Path) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = [sys.executable, gpu_compile.__file__, str(launch_file), str(request.param)]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_kernels_compile_within_the_limits_of_a_block(compiled: list[dict[str, Any]]) -> None:
    assert compiled
    too_big = [
        kernel
        for kernel in compiled
        if kernel["shared_bytes"] > MAX_SHARED_BYTES[kernel["arch"]] or kernel["registers"] > MAX_REGISTERS
    ]
    assert too_big == []


def test_kernels_keep_their_values_in_registers(compiled: list[dict[str, Any]]) -> None:
    assert [kernel for kernel in compiled if kernel["stack_bytes"]] == []

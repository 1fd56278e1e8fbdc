"""Everything that needs a GPU, in one command: the tests, then the benchmarks, then a table and a JSON file.

    make gpu-check

Needs PyTorch with CUDA, Triton, numpy, pytest and hypothesis, and no network; transformers and PEFT are compared with
where they are installed. Each part runs in a process of its own and has a limit of time, all together under ten
minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent.parent


PLAIN_PYTEST = ("-c", os.devnull, "--rootdir", str(ROOT), "--import-mode=importlib", "-p", "no:cacheprovider")
"""Without the project's settings, which name plugins that a bare machine lacks."""


@dataclass(frozen=True)
class Part:
    """One command; `{json}` among its arguments is the file for its figures."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float


PARTS = (
    Part("tests", ("-m", "pytest", "-q", *PLAIN_PYTEST, "tests/engine/gpu"), 200),
    Part("lora", ("benchmarks/gpu/lora.py", "--json", "{json}"), 90),
    Part("attention", ("benchmarks/gpu/attention.py", "--json", "{json}"), 60),
    Part("engine", ("benchmarks/gpu/whole_engine.py", "--json", "{json}"), 240),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("gpu-check.json"), help="where the figures go")
    parser.add_argument("--only", choices=[part.name for part in PARTS], nargs="+", help="run these parts alone")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("gpu-check needs a CUDA GPU and a CUDA build of PyTorch")
    results: dict[str, Any] = {"machine": _machine()}
    for part in PARTS:
        if arguments.only is None or part.name in arguments.only:
            results[part.name] = _run(part)
            arguments.json.write_text(json.dumps(results, indent=1))
    print(json.dumps(results["machine"]))
    for part in PARTS:
        if part.name in results:
            print(f"{part.name:10} {results[part.name]['outcome']:10} {results[part.name]['wall_s']:6.0f} s")
    print(f"figures: {arguments.json}")
    return any(results[part.name]["outcome"] != "passed" for part in PARTS if part.name in results)


def _machine() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "processors": properties.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def _run(part: Part) -> dict[str, Any]:
    print(f"== {part.name}", flush=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}
    environment.pop("TRITON_INTERPRET", None)
    with tempfile.TemporaryDirectory() as directory:
        figures = Path(directory) / "figures.json"
        command = [sys.executable, *(str(figures) if it == "{json}" else it for it in part.arguments)]
        started_s = time.perf_counter()
        try:
            code = subprocess.run(command, cwd=ROOT, env=environment, timeout=part.limit_s, check=False).returncode
            outcome = "passed" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            outcome = "too slow"
        wall_s = time.perf_counter() - started_s
        return {
            "outcome": outcome,
            "wall_s": round(wall_s, 1),
            "figures": json.loads(figures.read_text()) if figures.exists() else None,
        }


if __name__ == "__main__":
    sys.exit(main())

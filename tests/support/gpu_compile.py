"""Compile the Triton kernels that a call launches, for a GPU that need not be there, and say what they take.

To have kernels compiled, add a file `tests/engine/gpu/launches_<name>.py` with a table

    LAUNCHES: dict[str, Callable[[], object]] = {"decode, head size 128": lambda: attention(...), ...}

whose entries call the public function with CPU tensors (contents do not matter, nothing runs; sizes and dtypes should
be realistic). Every kernel launched meanwhile is compiled with exactly the arguments, block shapes, warps and stages of
that launch, so nothing about it is written down twice. `test_compile.py` picks the file up by its name.

Run as a script (`python gpu_compile.py launches.py 90`), because the kernels must be imported without the interpreter:
prints one JSON list with a record per kernel compiled.
"""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BINARIES = "backends/nvidia/bin"


@dataclass(frozen=True)
class CompiledKernel:
    """What one compiled kernel takes. `stack_bytes` per thread is memory that registers were spilled to; `widest_load`
    is in bits, of a global load or asynchronous copy; `tensor_core` names the matrix instructions used."""

    launch: str
    kernel: str
    arch: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    widest_load: int
    tensor_core: tuple[str, ...]


class _AbsentGpu:
    """What Triton asks of a driver before it launches."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_launches(launches: dict[str, Callable[[], object]], arch: int) -> list[CompiledKernel]:
    """Call every entry with launches replaced by compilations for compute capability `arch` (80, 90)."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[CompiledKernel] = []
    seen: set[str] = set()
    run = JITFunction.run
    current = ""

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            compiled.append(_inspect(kernel, current, arch))
        return kernel

    driver.set_active(_AbsentGpu(arch))
    JITFunction.run = compile_only
    try:
        for current, launch in launches.items():  # noqa: B007 - read by compile_only
            launch()
    finally:
        JITFunction.run = run
    return compiled


def _inspect(kernel: Any, launch: str, arch: int) -> CompiledKernel:
    with tempfile.TemporaryDirectory() as directory:
        cubin = Path(directory) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _tool("cuobjdump", "--dump-resource-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]+", sass)
    widths = [int(width) for load in loads for width in re.findall(r"\.(?:U|S)?(8|16|32|64|128)\b", load)]
    return CompiledKernel(
        launch=launch,
        kernel=kernel.metadata.name,
        arch=arch,
        num_warps=kernel.metadata.num_warps,
        registers=_field(usage, "REG"),
        stack_bytes=_field(usage, "STACK"),
        shared_bytes=kernel.metadata.shared,
        widest_load=max(widths, default=32 if loads else 0),
        tensor_core=tuple(sorted(set(re.findall(r"\b(HMMA|HGMMA|IMMA|DMMA)\b", sass)))),
    )


def _tool(name: str, *arguments: str) -> str:
    import triton

    path = Path(triton.__file__).parent / BINARIES / name
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def _field(usage: str, name: str) -> int:
    found = re.search(rf"\b{name}:(\d+)", usage)
    if found is None:
        raise ValueError(f"cuobjdump reports no {name}: {usage!r}")
    return int(found[1])


def _load(path: Path) -> dict[str, Callable[[], object]]:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LAUNCHES


if __name__ == "__main__":
    print(json.dumps([asdict(kernel) for kernel in compile_launches(_load(Path(sys.argv[1])), int(sys.argv[2]))]))

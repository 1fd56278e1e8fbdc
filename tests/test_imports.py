"""Imports point down: who may know whom, for every import statement, those inside functions included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
ROOT_MODULES = {"closing", "errors", "clock", "units", "config", "pace", "version"}

MAY_IMPORT: dict[str, set[str]] = {
    "protocol": set(),
    "policy": {"protocol"},
    "store": {"protocol"},
    "catalog": {"protocol"},
    "engine": {"store", "catalog", "policy", "protocol"},
    "fleet": {"engine", "store", "catalog", "policy", "protocol"},
    "gateway": {"fleet", "engine", "store", "catalog", "policy", "protocol"},
    "bench": {"fleet", "engine", "store", "policy", "protocol"},
    "cli": {"bench", "gateway", "fleet", "engine", "store", "catalog", "policy", "protocol"},
    "testing": {"fleet", "engine", "store", "policy", "protocol"},
    "__main__": {"cli"},
}
ONLY_IN = {
    "torch": ("engine", "testing", "bench"),  # `rekindle bench load` measures torch.load
    "fastapi": ("gateway",),
    "starlette": ("gateway",),
    "pydantic": ("gateway",),
    "uvicorn": ("cli",),
    "sqlalchemy": ("catalog",),
    "alembic": ("catalog",),
    "jinja2": ("gateway",),
    "prometheus_client": ("gateway",),
    "gguf": ("store",),
    "transformers": (),
    "peft": (),
    "ray": (),
}
"""Which packages may import a library; libraries that are not named may be imported anywhere."""

TRITON_ONLY_IN = "rekindle.engine.kernels.gpu"
PURE = ("rekindle.engine.scheduler", "rekindle.policy")
NOT_PURE = {
    "torch",
    "numpy",
    "time",
    "random",
    "os",
    "socket",
    "threading",
    "asyncio",
    "logging",
    "secrets",
    "datetime",
}


def imports() -> Iterator[tuple[str, str]]:
    """(importing module, imported module) of every import statement under src."""
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute here"
                yield module, node.module or ""


def package_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_packages_import_only_what_lies_below_them() -> None:
    wrong = []
    for module, imported in imports():
        above, below = package_of(module), package_of(imported)
        if not imported.startswith("rekindle.") or below in ROOT_MODULES or above == below:
            continue
        if below not in MAY_IMPORT.get(above, set()):
            wrong.append(f"{module} imports {imported}")
    assert wrong == []


def test_root_modules_import_no_package() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if package_of(module) in ROOT_MODULES and imported.startswith("rekindle.")
        if package_of(imported) not in ROOT_MODULES
    ]
    assert wrong == []


def test_heavy_libraries_stay_in_their_packages() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if (allowed := ONLY_IN.get(imported.split(".")[0])) is not None
        if package_of(module) not in allowed
    ]
    assert wrong == []


def test_triton_stays_in_the_gpu_kernels() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if imported.split(".")[0] == "triton" and not f"{module}.".startswith(f"{TRITON_ONLY_IN}.")
    ]
    assert wrong == []


def test_an_engine_starts_where_triton_is_not_installed() -> None:
    script = "import sys; sys.modules['triton'] = None; import rekindle.engine.__main__"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_decisions_are_pure() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module, imported in imports()
        if module.startswith(PURE) and imported.split(".")[0] in NOT_PURE
    ]
    assert wrong == []


def test_modules_do_not_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for module, imported in imports():
        if imported.startswith("rekindle"):
            graph.setdefault(module, set()).add(imported)
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for imported in graph.get(module, ()):
                visit(imported, (*trail, module))
            done.add(module)

    for module in list(graph):
        visit(module, ())


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        (
            "rekindle.engine.__main__",
            ["fastapi", "pydantic", "sqlalchemy", "transformers", "tokenizers", "jinja2", "ray"],
        ),
        ("rekindle.gateway.app", ["torch", "transformers", "ray"]),
        ("rekindle.engine.scheduler.scheduler", ["torch", "numpy"]),
        ("rekindle.policy.load_queue", ["torch", "numpy"]),
        ("rekindle.cli", ["torch", "fastapi", "sqlalchemy", "numpy"]),
    ],
)
def test_a_process_loads_nothing_it_does_not_need(module: str, absent: list[str]) -> None:
    script = f"import sys, {module}; print([name for name in {absent!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "[]"

"""Who may import whom: the walls of docs/architecture.md, read from the sources."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "diffusers", "transformers", "peft", "compel", "accelerate"}
DOING = {"asyncio", "anyio", "socket", "subprocess", "hypercorn", "starlette"}
FORBIDDEN = {
    "ipc": HEAVY | DOING | {"supervisor", "gpu_worker"},
    "supervisor": HEAVY | {"gpu_worker"},
    "gpu_worker": {"supervisor", "starlette", "hypercorn"},
}
# They decide and never do: nothing of the outside reaches them but their arguments.
PURE = ("settings", "errors", "states", "placement", "jobs", "estimates", "worker", "requests",
        "admission", "suspects", "rotation",
        "headers", "families", "catalogue", "parameters", "schedulers", "webhooks",
        "answers", "infotext", "openai_images", "start_checks")  # fmt: skip
OWNERS_OF_PROCESSES = {"supervisor/worker_process.py"}
BEGINNINGS = {"fork", "forkpty", "posix_spawn", "posix_spawnp", "system", "popen", "Popen",
              "open_process", "run_process", "create_subprocess_exec",
              "create_subprocess_shell"}  # fmt: skip


def statements(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """All of them, however deep; expressions, which import nothing, are passed over."""
    for node in nodes:
        yield node
        for part in ("body", "orelse", "handlers", "finalbody", "cases"):
            yield from statements(getattr(node, part, ()))


def imported(path: Path) -> Iterator[str]:
    for node in statements(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@cache
def tops(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_a_package_keeps_to_its_side_of_the_wall(package: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): crossed
        for path in (ROOT / package).rglob("*.py")
        if (crossed := tops(path) & FORBIDDEN[package])
    }
    assert not wrong


@pytest.mark.parametrize("name", PURE)
def test_a_pure_file_imports_nothing_that_acts(name: str) -> None:
    path = ROOT / "supervisor" / f"{name}.py"
    if name == "webhooks":
        assert not tops(path) & {"subprocess", "asyncio", "socket"}
    else:
        assert not tops(path) & (DOING | {"psutil", "httpx"})


def starts_processes(path: Path) -> bool:
    """By the standard library or by anyio."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    called = {
        node.func.attr
        for node in nodes
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and getattr(node.func.value, "id", "") in ("os", "anyio", "asyncio")
    }
    return bool(tops(path) & {"subprocess", "multiprocessing", "pty"} or called & BEGINNINGS)


def test_one_file_starts_processes() -> None:
    """The command line may start a server; it does so without a process of its own."""
    sources = (ROOT / "supervisor").rglob("*.py")
    assert {str(p.relative_to(ROOT)) for p in sources if starts_processes(p)} == OWNERS_OF_PROCESSES


def test_a_supervisor_that_is_whole_has_not_loaded_torch() -> None:
    """Nor does it when it tells of its pipelines, schedulers and host."""
    code = (
        "import pathlib, sys, supervisor.server, supervisor.cli; "
        "from supervisor import catalogue, monitoring, schedulers; "
        "catalogue.pipelines(); schedulers.listing(); monitoring.system_stats(pathlib.Path('.')); "
        f"print(sorted({HEAVY | {'gpu_worker'}!r} & set(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "[]", shown.stderr


def test_the_loop_of_a_worker_knows_no_torch() -> None:
    code = "import sys, gpu_worker.loop; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert shown.stdout.strip() == "False", shown.stderr

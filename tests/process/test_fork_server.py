"""Workers that are forked from one process: whose children they are, and what its end means.

The workers are scripted; `--fork-server` is the real one's.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import psutil
import pytest

from supervisor import fork_server
from supervisor.fork_server import ForkServer
from supervisor.worker_process import Ends
from tests.tools.faults import body, once
from tests.tools.server import SCRIPTED, RunningServer, running, wait_until


def fork_servers(server: RunningServer) -> list[psutil.Process]:
    """Workers have their command line, but are workers."""
    workers = {worker["pid"] for worker in server.placement()}
    children = psutil.Process(server.process.pid).children()
    return [each for each in children if each.pid not in workers]


def is_forked(pid: int) -> bool:
    return "--fork-server" in psutil.Process(pid).cmdline()


def replaced(server: RunningServer, pid: int) -> int:
    """Kills a server's one worker and returns its successor's process id, once that is ready."""
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.placement()[0]["pid"] not in (None, pid))
    server.until_ready()
    return int(server.placement()[0]["pid"])


def test_a_worker_is_the_supervisors_own_child_and_leads_a_group(
    tmp_path: Path, models: Path
) -> None:
    settings = {"MODEL_DIR": str(models), "DEVICES": "cpu,cpu"}
    with running(tmp_path, SCRIPTED, workers=2, **settings) as server:
        for worker in server.placement():
            pid = worker["pid"]
            assert is_forked(pid)
            assert psutil.Process(pid).ppid() == server.process.pid
            assert os.getpgid(pid) == os.getsid(pid) == pid
        assert len(fork_servers(server)) == 1


def sockets_of(pid: int) -> int:
    places = [f"/proc/{pid}/fd/{number}" for number in os.listdir(f"/proc/{pid}/fd")]
    return sum(os.readlink(place).startswith("socket:") for place in places)


def test_workers_have_no_descriptors_of_the_server(tmp_path: Path, models: Path) -> None:
    """One that listened would keep the port after the server's death."""
    with running(tmp_path, SCRIPTED, MODEL_DIR=str(models)) as server:
        (forks,) = fork_servers(server)
        forked = server.placement()[0]["pid"]
        assert (sockets_of(forks.pid), sockets_of(forked)) == (1, 0)
        forks.kill()
        successor = replaced(server, forked)
        assert (is_forked(successor), sockets_of(successor)) == (False, 0)


def test_a_fork_server_that_hangs_is_not_waited_for_twice(tmp_path: Path, models: Path) -> None:
    """Its worker is started as a program, and it is replaced."""
    with running(tmp_path, SCRIPTED, MODEL_DIR=str(models)) as server:
        (forks,) = fork_servers(server)
        forks.suspend()
        successor = replaced(server, server.placement()[0]["pid"])
        assert (is_forked(successor), server.placement()[0]["restarts"]) == (False, 1)
        assert not forks.is_running() or forks.status() == psutil.STATUS_ZOMBIE


def test_workers_outlive_the_fork_server_and_are_replaced_without_it(
    tmp_path: Path, models: Path
) -> None:
    with running(tmp_path, SCRIPTED, MODEL_DIR=str(models)) as server:
        before = server.placement()[0]["pid"]
        fork_servers(server)[0].kill()
        wait_until(lambda: not fork_servers(server))
        assert server.generate(body()).status_code == 200
        assert server.placement()[0]["pid"] == before
        assert not is_forked(replaced(server, before))
        assert server.generate(body()).status_code == 200


def test_a_start_that_failed_is_not_tried_again_with_what_was_imported(
    tmp_path: Path, models: Path
) -> None:
    script = f"die_before_ready code=4 count_file={tmp_path / 'count'} times=1"
    with running(tmp_path, SCRIPTED, MODEL_DIR=str(models), IGI_SCRIPT=script) as server:
        assert server.placement()[0]["last_exit"] == "exited with code 4"
        assert not is_forked(server.placement()[0]["pid"])
        jobs = tmp_path / "jobs"
        jobs.mkdir()
        dies = server.generate(body(once(jobs, "exit code=3 step=2")))
        assert dies.json()["meta"]["attempts"] == 2
        assert is_forked(server.placement()[0]["pid"])


SAYS_NOTHING = "import time; time.sleep(60)"
LATER_SAYS_NOTHING = """if True:
    import socket, sys, time
    orders = socket.socket(fileno=int(sys.argv[2]))
    orders.send(b"ready")
    time.sleep(60)
"""


def program(script: str) -> tuple[str, ...]:
    return sys.executable, "-c", script


def life_of(command: tuple[str, ...], start_seconds: float = 20.0) -> tuple[bool, list[str]]:
    """Whether the program could be asked to fork, and what became of that."""
    came_of_it: list[str] = []

    async def run() -> bool:
        server = ForkServer(command, dict(os.environ), start_seconds)
        async with anyio.create_task_group() as group:
            group.start_soon(server.run)
            while server.is_preparing:  # noqa: ASYNC110 - nothing tells of it
                await anyio.sleep(0.01)
            was_ready = server.is_ready
            for _ in range(2):
                try:
                    await server.fork({}, Ends(0, 1, 2))
                except OSError as error:
                    came_of_it.append(type(error).__name__)
            group.cancel_scope.cancel()
        return was_ready

    async def limited() -> bool:
        with anyio.fail_after(20):
            return await run()

    return anyio.run(limited), came_of_it


@pytest.mark.parametrize(
    ("command", "start_seconds"),
    [(program(""), 20.0), (program(SAYS_NOTHING), 0.5), (("/no/such/program",), 20.0)],
)
def test_one_that_ends_or_takes_too_long_or_is_not_there_is_not_asked(
    command: tuple[str, ...], start_seconds: float
) -> None:
    assert life_of(command, start_seconds) == (False, ["ConnectionError"] * 2)


def test_one_that_does_not_answer_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork_server, "ANSWER_SECONDS", 0.2)
    assert life_of(program(LATER_SAYS_NOTHING)) == (True, ["TimeoutError", "ConnectionError"])


STRAYS = """if True:
    import ctypes, os
    from supervisor.worker_process import reap_strays, waited_for

    def ended():
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)

    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.setsid()
        os._exit(0)
    os.waitpid(child, 0)
    ended()
    reap_strays()
    try:
        print(os.waitpid(-1, os.WNOHANG))
    except ChildProcessError:
        print("none is left")

    child = os.fork()
    if child == 0:
        os._exit(3)
    waited_for.add(child)
    ended()
    reap_strays()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_what_a_worker_leaves_in_another_group_is_reaped_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", STRAYS], capture_output=True, text=True)
    assert done.stdout == "none is left\n3\n", done.stderr

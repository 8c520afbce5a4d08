"""One child process: how its end is noticed, and what is left of it."""

import sys
import time
from functools import partial

import anyio
import psutil

from ipc import messages as m
from ipc.channel import Codec
from supervisor.worker_process import WorkerProcess, start_program


async def spawn(script: str) -> WorkerProcess:
    """A Python program; it is given the descriptors as arguments and ignores them."""
    start = partial(start_program, (sys.executable, "-c", script))
    return await WorkerProcess.spawn({}, Codec(m.FromWorker), start)


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_an_exit_is_noticed_though_a_grandchild_of_another_group_holds_the_output() -> None:
    script = """if True:
        import os, subprocess
        print(subprocess.Popen(["sleep", "60"], start_new_session=True).pid, flush=True)
        os._exit(3)
    """

    async def run() -> int:
        process = await spawn(script)
        grandchild = await anext(process.lines())
        with anyio.fail_after(5):
            exit = await process.wait()
            await process.end()
        assert exit.code == 3
        return int(grandchild)

    grandchild = anyio.run(run)
    assert not gone(grandchild)  # it left the group: nobody can know it
    psutil.Process(grandchild).kill()


def test_what_a_process_leaves_in_its_group_ends_with_it() -> None:
    script = """if True:
        import os, subprocess
        print(subprocess.Popen(["sleep", "60"]).pid, flush=True)
        os._exit(4)
    """

    async def run() -> int:
        process = await spawn(script)
        grandchild = int(await anext(process.lines()))
        with anyio.fail_after(5):
            exit = await process.wait()
            await process.end()
        assert exit.code == 4
        return grandchild

    grandchild, deadline = anyio.run(run), time.monotonic() + 5
    while not gone(grandchild):
        assert time.monotonic() < deadline


def test_what_is_printed_arrives_in_lines_of_bounded_length() -> None:
    script = "import sys; sys.stdout.buffer.write(b'a\\nb\\xff\\n' + b'x' * 100000 + b'\\nend')"

    async def run() -> list[str]:
        process = await spawn(script)
        lines = [line async for line in process.lines()]
        await process.wait()
        await process.end()
        return lines

    lines = anyio.run(run)
    assert lines[:2] == ["a", "b\ufffd"]
    assert lines[-1] == "end"
    assert max(map(len, lines)) <= 4000


def test_nothing_stays_open_after_the_end() -> None:
    async def run() -> None:
        with anyio.fail_after(20):
            for _ in range(5):
                process = await spawn("import time; time.sleep(60)")
                process.kill()
                assert (await process.wait()).code == -9
                process.kill()  # too late: harms nobody
                await process.end()

    anyio.run(run)  # what asyncio itself keeps is there now
    before = psutil.Process().num_fds()
    anyio.run(run)
    assert psutil.Process().num_fds() == before

"""A disk that is really full: a small tmpfs, in a namespace of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
MOUNTED = 'mount -t tmpfs -o size=512k disk "$1" && exec "$2" -c "$3" "$1"'

SCRIPT = """
import sys
from pathlib import Path

import anyio

from supervisor.errors import Problem
from supervisor.outbox import Event, Outbox
from supervisor.quota import Quota
from supervisor.storage import Storage, check_writable

disk = Path(sys.argv[1])
filler = disk / "filler"


def fill() -> None:
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def refused(function, *arguments):
    try:
        function(*arguments)
    except Problem as problem:
        return problem.code
    return "not refused"


async def main() -> None:
    storage = Storage(disk, Quota(disk, 0))
    outbox = Outbox(disk / "outbox.sqlite3")
    event = Event("image.stored", "http://here/", bytes(20_000))

    fill()  # at start
    check_writable("DATA_DIR", disk)
    await storage.start()
    assert refused(outbox.put, [event], 0.0) == "storage_full"

    filler.unlink()  # the server lives, and goes on when there is room
    [identifier] = outbox.put([event], 0.0)
    assert await storage.store("a", 0, "png", bytes(10_000)) == "a-0.png"

    fill()  # in use
    assert refused(outbox.put, [event] * 3, 0.0) == "storage_full"
    try:
        await storage.store("b", 0, "png", bytes(100_000))
    except Problem as problem:
        assert problem.code == "storage_full"
    else:
        raise AssertionError("stored on a full disk")
    assert sorted(path.name for path in disk.glob("*.png")) == ["a-0.png"]
    assert not list(disk.glob(".*"))

    filler.unlink()
    await storage.store("b", 0, "png", bytes(100_000))
    assert outbox.payload(identifier) == event.payload
    assert outbox.pending_count() == 1
    outbox.delivered(identifier)
    print("done")


anyio.run(main)
"""


def test_a_full_disk_refuses_and_recovers_without_a_trace(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*IN_NAMESPACE, "true"]).returncode:
        pytest.skip("user namespaces are not allowed here")
    command = ["sh", "-c", MOUNTED, "sh", str(tmp_path), sys.executable, SCRIPT]
    done = subprocess.run([*IN_NAMESPACE, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr

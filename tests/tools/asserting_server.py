"""The real server over workers whose device can be broken on request (asserting_worker)."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import anyio

from supervisor import logs, sockets
from supervisor.server import Server
from supervisor.settings import Settings

if __name__ == "__main__":
    settings = Settings.from_environ(os.environ)
    logs.configure(settings.log_level)
    command = (sys.executable, str(Path(__file__).with_name("asserting_worker.py")))
    listening = sockets.listen(settings.host, settings.port)
    anyio.run(Server(settings, listening, command).run)

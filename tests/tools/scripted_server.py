"""The real server over scripted workers: no torch, and faults on request."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import anyio

from supervisor import logs, sockets, storage
from supervisor.server import Server
from supervisor.settings import Settings

if __name__ == "__main__":
    settings = Settings.from_environ(os.environ)
    logs.configure(settings.log_level)
    storage.check_writable("DATA_DIR", settings.data_dir)
    storage.check_writable("IMAGE_DIR", settings.image_dir)
    command = (sys.executable, str(Path(__file__).with_name("scripted_worker.py")))
    listening = sockets.listen(settings.host, settings.port)
    anyio.run(Server(settings, listening, command).run)
    os._exit(0)  # as the command line does: threads that download are not waited for

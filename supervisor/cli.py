"""The command line: `igi serve` runs the server, `igi generate` asks one for a picture."""

import argparse
import base64
import json
import logging
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DEFAULT_URL = "http://127.0.0.1:1234"
POLL_SECONDS = 0.2


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    match given.command:
        case "serve":
            return serve()
        case "wait":
            return wait(given)
        case _:
            return generate(given)


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(prog="igi", description="Image Generation Inference")
    commands = described.add_subparsers(dest="command", required=True)
    commands.add_parser("serve", help="run the server; settings come from the environment")
    until = commands.add_parser("wait", help="wait until a server takes work")
    until.add_argument("--url", default=DEFAULT_URL)
    until.add_argument("--seconds", type=float, default=60.0)
    ask = commands.add_parser("generate", help="ask a running server for a picture")
    ask.add_argument("prompt")
    ask.add_argument("--output", type=Path, default=Path("picture.png"), help="file to write")
    ask.add_argument("--url", default=DEFAULT_URL)
    ask.add_argument("--api-key", default=os.environ.get("IGI_API_KEY"))
    ask.add_argument("--checkpoint")
    ask.add_argument("--negative-prompt")
    ask.add_argument("--seed", type=int)
    ask.add_argument("--steps", type=int)
    ask.add_argument("--guidance-scale", type=float)
    ask.add_argument("--width", type=int)
    ask.add_argument("--height", type=int)
    return described


def serve() -> int:
    """Ends the process when the server has stopped; 2 for settings that cannot be used."""
    import anyio

    from supervisor import logs, sockets, storage
    from supervisor.errors import Problem
    from supervisor.server import Server
    from supervisor.settings import Settings, SettingsError

    try:
        settings = Settings.from_environ(os.environ)
        logs.configure(settings.log_level)
        storage.check_writable("DATA_DIR", settings.data_dir)
        storage.check_writable("IMAGE_DIR", settings.image_dir)
        server = Server(settings, sockets.listen(settings.host, settings.port))
    except SettingsError as error:
        print(f"igi: {error}", file=sys.stderr)
        return 2
    except Problem as problem:
        print(f"igi: cannot use LAUNCH_CHECKPOINT or LAUNCH_VAE: {problem}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the server takes signals over
    anyio.run(server.run)
    # A thread that downloads cannot be told to stop, and Python would wait for it.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(0)


def wait(given: argparse.Namespace) -> int:
    """Exit code 1 when the server is not ready in time."""
    deadline = time.monotonic() + given.seconds
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"{given.url.rstrip('/')}/ready", timeout=5):
                return 0
        except OSError:  # refused, or not ready yet
            time.sleep(POLL_SECONDS)
    print(f"igi: {given.url} is not ready after {given.seconds:.0f} s", file=sys.stderr)
    return 1


def generate(given: argparse.Namespace) -> int:
    """Writes the first picture. Exit code 1 when there is none."""
    try:
        answer = _post(f"{given.url.rstrip('/')}/generate", _body(given), given.api_key)
    except urllib.error.HTTPError as error:
        problem = json.loads(error.read() or b"{}")
        print(f"igi: {problem.get('detail', error)}", file=sys.stderr)
        return 1
    except (urllib.error.URLError, OSError) as error:
        print(f"igi: cannot reach {given.url}: {error}", file=sys.stderr)
        return 1
    given.output.write_bytes(base64.b64decode(answer["images"][0]))
    print(f"{given.output} (seed {answer['meta']['seeds'][0]})")
    return 0


def _body(given: argparse.Namespace) -> dict[str, object]:
    parameters = {
        "prompt": given.prompt,
        "negative_prompt": given.negative_prompt,
        "seed": given.seed,
        "num_inference_steps": given.steps,
        "guidance_scale": given.guidance_scale,
        "width": given.width,
        "height": given.height,
    }
    suffix = given.output.suffix.lower().lstrip(".")
    body = {
        "parameters": {name: value for name, value in parameters.items() if value is not None},
        "output_format": {"jpg": "jpeg"}.get(suffix, suffix or "png"),
    }
    return body | ({"checkpoint": given.checkpoint} if given.checkpoint else {})


def _post(url: str, body: dict[str, object], key: str | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as response:
        answer: dict[str, Any] = json.load(response)
    return answer


if __name__ == "__main__":
    sys.exit(main())

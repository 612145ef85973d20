"""Folders in a storage, by their URL: S3, Google Cloud Storage and whatever else fsspec reaches."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.registry import known_implementations, registry

from actors.tasks import closest
from learners.core.errors import ConfigError

PART = ".part"
"""Ends the name of a file that is under way."""

ADVICE = (
    "Check the address, that this machine reaches it, and that the credentials which its driver "
    "finds here may list, read, write and delete there"
)


class StorageError(RuntimeError):
    """A storage did not do what it was asked for."""


class Missing(StorageError):
    """There is no such file."""


def is_url(place: str) -> bool:
    """Whether a run lies in a storage, and not in a folder."""
    return "://" in place


def check_protocol(url: str) -> str:
    """The protocol of a URL.

    Raises:
        ConfigError: nobody knows it.
    """
    protocol = url.partition("://")[0].rpartition("::")[2]
    known = sorted({*known_implementations, *registry})
    if protocol not in known:
        raise ConfigError(
            f"{url}: there is no storage {protocol!r}; closest: {closest(protocol, known)}. "
            "A --run-dir is a folder, or a URL such as s3://bucket/run or gs://bucket/run"
        )
    return protocol


@dataclass(frozen=True)
class Remote:
    """A folder of a storage; each of its answers is waited for `timeout_s` seconds at most."""

    url: str
    fs: Any
    root: str
    timeout_s: float

    @staticmethod
    def at(url: str, timeout_s: float) -> Remote:
        """The folder at a URL; nothing is asked of it yet.

        Raises:
            ConfigError: the protocol is unknown, its driver is not installed, or refuses the URL.
        """
        protocol = check_protocol(url)
        url = url.rstrip("/")
        try:
            fs, root = fsspec.url_to_fs(url)
        except ImportError as error:
            driver = known_implementations[protocol]["class"].partition(".")[0]
            advice = str(error) if driver == "fsspec" else f"pip install {driver}"
            raise ConfigError(f"{url}: the driver of {protocol}:// is missing: {advice}") from error
        except Exception as error:  # each driver has errors of its own
            raise ConfigError(f"{url}: {type(error).__name__}: {error}. {ADVICE}") from error
        return Remote(url, fs, root.rstrip("/"), timeout_s)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Calls a method of the file system.

        Raises:
            Missing: there is no such file.
            StorageError: anything else that went wrong, or no answer in time.
        """
        try:
            return within(self.timeout_s, lambda: getattr(self.fs, method)(*args, **options))
        except FileNotFoundError as error:
            raise Missing(f"{self.url}: {type(error).__name__}: {error}") from error
        except Exception as error:  # each driver has errors of its own
            raise StorageError(f"{self.url}: {type(error).__name__}: {error}") from error

    def path(self, name: str) -> str:
        """Of a file of the folder."""
        return f"{self.root}/{name}"

    def top(self) -> set[str]:
        """Names of the files and folders on the first level."""
        self.call("invalidate_cache")
        try:
            found = self.call("ls", self.root, detail=False)
        except Missing:
            return set()
        return {PurePosixPath(path).name for path in found}

    def names(self) -> set[str]:
        """All files, with their folders, joined by slashes."""
        self.call("invalidate_cache")
        found = {path.removeprefix(f"{self.root}/") for path in self.call("find", self.root)}
        if odd := sorted(name for name in found if {"..", ""} & set(name.split("/"))):
            raise StorageError(f"{self.url}: {odd[0]!r} is no name of a file of a run")
        return found

    def read(self, name: str) -> bytes | None:
        """The content of a file, None where there is none."""
        try:
            content: bytes = self.call("cat_file", self.path(name))
        except Missing:
            return None
        return content

    def fetch(self, name: str, target: Path) -> None:
        """Copies a file to this machine."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.call("get_file", self.path(name), str(target))

    def send(self, source: Path, name: str) -> None:
        """Copies a file to the storage, where it is never seen half-written."""
        target = self.path(name)
        self.call("makedirs", target.rpartition("/")[0], exist_ok=True)
        self.call("put_file", str(source), target + PART)
        self.call("mv", target + PART, target)

    def remove(self, name: str) -> None:
        """Deletes a file, if it is there."""
        with suppress(Missing):
            self.call("rm_file", self.path(name))


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """Does some work and waits so long at most; what takes longer is left behind.

    Raises:
        TimeoutError: it took longer.
    """
    answer: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            answer.put((work(), None))
        except BaseException as error:
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer within {seconds:g} s; --timeout-s allows for more") from None
    if error is not None:
        raise error
    return value

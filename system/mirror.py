"""A run at a URL: worked on in a folder of this machine, and mirrored to the storage.

    <url>/config.json, metrics.jsonl, tb/, checkpoints/<step>/, …    as in any run's folder
          lease.json                                                 who trains there

After each checkpoint whatever changed goes to the URL: first all that is no checkpoint, then the
tensors of checkpoints, and last the manifest that names one; those that are gone here are removed
there last, their manifests first. Every file is sent under another name and renamed. So what has a
manifest there is whole, whenever a process dies, and the records reach at least as far.

At the start the URL is the truth: what it holds is fetched, unless this machine was the last that
trained there and all that it ever sent still lies there; then its own folder may be further.

A lease says who trains. It is renewed whenever something is stored. On its own machine it ends with
its process, elsewhere once it has not been renewed for three times the time between checkpoints (15
minutes at least); then the next process takes it over. Who finds somebody else's lease in place of
its own ends before it writes anything: so do all but one of those that start at the same moment.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath

import psutil

from learners.core.errors import ConfigError
from system import run_folder
from system.checkpoint import MANIFEST, REPLACED, TEMPORARY
from system.config import RuntimeConfig
from system.records import CONFIG
from system.run_folder import CHECKPOINTS, LOCK
from system.storage import ADVICE, PART, Missing, Remote, StorageError, is_url

LEASE, RECORD = "lease.json", "mirror.json"
LEASE_MINUTES = 15.0
"""Shortest time after which a lease of another machine counts as abandoned."""

CLOCK_TOLERANCE_S = 2.0


class TakenOver(RuntimeError):
    """Another process trains at this URL."""


# --- Where a run lies ---


@contextmanager
def opened(place: str, runtime: RuntimeConfig) -> Iterator[tuple[Path, Callable[[], None]]]:
    """The folder in which to train, and what is to be called after each checkpoint.

    At the end of the block all of the folder is stored, or it is said that it is not.

    Args:
        place: a folder, or a URL.
        runtime: how often there are checkpoints, and how long an answer is waited for.

    Raises:
        ConfigError: the storage is unknown or refuses, holds something else, or is in use.
        StorageError: what the run left could not be stored at its end.
        TakenOver: another process has taken the run over.
    """
    if not is_url(place):
        yield Path(place), lambda: None
        return
    remote = Remote.at(place, runtime.timeout_s)
    cache = cache_folder(remote.url)
    cache.mkdir(parents=True, exist_ok=True)
    with run_folder.locked(cache):
        minutes = max(3.0 * runtime.checkpoint_minutes, LEASE_MINUTES)
        mirror = Mirror(remote, cache, 60.0 * minutes)
        try:
            mirror.begin()
            yield from training(mirror)
        finally:
            mirror.release()


def training(mirror: Mirror) -> Iterator[tuple[Path, Callable[[], None]]]:
    """What is done around a block in which a run is trained: `opened`, once it is ours."""
    print(f"storage      {mirror.remote.url}")
    try:
        yield mirror.folder, mirror.store
    except TakenOver:
        raise
    except Exception:
        mirror.store()
        raise
    mirror.finish()


@contextmanager
def copied(
    place: str,
    timeout_s: float = RuntimeConfig.timeout_s,
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[Path]:
    """A folder with the configuration and the checkpoints of a run, for as long as the block.

    Args:
        place: a folder, which is taken as it is, or a URL.
        timeout_s: how long an answer is waited for.
        wanted: which files to copy beside the configuration, by their names; by default those of
            the checkpoints.

    Raises:
        ConfigError: the storage is unknown or refuses, or holds no run.
    """
    if not is_url(place):
        yield Path(place)
        return
    remote = Remote.at(place, timeout_s)
    with tempfile.TemporaryDirectory(prefix="metaloop-") as name:
        try:
            there = complete(remote.names())
            if CONFIG not in there:
                raise ConfigError(f"{remote.url} holds no run: it has no {CONFIG}")
            chosen = wanted or is_in_checkpoint
            if not any(map(chosen, there)):
                raise ConfigError(f"{remote.url} has no checkpoint yet")
            for file in sorted(there):
                if file == CONFIG or chosen(file):
                    with suppress(Missing):  # a run that goes on removes its old checkpoints
                        remote.fetch(file, Path(name) / file)
        except StorageError as error:
            raise ConfigError(f"{error}. {ADVICE}") from error
        yield Path(name)


def is_in_checkpoint(name: str) -> bool:
    """Whether a file of a run's folder belongs to a checkpoint."""
    return name.startswith(f"{CHECKPOINTS}/")


def cache_folder(url: str) -> Path:
    """Where this machine works on the run at a URL."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return base / "metaloop" / f"{PurePosixPath(url).name}-{digest}"


# --- Who trains there ---


@dataclass(frozen=True)
class Lease:
    """Who trains at a URL.

    Attributes:
        host: name of the machine.
        process: its number.
        started: when the process started, in seconds since the epoch.
        cache: which copy of the run it works on.
        until: when it counts as abandoned on other machines; 0 once it was given back.
    """

    host: str
    process: int
    started: float
    cache: str
    until: float

    def is_mine(self) -> bool:
        """Whether it is this process's own."""
        me = psutil.Process()
        close = abs(self.started - me.create_time()) < CLOCK_TOLERANCE_S
        return (self.host, self.process) == (platform.node(), me.pid) and close

    def is_held(self) -> bool:
        """Whether its process, another one than this, has to be taken for alive."""
        if self.until == 0.0 or self.is_mine():
            return False
        if self.host != platform.node():
            return time.time() < self.until
        with suppress(psutil.Error):
            started = psutil.Process(self.process).create_time()
            return bool(abs(started - self.started) < CLOCK_TOLERANCE_S)
        return False


def read_lease(remote: Remote) -> Lease | None:
    """The lease of a URL, None where nobody ever had one.

    Raises:
        ConfigError: there is one, and it cannot be read.
    """
    content = remote.read(LEASE)
    if content is None:
        return None
    try:
        return Lease(**json.loads(content))
    except (ValueError, TypeError) as error:
        raise ConfigError(
            f"{remote.url}/{LEASE} cannot be read ({error}); remove it if nobody trains there"
        ) from error


def in_use(remote: Remote, lease: Lease) -> str:
    """What is said to who comes second."""
    until = time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(lease.until))
    return (
        f"{remote.url} is in use by process {lease.process} on {lease.host}: a run has one "
        f"process. Wait for its end, or give another --run-dir. If it died, it counts as dead on "
        f"other machines from {until} on, or once you remove {remote.url}/{LEASE}"
    )


# --- The mirror ---


class Mirror:
    """A run's folder on this machine, and what of it lies at a URL."""

    def __init__(self, remote: Remote, cache: Path, lease_seconds: float) -> None:
        self.remote = remote
        self.record = cache / RECORD
        self.folder = cache / "run"
        self.lease_seconds = lease_seconds
        self.cache, self.sent = uuid.uuid4().hex, dict[str, list[int]]()
        with suppress(FileNotFoundError):
            known = json.loads(self.record.read_text())
            self.cache, self.sent = known["cache"], known["sent"]

    def begin(self) -> None:
        """Takes the lease, and fetches what the URL holds where this machine has not the latest.

        Raises:
            ConfigError: the URL is in use, holds something else than a run, or the storage refuses.
        """
        try:
            self.become_the_latest()
        except StorageError as error:
            raise ConfigError(f"{error}. {ADVICE}") from error

    def become_the_latest(self) -> None:
        """`begin`, with the storage's own errors."""
        before = read_lease(self.remote)
        if before is not None and before.is_held():
            raise ConfigError(in_use(self.remote, before))
        top = self.remote.top()
        if CONFIG not in top and not top <= {LEASE, LEASE + PART, CONFIG + PART}:
            raise ConfigError(
                f"{self.remote.url} is not empty and holds no run; give another --run-dir"
            )
        there = self.remote.names()
        if before is None or before.cache != self.cache or not self.sent.keys() <= there:
            self.take(cache="")  # a copy that is cut short is nobody's latest
            self.fetch(there)
        self.take(self.cache)
        self.folder.mkdir(exist_ok=True)

    def fetch(self, there: Collection[str]) -> None:
        """Makes this machine's folder what the URL holds."""
        self.cache, self.sent = uuid.uuid4().hex, {}
        self.write_record()
        if self.folder.exists():
            shutil.rmtree(self.folder)
        wanted = sorted(complete(there))
        for name in wanted:
            self.remote.fetch(name, self.folder / name)
            self.sent[name] = stamp(self.folder / name)
        self.write_record()
        if wanted:
            print(f"fetched      {len(wanted)} files of {self.remote.url} into {self.folder}")

    def store(self) -> None:
        """Brings the URL up to date, or says what could not be stored, and tries again next time.

        Raises:
            TakenOver: another process trains there by now.
        """
        try:
            self.bring_up_to_date()
        except (StorageError, ConfigError) as error:
            logging.getLogger("metaloop").warning(
                "%s. The run goes on in %s; the next checkpoint tries again", error, self.folder
            )

    def finish(self) -> None:
        """Brings the URL up to date for good.

        Raises:
            StorageError: it could not be; what is missing there lies here.
            TakenOver: another process trains there by now.
        """
        try:
            self.bring_up_to_date()
        except (StorageError, ConfigError) as error:
            raise StorageError(
                f"{error}. All of the run is in {self.folder} on {platform.node()}: the same "
                "command on this machine goes on from there, and stores it"
            ) from error

    def bring_up_to_date(self) -> None:
        """Sends what changed, in an order in which it can be cut short, and removes what is gone.

        Raises:
            StorageError: with the names of what was not stored.
        """
        here = local_files(self.folder)
        changed = {name for name, path in here.items() if self.sent.get(name) != stamp(path)}
        try:
            self.renew()
            there = self.remote.names()
            for name in self.renamed(changed & there):
                self.remove(name)
            for name in sorted(changed, key=in_order):
                self.send(name)
            for name in sorted(there - here.keys(), key=in_order, reverse=True):
                if is_in_checkpoint(name) or name.endswith(PART):
                    self.remove(name)
        except StorageError as error:
            unsent = {n for n in changed if self.sent.get(n) != stamp(here[n])}
            left = sorted(unsent, key=in_order)
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            what = f"not stored: {', '.join(left[:3])}{more}" if left else "old files remain there"
            raise StorageError(f"{error}; {what}") from error

    def renamed(self, names: Collection[str]) -> list[str]:
        """Manifests there of checkpoints that were since replaced by others of the same step."""
        manifests = [name for name in names if PurePosixPath(name).name == MANIFEST]
        return [n for n in manifests if self.remote.read(n) != (self.folder / n).read_bytes()]

    def send(self, name: str) -> None:
        """Sends a file and notes it."""
        before = stamp(self.folder / name)
        self.remote.send(self.folder / name, name)
        self.sent[name] = before
        self.write_record()

    def remove(self, name: str) -> None:
        """Removes a file there and forgets it."""
        self.sent.pop(name, None)
        self.write_record()
        self.remote.remove(name)

    def take(self, cache: str) -> None:
        """Writes the lease.

        Raises:
            ConfigError: another process wrote one at the same time.
        """
        me = psutil.Process()
        until = time.time() + self.lease_seconds
        self.write_lease(Lease(platform.node(), me.pid, me.create_time(), cache, until))
        found = read_lease(self.remote)
        if found is None or not found.is_mine():
            raise ConfigError(f"{self.remote.url}: another process began to train there just now")

    def renew(self) -> None:
        """Writes the lease anew.

        Raises:
            TakenOver: it is another's.
        """
        found = read_lease(self.remote)
        if found is not None and not found.is_mine():
            raise TakenOver(
                f"process {found.process} on {found.host} has taken {self.remote.url} over, as "
                f"this one was not heard of for too long. What it had is in {self.folder}"
            )
        self.take(self.cache)

    def release(self) -> None:
        """Gives the lease back, as far as the storage answers."""
        with suppress(StorageError, ConfigError):
            found = read_lease(self.remote)
            if found is not None and found.is_mine():
                self.write_lease(replace(found, until=0.0))

    def write_lease(self, lease: Lease) -> None:
        """Puts a lease in place of the one before."""
        with tempfile.NamedTemporaryFile("w", encoding="utf-8") as file:
            json.dump(asdict(lease), file)
            file.flush()
            self.remote.send(Path(file.name), LEASE)

    def write_record(self) -> None:
        """Notes which copy this is, and what of it lies at the URL."""
        run_folder.write_json(self.record, {"cache": self.cache, "sent": self.sent})


def local_files(folder: Path) -> dict[str, Path]:
    """What is to be stored of a run's folder, by its name there."""
    found = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        passing = any(part.endswith((TEMPORARY, REPLACED)) for part in name.split("/"))
        if path.is_file() and not passing and name != LOCK:
            found[name] = path
    return found


def complete(names: Collection[str]) -> set[str]:
    """Without what is under way, and without files of checkpoints that no manifest names."""

    def belongs(name: str) -> bool:
        if name == LEASE or name.endswith(PART):
            return False
        folder = PurePosixPath(name).parent
        return folder.parent.name != CHECKPOINTS or f"{folder}/{MANIFEST}" in names

    return {name for name in names if belongs(name)}


def in_order(name: str) -> tuple[bool, bool, str, bool, str]:
    """Sorts as files are sent: what says that it is a run, records, checkpoints one by one."""
    path = PurePosixPath(name)
    is_checkpoint = is_in_checkpoint(name)
    own = str(path.parent) if is_checkpoint else ""
    return is_checkpoint, name != CONFIG, own, path.name == MANIFEST, name


def stamp(path: Path) -> list[int]:
    """What changes with a file."""
    found = path.stat()
    return [found.st_mtime_ns, found.st_size]

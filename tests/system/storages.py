"""A storage for the tests of mirrored runs: in memory, and failing on demand."""

from __future__ import annotations

import threading
from pathlib import Path

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Killed(BaseException):
    """The process that used the storage died."""


class Faulty(MemoryFileSystem):
    """faulty://…: files in memory, shared by all that ask, and the faults that a test wants.

    Attributes:
        errors: what each method named raises.
        dies_at: the number of the change, counted from 0, in the middle of which the process dies.
        changes: changes so far; afterwards nothing works for a process that died.
        hangs: the method that answers only once `free` is set.
    """

    protocol = "faulty"
    store: dict = {}  # noqa: RUF012 (the base's own way to share)
    pseudo_dirs = [""]  # noqa: RUF012
    errors: dict[str, Exception] = {}  # noqa: RUF012
    dies_at: int | None = None
    changes = 0
    hangs = ""
    free = threading.Event()

    @classmethod
    def _strip_protocol(cls, path):
        if isinstance(path, list):
            return [cls._strip_protocol(one) for one in path]
        return super()._strip_protocol(str(path).replace("faulty://", "memory://"))

    @classmethod
    def reset(cls):
        """No faults, and the files as they are."""
        cls.errors, cls.dies_at, cls.changes, cls.hangs = {}, None, 0, ""
        cls.free.clear()

    @classmethod
    def empty(cls):
        """No faults and no files."""
        cls.reset()
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]

    def before(self, method):
        """Whether the process dies in this change."""
        kind = type(self)
        if kind.hangs == method:
            kind.free.wait(60)
        if method in kind.errors:
            raise kind.errors[method]
        if kind.dies_at is not None and kind.changes > kind.dies_at:
            raise Killed
        if method not in ("put_file", "mv", "rm_file"):
            return False
        kind.changes += 1
        return kind.changes - 1 == kind.dies_at

    def put_file(self, lpath, rpath, **kwargs):
        dies = self.before("put_file")
        content = Path(lpath).read_bytes()
        self.pipe_file(rpath, content[: len(content) // 2] if dies else content)
        if dies:
            raise Killed

    def mv(self, path1, path2, **kwargs):
        dies = self.before("mv")
        self.pipe_file(path2, super().cat_file(path1))
        if dies:
            raise Killed
        super().rm_file(path1)

    def rm_file(self, path):
        dies = self.before("rm_file")
        super().rm_file(path)
        if dies:
            raise Killed

    def cat_file(self, path, start=None, end=None, **kwargs):
        self.before("cat_file")
        return super().cat_file(path, start, end, **kwargs)

    def get_file(self, rpath, lpath, **kwargs):
        self.before("get_file")
        super().get_file(rpath, lpath, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self.before("ls")
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("faulty", Faulty, clobber=True)

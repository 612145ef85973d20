"""The parameter server: which version of the acting parameters lies where.

It holds references and no tensors, so that a lookup takes the same time for any model. In the
serial backend the references are the arrays themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Blocks = dict[tuple[int, int], list[Any]]
"""Member range → a list with one reference to that range's parameters, [m, P].

Ray resolves a bare reference in an argument, and leaves one inside a list alone.
"""


@dataclass(frozen=True)
class Published:
    """One version of some parameters."""

    version: int
    blocks: Blocks


class ParameterServer:
    """Name → its newest versions."""

    def __init__(self, keep_versions: int = 3) -> None:
        self.keep_versions = keep_versions
        self.versions: dict[str, dict[int, Published]] = {}

    def publish(self, name: str, version: int, blocks: Blocks) -> None:
        """Makes a version known; versions of a name grow. The oldest are forgotten."""
        known = self.versions.setdefault(name, {})
        known[version] = Published(version, blocks)
        for old in sorted(known)[: -self.keep_versions]:
            del known[old]

    def newest(self, name: str) -> int | None:
        """The newest version's number, or None if there is none."""
        return max(self.versions.get(name, {}), default=None)

    def pull_if_newer(self, name: str, than: int | None) -> Published | None:
        """The newest version if it is newer than `than`, else None."""
        newest = self.newest(name)
        if newest is None or (than is not None and newest <= than):
            return None
        return self.versions[name][newest]

    def get(self, name: str, version: int) -> Published | None:
        """Exactly this version, or None if it is not, or no longer, known."""
        return self.versions.get(name, {}).get(version)

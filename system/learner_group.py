"""The learners of a run on Ray: one, or several that share the work on each update out.

All of them get the same calls with the same chunks, and come to the same state; the first one
publishes and answers.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import psutil
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from learners.core.errors import ConfigError, LearnersParted

LOOPBACK = "127.0.0.1"

ASKED_OF_ONE = ("plan", "describe", "get_state")
"""Methods of the host that change nothing and share nothing out."""


class LearnerGroup:
    """Handles of learner actors that are called as one."""

    def __init__(self, actors: Sequence[Any], timeout_s: float) -> None:
        """Waits until the actors are there, and lets them find one another.

        Raises:
            ConfigError: they cannot reach one another.
            GetTimeoutError: they are not there within `timeout_s`.
        """
        self.actors = list(actors)
        self.timeout_s = timeout_s
        self.calls: dict[Any, list[Any]] = {}
        self.infos = ray.get([actor.info.remote() for actor in actors], timeout=timeout_s)
        if len(actors) > 1:
            self.introduce()

    @property
    def first(self) -> Any:
        """The learner that publishes and answers."""
        return self.actors[0]

    @property
    def places(self) -> list[Any]:
        """Where the learners run."""
        return [place for place, _, _ in self.infos]

    def introduce(self) -> None:
        """Makes a process group of the actors, over the loopback interface on a single node."""
        addresses = [place.address for place in self.places]
        if len({place.node for place in self.places}) == 1:
            addresses = [LOOPBACK] * len(addresses)
        try:
            port = ray.get(self.first.meet.remote(addresses[0]), timeout=self.timeout_s)
            joined = [
                actor.join.remote((addresses[0], port), address, rank, len(self.actors))
                for rank, (actor, address) in enumerate(zip(self.actors, addresses, strict=True))
            ]
            ray.get(joined, timeout=self.timeout_s)
        except (LearnersParted, RayActorError, GetTimeoutError) as error:
            raise ConfigError(
                f"--num-learners {len(self.actors)}: the learners on {', '.join(addresses)} did "
                f"not find one another ({error}). They talk over ports that are chosen at random, "
                "which must be open between their nodes"
            ) from error

    def start(self, method: str, *args: Any) -> Any:
        """Calls the hosts without waiting; `finish` brings the answer."""
        asked = self.actors[:1] if method in ASKED_OF_ONE else self.actors
        references = [actor.call.remote(method, *args) for actor in asked]
        self.calls[references[0]] = references
        return references[0]

    def finished(self, reference: Any) -> bool:
        """Whether `finish` would not wait: all have answered, or one has failed."""
        references = self.calls[reference]
        ready, waiting = ray.wait(references, num_returns=len(references), timeout=0)
        return not waiting or any(failed(answer) for answer in ready)

    def finish(self, reference: Any) -> Any:
        """The first learner's answer, once all have answered.

        Raises:
            GetTimeoutError: one did not within `timeout_s`.
            RayError: what the first one to fail failed with.
        """
        waiting = self.calls.pop(reference)
        until = time.monotonic() + self.timeout_s
        while waiting:
            left = max(0.0, until - time.monotonic())
            ready, waiting = ray.wait(waiting, num_returns=1, timeout=left)
            if not ready:
                raise GetTimeoutError("a learner has not answered")
            ray.get(ready)
        return ray.get(reference)

    def publish_again(self) -> Any:
        """Lets the first learner fill a parameter server that has lost its memory."""
        reference = self.first.publish_again.remote()
        self.calls[reference] = [reference]
        return reference

    def end(self) -> None:
        """Ends those that are left of a group that has lost one: they would wait for it."""
        for actor in self.actors:
            with suppress(RayActorError):
                ray.kill(actor)


def failed(reference: Any) -> bool:
    """Whether a call that has ended did so with an error."""
    try:
        ray.get(reference, timeout=0)
    except Exception:
        return True
    return False


def speak_on(address: str) -> None:
    """Makes torch's and NVIDIA's libraries use the interface that has this address.

    By themselves they take the one of the host's name, which other nodes may not know.
    """
    for name, known in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in known):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return

"""What runs in processes of its own on Ray: rollout actors and learners."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.family import TaskFamily
from actors.rollout import Carry, Chunk, Receipt, Request, RolloutWorker
from learners.core.policy import Policy
from learners.core.population import Population
from learners.core.together import find_store, join, open_store
from system.ahead import DEPTH
from system.backend import AGENTS
from system.config import RunConfig
from system.learner_group import speak_on
from system.learner_host import LearnerHost
from system.parameter_server import Published


def log() -> logging.Logger:
    """Where it is said what failed and what was done."""
    return logging.getLogger("metaloop")


def in_time(wait: Callable[[], Any], timeout_s: float) -> Any:
    """What a limited wait brings.

    Raises:
        TimeoutError: it ended in vain; the message says how to wait longer.
    """
    try:
        return wait()
    except GetTimeoutError:
        raise TimeoutError(
            f"no answer within {timeout_s:g} s; --timeout-s allows for more"
        ) from None


class UnknownVersion(LookupError):
    """The parameter server does not know a version, as after its restart."""


@dataclass(frozen=True)
class Place:
    """A process in the cluster."""

    pid: int
    node: str
    """Ray's name of the node; two of them may share an address."""
    address: str


def this_place() -> Place:
    """The process that asks."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return Place(os.getpid(), ray.get_runtime_context().get_node_id(), address)


# --- The actors ---


@ray.remote
class RolloutActor:
    """A worker in a process of its own."""

    def __init__(
        self, family: TaskFamily, policy: Policy | Population, server: str, timeout_s: float
    ) -> None:
        self.worker = RolloutWorker(family, policy)
        # By name: a handle among the arguments could be lost before this actor restarts.
        self.server = ray.get_actor(server)
        self.timeout_s = timeout_s
        self.published: Published | None = None

    @ray.method(num_returns=3)
    def collect(self, request: Request, carry: Carry | None) -> tuple[Chunk, Receipt, Carry | None]:
        """A chunk, its receipt and its carry, under exactly the version asked for."""
        published = self.pull(request.version)
        # Read without a copy from the node's store.
        flat = ray.get(published.blocks[request.slot.members][0], timeout=self.timeout_s)
        return self.worker.collect(request, cast(np.ndarray, flat), published.version, carry)

    def pull(self, version: int | None) -> Published:
        """Where that version lies, or the newest."""
        known = self.published
        if known is None or known.version != version:
            answer: Any
            if version is None:
                than = None if known is None else known.version
                answer = self.server.pull_if_newer.remote(AGENTS, than)
            else:
                answer = self.server.get.remote(AGENTS, version)
            found = ray.get(answer, timeout=self.timeout_s)
            self.published = found or (known if version is None else None)
        if self.published is None:
            raise UnknownVersion(f"version {version}")
        return self.published

    def where(self) -> Place:
        """Where it runs; answers once the actor is ready."""
        return this_place()


@ray.remote
class LearnerActor:
    """The learner's host in a process of its own."""

    def __init__(
        self, config: RunConfig, family: TaskFamily, seeds: Sequence[int], server: Any
    ) -> None:
        runtime = config.runtime
        self.server = server
        self.timeout_s = runtime.timeout_s
        self.last: deque[Published] = deque(maxlen=versions_in_use(config.max_lag))
        self.store: Any = None  # where several learners find one another
        self.host = LearnerHost(
            config.learner, family.spec, seeds, runtime.device, runtime.learner_threads
        )
        self.host.store = ray.put
        self.host.publish = self.publish

    def publish(self, version: int, blocks: Any) -> None:
        """Tells the parameter server of a new version."""
        self.last.append(Published(version, blocks))
        self.tell(self.last[-1])

    def publish_again(self) -> None:
        """Fills a parameter server that has lost its memory."""
        for published in self.last:
            self.tell(published)

    def tell(self, published: Published) -> None:
        """Waits until the parameter server knows a version; it may have to be started anew first.

        Raises:
            TimeoutError: it does not come back.
        """
        until = time.monotonic() + self.timeout_s
        while True:
            known = self.server.publish.remote(AGENTS, published.version, published.blocks)
            try:
                ray.get(known, timeout=self.timeout_s)
                return
            except RayActorError as error:
                if time.monotonic() > until:
                    raise TimeoutError(
                        f"the parameter server does not come back for {self.timeout_s:g} s"
                    ) from error
                time.sleep(0.2)

    def meet(self, address: str) -> int:
        """Opens a store at which several learners find one another; returns its port."""
        self.store = open_store(address, self.timeout_s)
        return int(self.store.port)

    def join(self, store: tuple[str, int], address: str, rank: int, size: int) -> None:
        """Makes this learner, which is at `address`, one of several; the first one publishes."""
        speak_on(address)
        if rank > 0:
            self.host.publish = None
            self.store = find_store(*store, self.timeout_s)
        self.host.reduce = join(self.store, rank, size, self.host.device, self.timeout_s)

    def call(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        return getattr(self.host, method)(*args)

    def info(self) -> tuple[Place, Policy | Population, str]:
        """Where it runs, what acts, and the device."""
        return this_place(), self.host.learner.policy, str(self.host.device)


def versions_in_use(max_lag: int) -> int:
    """Versions that a chunk may have been collected under and may have to be collected again."""
    return max_lag + DEPTH + 1

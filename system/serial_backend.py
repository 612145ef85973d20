"""The serial backend: everything in one process."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from actors.family import TaskFamily
from actors.rollout import Request, RolloutWorker
from system.backend import AGENTS, Arrival, RolloutError, describe
from system.config import RunConfig
from system.learner_host import LearnerHost
from system.parameter_server import ParameterServer


class SerialBackend:
    """Everything in this process: for debugging, tests and machines without Ray."""

    actor_restarts = 0

    def __init__(self, config: RunConfig, family: TaskFamily, seeds: Sequence[int]) -> None:
        runtime = config.runtime
        self.host = LearnerHost(
            config.learner, family.spec, seeds, runtime.device, runtime.learner_threads
        )
        self.device = str(self.host.device)
        self.server = ParameterServer()
        self.host.publish = lambda version, blocks: self.server.publish(AGENTS, version, blocks)
        self.worker = RolloutWorker(family, self.host.learner.policy)

    @property
    def pids(self) -> list[int]:
        """The one process."""
        return [os.getpid()]

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        return getattr(self.host, method)(*args)

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects one request after the other."""
        arrivals = []
        for request, carry in zip(requests, carries or [None] * len(requests), strict=True):
            assert request.version is not None
            published = self.server.get(AGENTS, request.version)
            assert published is not None
            params = published.blocks[request.slot.members][0]
            try:
                chunk, said, stop = self.worker.collect(request, params, request.version, carry)
            except Exception as error:
                raise RolloutError(describe(request, error)) from error
            arrivals.append(Arrival(request, chunk, said, stop))
        return arrivals

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """The handles are the things themselves."""
        return list(handles)

    def close(self) -> None:
        """Nothing to end."""

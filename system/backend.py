"""Where actors and learner run: one small interface, and the serial backend behind it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

from actors.family import TaskFamily
from actors.rollout import Receipt, Request, RolloutWorker
from system.config import RunConfig
from system.learner_host import LearnerHost
from system.parameter_server import ParameterServer
from system.seeds import Stream, make_seeds

AGENTS = "agents"
"""Name under which the acting parameters are published."""


class Backend(Protocol):
    """Runs a `LearnerHost` and rollout workers."""

    actor_restarts: int
    """Workers that died and came back, so far."""

    @property
    def pids(self) -> list[int]:
        """Processes of driver, learner and workers."""
        ...

    def learner(self, method: str, *args: Any) -> Any:
        """Calls a method of the learner's host; handles among `args` become chunks there."""
        ...

    def collect(self, requests: Sequence[Request]) -> tuple[list[Any], list[Receipt]]:
        """Collects all requests.

        Returns:
            A handle to each chunk and its receipt, in the order of the requests.

        Raises:
            RolloutError: an environment or a worker failed for good.
        """
        ...

    def close(self) -> None:
        """Ends what was started."""
        ...


class RolloutError(RuntimeError):
    """Collection failed; the message names tasks, worker, cause and what was done."""


class SerialBackend:
    """Everything in this process: for debugging, tests and machines without Ray."""

    actor_restarts = 0

    def __init__(self, config: RunConfig, family: TaskFamily, seed: int) -> None:
        runtime = config.runtime
        self.host = LearnerHost(
            config.learner, family.spec, seed, runtime.device, runtime.learner_threads
        )
        self.server = ParameterServer()
        self.host.publish = lambda version, blocks: self.server.publish(AGENTS, version, blocks)
        self.worker = RolloutWorker(family, self.host.learner.policy)

    @property
    def pids(self) -> list[int]:
        """This process."""
        return [os.getpid()]

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host."""
        return getattr(self.host, method)(*args)

    def collect(self, requests: Sequence[Request]) -> tuple[list[Any], list[Receipt]]:
        """Collects one request after the other."""
        results = []
        for request in requests:
            published = self.server.get(AGENTS, request.version)
            assert published is not None
            params = published.blocks[request.slot.members][0]
            try:
                results.append(self.worker.collect(request, params))
            except Exception as error:
                raise RolloutError(describe(request, error)) from error
        return [chunk for chunk, _ in results], [receipt for _, receipt in results]

    def close(self) -> None:
        """Nothing to end."""


def make_backend(config: RunConfig, family: TaskFamily) -> Backend:
    """The configured backend, with a new learner.

    Raises:
        ConfigError: the device, or what Ray needs, is missing.
    """
    (seed,) = make_seeds(config.seed, Stream.INIT, count=1)
    if config.runtime.backend == "serial":
        return SerialBackend(config, family, seed)
    from system.ray_backend import RayBackend

    return RayBackend(config, family, seed)


def describe(request: Request, error: BaseException, where: str = "this process") -> str:
    """What a person needs to know of a failed request."""
    first = ", ".join(str(dict(task)) for task in request.tasks[:2])[:300]
    more = f" and {len(request.tasks) - 2} more" if len(request.tasks) > 2 else ""
    return (
        f"collecting slot {request.slot.id} (tasks {first}{more}; seeds {request.seeds}) failed "
        f"in {where}: {type(error).__name__}: {error}"
    )

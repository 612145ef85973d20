"""The Ray backend: rollout actors, a learner actor and the parameter server.

Chunks and parameters travel by reference: an actor returns a chunk, which the driver then owns and
hands to the learner unread; the learner puts parameters once and publishes references to them.
"""

from __future__ import annotations

import os
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.family import TaskFamily
from actors.rollout import Request
from learners.core.errors import LearnersParted
from system.actor_pool import ActorPool, Collected, Held
from system.backend import Arrival, LearnerDied, RolloutError
from system.cluster import resources, start_ray
from system.config import RunConfig
from system.learner_group import LearnerGroup
from system.parameter_server import ParameterServer
from system.ray_actors import LearnerActor, Place, RolloutActor, in_time, log, versions_in_use

MAX_LOSSES = 10
"""Times that chunks of one call may be lost with their nodes."""

LEARNER_PLACE: dict[str, Any] = {
    "label_selector": {"metaloop.role": "learner"},
    "fallback_strategy": [{"label_selector": {}}],
}
"""A node with this label where there is one (`ray start --labels metaloop.role=learner`)."""


def advise_on_threads(config: RunConfig) -> None:
    """Says once where a learner that works beside its actors has more threads than cores."""
    runtime, cores = config.runtime, os.cpu_count() or 1
    crowded = runtime.num_actors + runtime.num_learners * runtime.learner_threads > cores + 1
    if config.max_lag > 0 and runtime.address is None and runtime.learner_threads > 1 and crowded:
        log().warning(
            "with --max-lag the learner works beside %d actors on %d CPU cores: "
            "--learner-threads 1 is faster",
            runtime.num_actors,
            cores,
        )


def describe_places(learners: Sequence[Place], device: str, actors: Sequence[Place]) -> str:
    """Which node does what, in one line."""
    where = ", ".join(f"{place.address} ({place.node[:6]}, {device})" for place in learners)
    counts = Counter((place.address, place.node[:6]) for place in actors)
    spread = ", ".join(f"{count} on {ip} ({node})" for (ip, node), count in sorted(counts.items()))
    return f"nodes        learner on {where}; actors on {len(counts)} nodes: {spread}"


class RayBackend:
    """Actors, learner and parameter server on Ray. See `system.backend.Backend`."""

    def __init__(self, config: RunConfig, family: TaskFamily, seeds: Sequence[int]) -> None:
        self.config = config
        self.timeout_s = config.runtime.timeout_s
        start_ray(config.runtime)
        advise_on_threads(config)
        server = f"parameter-server-{uuid.uuid4().hex}"
        here = ray.get_runtime_context().get_node_id()
        options = {
            "name": server,
            "num_cpus": 0,
            "max_restarts": -1,
            "max_task_retries": 3,
            # With the driver's node the run ends anyway.
            "scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=True),
        }
        keep_versions = versions_in_use(config.max_lag)
        self.server = ray.remote(ParameterServer).options(**options).remote(keep_versions)
        self.learners = self.start_learners(family, seeds)
        _, policy, self.device = self.learners.infos[0]
        spread = RolloutActor.options(num_cpus=1, max_restarts=-1, scheduling_strategy="SPREAD")  # type: ignore[attr-defined]
        self.pool = ActorPool(
            lambda: spread.remote(family, policy, server, self.timeout_s),
            config.runtime.num_actors,
            lambda: self.from_learner(self.learners.publish_again(), "publish_again"),
            self.timeout_s,
            config.runtime.actor_memory_mb,
        )
        if config.runtime.address is not None:
            where = describe_places(self.learners.places, self.device, self.pool.places)
            print(where, file=sys.stderr)
        self.calls: dict[Any, tuple[Any, ...]] = {}

    @property
    def actor_restarts(self) -> int:
        """Actors that died and came back, so far."""
        return self.pool.restarts

    @property
    def pids(self) -> list[int]:
        """Driver, learners and actors of the driver's node, as far as they last answered."""
        here = ray.get_runtime_context().get_node_id()
        learners = [place.pid for place in self.learners.places if place.node == here]
        actors = [place.pid for place in self.pool.places if place.node == here]
        return [os.getpid(), *learners, *actors]

    def start_learners(self, family: TaskFamily, seeds: Sequence[int]) -> LearnerGroup:
        """The learners in processes of their own, each with a GPU if they have some."""
        config, runtime = self.config, self.config.runtime
        num_gpus = runtime.num_gpus(resources().get("GPU", 0))
        if runtime.num_learners > 1:
            # A card that Ray does not know of would be taken by all of them.
            runtime = replace(runtime, device="cuda" if num_gpus else "cpu")
            config = replace(config, runtime=runtime)
        gpus = 1 if num_gpus else 0
        placed = LearnerActor.options(num_cpus=0, num_gpus=gpus, **LEARNER_PLACE)  # type: ignore[attr-defined]
        actors = [
            placed.remote(config, family, seeds, self.server) for _ in range(runtime.num_learners)
        ]
        try:
            group: LearnerGroup = in_time(
                lambda: LearnerGroup(actors, self.timeout_s), self.timeout_s
            )
        except RayActorError as error:
            raise LearnerDied(f"a learner's process ended before it began: {error}.") from error
        return group

    def learner(self, method: str, *args: Any) -> Any:
        """Calls the host; what was collected arrives as chunks."""
        return self.finish(self.start(method, *args), method)

    def from_learner(self, reference: Any, method: str) -> Any:
        """`get` of an answer of the learner."""
        try:
            return in_time(lambda: self.learners.finish(reference), self.timeout_s)
        except (RayActorError, LearnersParted) as error:
            raise self.learner_died(error, method) from error

    def learner_died(self, error: Exception, method: str) -> LearnerDied:
        """What is raised where a learner is lost; those that are left are ended."""
        self.learners.end()
        number = len(self.learners.actors)
        whose = "the learner's" if number == 1 else f"one of {number} learners'"
        return LearnerDied(
            f"{whose} process ended in {method}: {getattr(error, 'cause', None) or error}. "
            f"The same command goes on from the newest checkpoint."
        )

    def start(self, method: str, *args: Any) -> Any:
        """Calls the host without waiting; `finish` brings the answer."""
        given = [arg.reference if isinstance(arg, Collected) else arg for arg in args]
        reference = self.learners.start(method, *given)
        self.calls[reference] = args
        return reference

    def finish(self, reference: Any, method: str) -> Any:
        """The answer to `start`. Chunks that were lost with their node are collected again.

        The learner has then not begun: it needs all of its arguments. Of several learners some may
        have: they are given up.
        """
        args = self.calls.pop(reference)
        for _ in range(MAX_LOSSES):
            try:
                return self.from_learner(reference, method)
            except ObjectLostError as error:
                if len(self.learners.actors) > 1:
                    raise self.learner_died(error, method) from error
                args = self.complete(args)
                reference = self.start(method, *args)
                self.calls.pop(reference)
        raise RolloutError(f"chunks were lost {MAX_LOSSES} times on their way to the learner")

    def complete(self, args: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments of a call with new chunks in place of those that are lost."""
        lost = [
            i for i, arg in enumerate(args) if isinstance(arg, Collected) and self.pool.lost(arg)
        ]
        slots = [args[i].request.slot.id for i in lost]
        log().warning("the chunks of slots %s were lost with their node; collected again", slots)
        again = self.pool.collect([args[i].request for i in lost], [args[i].carry for i in lost])
        found = {i: arrival.chunk for i, arrival in zip(lost, again, strict=True)}
        return tuple(found.get(i, arg) for i, arg in enumerate(args))

    def finished(self, reference: Any) -> bool:
        """Whether the answer to `start` is there."""
        return self.learners.finished(reference)

    # --- The actors: see `ActorPool` ---

    def collect(
        self, requests: Sequence[Request], carries: Sequence[Any] | None = None
    ) -> list[Arrival]:
        """Collects all requests; those of an actor that died are asked for again."""
        return self.pool.collect(requests, carries)

    def submit(self, request: Request, carry: Any) -> None:
        """Asks for a chunk; `poll` brings it."""
        self.pool.submit(request, carry)

    def poll(self, also: Any = None) -> list[Arrival]:
        """The chunks that have arrived; waits a second at most for the first of them."""
        return self.pool.poll(also)

    def fetch(self, handles: Sequence[Any]) -> list[Any]:
        """Where streams stand, and chunks, which come to this process.

        Raises:
            RolloutError: a chunk was lost on its way.
        """
        chunks = [handle.reference for handle in handles if isinstance(handle, Collected)]
        try:
            came = iter(in_time(lambda: ray.get(chunks, timeout=self.timeout_s), self.timeout_s))
        except ObjectLostError as error:
            raise RolloutError(f"chunks were lost on their way to the driver: {error}") from error
        return [
            next(came)
            if isinstance(handle, Collected)
            else handle.value
            if isinstance(handle, Held)
            else handle
            for handle in handles
        ]

    def close(self) -> None:
        """Ends the actors, and the cluster if it is ours."""
        ray.shutdown()

"""A Ray cluster: started on this machine or joined, and closed to whoever has no token."""

from __future__ import annotations

import logging
import os
from typing import Any

import psutil
import ray
from ray._private import services
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.exceptions import RayError

from learners.core.errors import ConfigError
from system import access
from system.config import RuntimeConfig

PROCESS_MB = 450
"""Memory that one actor or learner process needs at least."""


def check_machine(runtime: RuntimeConfig) -> None:
    """Refuses to start a local cluster that this machine cannot hold.

    Raises:
        ConfigError: memory or CPUs are missing; the message says how much and what to do.
    """
    several = f" and {runtime.num_learners} learners" if runtime.num_learners > 1 else ""
    processes = runtime.num_actors + runtime.num_learners + 1
    needed = runtime.object_store_mb + PROCESS_MB * processes
    free = psutil.virtual_memory().available // 2**20
    if free < needed:
        raise ConfigError(
            f"memory: a local Ray cluster with {runtime.num_actors} actors{several} needs about "
            f"{needed} MB and {free} MB are free. Use fewer --num-actors or --num-learners, a "
            f"smaller --object-store-mb, or --backend serial."
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores and runtime.num_actors > cores:
        logging.getLogger("metaloop").warning(
            "%d actors on %d CPU cores: they will take turns; --num-actors %d is as fast",
            runtime.num_actors,
            cores,
            cores,
        )


def start_ray(runtime: RuntimeConfig) -> None:
    """Joins the cluster at `runtime.address`, or starts a local one; strangers stay outside.

    Raises:
        ConfigError: the cluster cannot be reached, started, is open, or is too small.
    """
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    access.check_ray_version()
    if runtime.address is None:
        check_machine(runtime)
        options |= {
            "num_cpus": runtime.num_actors,
            "object_store_memory": runtime.object_store_mb * 2**20,
            "include_dashboard": False,
        }
        advice = (
            "Ray's processes need free ports on the loopback interface and space in the "
            "temporary folder; `metaloop train … --backend serial` does without Ray"
        )
    else:
        check_address(runtime.address)
        options["address"] = runtime.address
        advice = (
            "check that the address is that of a running cluster's head, that its port is open "
            "from here, and that the authentication token is set"
        )
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Of a call that fails we look at one answer; Ray would print the error for each of the others.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    try:
        authenticate(runtime)
        ray.init(**options)
        if runtime.address is None:
            require_closed_cluster()
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, RayError) as error:
        place = runtime.address or "a local cluster"
        raise ConfigError(f"Ray did not start ({place}): {error}. {advice}.") from error
    check_size(runtime)


def check_address(address: str) -> None:
    """Raises ConfigError for an address of another kind than a cluster's own."""
    if "://" in address:
        raise ConfigError(
            f"--address {address}: needed is HOST:PORT of the cluster's head, usually port 6379, "
            "or auto on one of its nodes. From a machine outside, `metaloop submit PRESET "
            "--address http://HOST:8265` runs it as a job"
        )


def authenticate(runtime: RuntimeConfig) -> None:
    """Makes this process, and those that Ray starts, use the token.

    A cluster that is joined is asked first whether it lets strangers in, and our token too.

    Raises:
        ConfigError: there is no token, the cluster is open, or it does not know our token.
        ConnectionError: nothing answers at the address.
    """
    if runtime.address is None:
        access.use_token(create=True)
    else:
        gcs = services.canonicalize_bootstrap_address_or_die(runtime.address)
        closed = access.gcs_refuses_strangers(gcs)
        access.require_closed(gcs, closed, runtime.accept_open_cluster)
        if not closed:
            os.environ[access.AUTH_MODE] = "disabled"
        elif not access.gcs_answers(gcs, access.use_token(create=False)):
            raise ConfigError(
                f"the Ray cluster at {gcs} turns our authentication token away: needed is the one "
                f"it was started with, in {access.TOKEN}, in the file that {access.TOKEN_PATH} "
                f"names, or in {access.default_token_path()}"
            )
    # Ray has read the setting as it was imported.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def require_closed_cluster() -> None:
    """Ends the local cluster that was started if it lets strangers in.

    Raises:
        ConfigError: it does.
    """
    gcs = ray.get_runtime_context().gcs_address
    try:
        access.require_closed(gcs, access.gcs_refuses_strangers(gcs), accept_open=False)
    except BaseException:
        ray.shutdown()
        raise


def check_size(runtime: RuntimeConfig) -> None:
    """Leaves a cluster too small for the run, unless its autoscaler is waited for.

    Raises:
        ConfigError: CPUs for the actors, or GPUs for learners that are to have them, are missing.
    """
    cpus, gpus = resources().get("CPU", 0), resources().get("GPU", 0)
    place = f"the cluster at {runtime.address}" if runtime.address else "the local cluster"
    if cpus < runtime.num_actors:
        found = f"CPU: {place} has {cpus:g} CPUs and {runtime.num_actors} actors need one each"
        advice = f"--num-actors {max(int(cpus), 1)}"
    elif gpus < (needed := runtime.num_gpus(gpus)):
        found = f"GPU: {place} has {gpus:g} GPUs and --num-learners {needed} needs {needed}"
        fewer = f"--num-learners {int(gpus)} or " if gpus >= 1 else ""
        advice = f"{fewer}--device cpu"
    else:
        return
    if runtime.address is not None and runtime.wait_for_nodes:
        access.warn("%s; waiting %g s for more nodes", found, runtime.timeout_s)
        return
    ray.shutdown()
    raise ConfigError(f"{found}. Use {advice}, add nodes, or with an autoscaler --wait-for-nodes.")


def resources() -> dict[str, float]:
    """What the cluster has, by name."""
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found

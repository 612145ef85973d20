"""From one actor to 256: what is measured here with one and two, and what a simulation makes of it.

    python docs/results/scaling.py --measure maml-trpo/half-cheetah-dir
    python docs/results/scaling.py --measure a2c/half-cheetah --max-lag 4
    python docs/results/scaling.py

The first two, on an idle machine, run a preset on Ray and write docs/results/scaling/<preset>.json.
The last one makes of these the tables in docs/scaling.md and the figure docs/results/scaling.png.

The simulation is of events. A driver hands chunks to actors that have fewer than two (a stream's
always to its own), one after the other; an actor takes some time for each, drawn from the measured
ones; and the driver takes the answers one after the other. Then the learner works, alone
(synchronous), or beside the actors, which are two chunks of each slot ahead at most (asynchronous).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import deque
from dataclasses import asdict, dataclass, replace
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
FOLDER, FIGURE, PAGE = HERE / "scaling", HERE / "scaling.png", HERE.parent / "scaling.md"
MARKS = "<!-- tables: docs/results/scaling.py -->", "<!-- end of tables -->"

ACTORS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
IN_FLIGHT = 2
"""As in system/actor_pool.py: requests that an actor has at a time."""
DEPTH = 2
"""As in system/ahead.py: chunks of a slot that are in flight or wait for the learner."""


@dataclass(frozen=True)
class Costs:
    """What the parts of an iteration cost, in seconds.

    Attributes:
        num_slots: chunks of one phase.
        num_phases: collections of one iteration.
        streams: whether a slot stays with its actor.
        chunk_s: what a chunk took its actor, each of those measured.
        handover_s: of an actor and a chunk beside it: fetching parameters, putting the chunk away.
        driver_s: of the driver and a chunk: submitting, waiting, the receipt.
        learner_s: of the learner and an iteration.
        rest_s: of an iteration: what is left, such as calling the learner and publishing.
        chunk_mb: size of a chunk.
        block_mb: size of the parameters that a slot acts with.
        network_mb_s: of each node; assumed.
        actors_per_node: assumed.
    """

    num_slots: int
    num_phases: int
    streams: bool
    chunk_s: tuple[float, ...]
    handover_s: float = 0.0
    driver_s: float = 0.0
    learner_s: float = 0.0
    rest_s: float = 0.0
    chunk_mb: float = 0.0
    block_mb: float = 0.0
    network_mb_s: float = 1000.0
    actors_per_node: int = 32

    def serial_s(self, num_actors: int) -> float:
        """An iteration's time in which no actor can help; all chunks reach one learner."""
        nodes = -(-num_actors // self.actors_per_node)
        far = self.num_slots * (nodes - 1) / nodes * (self.chunk_mb + self.block_mb)
        return self.learner_s + self.rest_s + self.num_phases * far / self.network_mb_s


def finer(costs: Costs, factor: int) -> Costs:
    """The same work in more slots, each of which takes as much less."""
    chunk_s = tuple(seconds / factor for seconds in costs.chunk_s)
    sizes = {"chunk_mb": costs.chunk_mb / factor, "block_mb": costs.block_mb / factor}
    return replace(costs, num_slots=costs.num_slots * factor, chunk_s=chunk_s, **sizes)


# --- The simulation ---


def collection_s(costs: Costs, num_actors: int, rng: np.random.Generator) -> float:
    """Seconds until the driver has a chunk of every slot."""
    waiting = deque((slot, float(rng.choice(costs.chunk_s))) for slot in range(costs.num_slots))
    in_flight, free_at = [0] * num_actors, [0.0] * num_actors
    flying: list[tuple[float, int]] = []
    now = 0.0
    while waiting or flying:
        held: deque[tuple[int, float]] = deque()
        while waiting:
            slot, seconds = waiting.popleft()
            own = slot % num_actors if costs.streams else in_flight.index(min(in_flight))
            if in_flight[own] >= IN_FLIGHT:
                held.append((slot, seconds))
                if not costs.streams:
                    break
                continue
            now += costs.driver_s / 2.0
            in_flight[own] += 1
            free_at[own] = max(free_at[own], now) + seconds + costs.handover_s
            heappush(flying, (free_at[own], own))
        waiting = held + waiting
        arrived, actor = heappop(flying)
        now = max(now, arrived) + costs.driver_s / 2.0
        in_flight[actor] -= 1
    return now


def synchronous_s(costs: Costs, num_actors: int, iterations: int = 20, seed: int = 0) -> float:
    """Seconds of an iteration whose parts wait for each other, on average."""
    rng = np.random.default_rng(seed)
    phases = iterations * costs.num_phases
    collecting = sum(collection_s(costs, num_actors, rng) for _ in range(phases)) / iterations
    return collecting + costs.serial_s(num_actors)


def asynchronous_s(costs: Costs, num_actors: int, iterations: int = 60, seed: int = 0) -> float:
    """Seconds from update to update while actors go on, on average without the first third."""
    rng = np.random.default_rng(seed)
    working = range(min(num_actors, costs.num_slots))
    slots = [range(actor, costs.num_slots, num_actors) for actor in working]
    ready, busy = [0] * costs.num_slots, [False for _ in working]
    turn, updated_at = [0 for _ in working], list[float]()
    events: list[tuple[float, int, int]] = []  # (when, actor or -1 for the learner, slot)
    now, learning = 0.0, False
    while len(updated_at) < iterations:
        for actor, own in enumerate(slots):
            if busy[actor]:
                continue
            order = [own[(turn[actor] + i) % len(own)] for i in range(len(own))]
            wanted = next((slot for slot in order if ready[slot] < DEPTH), None)
            if wanted is not None:
                now += costs.driver_s / 2.0
                seconds = float(rng.choice(costs.chunk_s)) + costs.handover_s
                heappush(events, (now + seconds, actor, wanted))
                busy[actor], turn[actor] = True, own.index(wanted) + 1
        if not learning and all(ready):
            ready, learning = [number - 1 for number in ready], True
            heappush(events, (now + costs.serial_s(num_actors), -1, -1))
            continue
        when, actor, slot = heappop(events)
        now = max(now, when)
        if actor < 0:
            learning = False
            updated_at.append(now)
        else:
            now += costs.driver_s / 2.0
            busy[actor] = False
            ready[slot] += 1
    begin = iterations // 3
    return (updated_at[-1] - updated_at[begin]) / (iterations - 1 - begin)


def bounds(costs: Costs, num_actors: int) -> dict[str, float]:
    """Speed-ups that single causes allow, everything else being free."""
    work = costs.num_phases * costs.num_slots * (statistics.fmean(costs.chunk_s) + costs.handover_s)
    serial = costs.learner_s + costs.rest_s
    driver = costs.num_phases * costs.num_slots * costs.driver_s
    return {
        "slots": costs.num_slots / -(-costs.num_slots // num_actors),
        "learner": (work + serial) / (work / num_actors + serial),
        "driver": min(float(num_actors), (work + driver) / driver) if driver else float(num_actors),
    }


# --- The measurement ---


def measure(preset: str, max_lag: int, iterations: int, num_members: int | None) -> dict[str, Any]:
    """Runs a preset with one and with two actors; its costs are those with one, synchronous."""
    from system.presets import PRESETS
    from system.run_folder import describe_process

    config = PRESETS[preset]()
    config = replace(config, num_members=num_members or config.num_members)
    seconds: dict[str, dict[int, list[float]]] = {}
    costs: Costs | None = None
    load = os.getloadavg()[0]
    for lag in sorted({0, max_lag}):
        own = seconds[kind_of(lag)] = {}
        for num_actors in (1, 2):
            runtime = replace(config.runtime, backend="ray", num_actors=num_actors)
            rows, known = run(replace(config, max_lag=lag, runtime=runtime), iterations)
            own[num_actors] = [row["wall_s"] for row in rows]
            costs = costs or known
    assert costs is not None
    return {
        "preset": preset,
        "num_members": config.num_members,
        "max_lag": max_lag,
        "costs": asdict(costs),
        "seconds": seconds,
        "load": load,
        **describe_process(config, config.runtime.device),
    }


def kind_of(max_lag: int) -> str:
    """What a run with this lag is called."""
    return "asynchronous" if max_lag else "synchronous"


def run(config: Any, iterations: int) -> tuple[list[dict[str, Any]], Costs]:
    """Iterations of a run, and what their parts cost; two before them make the environments."""
    from actors.tasks import load_family
    from learners.registry import make_learner
    from system.loop import Loop
    from system.run import make_backend

    family = load_family(config.task, config.task_options)
    backend = make_backend(config, family)
    rows = []
    try:
        loop = Loop(config, family, backend)
        step = loop.step_ahead if config.max_lag else loop.step
        for number in range(2 + iterations):
            wall, thread = time.perf_counter(), time.thread_time()
            phases, _, learner_s, *_ = step(number)
            row = {"wall_s": time.perf_counter() - wall, "driver_s": time.thread_time() - thread}
            rows.append(row | {"phases": phases, "learner_s": learner_s})
    finally:
        backend.close()
    policy = make_learner(config.learner, family.spec).policy
    numbers = sum(parameter.numel() for parameter in policy.template().values())
    block_mb = 4.0 * numbers * min(config.members_per_slot, config.num_members) / 2**20
    return rows[2:], costs_of(rows[2:], loop.streams, block_mb)


def costs_of(rows: list[dict[str, Any]], streams: bool, block_mb: float) -> Costs:
    """What the receipts and clocks of a run with one actor say."""
    phases = [phase for row in rows for phase in row["phases"]]
    receipts = [receipt for phase in phases for receipt in phase.receipts]
    collecting = sum(phase.seconds for phase in phases)
    learning = statistics.median(row["learner_s"] for row in rows)
    busy = sum(receipt.seconds for receipt in receipts)
    rest = [
        row["wall_s"] - row["learner_s"] - sum(phase.seconds for phase in row["phases"])
        for row in rows
    ]
    return Costs(
        num_slots=len(phases[0].receipts),
        num_phases=len(rows[0]["phases"]),
        streams=streams,
        chunk_s=tuple(receipt.seconds for receipt in receipts),
        handover_s=max(0.0, collecting - busy) / len(receipts),
        driver_s=sum(row["driver_s"] for row in rows) / len(receipts),
        learner_s=learning,
        rest_s=max(0.0, statistics.median(rest)),
        chunk_mb=sum(receipt.num_bytes for receipt in receipts) / len(receipts) / 2**20,
        block_mb=block_mb,
    )


# --- The page ---

SIMULATED = {"synchronous": synchronous_s, "asynchronous": asynchronous_s}


def speedups(costs: Costs, kind: str) -> list[float]:
    """How many times as fast as with one actor, for each number in `ACTORS`."""
    seconds = [SIMULATED[kind](costs, num_actors) for num_actors in ACTORS]
    return [seconds[0] / own for own in seconds]


def changed(costs: Costs) -> dict[str, Costs]:
    """What to do about it, by name."""
    slots = finer(costs, 4)
    fast = replace(slots, learner_s=costs.learner_s / 8.0)
    return {"4 × slots": slots, "4 × slots, learner 8 × as fast": fast}


def tables(result: dict[str, Any]) -> str:
    """What was measured of a preset, how the simulation fits it, and where it leads."""
    costs = Costs(**result["costs"])
    chunk = np.quantile(costs.chunk_s, (0.0, 0.5, 1.0)) * 1e3
    machine, kinds = result["machine"], list(result["seconds"])
    measured = list(result["seconds"][kinds[0]].values())
    lines = [
        f"### {result['preset']}",
        "",
        f"M = {result['num_members']}: {costs.num_slots} slots, collected {costs.num_phases} times "
        f"in an iteration. {machine['cores']} cores of {machine['processor']}, load before it "
        f"{result['load']:.1f}, {len(measured[0])} iterations each.",
        "",
        "| part | measured |",
        "| --- | --- |",
        f"| a chunk, its actor (least, median, most) | {', '.join(f'{x:.1f}' for x in chunk)} ms |",
        f"| a chunk, its actor beside that | {costs.handover_s * 1e3:.1f} ms |",
        f"| a chunk, the driver | {costs.driver_s * 1e3:.1f} ms |",
        f"| an iteration, the learner | {costs.learner_s * 1e3:.0f} ms |",
        f"| an iteration, the rest | {costs.rest_s * 1e3:.0f} ms |",
        f"| size of a chunk; of its parameters | {costs.chunk_mb:.2f}; {costs.block_mb:.2f} MiB |",
        "",
        "| seconds of an iteration | 1 actor | simulated | 2 actors | simulated |",
        "| --- | --- | --- | --- | --- |",
    ]
    for kind, runs in result["seconds"].items():
        cells = [
            f"{statistics.median(own):.3f} | {SIMULATED[kind](costs, int(number)):.3f}"
            for number, own in runs.items()
        ]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    columns = {kind: speedups(costs, kind) for kind in kinds} | {
        name: speedups(other, kinds[0]) for name, other in changed(costs).items()
    }
    lines += [
        "",
        f"| actors | {' | '.join(columns)} | slots alone | learner alone | driver alone |",
        "| --- |" + " --- |" * (len(columns) + 3),
    ]
    for row, num_actors in enumerate(ACTORS):
        cells = [f"{column[row]:.1f}" for column in columns.values()]
        cells += [f"{bound:.1f}" for bound in bounds(costs, num_actors).values()]
        lines.append(f"| {num_actors} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], out: Path) -> None:
    """Speed-up over the number of actors, a panel for each preset."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(results), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, result in zip(np.atleast_1d(figure.subplots(1, len(results))), results, strict=True):
        costs = Costs(**result["costs"])
        axes.plot(ACTORS, ACTORS, color="0.8", label="linear")
        for kind, measured in result["seconds"].items():
            (line,) = axes.plot(ACTORS, speedups(costs, kind), label=kind)
            mean = {int(n): statistics.median(own) for n, own in measured.items()}
            ratios = [mean[1] / own for own in mean.values()]
            axes.plot(list(mean), ratios, "o", color=line.get_color(), label=f"{kind}, measured")
        for name, other in changed(costs).items():
            axes.plot(ACTORS, speedups(other, "synchronous"), label=name)
        for name, style in (("slots", ":"), ("learner", "--")):
            every = range(1, ACTORS[-1] + 1)
            allowed = [bounds(costs, num_actors)[name] for num_actors in every]
            axes.plot(every, allowed, style, color="0.4", label=f"{name} alone")
        axes.set(xscale="log", yscale="log", title=result["preset"], xlabel="actors")
        axes.set_ylabel("speed-up")
        axes.set_xticks(ACTORS, [str(number) for number in ACTORS])
        axes.set_yticks(ACTORS, [str(number) for number in ACTORS])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=120)


def rewrite(page: Path, results: list[dict[str, Any]]) -> None:
    """Puts the tables between the page's two marks."""
    before, _, rest = page.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    between = "\n\n".join(tables(result) for result in results)
    page.write_text(f"{before}{MARKS[0]}\n\n{between}\n\n{MARKS[1]}{after}")


def main() -> None:
    """Measures a preset, or makes page and figure of what was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", metavar="PRESET", help="run this and write what it cost")
    parser.add_argument("--max-lag", type=int, default=0, help="measure asynchronously as well")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--num-members", type=int, help="by default the preset's")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of what was measured")
    arguments = parser.parse_args()
    if arguments.measure is None:
        results = [json.loads(path.read_text()) for path in sorted(arguments.folder.glob("*.json"))]
        rewrite(PAGE, results)
        draw(results, FIGURE)
        return
    result = measure(
        arguments.measure, arguments.max_lag, arguments.iterations, arguments.num_members
    )
    arguments.folder.mkdir(exist_ok=True)
    path = arguments.folder / f"{arguments.measure.replace('/', '-')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

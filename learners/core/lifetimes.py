"""Who lives, for how long, and with which step sizes: the population of LPG.

A lifetime is an agent in one environment for N updates. Then its member begins another, with a new
level of its world, a new agent, a new critic and new step sizes (α, α_y). These are drawn by a
bandit in each world, with probabilities proportional to

    exp((mean of the last 10 final returns + 0.2 / √n) / 0.1),

n the lifetimes that had them (Oh et al. 2020); without any the mean is 0 and n is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from learners.core.actor_critic import prefixed, stack
from learners.core.contract import State
from learners.core.population import Agent, Block, Population
from learners.core.trajectory import Params, Trajectory, mean_episode_return

RECENT_LIVES = 10
"""Final returns that the bandit remembers of each pair of step sizes."""

BONUS, TEMPERATURE = 0.2, 0.1
"""Of the bandit."""

MEMORY = 0.8
"""What is left of a member's recent return after a window."""

COURSE_MEMORY = 0.95
"""What is left of a tenth's mean return after a window in which it was seen again."""

BY_WORLD = ("params", "optimizer", "critic", "critic_optimizer")


@dataclass(frozen=True)
class Lifetimes:
    """Births and deaths in a population.

    State groups, all with an entry of each member: by world "params", "optimizer", "critic" and
    "critic_optimizer"; "lifetimes" with n ("age") and N ("length") in updates, α ("lr"), α_y and
    the pair's number ("arm"), and the mean return lately ("recent"); "counters" with the seed, the
    number of lifetimes, and whether one begins ("renew"). Beside them "bandit"; and "course", the
    mean return lately in each world and tenth of a lifetime, [W, 10], and whether there was any.

    Attributes:
        population: the agents.
        tabular_lrs: the values of α on tables.
        network_lrs: the values of α in networks.
        alpha_ys: the values of α_y.
        tabular_updates: N on tables.
        network_updates: N in networks.
    """

    population: Population
    tabular_lrs: tuple[float, ...]
    network_lrs: tuple[float, ...]
    alpha_ys: tuple[float, ...]
    tabular_updates: int
    network_updates: int

    def arms(self, agent: Agent) -> list[tuple[float, float]]:
        """The pairs (α, α_y) of a world."""
        lrs = self.tabular_lrs if agent.world.tabular else self.network_lrs
        return list(product(lrs, self.alpha_ys))

    def updates(self, agent: Agent) -> int:
        """N of a world."""
        return self.tabular_updates if agent.world.tabular else self.network_updates

    def worlds(self, num_members: int) -> list[Block]:
        """All members, one block for each world."""
        return self.population.blocks(num_members, num_members)

    def init(self, seeds: Sequence[int]) -> State:
        """First lifetimes; they end after N updates less what staggers them."""
        worlds = self.worlds(len(seeds))
        counters = {
            "seed": torch.tensor(seeds, dtype=torch.int64),
            "lives": torch.zeros(len(seeds), dtype=torch.int64),
            "renew": torch.ones(len(seeds), dtype=torch.bool),
        }
        bandit = self.new_bandit()
        shape = (len(worlds), 10)
        course = {"returns": torch.zeros(shape), "seen": torch.zeros(shape, dtype=torch.bool)}
        state = {"counters": counters, "bandit": bandit, "course": course}
        state |= self.born(counters, bandit)
        ages = []
        for block in worlds:
            size = block.own[1]
            ages += [i * self.updates(block.agent) // size for i in range(size)]
        state["lifetimes"]["age"] = torch.tensor(ages)
        return state

    def new_bandit(self) -> Params:
        """Nothing is known yet."""
        agents = self.population.agents
        num_arms = max(len(self.arms(agent)) for agent in agents)
        return {
            "returns": torch.zeros(len(agents), num_arms, RECENT_LIVES),
            "lives": torch.zeros(len(agents), num_arms, dtype=torch.int64),
        }

    def born(
        self,
        counters: Params,
        bandit: Params,
        *,
        chosen: Tensor | None = None,
        greedy: bool = False,
    ) -> State:
        """New lifetimes, for the members of `chosen` [M] alone or for all.

        `greedy` takes the pair of step sizes of the highest mean return.
        """
        groups: State = {name: {} for name in BY_WORLD}
        lives: dict[str, list[float]] = {"lr": [], "alpha_y": [], "arm": [], "length": []}
        seeds, past = counters["seed"].tolist(), counters["lives"].tolist()
        wanted = [True] * len(seeds) if chosen is None else chosen.tolist()
        for block in self.worlds(len(seeds)):
            own = [
                torch.Generator().manual_seed(seeds[m] * 1_000_003 + past[m])
                for m in range(*block.members)
                if wanted[m]
            ]
            if not own:
                continue
            agent = block.agent
            for group, network, optimizer in (
                ("params", agent.network, agent.optimizer),
                ("critic", agent.critic, agent.critic_optimizer),
            ):
                params = stack([network.init(generator) for generator in own])
                slots = optimizer.init(params)
                slot_group = "optimizer" if group == "params" else "critic_optimizer"
                groups[group] |= prefixed(params, f"world{block.world}.")
                groups[slot_group] |= prefixed(slots, f"world{block.world}.")
            arms = self.arms(agent)
            scores = scores_of(bandit, block.world, len(arms), greedy=greedy)
            for generator in own:
                arm = int(scores.argmax())
                if not greedy:
                    arm = int(torch.multinomial(scores.softmax(0), 1, generator=generator))
                lives["arm"].append(arm)
                lives["lr"].append(arms[arm][0])
                lives["alpha_y"].append(arms[arm][1])
                lives["length"].append(self.updates(agent))
        whole = ("arm", "length")
        groups["lifetimes"] = {
            name: torch.tensor(values, dtype=torch.int64 if name in whole else torch.float32)
            for name, values in lives.items()
        }
        groups["lifetimes"]["age"] = torch.zeros(len(lives["arm"]), dtype=torch.int64)
        groups["lifetimes"]["recent"] = torch.zeros(len(lives["arm"]))
        device = counters["seed"].device
        return {g: {n: p.to(device) for n, p in entries.items()} for g, entries in groups.items()}

    def lived(self, state: State, batches: Sequence[Trajectory]) -> State:
        """The state K updates later; those whose lifetime is over begin another.

        Args:
            state: with the agents, slots and critics after the window.
            batches: K support batches and the query batch.
        """
        age = state["lifetimes"]["age"] + (len(batches) - 1)
        returns = torch.stack([mean_episode_return(batch) for batch in batches])
        seen, recent = returns.nanmean(0), state["lifetimes"]["recent"]
        recent = torch.where(seen.isfinite(), torch.lerp(seen, recent, MEMORY), recent)
        over = age >= state["lifetimes"]["length"]
        lifetimes = state["lifetimes"] | {"age": age, "recent": recent}
        counters = state["counters"] | {"renew": over}
        course = self.course(state, seen)
        state = state | {"lifetimes": lifetimes, "counters": counters, "course": course}
        if not bool(over.any()):
            return state
        bandit = self.remembered(state["bandit"], lifetimes, over)
        counters = counters | {"lives": counters["lives"] + over}
        born = self.born(counters, bandit, chosen=over)
        return state | {"counters": counters, "bandit": bandit} | self.replaced(state, born, over)

    def course(self, state: State, seen: Tensor) -> Params:
        """The course with the mean returns [M] of a window, NaN where no episode ended."""
        returns, known = (state["course"][name].clone() for name in ("returns", "seen"))
        age, length = (state["lifetimes"][name] for name in ("age", "length"))
        tenth = (10 * age // length).clamp_max(9)
        for block in self.worlds(len(seen)):
            rows = slice(*block.members)
            for place in range(10):
                here = seen[rows][tenth[rows] == place].nanmean()
                if bool(here.isfinite()):
                    cell = (block.world, place)
                    weight = COURSE_MEMORY * known[cell]
                    returns[cell] = torch.lerp(here, returns[cell], weight.to(here.dtype))
                    known[cell] = True
        return {"returns": returns, "seen": known}

    def remembered(self, bandit: Params, lifetimes: Params, over: Tensor) -> Params:
        """The bandit with the final returns of the lifetimes that are over."""
        returns, lives = bandit["returns"].clone(), bandit["lives"].clone()
        for block in self.worlds(len(over)):
            for member in range(*block.members):
                if bool(over[member]):
                    arm = int(lifetimes["arm"][member])
                    place = int(lives[block.world, arm]) % RECENT_LIVES
                    returns[block.world, arm, place] = lifetimes["recent"][member]
                    lives[block.world, arm] += 1
        return {"returns": returns, "lives": lives}

    def replaced(self, state: State, born: State, over: Tensor) -> State:
        """The groups that `born` has, with its lifetimes in place of those that are over."""
        groups: State = {group: dict(state[group]) for group in (*BY_WORLD, "lifetimes")}
        rows = {f"world{b.world}": b.rows(over) for b in self.worlds(len(over))}
        for group, entries in born.items():
            for name, new in entries.items():
                kept = state[group][name].clone()
                kept[rows.get(name.split(".")[0], over)] = new.to(kept.dtype)
                groups[group][name] = kept
        return groups


def scores_of(bandit: Params, world: int, num_arms: int, *, greedy: bool) -> Tensor:
    """What the probabilities of a world's pairs are a softmax of; the mean returns if greedy."""
    lives = bandit["lives"][world, :num_arms].cpu()
    mean = bandit["returns"][world, :num_arms].cpu().sum(1) / lives.clamp(1, RECENT_LIVES)
    if greedy:
        return mean.masked_fill(lives == 0, -torch.inf) if bool(lives.any()) else mean
    return (mean + BONUS / lives.clamp_min(1).sqrt()) / TEMPERATURE

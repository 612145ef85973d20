"""The best fixed TD(λ) on a random walk: a grid of step sizes and decays, side by side.

    python docs/results/td_grid.py random-walk-flip --steps 40000 --num-envs 16 --seed 1

Every cell learns from the same streams, of 10 replicas × E environments; a replica's step is the
mean over its environments, as in `learners/td_lambda.py`. Printed is the mean squared error of the
value over the states visited in the second half of the steps, for each cell, and the best cell with
its 95 % bootstrap interval over replicas.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from actors.tasks import load_family
from system.statistics import mean_ci

REPLICAS = 10
LRS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DECAYS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def errors(task: str, num_steps: int, num_envs: int, seed: int) -> Tensor:
    """Mean squared error of each cell and replica, [cells, REPLICAS]."""
    family = load_family(task)
    env, policy = family.make(REPLICAS * num_envs), family.spec.target_policy
    assert policy is not None
    target = torch.tensor(policy)
    behaviours = torch.tensor(family.spec.behaviours or [[1.0 / len(policy)] * len(policy)])
    lr, decay = (
        grid.reshape(-1, 1, 1, 1)
        for grid in torch.meshgrid(torch.tensor(LRS), torch.tensor(DECAYS), indexing="ij")
    )
    size = family.spec.obs_size + 1
    weight = torch.zeros(len(lr), REPLICAS, 1, size)
    trace = torch.zeros(len(lr), REPLICAS, num_envs, size)
    total = torch.zeros(len(lr), REPLICAS)
    generator = torch.Generator().manual_seed(seed)
    obs, _ = env.reset(seed=seed, options={"tasks": [{}] * env.num_envs})

    def seen(obs: Tensor) -> Tensor:
        return torch.cat([obs, torch.ones(len(obs), 1)], 1).view(REPLICAS, num_envs, -1)

    for t in range(num_steps):
        now, behaviour = seen(obs), behaviours[t // family.spec.switch_every % len(behaviours)]
        action = torch.multinomial(behaviour, env.num_envs, replacement=True, generator=generator)
        obs, reward, terminated, _, info = env.step(action)
        following, over = seen(obs), terminated.view(REPLICAS, num_envs)
        value = (weight * now).sum(-1)
        if t >= num_steps // 2:
            truth = torch.as_tensor(info["true_value"]).view(REPLICAS, num_envs)
            total += (value - truth).square().mean(-1)
        error = reward.view(REPLICAS, num_envs) + ~over * (weight * following).sum(-1) - value
        ratio = (target / behaviour)[action]
        trace = ratio.view(1, REPLICAS, num_envs, 1) * (decay * trace + now)
        weight = weight + lr * (error.unsqueeze(-1) * trace).mean(2, keepdim=True)
        trace = trace * ~over.unsqueeze(-1)
        if terminated.any():
            obs, _ = env.reset(options={"reset_mask": terminated.numpy()})
        obs = obs.clone()
    return total / (num_steps - num_steps // 2)


def main() -> None:
    """Prints the grid and its best cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task")
    parser.add_argument("--steps", type=int, default=40_000)
    parser.add_argument("--num-envs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    found = errors(arguments.task, arguments.steps, arguments.num_envs, arguments.seed)
    means = found.mean(1).nan_to_num(torch.inf).view(len(LRS), len(DECAYS))
    print("α \\ λ  " + " ".join(f"{decay:7.2f}" for decay in DECAYS))
    for lr, row in zip(LRS, means.tolist(), strict=True):
        print(f"{lr:6.2f} " + " ".join(f"{value:7.4f}" for value in row))
    best = int(means.argmin())
    mean, (low, high) = mean_ci(found[best].numpy())
    place = f"α = {LRS[best // len(DECAYS)]}, λ = {DECAYS[best % len(DECAYS)]}"
    print(f"best {place}: {float(mean):.5f} [{float(low):.5f}, {float(high):.5f}]")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()

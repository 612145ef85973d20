"""Policy-gradient losses of many members at once, each on its own whole episodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from learners.core import baseline, returns
from learners.core.policy import Distribution, Policy
from learners.core.trajectory import Params, Trajectory, masked_mean


@dataclass(frozen=True)
class Batch:
    """What the losses need of one trajectory; nothing in it carries gradient."""

    obs: Tensor  # [M, T·E, O]
    action: Tensor  # [M, T·E, A] or [M, T·E]
    log_prob: Tensor  # [M, T, E], of the behaviour policy
    advantage: Tensor  # [M, T, E], standardised per member
    valid: Tensor  # [M, T, E]

    def members(self, start: int, stop: int) -> Batch:
        """Members start ≤ m < stop, as views."""
        return Batch(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def envs(self, stop: int) -> Batch:
        """The first environments, e < stop."""
        shape = self.valid.shape
        flat = {n: getattr(self, n).unflatten(1, shape[1:]) for n in ("obs", "action")}
        return Batch(
            **{name: steps[:, :, :stop].flatten(1, 2) for name, steps in flat.items()},
            log_prob=self.log_prob[:, :, :stop],
            advantage=self.advantage[:, :, :stop],
            valid=self.valid[:, :, :stop],
        )


def advantages(trajectory: Trajectory, gamma: float, gae_lambda: float) -> Batch:
    """Fits each member's baseline to its own data and standardises its advantages."""
    t = trajectory
    discounted = returns.discounted_returns(t.reward, t.terminated, t.valid, gamma)
    value = baseline.fit_predict(t.obs, discounted, t.valid)
    advantage = returns.gae(t.reward, value, t.terminated, t.valid, gamma, gae_lambda)
    return Batch(
        obs=t.obs.flatten(1, 2),
        action=t.action.flatten(1, 2),
        log_prob=t.log_prob,
        advantage=returns.standardise(advantage, t.valid),
        valid=t.valid,
    )


def inner_loss(params: Params, batch: Batch, kind: str, acting: Policy) -> Tensor:
    """Policy-gradient loss of each member on its own data, [M].

    All kinds have the gradient −mean Â ∇log π. Their second derivatives differ: that of "log_prob"
    (Finn et al. 2017, eq. 4) is −mean Â ∇²log π; "likelihood_ratio" (Rothfuss et al. 2019) adds
    −mean Â ∇log π ∇log πᵀ, so that the meta-gradient also credits the choice of the data; "dice"
    (Foerster et al. 2018, in the form with advantages of Farquhar et al. 2019) credits each step
    with all steps before it. Gradient flows to `params`.
    """
    dist = acting.distribution(params, batch.obs)
    log_prob = dist.log_prob(batch.action).view_as(batch.advantage) * batch.valid
    if kind == "log_prob":
        objective = log_prob
    elif kind == "likelihood_ratio":
        objective = torch.exp(log_prob - log_prob.detach())
    else:
        past = log_prob.cumsum(1)
        before = past - log_prob
        objective = torch.exp(past - past.detach()) - torch.exp(before - before.detach())
    return -masked_mean(objective * batch.advantage, batch.valid)


def surrogate(dist: Distribution, batch: Batch) -> Tensor:
    """−mean ratio · Â of each member, [M]. Gradient flows to `dist`."""
    log_prob = dist.log_prob(batch.action).view_as(batch.advantage)
    ratio = torch.exp((log_prob - batch.log_prob) * batch.valid)
    return -masked_mean(ratio * batch.advantage, batch.valid)

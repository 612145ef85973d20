"""Agents under a frozen rule against LPG's update; the hand-written rules against slow loops."""

import pytest
import torch

from learners.config import LpgAgentConfig, LpgConfig
from learners.core.errors import ConfigError
from learners.core.params import gradients, leaves
from learners.core.population import AGENT_ADAM
from learners.core.trajectory import Spec
from learners.registry import make_learner as learner_for
from tests.learners.lifetimes import (
    AGENT_SETTINGS,
    DENSE,
    NUM_ACTIONS,
    TABLE,
    make_agents,
    make_batch,
    make_learner,
    make_state,
)

WORLDS = {"table": (TABLE,), "dense": (DENSE,), "both": (TABLE, DENSE), "floats": ()}
TEACHERS = ["rule", "a2c", "reinforce", "none"]
GAMMA, LAMBDA = AGENT_SETTINGS["gamma"], AGENT_SETTINGS["gae_lambda"]
NUM_MEMBERS = 4


def agents_of(world="both", **settings):
    """A learner, its state in float64, and a batch of its agents."""
    learner = make_agents(WORLDS[world], **settings)
    state = make_state(learner)
    return learner, state, batch_of(learner, state)


def batch_of(learner, state, seed=0):
    return make_batch(learner, learner.begin(state, NUM_MEMBERS)[1], seed=seed)


def updated(learner, state, batch):
    return learner.meta_update(state, [learner.begin(state, NUM_MEMBERS)[1]], [batch])


def expected_params(learner, state, objective):
    """θ after one step up the gradient of each block's objective(block, params) [M]."""
    blocks, parts = learner.policy.blocks(NUM_MEMBERS, NUM_MEMBERS), []
    for block in blocks:
        params = leaves(block.of(state["params"]))
        slopes = gradients(-objective(block, params).sum(), params)
        lr = state["lifetimes"]["lr"][slice(*block.members)]
        slots = block.of(state["optimizer"])
        moved, _ = block.agent.optimizer.update(params, slopes, slots, lr)
        parts.append({name: p.detach() for name, p in moved.items()})
    return learner.policy.join(blocks, parts)


def log_probs(block, params, batch):
    data = batch.members(*block.members)
    heads = block.agent.heads(params, data.obs.flatten(1, 2))
    return heads.policy.log_prob(data.action.flatten(1, 2))


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, p in expected.items():
        torch.testing.assert_close(found[name], p, rtol=1e-10, atol=1e-12)


def slow_advantages(learner, state, batch):
    """GAE step by step, [M, T, E]: a time limit is bootstrapped over, a termination is not."""
    advantage = torch.zeros_like(batch.reward)
    num_steps, num_envs = batch.reward.shape[1:]
    for block in learner.policy.blocks(NUM_MEMBERS, NUM_MEMBERS):
        critic = block.of(state["critic"])
        data = batch.members(*block.members)

        def value(obs, critic=critic, block=block):
            return block.agent.critic(critic, obs).squeeze(-1)

        for e in range(num_envs):
            later = torch.zeros(block.own[1], dtype=torch.float64)
            for t in reversed(range(num_steps)):
                obs = data.obs[:, t, e : e + 1]
                following = data.obs[:, t + 1] if t + 1 < num_steps else data.last_obs
                after = value(following[:, e : e + 1])[:, 0]
                final = value(data.final_obs[:, t, e : e + 1])[:, 0]
                for m in range(block.own[1]):
                    terminated = bool(data.terminated[m, t, e])
                    truncated = bool(data.truncated[m, t, e])
                    bootstrap = final[m] if truncated else after[m]
                    bootstrap = 0.0 if terminated else bootstrap
                    delta = data.reward[m, t, e] + GAMMA * bootstrap - value(obs)[m, 0]
                    going = 0.0 if terminated or truncated else 1.0
                    later[m] = delta + GAMMA * LAMBDA * going * later[m]
                    advantage[block.members[0] + m, t, e] = later[m]
    return advantage


def slow_rewards_to_go(batch):
    """Σ γ^i r_t+i until the episode or the chunk ends, [M, T, E]."""
    total = torch.zeros_like(batch.reward)
    num_members, num_steps, num_envs = batch.reward.shape
    for m in range(num_members):
        for e in range(num_envs):
            for t in range(num_steps):
                for later in range(t, num_steps):
                    total[m, t, e] += GAMMA ** (later - t) * batch.reward[m, later, e]
                    if batch.terminated[m, later, e] or batch.truncated[m, later, e]:
                        break
    return total


@pytest.mark.parametrize("sees_lifetime", [False, True])
@pytest.mark.parametrize("world", ["table", "dense", "both"])
def test_under_a_rule_an_update_is_that_of_lpg(world, sees_lifetime):
    lpg = make_learner(WORLDS[world], sees_lifetime=sees_lifetime)
    state = make_state(lpg)
    agents = lpg.begin(state, NUM_MEMBERS)[1]
    learner = make_agents(WORLDS[world], sees_lifetime=sees_lifetime)
    own = learner.init(range(NUM_MEMBERS))
    shared = ("params", "optimizer", "critic", "critic_optimizer", "lifetimes", "meta_params")
    own |= {group: state[group] for group in shared}
    for k in range(3):
        batch = make_batch(lpg, agents, seed=k)
        agents = lpg.inner_update(state, agents, batch)
        own, _ = updated(learner, own, batch)
        for name, p in agents.params.items():
            assert torch.equal(own["params"][name], p), name
        for name, p in own["optimizer"].items():
            assert torch.equal(agents.slots[name], p), name
        assert torch.equal(own["lifetimes"]["age"], agents.slots["age"])
    for name, p in own["params"].items():
        assert not torch.equal(p, state["params"][name]), name
    for name, p in own["meta_params"].items():
        assert torch.equal(p, state["meta_params"][name]), name


@pytest.mark.parametrize("teacher", ["a2c", "reinforce"])
@pytest.mark.parametrize("world", ["table", "dense", "both", "floats"])
def test_hand_written_rules_are_the_policy_gradient_of_a_slow_loop(world, teacher):
    learner, state, batch = agents_of(world, teacher=teacher)
    assert batch.terminated.any()
    assert batch.truncated.any()
    if teacher == "a2c":
        weight = slow_advantages(learner, state, batch)
    else:
        weight = slow_rewards_to_go(batch)

    def objective(block, params):
        own = weight[slice(*block.members)].flatten(1, 2)
        return (own * log_probs(block, params, batch)).mean(1)

    found, _ = updated(learner, state, batch)
    expected = expected_params(learner, state, objective)
    assert_close(found["params"], expected)
    for name, p in found["params"].items():
        assert not torch.equal(p, state["params"][name]), name


@pytest.mark.parametrize("teacher", ["a2c", "reinforce"])
def test_hand_written_rules_leave_the_predictions_alone(teacher):
    learner, state, batch = agents_of("table", teacher=teacher)
    found, _ = updated(learner, state, batch)
    before, after = (s["params"]["world0.layer0.weight"] for s in (state, found))
    assert torch.equal(after[..., NUM_ACTIONS:], before[..., NUM_ACTIONS:])
    assert not torch.equal(after[..., :NUM_ACTIONS], before[..., :NUM_ACTIONS])


@pytest.mark.parametrize("world", ["table", "dense", "both", "floats"])
def test_without_a_teacher_the_policy_stays_and_the_critic_learns(world):
    learner, state, batch = agents_of(world, teacher="none")
    found = state
    for _ in range(3):
        found, _ = updated(learner, found, batch)
    for name, p in state["params"].items():
        assert torch.equal(found["params"][name], p), name
    for name, p in state["critic"].items():
        assert not torch.equal(found["critic"][name], p), name
    assert found["lifetimes"]["age"].tolist() == [3] * NUM_MEMBERS


@pytest.mark.parametrize("teacher", TEACHERS)
def test_the_critic_learns_the_same_whoever_teaches(teacher):
    learner, state, batch = agents_of(teacher=teacher)
    other, other_state, _ = agents_of(teacher="none")
    found, _ = updated(learner, state, batch)
    expected, _ = updated(other, other_state, batch)
    for name, p in expected["critic"].items():
        torch.testing.assert_close(found["critic"][name], p, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("world", ["table", "dense", "floats"])
def test_the_weight_of_entropy_is_that_of_its_gradient(world):
    learner, state, batch = agents_of(world, teacher="none", entropy_coef=0.3)

    def entropy(block, params):
        obs = batch.members(*block.members).obs.flatten(1, 2)
        return block.agent.heads(params, obs).policy.entropy().mean(1)

    found, _ = updated(learner, state, batch)
    expected = expected_params(learner, state, lambda block, params: 0.3 * entropy(block, params))
    assert_close(found["params"], expected)
    block = learner.policy.blocks(NUM_MEMBERS, NUM_MEMBERS)[0]
    before, after = (entropy(block, block.of(s["params"])) for s in (state, found))
    assert (after > before).all()


def test_gradients_are_scaled_down_to_their_largest_norm():
    free, state, batch = agents_of("table", teacher="a2c")
    steps = [
        updated(make_agents((TABLE,), teacher="a2c", max_grad_norm=norm), state, batch)[0][
            "params"
        ]["world0.layer0.weight"]
        - state["params"]["world0.layer0.weight"]
        for norm in (100.0, 0.01)
    ]
    lr = free.config.tabular_lr
    lengths = [step.flatten(1).norm(dim=1) / lr for step in steps]
    assert (lengths[0] > 0.01).all()
    torch.testing.assert_close(lengths[1], torch.full_like(lengths[1], 0.01), rtol=1e-5, atol=0.0)


def test_observations_of_numbers_make_networks_with_adam():
    learner, state, batch = agents_of("floats", teacher="rule")
    assert batch.obs.is_floating_point()
    (agent,) = learner.policy.agents
    assert agent.optimizer == AGENT_ADAM
    assert state["params"]["world0.layer0.weight"].shape == (NUM_MEMBERS, 6, 3)
    found, metrics = updated(learner, state, batch)
    assert found["optimizer"]["world0.t"].tolist() == [1] * NUM_MEMBERS
    for name, p in found["params"].items():
        assert not torch.equal(p, state["params"][name]), name
    assert torch.tensor(list(metrics.values())).isfinite().all()


@pytest.mark.parametrize("teacher", TEACHERS)
def test_metrics_are_finite_and_say_how_the_teacher_compares_with_the_advantage(teacher):
    learner, state, batch = agents_of(teacher=teacher)
    _, metrics = updated(learner, state, batch)
    names = {"lpg/pi_hat_abs", "lpg/pi_hat_against_advantage", "lpg/policy_entropy"}
    assert metrics.keys() == names
    assert torch.tensor(list(metrics.values())).isfinite().all()
    agreement = metrics["lpg/pi_hat_against_advantage"]
    assert abs(agreement) <= 1.0 + 1e-9
    if teacher == "a2c":
        expected = slow_advantages(learner, state, batch).abs().mean()
        assert agreement == pytest.approx(1.0)
        assert metrics["lpg/pi_hat_abs"] == pytest.approx(float(expected))
    if teacher == "none":
        assert agreement == metrics["lpg/pi_hat_abs"] == 0.0
    heads = [
        block.agent.heads(
            block.of(state["params"]), batch.members(*block.members).obs.flatten(1, 2)
        )
        for block in learner.policy.blocks(NUM_MEMBERS, NUM_MEMBERS)
    ]
    entropy = torch.cat([h.policy.entropy().mean(1) for h in heads]).mean()
    assert metrics["lpg/policy_entropy"] == pytest.approx(float(entropy))


@pytest.mark.parametrize("teacher", TEACHERS)
def test_blocks_of_members_change_nothing(teacher):
    found = []
    for size in (NUM_MEMBERS, 1):
        learner, state, batch = agents_of(teacher=teacher, members_per_block=size)
        found.append(updated(learner, state, batch)[0])
    for group, entries in found[0].items():
        for name, p in entries.items():
            torch.testing.assert_close(found[1][group][name], p, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("teacher", TEACHERS)
def test_inputs_stay_as_they_were(teacher):
    learner, state, batch = agents_of(teacher=teacher)
    copy = batch.map(torch.clone)
    before = {g: {n: p.clone() for n, p in entries.items()} for g, entries in state.items()}
    updated(learner, state, batch)
    for name, tensor in vars(batch).items():
        assert torch.equal(tensor, getattr(copy, name)), name
    for group, entries in before.items():
        for name, p in entries.items():
            assert torch.equal(state[group][name], p), name


def test_replicas_begin_from_their_own_seeds_and_never_anew():
    learner = make_agents()
    state, again = learner.init([3, 4, 5, 6]), learner.init([3, 4, 5, 9])
    for group in ("params", "critic"):
        for name, p in state[group].items():
            same = (p == again[group][name]).flatten(1).all(1)
            if name.endswith("weight"):
                assert same.all() == name.startswith("world0."), name
                assert not torch.equal(p[0], p[1])
    for evaluating in (False, True):
        renew, agents = learner.begin(state, 4, evaluating=evaluating)
        assert renew == [False] * 4
        assert agents.params == state["params"]
    assert state["lifetimes"]["lr"].tolist() == pytest.approx([0.5, 0.5, 0.05, 0.05])
    assert (learner.num_inner_updates, learner.num_evaluation_updates) == (0, 0)
    with pytest.raises(NotImplementedError):
        learner.inner_update(state, agents, None)


def test_only_agents_under_a_rule_hold_one():
    for teacher in TEACHERS:
        state = make_agents(teacher=teacher).init(range(4))
        assert ("meta_params" in state) == (teacher == "rule")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"teacher": "ppo"}, "teacher must be one of .*'rule', 'a2c', 'reinforce', 'none'.*'ppo'"),
        ({"num_steps": 0}, "num_steps"),
        ({"lifetime_updates": 0}, "lifetime_updates"),
        ({"members_per_block": 0}, "members_per_block"),
        ({"rule_width": -1}, "rule_width"),
        ({"num_predictions": 2.5}, "num_predictions"),
        ({"embedding_width": 0}, "embedding_width"),
        ({"hidden": (8, 0)}, "hidden"),
        ({"tabular_lr": 0.0}, "tabular_lr"),
        ({"network_lr": float("inf")}, "network_lr"),
        ({"alpha_y": -0.5}, "alpha_y"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm"),
        ({"critic_lr": 0.0}, "critic_lr"),
        ({"gamma": 1.1}, "gamma"),
        ({"gae_lambda": -0.1}, "gae_lambda"),
        ({"critic_rate": 2.0}, "critic_rate"),
        ({"entropy_coef": -0.1}, "entropy_coef"),
        ({"entropy_coef": float("nan")}, "entropy_coef"),
    ],
)
def test_settings_that_no_run_could_use_are_refused(settings, expected):
    with pytest.raises(ConfigError, match=expected):
        LpgAgentConfig(**settings)


@pytest.mark.parametrize("config", [LpgConfig(), LpgAgentConfig(teacher="a2c")])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(4, 2, discrete=False, horizon=10),
        Spec(12, 2, discrete=True, horizon=10, image=(3, 2, 2)),
    ],
    ids=["continuous", "pixels"],
)
def test_environments_that_agents_cannot_act_in_are_refused(config, spec):
    with pytest.raises(ConfigError, match="discrete actions"):
        learner_for(config, spec).init([0])

import numpy as np
import pytest

from actors.tasks import load_family

FAMILIES = ("bandit", "tabular-mdp", "navigation-2d", "catch", "random-walk-flip")


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("new_tasks", [False, True])
def test_a_mask_of_all_is_a_reset_of_all(name, new_tasks):
    family = load_family(name)
    draws = [family.sample(np.random.default_rng(seed), 4) for seed in (0, 1)]
    states = []
    for options in ({}, {"reset_mask": np.ones(4, bool)}):
        env = family.make(4)
        env.reset(seed=3, options={"tasks": draws[0]})
        for _ in range(5):
            env.step(np.zeros(env.action_space.shape, env.action_space.dtype))
        obs, _ = env.reset(options=options | ({"tasks": draws[1]} if new_tasks else {}))
        states.append(env.state() | {"returned": np.array(obs)})
    assert states[0].keys() == states[1].keys()
    for key, array in states[0].items():
        np.testing.assert_array_equal(array, states[1][key], err_msg=key)
    assert not states[0]["steps"].any()
    assert not states[0]["ended"].any()

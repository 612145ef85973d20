"""What is not finite is named."""

import pickle

import pytest
import torch

from learners.core.contract import check_finite, check_params
from learners.core.errors import NonFiniteError
from tests.learners.builders import make_learner, make_state, make_trajectory

CHECKED = ("obs", "action", "reward", "log_prob", "last_obs", "episode_return")


def trajectory(discrete: bool = False):
    learner = make_learner(discrete)
    return make_trajectory(learner, make_state(learner)["meta_params"], 4, seed=0)


@pytest.mark.parametrize("discrete", [False, True])
def test_finite_data_passes(discrete):
    check_finite(trajectory(discrete))


@pytest.mark.parametrize("name", CHECKED)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("member", [0, 2])
def test_check_finite_names_tensor_and_first_member(name, bad, member):
    data = trajectory()
    tensor = getattr(data, name)
    tensor[member].view(-1)[-1] = bad
    tensor[3].view(-1)[0] = bad
    with pytest.raises(NonFiniteError, match=f"^{name} of member {member} is not finite$") as info:
        check_finite(data)
    assert (info.value.tensor, info.value.member) == (name, member)


def test_check_params_names_group_and_entry():
    params = {"a": torch.ones(2), "log_std": torch.ones(2)}
    check_params(params, "adapted")
    params["log_std"][1] = torch.inf
    with pytest.raises(NonFiniteError, match=r"^adapted/log_std is not finite$") as info:
        check_params(params, "adapted")
    assert info.value.member is None


@pytest.mark.parametrize("error", [NonFiniteError("reward", 3), NonFiniteError("adapted/x")])
def test_non_finite_error_survives_pickling(error):
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is NonFiniteError
    assert (copy.tensor, copy.member, str(copy)) == (error.tensor, error.member, str(error))

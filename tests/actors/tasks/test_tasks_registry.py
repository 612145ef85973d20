import subprocess
import sys

import pytest

from actors.tasks import load_family, task_names

USER_MODULE = """
from dataclasses import dataclass

import gymnasium
from gymnasium.envs.classic_control import PendulumEnv

from actors.tasks.gym_env import SingleEnvFamily


class Pole(PendulumEnv):
    def reset(self, *, seed=None, options=None):
        self.m = options["task"]["mass"]
        return super().reset(seed=seed)


@dataclass(frozen=True)
class PoleMass(SingleEnvFamily):
    horizon: int = 7
    heaviest: float = 2.0

    def make_single(self):
        return Pole()

    def sample(self, rng, num_tasks):
        return [{"mass": m} for m in rng.uniform(0.5, self.heaviest, num_tasks).tolist()]


class NotADataclass:
    pass
"""


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "poles_of_a_user.py").write_text(USER_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield "poles_of_a_user"
    sys.modules.pop("poles_of_a_user", None)


def test_importing_the_registry_loads_no_library():
    code = (
        "import sys, actors.tasks; actors.tasks.task_names(); "
        "print(sorted({'torch', 'gymnasium', 'mujoco', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_name_loads():
    assert task_names() == [
        "navigation-2d",
        "half-cheetah-dir",
        "half-cheetah-vel",
        "ant-dir",
        "ant-vel",
        "ant-goal",
        "hopper",
        "half-cheetah",
        "walker2d",
        "ant",
        "humanoid",
        "delayed-hopper",
        "delayed-half-cheetah",
        "delayed-walker2d",
        "delayed-ant",
        "delayed-humanoid",
        "bandit",
        "tabular-mdp",
        "catch",
        "random-walk-flip",
        "random-walk-off-policy",
        "worlds",
        "maze",
    ]
    for name in task_names():
        assert load_family(name).spec.horizon >= 1


def test_options_reach_the_family():
    assert load_family("half-cheetah-vel", {"horizon": 7, "max_velocity": 3}).max_velocity == 3
    assert load_family("gym:CartPole-v1", {"horizon": 7}).spec.horizon == 7


def test_unknown_name_is_answered_with_the_three_closest():
    with pytest.raises(ValueError, match="metaloop list") as caught:
        load_family("half-cheeta-dir")
    assert "'half-cheeta-dir'; closest: half-cheetah-dir, half-cheetah, half-cheetah-vel." in str(
        caught.value
    )


def test_unknown_option_is_answered_with_the_three_closest():
    with pytest.raises(ValueError, match="no option 'maximum_velocity'") as caught:
        load_family("half-cheetah-vel", {"maximum_velocity": 3.0})
    assert str(caught.value).count(", ") == 2
    assert "closest: max_velocity, " in str(caught.value)


def test_the_id_of_a_gymnasium_family_is_not_an_option():
    with pytest.raises(ValueError, match="no option 'env_id'; closest: horizon"):
        load_family("gym:CartPole-v1", {"env_id": "Acrobot-v1"})


def test_family_by_import_path(user_module):
    family = load_family(f"{user_module}:PoleMass", {"heaviest": 3.0})
    assert family.heaviest == 3.0
    assert family.spec.obs_size == 3
    with pytest.raises(ValueError, match="no option 'weight'"):
        load_family(f"{user_module}:PoleMass", {"weight": 3.0})


def test_bad_import_paths_name_the_part_that_failed(user_module):
    with pytest.raises(ValueError, match="the module 'no_such_module' cannot be imported"):
        load_family("no_such_module:Tasks")
    with pytest.raises(ValueError, match="the module '' cannot be imported"):
        load_family(":Tasks")
    with pytest.raises(ValueError, match="no class 'PoleMas'; closest: PoleMass, Pole"):
        load_family(f"{user_module}:PoleMas")
    with pytest.raises(ValueError, match="'NotADataclass' must be a dataclass"):
        load_family(f"{user_module}:NotADataclass")


def test_unknown_gymnasium_ids():
    with pytest.raises(ValueError, match="no environment 'CartPoel-v1'; closest: CartPole-v") as c:
        load_family("gym:CartPoel-v1")
    assert str(c.value).split("closest: ")[1].split(" (")[0].count(", ") == 2
    with pytest.raises(ValueError, match="CartPole-v77"):
        load_family("gym:CartPole-v77")
    with pytest.raises(ValueError, match="the module 'no_such_module' cannot be imported"):
        load_family("gym:no_such_module:Thing-v0")

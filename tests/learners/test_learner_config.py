"""Hyper-parameters that no run could use are refused by name; the registry finds the learner."""

import dataclasses

import pytest

from learners.config import MamlTrpoConfig
from learners.core.errors import ConfigError
from learners.core.trajectory import Spec
from learners.maml import MamlTrpo
from learners.registry import LEARNERS, make_learner

REFUSED = [
    *((name, 0) for name in ("num_inner_updates", "cg_steps", "line_search_tries")),
    *((name, -1) for name in ("num_inner_updates", "cg_steps", "line_search_tries")),
    *((name, value) for name in ("inner_lr", "max_kl", "init_std") for value in (0.0, -0.1)),
    *((name, float("nan")) for name in ("inner_lr", "max_kl", "init_std", "gamma")),
    ("members_per_block", 0),
    *(
        (name, value)
        for name in ("gamma", "gae_lambda", "line_search_ratio")
        for value in (-0.01, 1.01)
    ),
    ("cg_damping", -1e-9),
    ("exploration", -0.5),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_unusable_value_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"^{name} .*{value}$"):
        MamlTrpoConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gamma", 0.0),
        ("gamma", 1.0),
        ("gae_lambda", 0.0),
        ("gae_lambda", 1.0),
        ("cg_damping", 0.0),
        ("exploration", 0.0),
        ("num_inner_updates", 1),
        ("members_per_block", 1),
        ("hidden", ()),
    ],
)
def test_values_at_the_edge_are_allowed(name, value):
    assert getattr(MamlTrpoConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inner_loss", "log_probability"),
        ("activation", "gelu"),
        ("cg_damping", float("nan")),
        ("exploration", float("nan")),
        ("inner_lr", float("inf")),
        ("max_kl", float("inf")),
        ("hidden", (0,)),
        ("num_inner_updates", 1.5),
        ("members_per_block", 2.5),
    ],
)
def test_more_unusable_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=f"^{name} "):
        MamlTrpoConfig(**{name: value})


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)


def test_every_setting_is_documented_and_frozen():
    config = MamlTrpoConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.inner_lr = 1.0
    for field in dataclasses.fields(config):
        assert field.default is not dataclasses.MISSING, field.name


def test_registry_makes_the_learner_of_a_configuration():
    config, spec = MamlTrpoConfig(hidden=(5,)), Spec(2, 3, discrete=True, horizon=7)
    learner = make_learner(config, spec)
    assert isinstance(learner, MamlTrpo)
    assert (learner.config, learner.spec) == (config, spec)
    assert learner.init([0])["meta_params"]["layer0.weight"].shape == (2, 5)
    for place in LEARNERS.values():
        assert place.startswith("learners.")

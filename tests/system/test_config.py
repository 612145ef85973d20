"""Configurations: complete, refusing nonsense, and comparable."""

import dataclasses
import json
from dataclasses import replace

import pytest

from learners.config import METHODS, A2cConfig, MamlTrpoConfig
from learners.core.errors import ConfigError
from system.config import (
    MAY_CHANGE,
    RunConfig,
    RuntimeConfig,
    differences,
    from_dict,
    to_dict,
)
from system.presets import PRESETS

every_preset = pytest.mark.parametrize("name", PRESETS)


@every_preset
def test_every_preset_survives_json(name):
    config = PRESETS[name]()
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@every_preset
def test_every_preset_knows_its_name_and_says_what_it_is(name):
    assert PRESETS[name]().preset == name
    assert PRESETS[name].__doc__


def test_options_and_every_kind_of_value_survive_json(tiny_run):
    config = tiny_run(
        task_options={"horizon": 7, "action_scale": 0.5, "flag": True, "name": "a"},
        learner=MamlTrpoConfig(hidden=(3, 4, 5), learn_inner_lr=True, inner_loss="dice"),
        runtime={"address": "127.0.0.1:6379"},
    )
    again = from_dict(json.loads(json.dumps(to_dict(config))))
    assert again == config
    assert isinstance(again.learner.hidden, tuple)


def test_configurations_cannot_be_changed_in_place(tiny_run):
    config = tiny_run()
    for part in (config, config.runtime, config.learner):
        with pytest.raises(dataclasses.FrozenInstanceError):
            part.seed = 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("num_members", 0),
        ("num_envs", -1),
        ("members_per_slot", 0),
        ("envs_per_slot", 0),
        ("eval_tasks", 0),
        ("seed", -1),
        ("eval_every", -1),
    ],
)
def test_values_that_no_run_can_use_are_refused(tiny_run, name, value):
    with pytest.raises(ConfigError, match=rf"{name} must .* not {value}"):
        tiny_run(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_actors", 0),
        ("learner_threads", 0),
        ("keep_checkpoints", 0),
        ("timeout_s", 0.0),
        ("timeout_s", float("nan")),
        ("object_store_mb", 99),
        ("actor_memory_mb", -1),
    ],
)
def test_runtimes_that_no_run_can_use_are_refused(name, value):
    with pytest.raises(ConfigError, match=rf"{name} must .* not {value}"):
        RuntimeConfig(**{name: value})


def test_equal_configurations_do_not_differ(tiny_run):
    assert differences(tiny_run(), tiny_run()) == []


def test_every_difference_in_what_is_learned_is_named_with_both_values(tiny_run):
    old = tiny_run()
    old = replace(old, task_options={"horizon": 20, "colour": "red"})
    learner = replace(old.learner, inner_lr=0.3, hidden=(5,))
    new = replace(old, seed=4, learner=learner, task_options={"horizon": 21, "action_scale": 2.0})
    found = {name: (a, b) for name, a, b in differences(old, new)}
    assert found == {
        "seed": (0, 4),
        "learner.inner_lr": (0.1, 0.3),
        "learner.hidden": ([64, 64], [5]),
        "task_options.horizon": (20, 21),
        "task_options.action_scale": ("(not set)", 2.0),
        "task_options.colour": ("red", "(not set)"),
    }


def test_the_first_option_of_a_task_is_one_difference(tiny_run):
    old = replace(tiny_run(), task_options={})
    new = replace(old, task_options={"horizon": 21})
    assert differences(old, new) == [("task_options.horizon", "(not set)", 21)]
    assert differences(new, old) == [("task_options.horizon", 21, "(not set)")]


def test_what_a_resumed_run_may_change_is_no_difference(tiny_run):
    old = tiny_run()
    new = tiny_run(
        iterations=9,
        eval_every=2,
        eval_tasks=5,
        runtime={
            "backend": "ray",
            "num_actors": 5,
            "checkpoint_minutes": 1.0,
            "keep_checkpoints": 2,
            "timeout_s": 5.0,
        },
    )
    assert differences(old, new) == []


def test_every_other_field_is_a_difference(tiny_run):
    old = tiny_run()
    changed = {"preset": "another", "task": "bandit", "task_options": {}, "learner": None}
    for field in dataclasses.fields(RunConfig):
        if field.name in MAY_CHANGE:
            continue
        if field.name == "learner":
            new = replace(old, learner=replace(old.learner, gamma=0.5))
        elif field.name == "max_lag":
            old = replace(old, learner=A2cConfig(), runtime=replace(old.runtime, backend="ray"))
            new = replace(old, max_lag=1)
        else:
            value = changed.get(field.name, getattr(old, field.name))
            new = replace(old, **{field.name: value + 1 if isinstance(value, int) else value})
        assert differences(old, new), field.name


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_configuration_comes_back_from_json(tiny_run, method):
    changed = {"td-lambda": {"hidden": ()}, "rl2": {"width": 7}}.get(method, {"hidden": (7, 5)})
    sizes = {"num_members": 10, "num_envs": 1} if method == "rl2" else {}
    config = replace(tiny_run(), learner=METHODS[method](**changed), **sizes)
    values = json.loads(json.dumps(to_dict(config)))
    assert values["learner"]["method"] == method
    assert from_dict(values) == config


def test_configurations_without_a_method_are_those_of_maml(tiny_run):
    values = to_dict(tiny_run())
    del values["learner"]["method"]
    assert from_dict(values) == tiny_run()
    with pytest.raises(ConfigError, match="unknown method 'maml'"):
        from_dict(values | {"learner": values["learner"] | {"method": "maml"}})


def test_lag_is_refused_where_it_cannot_be(tiny_run):
    with pytest.raises(ConfigError, match=r"max_lag 2: maml-trpo needs"):
        replace(tiny_run(), max_lag=2)
    with pytest.raises(ConfigError, match=r"max_lag 2 needs --backend ray"):
        replace(tiny_run(), learner=A2cConfig(), max_lag=2)
    with pytest.raises(ConfigError, match="max_lag must not be negative"):
        replace(tiny_run(), max_lag=-1)


def test_configurations_of_another_version_are_refused(tiny_run):
    values = to_dict(tiny_run())
    with pytest.raises(ConfigError, match=r"another version.*colour"):
        from_dict(values | {"colour": "red"})
    with pytest.raises(ConfigError, match=r"another version.*colour"):
        from_dict(values | {"learner": values["learner"] | {"colour": "red"}})
    with pytest.raises(ConfigError, match=r"another version.*colour"):
        from_dict(values | {"runtime": values["runtime"] | {"colour": "red"}})
    without = {name: value for name, value in values.items() if name != "task"}
    with pytest.raises(ConfigError, match=r"another version.*task"):
        from_dict(without)

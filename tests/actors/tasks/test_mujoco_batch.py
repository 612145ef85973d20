import numpy as np
import pytest

from actors.tasks.half_cheetah import HalfCheetahDir
from actors.tasks.random_state import generator_bytes, generator_from_bytes


def started(num_envs=3, **options):
    env = HalfCheetahDir(**options).make(num_envs)
    env.reset(seed=0, options={"tasks": [{"direction": 1.0}] * num_envs})
    return env


@pytest.mark.parametrize("corrupt", ["qpos", "qvel", "acceleration", "control"])
def test_bad_states_are_counted_and_paid_with_nan(corrupt, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    env, healthy = started(), started()
    action = np.zeros((3, 6))
    if corrupt == "qpos":
        env.qpos[1, 0] = np.nan
    elif corrupt == "qvel":
        env.qvel[1, 0] = 1e11
    elif corrupt == "acceleration":
        env.qvel[1, 3:] = 1e8  # finite, but the forces that follow are not
    else:
        action[1, 2] = np.nan
    obs, reward, terminated, _, _ = env.step(action)
    assert np.isnan(reward).tolist() == [False, True, False]
    assert env.num_bad_states == 1
    assert np.isfinite(obs).all()
    assert not terminated.any()
    expected, expected_reward, *_ = healthy.step(np.zeros((3, 6)))
    np.testing.assert_array_equal(obs[[0, 2]], expected[[0, 2]])
    np.testing.assert_array_equal(reward[[0, 2]], expected_reward[[0, 2]])
    _, reward, *_ = env.step(np.zeros((3, 6)))
    assert np.isfinite(reward).all()  # reported once, for the step where it happened
    assert env.num_bad_states == 1
    assert list(tmp_path.iterdir()) == []  # no log file of MuJoCo's
    assert "unstable" not in "".join(capfd.readouterr())
    assert env.state()["num_bad_states"] == 1


def test_the_order_and_number_of_environments_does_not_matter():
    many, one = started(3), started(1)
    one.restore(
        {key: array[1:2] if array.shape[0] == 3 else array for key, array in many.state().items()}
    )
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = rng.uniform(-1, 1, (3, 6))
        left, right = many.step(action), one.step(action[1:2])
        np.testing.assert_array_equal(left[0][1:2], right[0])
        np.testing.assert_array_equal(left[1][1:2], right[1])


def test_two_batches_in_turn_do_not_disturb_each_other():
    alone, first, second = started(), started(), started()
    second.reset(seed=9)
    action = np.full((3, 6), 0.5)
    for _ in range(20):
        second.step(-action)
        np.testing.assert_array_equal(alone.step(action)[0], first.step(action)[0])


def test_a_partial_reset_draws_for_the_masked_rows_alone():
    env, alone = started(4), started(1)
    for _ in range(7):
        env.step(np.full((4, 6), 0.3))
    placed = []
    read_start = env.read_start
    env.read_start = lambda index: (placed.append(index), read_start(index))
    before = env.state()
    obs, _ = env.reset(seed=8, options={"reset_mask": np.array([False, False, True, False])})
    expected, _ = alone.reset(seed=8)
    assert placed == [2]
    np.testing.assert_array_equal(obs[2], expected[0])
    np.testing.assert_array_equal(env.state()["rng"], alone.state()["rng"])
    np.testing.assert_array_equal(env.physics[2], alone.physics[0])
    for index in (0, 1, 3):
        np.testing.assert_array_equal(env.physics[index], before["physics"][index])
    assert env.state()["steps"].tolist() == [7, 7, 0, 7]
    for _ in range(5):
        left, right = env.step(np.full((4, 6), 0.5)), alone.step(np.full((1, 6), 0.5))
        np.testing.assert_array_equal(left[0][2], right[0][0])
        np.testing.assert_array_equal(left[1][2], right[1][0])


def test_a_bad_robot_starts_again_alone():
    env = started(3, horizon=4)
    env.qvel[1, 0] = 1e11
    env.step(np.zeros((3, 6)))
    for _ in range(3):
        ended = env.step(np.zeros((3, 6)))[2]
    assert ended.all()
    env.reset(options={"reset_mask": [True, False, False]})
    _, reward, terminated, _, _ = env.step(np.zeros((3, 6)))
    assert terminated.tolist() == [False, True, True]
    assert reward[0] != 0
    assert (reward[1:] == 0).all()


def test_packed_generators_go_on_bit_for_bit():
    rng = np.random.default_rng(7)
    rng.integers(10, dtype=np.int32)  # leaves half of a 64-bit draw behind
    packed = generator_bytes(rng)
    assert packed.dtype == np.uint8
    copy = generator_from_bytes(packed)
    assert copy.bit_generator.state == rng.bit_generator.state
    np.testing.assert_array_equal(
        copy.integers(10, size=5, dtype=np.int32), rng.integers(10, size=5, dtype=np.int32)
    )
    np.testing.assert_array_equal(copy.standard_normal(9), rng.standard_normal(9))

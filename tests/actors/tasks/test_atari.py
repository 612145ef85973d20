"""Atari games on the real ALE: Breakout, which has FIRE, and Ms. Pac-Man, which has not."""

import functools
import sys

import ale_py
import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from actors.family import TaskFamily
from actors.tasks import load_family
from actors.tasks.atari import AtariFamily, games

ACTIONS = {"breakout": 4, "ms-pacman": 9}
IDS = {"breakout": "ALE/Breakout-v5", "ms-pacman": "ALE/MsPacman-v5"}
SEED = 11

every_game = pytest.mark.parametrize("game", ACTIONS)


@functools.cache
def batch(family, num_envs, seed):
    """Games at their start, made once: loading a ROM takes a tenth of a second, twice each."""
    env, obs = fresh_start(family, num_envs, seed)
    return env, obs, env.state()


def fresh_start(family, num_envs, seed=SEED):
    env = family.make(num_envs)
    obs, _ = env.reset(seed=seed, options={"tasks": [{}] * num_envs})
    return env, obs


def started(family, num_envs, seed=SEED):
    env, obs, state = batch(family, num_envs, seed)
    env.restore(state)
    return env, obs.copy()


def actions_of(game, num_steps, num_envs, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(ACTIONS[game], (num_steps, num_envs), generator=rng)


def idle(env):
    """A step of NOOP everywhere."""
    return env.step(torch.zeros(env.num_envs, dtype=torch.int64))


def lose_a_life(env):
    """Idles until the ball is lost somewhere, and says where and after how many steps."""
    length = 1
    while not (ended := idle(env)[2]).any():
        length += 1
    return ended, length


def reset_where(env, mask):
    return env.reset(options={"reset_mask": mask})[0]


def play(env, actions):
    """All that the environments return, with every ended one reset at once."""
    seen = []
    for action in actions:
        *parts, info = env.step(action)
        ended = parts[2] | parts[3]
        seen.append([*parts, info["raw_reward"], info["game_over"], reset_where(env, ended)])
    return [np.stack(part) for part in zip(*seen, strict=True)]


def assert_same(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def seeds_of(num_envs, seed=SEED):
    return [int(own) for own in np.random.SeedSequence(seed).generate_state(num_envs)]


def registered(game):
    """Gymnasium's own entry and wrappers."""
    gymnasium.register_envs(ale_py)
    env = gymnasium.make(
        IDS[game], frameskip=1, repeat_action_probability=0.0, full_action_space=False
    )
    return AtariPreprocessing(env)


class BaselinesReset(gymnasium.Wrapper):
    """EpisodicLifeEnv and FireResetEnv of OpenAI baselines, written down independently."""

    def __init__(self, env):
        super().__init__(env)
        self.lives, self.over, self.earned = 0, True, 0.0

    def step(self, action):
        obs, reward, self.over, truncated, info = self.env.step(action)
        before, self.lives = self.lives, info["lives"]
        lost = before > self.lives > 0
        return obs, reward, self.over or lost, truncated, info

    def reset(self, **kwargs):
        if self.over:
            self.env.reset(**kwargs)
        else:
            self.env.step(0)
        self.env.step(1)
        obs, _, over, _, info = self.env.step(2)
        assert not over
        self.lives, self.over = info["lives"], False
        return obs, info


# --- The family ---


@every_game
def test_spec_and_shapes(game):
    family = load_family(f"atari-{game}")
    assert isinstance(family, TaskFamily)
    assert family == AtariFamily(game=game)
    spec = family.spec
    assert (spec.obs_size, spec.action_size, spec.discrete) == (28224, ACTIONS[game], True)
    assert (spec.horizon, spec.image) == (27_000, (4, 84, 84))
    assert family.finite_tasks == [{}]
    assert family.sample(np.random.default_rng(0), 3) == [{}, {}, {}]
    env, obs = started(family, 2)
    assert obs.shape == (2, 28224)
    assert obs.dtype == np.uint8
    assert env.observation_space.contains(obs)
    kept = obs.copy()
    later, reward, terminated, truncated, info = env.step(torch.tensor([2, 3]))
    held = later.copy()
    assert later.dtype == np.uint8
    assert reward.dtype == info["raw_reward"].dtype == np.float32
    assert terminated.dtype == truncated.dtype == info["game_over"].dtype == bool
    env.step(torch.tensor([3, 2]))
    assert_same([obs, later], [kept, held])
    env.close()


def test_every_game_is_spelt_in_lower_case_with_dashes():
    assert len(games()) == 102
    assert {"breakout", "space-invaders", "ms-pacman", "pong"} <= set(games())
    assert all(name == name.lower() and "_" not in name for name in games())


@pytest.mark.parametrize("name", ["atari-space-invader", "atari-SpaceInvaders", "atari-combat"])
def test_unknown_game_is_answered_with_the_three_closest(name):
    with pytest.raises(ValueError, match="there is no Atari game") as caught:
        load_family(name)
    assert str(caught.value).split("closest: ")[1].count(", ") == 2
    if name != "atari-combat":
        assert "closest: space-invaders, " in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"horizon": 0}, {"noop_max": -1}, {"fire": 1}, {"clip_reward": "no"}, {"episodic_life": 0}],
)
def test_options_out_of_range_are_named(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        load_family("atari-breakout", options)


def test_the_game_is_fixed_by_the_name():
    with pytest.raises(ValueError, match="no option 'game'"):
        load_family("atari-breakout", {"game": "pong"})


@pytest.mark.parametrize("missing", ["ale_py", "cv2"])
def test_without_the_extra_the_way_out_is_named(missing, monkeypatch):
    monkeypatch.delitem(sys.modules, "actors.tasks.atari")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"pip install 'metaloop\[atari\]'"):
        load_family("atari-breakout")


# --- Against Gymnasium and OpenAI baselines ---


@every_game
def test_frames_and_rewards_are_those_of_gymnasiums_wrappers(game):
    env, obs = started(AtariFamily(game=game, fire=False, clip_reward=False), 2)
    actions = actions_of(game, 130, 2)
    actions[:, 1].clamp_(max=1)
    steps = [env.step(action) for action in actions]
    for index, seed in enumerate(seeds_of(2)):
        reference = FrameStackObservation(registered(game), 4)
        first, info = reference.reset(seed=seed)
        np.testing.assert_array_equal(obs[index], first.ravel())
        lives = info["lives"]
        for action, step in zip(actions[:, index].tolist(), steps, strict=True):
            expected, paid, over, _, info = reference.step(action)
            np.testing.assert_array_equal(step[0][index], expected.ravel())
            assert step[1][index] == step[4]["raw_reward"][index] == paid
            assert step[2][index] == (over or info["lives"] < lives)
            if step[2][index]:
                break


@pytest.mark.parametrize("seed", [0, 1])
def test_lives_and_fire_are_those_of_openai_baselines(seed):
    env, obs = started(AtariFamily(game="breakout"), 1)
    reference = FrameStackObservation(BaselinesReset(registered("breakout")), 4)
    expected, _ = reference.reset(seed=seeds_of(1)[0])
    np.testing.assert_array_equal(obs[0], expected.ravel())
    num_ended = num_games = 0
    for action in actions_of("breakout", 250, 1, seed):
        obs, reward, terminated, truncated, info = env.step(action)
        expected, paid, ended, _, _ = reference.step(int(action))
        np.testing.assert_array_equal(obs[0], expected.ravel())
        assert (reward[0], info["raw_reward"][0]) == (np.sign(paid), paid)
        assert (terminated[0], truncated[0]) == (ended, False)
        assert info["game_over"][0] == reference.env.over
        if ended:
            num_ended += 1
            num_games += reference.env.over
            expected, _ = reference.reset()
            np.testing.assert_array_equal(reset_where(env, terminated)[0], expected.ravel())
    assert num_games >= 1
    assert num_ended > num_games + 2


# --- Lives, games, rewards ---


def test_a_lost_life_ends_the_episode_and_the_fifth_the_game():
    env, _ = started(AtariFamily(game="breakout"), 2)
    ale = env.envs[0].ale
    ends = []
    while len(ends) < 6:
        frame = ale.getEpisodeFrameNumber()
        _, _, terminated, truncated, info = idle(env)
        assert not truncated.any()
        if terminated[0]:
            before = ale.getEpisodeFrameNumber()
            ends.append((ale.lives(), bool(info["game_over"][0])))
            held = env.step(torch.tensor([2, 0]))
            assert ale.getEpisodeFrameNumber() == before
            assert (held[1][0], held[4]["raw_reward"][0], held[2][0]) == (0, 0, True)
            obs = reset_where(env, np.array([True, False]))
            stack = obs[0].reshape(4, -1)
            assert (stack == stack[0]).all()
            np.testing.assert_array_equal(obs[1], held[0][1])
            if ends[-1][1]:
                assert ale.lives() == 5
                assert ale.getEpisodeFrameNumber() <= 30 + 8
            else:
                assert ale.getEpisodeFrameNumber() == before + 12
            assert not idle(env)[2][0]
        else:
            assert ale.getEpisodeFrameNumber() == frame + 4
            assert not info["game_over"][0]
    assert ends == [(4, False), (3, False), (2, False), (1, False), (0, True), (4, False)]


@every_game
def test_without_episodic_life_only_the_game_ends(game):
    env, _ = started(AtariFamily(game=game, episodic_life=False, fire=False), 1)
    seen = set()
    for action in actions_of(game, 600, 1):
        if game == "breakout":
            action[:] = 1
        _, _, terminated, _, info = env.step(action)
        seen.add(env.envs[0].ale.lives())
        assert terminated[0] == info["game_over"][0] == (env.envs[0].ale.lives() == 0)
        if terminated[0]:
            break
    assert terminated[0]
    assert len(seen) > 2


def test_a_full_reset_starts_a_new_game_after_a_lost_life():
    env, _ = started(AtariFamily(game="breakout"), 1)
    for options in (None, {"tasks": [{}]}):
        lose_a_life(env)
        assert env.envs[0].ale.lives() == 4
        env.reset(options=options)
        assert env.envs[0].ale.lives() == 5
    with pytest.raises(ValueError, match="1 environments, 2 tasks"):
        env.reset(options={"tasks": [{}, {}]})
    with pytest.raises(ValueError, match="reset_mask must be bool"):
        env.reset(options={"reset_mask": np.ones(2, bool)})


def test_a_mask_starts_a_running_environment_anew_and_leaves_the_others():
    env, _ = started(AtariFamily(game="ms-pacman"), 2)
    for action in actions_of("ms-pacman", 10, 2):
        obs, *_ = env.step(action)
    frames = [single.ale.getEpisodeFrameNumber() for single in env.envs]
    again = reset_where(env, np.array([False, True]))
    np.testing.assert_array_equal(again[0], obs[0])
    assert env.envs[0].ale.getEpisodeFrameNumber() == frames[0]
    assert env.envs[1].ale.getEpisodeFrameNumber() <= 30


@pytest.mark.parametrize(("game", "lowest", "highest"), [("ms-pacman", 0, 10), ("skiing", -7, -6)])
@pytest.mark.parametrize("clip_reward", [True, False])
def test_rewards_are_signs_and_raw_rewards_are_points(game, lowest, highest, clip_reward):
    env, _ = started(AtariFamily(game=game, clip_reward=clip_reward), 1)
    action = torch.tensor([2])
    steps = [env.step(action) for _ in range(120)]
    reward = np.stack([step[1] for step in steps])
    raw_reward = np.stack([step[4]["raw_reward"] for step in steps])
    assert (raw_reward.min(), raw_reward.max()) == (lowest, highest)
    np.testing.assert_array_equal(reward, np.sign(raw_reward) if clip_reward else raw_reward)


def test_points_won_while_a_reset_presses_buttons_are_not_lost():
    env, _ = started(AtariFamily(game="breakout"), 1)
    lose_a_life(env)
    single = env.envs[0]
    plain = single.step
    single.step = lambda action: (*plain(action)[:1], 2.0, *plain(action)[2:])
    reset_where(env, np.array([True]))
    single.step = plain
    _, reward, _, _, info = idle(env)
    assert (reward[0], info["raw_reward"][0]) == (0, 6)
    _, _, _, _, info = idle(env)
    assert info["raw_reward"][0] == 0


def test_a_game_that_ends_while_a_reset_presses_buttons_is_followed_by_a_new_one():
    env, _ = started(AtariFamily(game="breakout"), 1)
    lose_a_life(env)
    single = env.envs[0]
    plain, pressed = single.step, []

    def fatal(action):
        frame, _, over, *rest = plain(action)
        pressed.append(action)
        return frame, 3.0 * (action != 2), over or action == 1, *rest

    single.step = fatal
    reset_where(env, np.array([True]))
    single.step = plain
    assert pressed == [0, 1, 2]
    assert single.ale.lives() == 5
    _, _, terminated, _, info = idle(env)
    assert not terminated[0]
    assert not info["game_over"][0]
    assert info["raw_reward"][0] == 0


def test_the_horizon_truncates_the_game_and_not_the_life():
    env, _ = started(AtariFamily(game="breakout", horizon=40), 1)
    lives = []
    for t in range(40):
        _, _, terminated, truncated, info = idle(env)
        assert truncated[0] == info["game_over"][0] == (t == 39)
        if terminated[0]:
            assert t < 39
            lives.append(env.envs[0].ale.lives())
            reset_where(env, terminated)
    assert lives != []
    held = idle(env)
    assert (held[1][0], held[3][0]) == (0, True)
    reset_where(env, truncated)
    assert env.envs[0].ale.lives() == 5
    assert not idle(env)[3][0]


def test_a_life_lost_at_the_horizon_is_terminated_and_the_game_over():
    env, _ = started(AtariFamily(game="breakout"), 1)
    _, length = lose_a_life(env)
    env, _ = started(AtariFamily(game="breakout", horizon=length), 1)
    for _ in range(length):
        _, _, terminated, truncated, info = idle(env)
    assert (terminated[0], truncated[0], info["game_over"][0]) == (True, False, True)
    reset_where(env, terminated)
    assert env.envs[0].ale.lives() == 5


@pytest.mark.parametrize(
    ("noop_max", "fire", "frames"), [(0, False, 0), (1, False, 1), (0, True, 8)]
)
def test_noops_and_fire_at_the_start(noop_max, fire, frames):
    env, _ = started(AtariFamily(game="breakout", noop_max=noop_max, fire=fire), 1)
    assert env.envs[0].ale.getEpisodeFrameNumber() == frames


# --- Seeds and saved state ---


def test_seed_decides_everything():
    family = AtariFamily(game="breakout")
    actions = actions_of("breakout", 40, 2)
    runs = []
    for seed in (3, 3, 4):
        env, obs = fresh_start(family, 2, seed)
        runs.append([obs, *play(env, actions)])
    assert_same(runs[0], runs[1])
    assert (runs[0][1] != runs[2][1]).any()
    assert (runs[0][0][0] != runs[0][0][1]).any()


@pytest.mark.parametrize(("game", "taken_after"), [("breakout", 60), ("ms-pacman", 70)])
def test_restored_in_another_object_it_goes_on_bit_for_bit(game, taken_after):
    family = AtariFamily(game=game)
    actions = actions_of(game, taken_after + 70, 2)
    env, _ = started(family, 2)
    play(env, actions[:taken_after])
    state = env.state()
    assert all(type(array) is np.ndarray and array.dtype != object for array in state.values())
    kept = {key: array.copy() for key, array in state.items()}

    def finish(env):
        rest = play(env, actions[taken_after:])
        obs, _ = env.reset()  # without a seed: the random stream is part of the state
        return [*rest, obs, *play(env, actions[:15])]

    uninterrupted = finish(env)
    other, _ = fresh_start(family, 2, seed=99)
    play(other, actions[:5])
    other.restore(state)
    fresh = family.make(2)
    fresh.restore(state)
    assert_same(finish(other), uninterrupted)
    assert_same(finish(fresh), uninterrupted)
    assert all(np.array_equal(state[key], kept[key]) for key in kept)


def test_a_state_taken_between_a_lost_life_and_its_reset_goes_on_with_the_game():
    family = AtariFamily(game="breakout")
    env, _ = started(family, 2)
    ended, _ = lose_a_life(env)
    other = family.make(2)
    other.restore(env.state())
    np.testing.assert_array_equal(reset_where(env, ended), reset_where(other, ended))
    assert 4 in [single.ale.lives() for single in other.envs]
    actions = actions_of("breakout", 30, 2)
    assert_same(play(other, actions), play(env, actions))


def test_the_last_frame_of_a_restored_game_is_the_same():
    """It may show a part of the step before, when the game ends within its four frames."""
    family = AtariFamily(game="breakout", noop_max=0)
    env, _ = started(family, 1)
    other = family.make(1)
    over = False
    while not over:
        state = env.state()
        obs, _, terminated, _, info = idle(env)
        over = info["game_over"][0]
        if terminated[0] and not over:
            reset_where(env, terminated)
    other.restore(state)
    np.testing.assert_array_equal(idle(other)[0], obs)


def test_state_of_another_batch_is_refused_and_changes_nothing():
    env, _ = started(AtariFamily(game="breakout"), 1)
    before = env.state()
    wider, _ = started(AtariFamily(game="breakout"), 2)
    with pytest.raises(ValueError, match="another environment"):
        env.restore(wider.state())
    kangaroo = AtariFamily(game="kangaroo").make(1)
    with pytest.raises(ValueError, match="the game 'kangaroo', not 'breakout'"):
        env.restore(kangaroo.state())
    changed = {key: np.zeros_like(array) for key, array in before.items()}
    for missing in before:
        partial = {key: array for key, array in changed.items() if key != missing}
        with pytest.raises(ValueError, match=f"no '{missing}'"):
            env.restore(partial)
    after = env.state()
    assert all(np.array_equal(before[key], after[key]) for key in before)

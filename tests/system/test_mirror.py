"""Runs at a URL: mirrored whole, resumed elsewhere, cut short anywhere, used by one process."""

import json
import os
import platform
import signal
import time
from dataclasses import asdict, replace

import psutil
import pytest
import torch
from fsspec.registry import known_implementations

from learners.core.errors import ConfigError
from system import cli, exports, mirror, run, run_folder
from system.checkpoint import INFO, MANIFEST, STATE
from system.config import RuntimeConfig
from system.loop import Counters, Loop
from system.mirror import LEASE, Lease, Mirror, TakenOver, copied, opened
from system.storage import PART, Remote, StorageError, within
from tests.system.storages import Faulty, Killed
from tests.system.test_run import assert_unbroken, learned, rows, state_of, steps_of

pytestmark = pytest.mark.usefixtures("torch_threads", "machine")

RUNTIME = RuntimeConfig(backend="serial", timeout_s=60.0)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """(name) goes on as another machine, which has a cache of its own."""
    Faulty.empty()

    def become(name):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
        monkeypatch.setattr(platform, "node", lambda: name)

    become("first")
    yield become
    Faulty.reset()


@pytest.fixture(params=["faulty", "file", "memory"])
def url(request, tmp_path):
    """The URL of a run that is not there yet."""
    at = {"faulty": "/runs/one", "file": tmp_path / "store" / "one", "memory": tmp_path / "one"}
    return f"{request.param}://{at[request.param]}"


@pytest.fixture
def faulty():
    return "faulty:///runs/one"


def remote_of(url):
    return Remote.at(url, 60.0)


def stored(url):
    """Names of what lies at a URL."""
    return remote_of(url).names()


def train(config, url):
    with opened(url, config.runtime) as (folder, store):
        return run.train(config, folder, store), folder


def checkpoint(folder, iteration, value=None, keep=2):
    """A checkpoint and the records that belong to it."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": iteration, "env_steps": iteration}) + "\n")
    state = {"meta_params": {"weight": torch.full((100,), float(value or iteration))}}
    run_folder.save(folder, state, {}, Counters(iteration), keep)


def held_by(url, **changes):
    """Puts the lease of another process in place."""
    lease = Lease("elsewhere", 77, 0.0, "its-copy", time.time() + 600.0)
    lease = replace(lease, **changes)
    fs = remote_of(url).fs
    fs.makedirs(remote_of(url).root, exist_ok=True)
    fs.pipe_file(remote_of(url).path(LEASE), json.dumps(asdict(lease)).encode())


# Whole runs


def test_a_run_lies_at_its_url_as_in_a_folder(url, tmp_path, tiny_run, capsys):
    here = tmp_path / "here"
    expected = run.train(tiny_run(), here)
    result, folder = train(tiny_run(), url)
    assert result == expected
    assert f"storage      {url}" in capsys.readouterr().out
    there = stored(url)
    assert there == {
        *("config.json", "evaluation.json", "meta.json", "metrics.jsonl", LEASE),
        *(f"checkpoints/00000003/{file}" for file in (STATE, INFO, MANIFEST)),
        *(f"tb/{path.name}" for path in (folder / "tb").iterdir()),
    }
    remote = remote_of(url)
    for name in there - {LEASE}:
        assert remote.read(name) == (folder / name).read_bytes()
    assert json.loads(remote.read(LEASE))["until"] == 0.0


def test_a_run_goes_on_on_another_machine_bit_for_bit(
    url, machine, tmp_path, tiny_run, assert_same_state
):
    whole = tmp_path / "whole"
    expected = run.train(tiny_run(iterations=6, eval_every=3), whole)
    _, first = train(tiny_run(iterations=3, eval_every=3), url)
    machine("second")
    result, second = train(tiny_run(iterations=6, eval_every=3), url)
    assert second != first
    assert result == expected
    assert_same_state(state_of(second)[0], state_of(whole)[0])
    assert_unbroken(second, 6)
    assert learned(second) == learned(whole)
    machine("first")
    train(tiny_run(iterations=6, eval_every=3), url)
    assert_same_state(state_of(first)[0], state_of(whole)[0])
    assert_unbroken(first, 6)


def test_ctrl_c_stores_what_there_is_and_gives_the_lease_back(
    faulty, machine, tiny_run, monkeypatch
):
    iterate = Loop.iterate

    def signalled(self, counters):
        if counters.iteration == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return iterate(self, counters)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", signalled)
        assert train(tiny_run(iterations=4), faulty)[0] is None
    assert f"checkpoints/00000002/{MANIFEST}" in stored(faulty)
    machine("second")
    _, folder = train(tiny_run(iterations=4), faulty)
    assert_unbroken(folder, 4)


def test_what_a_failed_run_recorded_is_stored(faulty, machine, tiny_run, monkeypatch):
    iterate = Loop.iterate

    def fail_at_two(self, counters):
        if counters.iteration == 2:
            raise RuntimeError("not today")
        return iterate(self, counters)

    monkeypatch.setattr(Loop, "iterate", fail_at_two)
    with pytest.raises(RuntimeError, match="not today"):
        train(tiny_run(runtime={"checkpoint_minutes": 0.0}), faulty)
    assert len(remote_of(faulty).read("metrics.jsonl").splitlines()) == 2
    assert f"checkpoints/00000002/{MANIFEST}" in stored(faulty)


# The command line


def test_train_evaluate_and_export_take_urls(tmp_path, tiny_flags, capsys):
    url = f"file://{tmp_path}/store/run"
    flags = [*tiny_flags, "--backend", "serial", "--iterations", "1", "--run-dir", url]
    assert cli.main(["train", "maml-trpo/navigation-2d", *flags]) == 0
    assert f"storage      {url}" in capsys.readouterr().out
    assert cli.main(["evaluate", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["iteration"] == 1
    assert cli.main(["export", url]) == 2
    assert "--out DIR" in capsys.readouterr().err
    assert cli.main(["export", url, "--out", str(tmp_path / "policy")]) == 0
    assert exports.load(tmp_path / "policy").said["trained"]["iterations"] == 1


@pytest.mark.parametrize(("names", "said"), [((), "holds no run"), (("config.json",), "has no ch")])
def test_an_evaluation_of_what_is_no_run_names_the_url(faulty, names, said):
    for name in names:
        remote_of(faulty).fs.pipe_file(f"/runs/one/{name}", b"{}")
    with pytest.raises(ConfigError, match=f"{faulty} {said}"), copied(faulty):
        pytest.fail("it was opened")


def test_a_run_that_goes_on_can_be_evaluated(faulty):
    """Its old checkpoints vanish while they are copied; its lease is no hindrance."""
    with opened(faulty, RUNTIME) as (folder, store):
        (folder / "config.json").write_text("{}")
        for iteration in (1, 2):
            checkpoint(folder, iteration)
        store()
        names = Remote.names
        with pytest.MonkeyPatch.context() as patch:

            def then_remove(self):
                found = names(self)
                self.remove(f"checkpoints/00000001/{MANIFEST}")
                return found

            patch.setattr(Remote, "names", then_remove)
            with copied(faulty) as copy:
                assert run_folder.restore(copy)[1].iteration == 2


# Cut short


def test_a_mirror_that_dies_anywhere_leaves_whole_checkpoints(faulty, machine):
    """Every change of a store in turn is the one in the middle of which the process dies."""
    seen = set()
    for dies_at in range(200):
        machine(f"first-{dies_at}")
        Faulty.empty()
        died = False
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mirror, "release", lambda self: None)
            try:
                with opened(faulty, RUNTIME) as (folder, store):
                    (folder / "config.json").write_text("{}")
                    checkpoint(folder, 1, keep=1)
                    store()
                    checkpoint(folder, 2, keep=1)
                    Faulty.changes, Faulty.dies_at = 0, dies_at
                    store()
                    break
            except Killed:
                died = True
        assert died
        Faulty.reset()
        machine("second")
        held_by(faulty, until=0.0)
        with opened(faulty, RUNTIME) as (folder, store):
            _, counters, said = run_folder.restore(folder)
            assert said == []
            assert len(rows(folder)) >= counters.iteration
            seen.add(counters.iteration)
            checkpoint(folder, 3, keep=1)
            store()
        left = {name for name in stored(faulty) if name.startswith("checkpoints/") or PART in name}
        assert left == {f"checkpoints/00000003/{file}" for file in (STATE, INFO, MANIFEST)}
        # The machine that died would now go on from what the other one made.
        machine(f"first-{dies_at}")
        with opened(faulty, RUNTIME) as (folder, store):
            assert run_folder.restore(folder)[1].iteration == 3
    assert seen == {1, 2}
    assert dies_at > 8


def test_a_replaced_checkpoint_is_never_half_of_each(faulty, machine):
    """The same step with other content, as after a refused checkpoint was passed over."""
    for dies_at in range(200):
        Faulty.empty()
        machine(f"first-{dies_at}")
        try:
            with opened(faulty, RUNTIME) as (folder, store):
                (folder / "config.json").write_text("{}")
                checkpoint(folder, 1)
                checkpoint(folder, 2, value=7.0)
                store()
                checkpoint(folder, 2, value=8.0)
                Faulty.changes, Faulty.dies_at = 0, dies_at
                store()
                break
        except Killed:
            Faulty.reset()
        with copied(faulty) as copy:
            state, counters, said = run_folder.restore(copy)
        assert said == []
        value = state["meta_params"]["weight"][0].item()
        assert (counters.iteration, value) in [(1, 1.0), (2, 7.0), (2, 8.0)]
    assert dies_at > 8


def test_a_fetch_that_is_cut_short_is_done_again(faulty, machine, monkeypatch):
    with opened(faulty, RUNTIME) as (folder, _):
        (folder / "config.json").write_text("{}")
        checkpoint(folder, 1)
    machine("second")
    fetch = Remote.fetch

    def fetch_some(self, name, target):
        if name == "metrics.jsonl":
            raise Killed
        fetch(self, name, target)

    with monkeypatch.context() as patch:
        patch.setattr(Remote, "fetch", fetch_some)
        with pytest.raises(Killed), opened(faulty, RUNTIME):
            pytest.fail("it was opened")
    with opened(faulty, RUNTIME) as (folder, _):
        assert len(rows(folder)) == 1


# Which copy is the latest


def test_what_could_not_be_stored_is_gone_on_with_on_the_same_machine(
    faulty, machine, tiny_run, caplog
):
    config = tiny_run(iterations=2, runtime={"checkpoint_minutes": 0.0})
    train(config, faulty)
    put_file = Faulty.put_file

    def full(self, lpath, rpath, **kwargs):
        if "state" in rpath:
            raise OSError("the bucket is full")
        put_file(self, lpath, rpath, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Faulty, "put_file", full)
        with pytest.raises(StorageError) as caught:
            train(replace(config, iterations=4), faulty)
    assert "the bucket is full" in str(caught.value)
    assert f"not stored: checkpoints/00000003/{STATE}, " in str(caught.value)
    assert "and 2 more" in str(caught.value)
    assert "the same command on this machine" in str(caught.value)
    # One warning after each checkpoint: of iterations 3 and 4, and of the end.
    assert caplog.text.count("the next checkpoint tries again") == 3
    assert f"checkpoints/00000003/{MANIFEST}" not in stored(faulty)
    with copied(faulty) as copy:
        assert run_folder.restore(copy)[1].iteration == 2
    with opened(faulty, RUNTIME) as (folder, _):
        assert steps_of(folder)[-1] == "00000004"
    assert f"checkpoints/00000004/{MANIFEST}" in stored(faulty)


def test_a_failure_that_passes_costs_nothing(faulty, tiny_run, caplog):
    config = tiny_run(iterations=3, runtime={"checkpoint_minutes": 0.0})
    with opened(faulty, config.runtime) as (folder, store):

        def then_fail():
            Faulty.errors = {"put_file": OSError("the network is down")}
            store()
            Faulty.errors = {}

        assert run.train(config, folder, then_fail) is not None
    assert "the network is down" in caplog.text
    assert "not stored: config.json, meta.json" in caplog.text
    assert f"checkpoints/00000003/{MANIFEST}" in stored(faulty)


def test_a_checkpoint_that_was_removed_by_hand_stays_away(faulty):
    with opened(faulty, RUNTIME) as (folder, _):
        (folder / "config.json").write_text("{}")
        for iteration in (1, 2):
            checkpoint(folder, iteration)
    for file in (STATE, INFO, MANIFEST):
        remote_of(faulty).remove(f"checkpoints/00000002/{file}")
    with opened(faulty, RUNTIME) as (folder, _):
        assert steps_of(folder) == ["00000001"]
    assert not any("00000002" in name for name in stored(faulty))


def test_only_what_changed_is_sent(faulty):
    with opened(faulty, RUNTIME) as (folder, store):
        (folder / "config.json").write_text("{}")
        checkpoint(folder, 1)
        store()
        Faulty.changes = 0
        store()
        assert Faulty.changes == 2  # the lease: sent and renamed
        checkpoint(folder, 2)
        store()
        # Twice the lease, and what is new: the records and three files, sent and renamed.
        assert Faulty.changes == 2 + 2 + 2 * 4


# Who trains


@pytest.mark.parametrize("until", [-1.0, 600.0])
def test_a_process_that_lives_on_this_machine_keeps_its_lease(faulty, until):
    parent = psutil.Process(os.getppid())
    lease = {"host": "first", "process": parent.pid, "started": parent.create_time()}
    held_by(faulty, **lease, until=time.time() + until)
    with pytest.raises(ConfigError) as caught, opened(faulty, RUNTIME):
        pytest.fail("it was opened")
    assert f"in use by process {parent.pid} on first" in str(caught.value)


def test_a_process_of_another_machine_keeps_its_lease_until_it_is_stale(faulty):
    held_by(faulty)
    with pytest.raises(ConfigError) as caught, opened(faulty, RUNTIME):
        pytest.fail("it was opened")
    assert f"{faulty} is in use by process 77 on elsewhere" in str(caught.value)
    assert f"remove {faulty}/{LEASE}" in str(caught.value)
    held_by(faulty, until=time.time() - 1.0)
    with opened(faulty, RUNTIME):
        pass


def test_a_process_that_died_on_this_machine_is_followed_at_once(faulty):
    parent = psutil.Process(os.getppid())
    # The number is in use again, by a process that started later.
    held_by(faulty, host="first", process=parent.pid, started=parent.create_time() - 3600.0)
    with opened(faulty, RUNTIME):
        pass


def test_who_was_taken_for_dead_stops_and_writes_nothing(faulty):
    files = {}

    def train_for_too_long():
        with opened(faulty, RUNTIME) as (folder, store):
            (folder / "config.json").write_text("{}")
            store()
            held_by(faulty)
            files.update(Faulty.store)
            checkpoint(folder, 1)
            store()

    with pytest.raises(TakenOver, match="process 77 on elsewhere"):
        train_for_too_long()
    assert Faulty.store == files


def test_of_two_that_start_together_one_stops(faulty, monkeypatch):
    write_lease = Mirror.write_lease

    def and_then_another(self, lease):
        write_lease(self, lease)
        held_by(faulty)

    monkeypatch.setattr(Mirror, "write_lease", and_then_another)
    with pytest.raises(ConfigError, match="another process began"), opened(faulty, RUNTIME):
        pytest.fail("it was opened")


def test_a_second_process_with_the_same_cache_is_refused(faulty):
    with (
        opened(faulty, RUNTIME),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()}"),
        opened(faulty, RUNTIME),
    ):
        pytest.fail("it was opened twice")


def test_a_lease_that_is_none_is_refused(faulty):
    remote_of(faulty).fs.pipe_file(f"/runs/one/{LEASE}", b"{")
    with pytest.raises(ConfigError, match=r"lease\.json cannot be read"), opened(faulty, RUNTIME):
        pytest.fail("it was opened")


# What is refused


def test_an_unknown_protocol_is_answered_with_the_closest(tiny_flags, capsys):
    for verb in (["train", "ppo/cartpole", "--run-dir"], ["evaluate"]):
        assert cli.main([*verb, "s4://bucket/run"]) == 2
        err = capsys.readouterr().err
        assert "no storage 's4'; closest:" in err
        assert "s3" in err


def test_a_missing_driver_is_named(monkeypatch):
    entry = {"class": "no_such_driver.FileSystem", "err": "install it"}
    monkeypatch.setitem(known_implementations, "undriven", entry)
    with pytest.raises(ConfigError, match=r"undriven:// is missing: pip install no_such_driver"):
        Remote.at("undriven://bucket/run", 1.0)


@pytest.mark.parametrize(
    "error",
    [PermissionError("access denied"), ConnectionError("no route to host"), ValueError("odd")],
)
@pytest.mark.parametrize("method", ["cat_file", "ls", "put_file", "mv"])
def test_a_storage_that_refuses_is_said_before_anything_starts(faulty, method, error):
    Faulty.errors = {method: error}
    with pytest.raises(ConfigError) as caught, opened(faulty, RUNTIME):
        pytest.fail("it was opened")
    assert f"{faulty}: {type(error).__name__}: {error}" in str(caught.value)
    assert "credentials" in str(caught.value)


def test_a_storage_that_hangs_is_given_up(faulty):
    Faulty.hangs = "ls"
    impatient = replace(RUNTIME, timeout_s=0.2)
    with pytest.raises(ConfigError, match=r"no answer within 0.2 s"), opened(faulty, impatient):
        pytest.fail("it was opened")
    Faulty.free.set()


def test_what_works_in_time_answers_or_raises():
    assert within(60.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(60.0, lambda: 1 / 0)


def test_a_url_with_something_else_is_refused_and_left_alone(url):
    remote = remote_of(url)
    remote.fs.makedirs(remote.root, exist_ok=True)
    remote.fs.pipe_file(remote.path("thesis.tex"), b"years of work")
    with pytest.raises(ConfigError, match="holds no run"), opened(url, RUNTIME):
        pytest.fail("it was opened")
    assert stored(url) == {"thesis.tex"}


def test_names_that_lead_elsewhere_are_refused(faulty, monkeypatch):
    found = ["/runs/one/config.json", "/runs/one/../../etc/passwd"]
    monkeypatch.setattr(Faulty, "find", lambda self, path: found)
    with pytest.raises(StorageError, match="is no name of a file of a run"):
        remote_of(faulty).names()


def test_another_configuration_is_refused_there_as_here(faulty, machine, tiny_run):
    train(tiny_run(), faulty)
    before = {name: remote_of(faulty).read(name) for name in stored(faulty) - {LEASE}}
    machine("second")
    with pytest.raises(ConfigError, match="seed: 0 there, 8 now"):
        train(tiny_run(seed=8), faulty)
    assert {name: remote_of(faulty).read(name) for name in stored(faulty) - {LEASE}} == before


def test_urls_that_mean_one_place_have_one_cache():
    assert mirror.cache_folder(remote_of("memory://a/run/").url) == mirror.cache_folder(
        remote_of("memory://a/run").url
    )
    assert mirror.cache_folder("memory://a/run") != mirror.cache_folder("memory://b/run")

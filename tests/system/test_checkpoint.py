import builtins
import io
import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch

from system import checkpoint
from system.checkpoint import (
    INFO,
    MANIFEST,
    STATE,
    CorruptCheckpoint,
    flatten,
    load,
    load_newest,
    save,
    unflatten,
)

TENSORS = {
    "f64": torch.tensor([1 / 3, -0.0, 5e-324], dtype=torch.float64),
    "f32": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "f16": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "bf16": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "i64": torch.tensor([-(2**63), 2**63 - 1]),
    "i32": torch.tensor([[7]], dtype=torch.int32),
    "u8": torch.arange(256, dtype=torch.uint8),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
}
INFO_VALUES = {"iteration": 7, "seed": 2**70, "best": None, "rate": 0.1, "tasks": [[1, 2.5], "é"]}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype
        and left[k].shape == right[k].shape
        and left[k].contiguous().numpy(force=True).tobytes()
        == right[k].contiguous().numpy(force=True).tobytes()
        for k in left
        if left[k].dtype != torch.bfloat16
    )


def numbered(value):
    return {"x": torch.full((5,), float(value))}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Round trip


def test_round_trip_is_bitwise_for_every_dtype(tmp_path):
    path = save(tmp_path / "new" / "checkpoints", 12, TENSORS, INFO_VALUES)
    assert path.name == "00000012"
    tensors, info = load(path)
    assert same(tensors, TENSORS)
    assert torch.equal(tensors["bf16"], TENSORS["bf16"])
    assert tensors["bf16"].dtype == torch.bfloat16
    assert info == INFO_VALUES


def test_random_state_continues_where_it_was(tmp_path):
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    path = save(tmp_path, 1, {"rng": generator.get_state()}, {})
    expected = torch.rand(4, generator=generator)
    resumed = torch.Generator()
    resumed.set_state(load(path)[0]["rng"])
    assert torch.equal(torch.rand(4, generator=resumed), expected)


def test_views_strides_shared_memory_and_gradients_are_saved_by_value(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    given = {"base": base, "row": base[1], "columns": base.T, "leaf": torch.ones(2)}
    given["leaf"].requires_grad_()
    before = base.clone()
    tensors, _ = load(save(tmp_path, 0, given, {}))
    assert all(torch.equal(tensors[k], given[k]) for k in given)
    assert torch.equal(base, before)
    tensors["row"] += 1.0  # what was loaded can be written to, and shares nothing
    assert torch.equal(tensors["base"], before)


def test_no_tensors_and_no_info(tmp_path):
    assert load(save(tmp_path, 0, {}, {})) == ({}, {})


def test_nested_names():
    tree = {"meta": {"w": torch.ones(2), "adam": {"m": torch.zeros(1)}}, "step": torch.tensor(3)}
    flat = flatten(tree)
    assert list(flat) == ["meta/w", "meta/adam/m", "step"]
    again = unflatten(flat)
    assert again["meta"]["adam"]["m"] is tree["meta"]["adam"]["m"]
    assert again["step"] is tree["step"]
    assert again["meta"].keys() == tree["meta"].keys()
    with pytest.raises(ValueError, match="a/b"):
        flatten({"a/b": torch.ones(1)})


# Which are kept


def test_the_newest_are_kept_and_those_named(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, numbered(step), {}, keep=2, keep_also={3})
    assert names(tmp_path) == ["00000003", "00000006", "00000007"]


def test_steps_sort_as_numbers_beyond_eight_digits(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step, numbered(step), {})
    assert load_newest(tmp_path).step == 100_000_000


def test_the_same_step_again_replaces_it(tmp_path):
    save(tmp_path, 4, numbered(1), {"n": 1}, keep=1)
    save(tmp_path, 4, numbered(2), {"n": 2}, keep=1)
    assert names(tmp_path) == ["00000004"]
    assert load_newest(tmp_path).info == {"n": 2}


def test_saving_before_a_refused_checkpoint_keeps_what_was_just_saved(tmp_path):
    save(tmp_path, 30, numbered(30), {})
    (tmp_path / "00000030" / STATE).unlink()
    save(tmp_path, 20, numbered(20), {}, keep=1)
    newest = load_newest(tmp_path)
    assert newest.step == 20
    assert len(newest.refused) == 1
    save(tmp_path, 30, numbered(31), {}, keep=1)
    newest = load_newest(tmp_path)
    assert (newest.step, newest.refused) == (30, [])
    assert torch.equal(newest.tensors["x"], numbered(31)["x"])


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "12").mkdir()
    save(tmp_path, 1, numbered(1), {}, keep=1)
    save(tmp_path, 2, numbered(2), {}, keep=1)
    assert names(tmp_path) == ["00000002", "12", "notes.txt"]


def test_leftovers_are_removed_at_the_next_save(tmp_path):
    for name in ("00000009.tmp", "00000001.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / STATE).write_bytes(b"half")
    save(tmp_path, 1, numbered(1), {})
    assert names(tmp_path) == ["00000001"]


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), complex("nan")])
@pytest.mark.parametrize("wide", [False, True])
def test_non_finite_is_never_written(tmp_path, value, wide):
    dtypes = {(False, False): torch.float32, (False, True): torch.float64}
    dtype = dtypes.get((isinstance(value, complex), wide), torch.complex64)
    bad = torch.tensor([1.0, value], dtype=dtype)
    with pytest.raises(ValueError, match=r"1 of 2 values of 'meta/w'"):
        save(tmp_path / "run", 1, {"fine": torch.ones(1), "meta/w": bad}, {})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("step", "keep", "info"), [(-1, 3, {}), (1, 0, {}), (1, 3, {"loss": float("nan")})]
)
def test_bad_arguments_write_nothing(tmp_path, step, keep, info):
    with pytest.raises(ValueError, match=r"at least|JSON"):
        save(tmp_path, step, numbered(1), info, keep=keep)
    assert names(tmp_path) == []


def damage_cut(path, file):
    content = (path / file).read_bytes()
    (path / file).write_bytes(content[: len(content) // 2])


def damage_flip(path, file):
    content = bytearray((path / file).read_bytes())
    content[-3] ^= 1
    (path / file).write_bytes(content)


def damage_empty(path, file):
    (path / file).write_bytes(b"")


def damage_missing(path, file):
    (path / file).unlink()


def damage_folder(path, file):
    (path / file).unlink()
    (path / file).mkdir()


@pytest.mark.parametrize("file", [STATE, INFO, MANIFEST])
@pytest.mark.parametrize(
    "damage", [damage_cut, damage_flip, damage_empty, damage_missing, damage_folder]
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_used(tmp_path, damage, file):
    save(tmp_path, 1, numbered(1), {"n": 1})
    newest = save(tmp_path, 2, numbered(2), {"n": 2})
    damage(newest, file)
    with pytest.raises(CorruptCheckpoint) as caught:
        load(newest)
    assert caught.value.path == newest
    assert file in caught.value.reason or STATE in caught.value.reason
    loaded = load_newest(tmp_path)
    assert (loaded.step, loaded.info) == (1, {"n": 1})
    assert torch.equal(loaded.tensors["x"], numbered(1)["x"])
    assert loaded.refused == [(newest, caught.value.reason)]


@pytest.mark.parametrize("file", [STATE, INFO, MANIFEST])
def test_no_flipped_byte_goes_unnoticed(tmp_path, file):
    path = save(tmp_path, 1, numbered(1), {"n": 1})
    good = (path / file).read_bytes()
    for place in range(len(good)):
        (path / file).write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        try:
            tensors, info = load(path)
        except CorruptCheckpoint:
            continue
        assert file == MANIFEST  # nothing but an unused entry of it
        assert same(tensors, numbered(1))
        assert info == {"n": 1}


def test_all_refused_is_an_error_that_says_why(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step, numbered(step), {}) / STATE).unlink()
    with pytest.raises(
        CorruptCheckpoint, match=r"00000002: .* is missing; 00000001: .* begin anew"
    ):
        load_newest(tmp_path)


def test_none_at_all(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "absent") is None
    with pytest.raises(CorruptCheckpoint, match="missing"):
        load(tmp_path / "00000001")


def rewrite(path, file, content):
    """Puts `content` in place of a file, with a manifest that vouches for it."""
    (path / file).write_bytes(content)
    files = {name: (path / name).read_bytes() for name in (STATE, INFO)}
    (path / MANIFEST).write_bytes(checkpoint._manifest(files))


def test_an_unknown_format_version_is_refused(tmp_path):
    path = save(tmp_path, 1, numbered(1), {})
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(CorruptCheckpoint, match="format version 2"):
        load(path)


@pytest.mark.parametrize("content", [b"[1]", b"\xff", b"{", b"[" * 100_000])
def test_info_that_is_no_json_object_is_refused(tmp_path, content):
    path = save(tmp_path, 1, numbered(1), {})
    rewrite(path, INFO, content)
    with pytest.raises(CorruptCheckpoint, match=INFO):
        load(path)


@pytest.mark.parametrize(
    "manifest", [{}, {"format": 1}, {"format": 1, "files": []}, {"format": 1, "files": {STATE: 3}}]
)
def test_a_manifest_that_describes_nothing_is_refused(tmp_path, manifest):
    path = save(tmp_path, 1, numbered(1), {})
    (path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(CorruptCheckpoint):
        load(path)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_disguised_pickle_is_refused_and_not_executed(tmp_path, protocol):
    path = save(tmp_path / "c", 1, numbered(1), {})
    buffer = io.BytesIO()
    torch.save(Bomb(tmp_path / "executed"), buffer)
    for content in (pickle.dumps(Bomb(tmp_path / "executed"), protocol), buffer.getvalue()):
        rewrite(path, STATE, content)
        with pytest.raises(CorruptCheckpoint, match="not a safetensors file"):
            load(path)
    assert not (tmp_path / "executed").exists()


def test_files_are_safetensors_and_json_alone(tmp_path):
    path = save(tmp_path, 1, TENSORS, INFO_VALUES)
    assert names(path) == sorted([STATE, INFO, MANIFEST])
    assert safetensors.torch.load_file(path / STATE).keys() == TENSORS.keys()
    assert json.loads((path / INFO).read_text()) == INFO_VALUES
    for file in path.iterdir():
        with pytest.raises((pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError)):
            pickle.loads(file.read_bytes())


# Interruption


class KilledError(BaseException):
    """Not an Exception, so that nothing catches it as an error."""


class Killer:
    """Counts calls that reach the operating system; from call `at` on, each one raises.

    A write that is killed leaves half of its bytes.
    """

    FUNCTIONS = ("fsync", "rename", "replace", "open", "close", "mkdir", "rmdir", "unlink", "link")

    def __init__(self, monkeypatch, at):
        self.at = at
        self.calls = []
        for name in self.FUNCTIONS:
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))
        real_open = builtins.open

        def open_counted(*args, **kwargs):
            self.count("open file", args[0])
            return Stream(real_open(*args, **kwargs), self)

        monkeypatch.setattr(builtins, "open", open_counted)

    def wrap(self, name, function):
        def counted(*args, **kwargs):
            # A dead process closes what it had open.
            if name != "close":
                self.count(name, args[0])
            return function(*args, **kwargs)

        return counted

    def count(self, name, argument):
        self.calls.append((name, str(argument)))
        if len(self.calls) > self.at:
            raise KilledError(name)


class Stream:
    def __init__(self, stream, killer):
        self.stream, self.killer = stream, killer

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.stream.close()

    def write(self, content):
        try:
            self.killer.count("write", self.stream.name)
        except KilledError:
            self.stream.write(content[: len(content) // 2])
            self.stream.flush()
            raise
        return self.stream.write(content)

    def __getattr__(self, name):
        return getattr(self.stream, name)


def number_of_calls(folder, step, keep):
    with pytest.MonkeyPatch.context() as patch:
        killer = Killer(patch, at=10**9)
        save(folder, step, numbered(-1), {"n": -1}, keep=keep)
    return killer.calls


@pytest.mark.parametrize(
    ("before", "step", "keep"),
    [([], 1, 3), ([1], 2, 1), ([1, 2, 3], 4, 3), ([1], 1, 1), ([1, 2], 2, 1)],
    ids=["first", "keep one", "keep three", "same step", "same step, keep one"],
)
def test_killed_at_any_call_a_complete_checkpoint_remains(tmp_path, before, step, keep):
    def fresh(folder):
        shutil.rmtree(folder, ignore_errors=True)
        for old in before:
            save(folder, old, numbered(old), {"n": old})
        return folder

    total = len(number_of_calls(fresh(tmp_path / "count"), step, keep))
    assert total >= 15
    outcomes = set()
    for at in range(total):
        folder = fresh(tmp_path / "killed")
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, at)
            with pytest.raises(KilledError):
                save(folder, step, numbered(-1), {"n": -1}, keep=keep)
        newest = load_newest(folder)
        folder.mkdir(exist_ok=True)
        if newest is None:
            assert before == []
        else:
            n = newest.info["n"]
            assert n in (-1, *before[-1:])
            assert torch.equal(newest.tensors["x"], numbered(n)["x"])
            assert newest.refused == []
        outcomes.add(newest and newest.info["n"])
        for name in filter(str.isdigit, names(folder)):
            load(folder / name)  # no older one is left half deleted either

        save(folder, step + 1, numbered(0), {"n": 0}, keep=keep)
        assert all(name.isdigit() for name in names(folder)), names(folder)
        assert len(names(folder)) <= keep
        assert load_newest(folder).info == {"n": 0}
    # The kills fell on both sides of the commit.
    assert outcomes == {-1, before[-1] if before else None}


@pytest.mark.parametrize("depth", [1, 2])
def test_killed_while_recovering_from_a_kill(tmp_path, depth):
    """Killed while replacing, then again at any call of the save that tidies up."""
    folder = tmp_path / "c"

    def killed_save(at, step, n):
        with pytest.MonkeyPatch.context() as patch:
            Killer(patch, at)
            try:
                save(folder, step, numbered(n), {"n": n}, keep=1)
            except KilledError:
                return True
        return False

    save(folder, 1, numbered(1), {"n": 1})
    calls = [name for name, _ in number_of_calls(folder, 1, 1)]
    # From the first rename on a kill leaves more than a temporary folder.
    for first in range(calls.index("rename") + 1, len(calls)):
        second, unfinished = 0, True
        while unfinished:
            shutil.rmtree(folder)
            save(folder, 1, numbered(1), {"n": 1})
            killed_save(first, 1, 2)
            unfinished = killed_save(second, depth, 3)
            newest = load_newest(folder)
            assert newest.info["n"] in (1, 2, 3)
            assert newest.refused == []
            second += 1


def test_everything_is_on_disk_before_it_is_renamed(tmp_path, monkeypatch):
    opened = {}
    real = os.fsync
    order = []

    def fsync(descriptor):
        order.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        real(descriptor)

    def rename(source, target, real=os.rename):
        order.append(("rename", os.path.basename(source), os.path.basename(target)))
        opened[target] = names(source)
        real(source, target)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("the names of open files cannot be read here")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path / "checkpoints", 1, numbered(1), {})
    assert order == [
        ("fsync", STATE),
        ("fsync", INFO),
        ("fsync", MANIFEST),
        ("fsync", "00000001.tmp"),
        ("rename", "00000001.tmp", "00000001"),
        ("fsync", "checkpoints"),
    ]
    assert list(opened.values()) == [sorted([STATE, INFO, MANIFEST])]


def test_a_full_disk_is_reported_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    save(tmp_path, 1, numbered(1), {"n": 1}, keep=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2, numbered(2), {"n": 2}, keep=1)
    assert load_newest(tmp_path).info == {"n": 1}
    save(tmp_path, 2, numbered(2), {"n": 2}, keep=1)
    assert names(tmp_path) == ["00000002"]


def test_the_error_survives_a_process_boundary(tmp_path):
    error = pickle.loads(pickle.dumps(CorruptCheckpoint(tmp_path, "cut short")))
    assert (error.path, error.reason) == (tmp_path, "cut short")
    assert str(error) == f"{tmp_path}: cut short"

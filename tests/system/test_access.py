"""The token that keeps strangers out of a Ray cluster, and the proof that it does."""

import json
import logging
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from learners.core.errors import ConfigError
from system import access
from tests.system.dashboards import serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder without a token, and no setting that names one."""
    for name in (access.AUTH_MODE, access.TOKEN, access.TOKEN_PATH):
        # Set first, so that what a test leaves behind is taken away at its end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    before = os.umask(0o022)
    yield tmp_path
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


# The token's file


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_new_token_is_only_its_owners(home, umask):
    os.umask(umask)
    token = access.use_token(create=True)
    path = home / ".ray" / "auth_token"
    assert path.read_text() == token
    assert len(bytes.fromhex(token)) == 32
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert [found.name for found in path.parent.iterdir()] == ["auth_token"]
    assert os.environ[access.AUTH_MODE] == "token"
    assert access.use_token(create=True) == token


def test_rays_folder_is_closed_where_it_was_open(home):
    (home / ".ray").mkdir(mode=0o755)
    access.use_token(create=True)
    assert mode(home / ".ray") == 0o700


def test_two_tokens_are_not_alike(home, monkeypatch):
    monkeypatch.setenv(access.TOKEN_PATH, str(home / "one"))
    first = access.use_token(create=True)
    monkeypatch.setenv(access.TOKEN_PATH, str(home / "other"))
    assert access.use_token(create=True) != first


def test_a_token_made_meanwhile_by_another_process_stays(home):
    path = home / ".ray" / "auth_token"
    first = access.create_token(path)
    assert access.create_token(path) == first
    assert [found.name for found in path.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize("loose", [0o644, 0o640, 0o604])
def test_a_token_that_others_can_read_is_tightened_with_a_warning(home, caplog, loose):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700)
    path.write_text("ours\n")
    path.chmod(loose)
    assert access.use_token(create=False) == "ours"
    assert mode(path) == 0o600
    assert f"had mode {loose:03o} and now has 600" in caplog.text
    caplog.clear()
    access.use_token(create=False)
    assert caplog.text == ""


def test_a_loose_token_of_somebody_else_is_refused(home, monkeypatch):
    path = home / "auth_token"
    path.write_text("theirs")
    path.chmod(0o644)
    monkeypatch.setenv(access.TOKEN_PATH, str(path))
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ConfigError, match=r"auth_token has mode 644.*belongs to user") as caught:
        access.use_token(create=True)
    assert access.TOKEN_PATH in str(caught.value)
    assert mode(path) == 0o644
    assert access.AUTH_MODE not in os.environ


def test_an_empty_token_is_refused(home):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700)
    path.touch(mode=0o600)
    with pytest.raises(ConfigError, match="is empty; remove the file"):
        access.use_token(create=True)


def test_settings_come_before_the_file_in_rays_order(home, monkeypatch):
    in_home = access.use_token(create=True)
    path = home / "elsewhere" / "token"
    monkeypatch.setenv(access.TOKEN_PATH, str(path))
    in_path = access.use_token(create=True)
    assert in_path == path.read_text() != in_home
    assert mode(path) == 0o600
    monkeypatch.setenv(access.TOKEN, "  in the environment \n")
    assert access.use_token(create=True) == "in the environment"


def test_joining_needs_a_token_that_is_there(home):
    with pytest.raises(ConfigError, match="there is no authentication token") as caught:
        access.use_token(create=False)
    for named in (access.TOKEN, access.TOKEN_PATH, ".ray/auth_token", "--accept-open-cluster"):
        assert named in str(caught.value)
    assert not (home / ".ray").exists()
    assert access.AUTH_MODE not in os.environ


def test_authentication_that_was_switched_off_is_on_again_and_said(home, monkeypatch, caplog):
    monkeypatch.setenv(access.AUTH_MODE, "disabled")
    access.use_token(create=True)
    assert os.environ[access.AUTH_MODE] == "token"
    assert "RAY_AUTH_MODE=disabled is not heeded" in caplog.text


# Ray's version


@pytest.mark.parametrize("old", ["2.53.1", "2.9.0", "1.13", "2.52.0rc1"])
def test_a_ray_with_known_holes_is_refused(old):
    with pytest.raises(ConfigError, match=rf"Ray {old} .*CVE-2026-27482.*install Ray 2.54"):
        access.check_ray_version(old)


@pytest.mark.parametrize("found", ["2.54.0", "2.60.0", "3.0.0.dev0", None])
def test_a_ray_without_them_is_not(found):
    access.check_ray_version(found)


# Probes


@pytest.mark.parametrize(
    ("rule", "closed"),
    [
        (lambda path, shown: 403 if shown else 401, True),
        (lambda path, shown: 200, False),
        (lambda path, shown: 401 if shown is None else 200, False),  # any token will do
        (lambda path, shown: 200 if path == "/api/jobs/" else 401, False),
        (lambda path, shown: 404, False),
        (lambda path, shown: 302, False),
        (lambda path, shown: 401 if path == "/login" else 302, False),
    ],
)
def test_a_dashboard_is_closed_where_every_stranger_is_turned_away(rule, closed):
    with serving(lambda path, shown: (rule(path, shown), None)) as address:
        assert access.refuses_strangers(address) is closed


def test_an_open_cluster_is_refused_unless_accepted(caplog):
    access.require_closed("here:1", closed=True, accept_open=False)
    assert caplog.text == ""
    with pytest.raises(ConfigError, match="at here:1 answers requests without a token") as caught:
        access.require_closed("here:1", closed=False, accept_open=False)
    assert "--accept-open-cluster" in str(caught.value)
    assert "RAY_AUTH_MODE=token" in str(caught.value)
    with caplog.at_level(logging.WARNING):
        access.require_closed("here:1", closed=False, accept_open=True)
    assert "at here:1 answers requests without a token" in caplog.text


# A local cluster

LOCAL = """
import json, os, sys
import ray                                  # before anything is set
from system import access, cluster
from system.config import RuntimeConfig
cluster.start_ray(RuntimeConfig(num_actors=1, object_store_mb=100))
gcs = ray.get_runtime_context().gcs_address
token = access.find_token()
print(json.dumps({
    "ours": access.gcs_answers(gcs, token),
    "none": access.gcs_answers(gcs, None),
    "wrong": access.gcs_answers(gcs, token[::-1]),
    "worker": ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_MODE")).remote(), timeout=60),
}))
# A cluster that turns nobody away is ended at once.
access.gcs_refuses_strangers = lambda address: False
try:
    cluster.require_closed_cluster()
except ValueError as error:
    print(json.dumps({"refused": str(error), "gone": not ray.is_initialized()}))
"""


@pytest.mark.ray
def test_a_local_cluster_lets_nobody_in_but_us(home):
    """Also where the user had switched authentication off, and Ray was imported before."""
    environment = {name: value for name, value in os.environ.items() if "RAY_AUTH" not in name}
    done = subprocess.run(
        [sys.executable, "-c", LOCAL],
        cwd=ROOT,
        env=environment | {"HOME": str(home), access.AUTH_MODE: "disabled"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found, ended = (json.loads(line) for line in done.stdout.splitlines()[-2:])
    assert found == {"ours": True, "none": False, "wrong": False, "worker": "token"}
    assert "answers requests without a token" in ended["refused"]
    assert ended["gone"]
    assert mode(home / ".ray" / "auth_token") == 0o600
    assert "RAY_AUTH_MODE=disabled is not heeded" in done.stderr

"""The parameter server's promises, without Ray."""

import pickle

from hypothesis import given
from hypothesis import strategies as st

from system.parameter_server import ParameterServer, Published


def blocks(value):
    return {(0, 2): [f"{value}, first members"], (2, 4): [f"{value}, last members"]}


def filled(*versions, keep_versions=3):
    server = ParameterServer(keep_versions)
    for version in versions:
        server.publish("agents", version, blocks(version))
    return server


def test_an_exact_version_comes_back_as_it_was_published():
    server = filled(1, 2)
    assert server.get("agents", 1) == Published(1, blocks(1))
    assert server.get("agents", 2) == Published(2, blocks(2))


def test_unknown_versions_and_names_are_none():
    server = filled(4)
    assert server.get("agents", 5) is None
    assert server.get("others", 4) is None
    assert server.newest("others") is None
    assert server.pull_if_newer("others", None) is None
    assert ParameterServer().newest("agents") is None


def test_names_do_not_mix():
    server = filled(3)
    server.publish("others", 9, blocks("another"))
    assert (server.newest("agents"), server.newest("others")) == (3, 9)
    assert server.get("agents", 9) is None


def test_only_a_newer_version_is_pulled():
    server = filled(3, 4)
    assert server.pull_if_newer("agents", None) == Published(4, blocks(4))
    assert server.pull_if_newer("agents", 3) == Published(4, blocks(4))
    assert server.pull_if_newer("agents", 4) is None
    assert server.pull_if_newer("agents", 5) is None


def test_the_oldest_versions_are_forgotten():
    server = filled(1, 2, 3, 4, 5)
    assert [v for v in range(7) if server.get("agents", v)] == [3, 4, 5]
    assert filled(1, 2, keep_versions=1).get("agents", 1) is None


def test_a_version_may_be_published_again():
    """As when the learner fills a server that has lost its memory."""
    server = filled(1, 2)
    server.publish("agents", 2, blocks("again"))
    assert server.get("agents", 2) == Published(2, blocks("again"))
    assert server.get("agents", 1) is not None


@given(st.sets(st.integers(0, 30), min_size=1), st.integers(1, 4))
def test_exactly_the_newest_versions_are_kept(versions, keep):
    in_order = sorted(versions)
    server = filled(*in_order, keep_versions=keep)
    known = [version for version in range(31) if server.get("agents", version)]
    assert known == in_order[-keep:]
    assert server.newest("agents") == in_order[-1]


def test_it_holds_references_and_no_copies():
    heavy = object()
    server = ParameterServer()
    server.publish("agents", 1, {(0, 1): [heavy]})
    assert server.get("agents", 1).blocks[(0, 1)][0] is heavy


def test_what_is_published_can_cross_processes():
    published = Published(1, blocks(1))
    assert pickle.loads(pickle.dumps(published)) == published

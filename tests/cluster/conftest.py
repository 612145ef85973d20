"""One cluster of three nodes for all tests of this folder."""

import pytest

from tests.cluster.nodes import WORKER, three_nodes


@pytest.fixture(scope="package")
def started_nodes(own_token, clusters):
    clusters.close()  # this process is a driver of one cluster at a time
    with three_nodes(own_token) as started:
        yield started


@pytest.fixture
def nodes(started_nodes):
    """Three nodes; one that died is there again afterwards."""
    yield started_nodes
    if len(started_nodes.processes) <= WORKER:
        started_nodes.join_worker()

"""Servers that the tests of this folder share, one of each kind in each process of pytest."""

import pytest

from .servers import RunningCluster, RunningServer, running


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    pytest.importorskip("redis")
    with running(RunningServer, "redis", tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory):
    pytest.importorskip("redis")
    with running(RunningServer, "valkey", tmp_path_factory.mktemp("valkey")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_cluster(tmp_path_factory):
    pytest.importorskip("redis")
    with running(RunningCluster, "redis", tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster

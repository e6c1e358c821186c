"""Servers that return logprobs, by requests over loopback."""

import json
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kvcache.verify import verify, verify_reuse
from kvcache.verify.targets.endpoint import EndpointError, EndpointTarget, filled

from .tiny import FULL, VOCAB, Weights, reference

WEIGHTS = Weights((FULL, FULL))


class Handler(BaseHTTPRequestHandler):
    """Completes prompts of ids. Subclasses are wrong in one thing, or speak another dialect."""

    earlier: list

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if body.get("stream"):
            self.stream(body["prompt"], body.get("cache_salt"))
            return
        status, answer = self.answer(body)
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        """Keeps standard error clean."""

    def stream(self, ids, salt):
        """Answers piece by piece, for as long as somebody listens."""
        self.computed(ids, salt)
        self.send_response(200)
        self.end_headers()
        with suppress(ConnectionError):
            for _ in range(16):
                self.wfile.write(b"data: {}\n\n")

    def answer(self, body):
        if isinstance(body["logprobs"], bool):
            return 400, {"error": "logprobs must be a number"}
        rows, cached = self.computed(body["prompt"], body.get("cache_salt"))
        return 200, self.told(rows, body["logprobs"]) | {
            "usage": {"prompt_tokens_details": {"cached_tokens": cached}}
        }

    def computed(self, ids, salt):
        """Logprobs behind a prompt, and the tokens that an earlier one begins with."""
        cached = max((common(ids, known) for key, known in self.earlier if key == salt), default=0)
        self.earlier.append((salt, ids))
        logits = reference(WEIGHTS, self.reused(ids, cached))[0][-1].astype(np.float64)
        return logits - np.log(np.exp(logits).sum()), cached

    def reused(self, ids, cached):
        return ids

    def told(self, row, count):
        tokens = [int(token) for token in np.argsort(-row)[:count]]
        top = {str(token): row[token] for token in tokens}
        first = str(tokens[0])
        logprobs = {"tokens": [first], "token_logprobs": [top[first]], "top_logprobs": [top]}
        return {"choices": [{"logprobs": logprobs}]}


class Wrong(Handler):
    """Reuses more than it has: the third token of what is cached is another."""

    def reused(self, ids, cached):
        return [*ids[:2], (ids[2] + 1) % VOCAB, *ids[3:]] if cached > 4 else ids


class Listing(Handler):
    """Tells logprobs as a list, and takes no number for them."""

    def answer(self, body):
        if body["logprobs"] is not True:
            return 400, {"error": "logprobs must be a bool"}
        return super().answer(body | {"logprobs": body["top_logprobs"]})

    def told(self, row, count):
        tokens = [int(token) for token in np.argsort(-row)[:count]]
        top = [{"id": token, "logprob": row[token]} for token in tokens]
        return {"choices": [{"logprobs": {"content": [{**top[0], "top_logprobs": top}]}}]}


class Silent(Handler):
    def told(self, row, count):
        return {"choices": [{"text": "w"}]}


class Refusing(Handler):
    def answer(self, body):
        return 503, {"error": "loading the model"}


def common(one, other):
    pairs = zip(one, other, strict=False)  # of any two lengths
    return next(
        (n for n, pair in enumerate(pairs) if pair[0] != pair[1]), min(len(one), len(other))
    )


@contextmanager
def serving(handler):
    """The address of a server."""
    fresh = type("Fresh", (handler,), {"earlier": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), fresh)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def target_of(url, **options):
    options = {"cold": {"cache_salt": "{unique}"}, "vocab_size": VOCAB} | options
    return EndpointTarget(url, max_tokens=24, **options)


@pytest.mark.parametrize("handler", [Handler, Listing])
def test_a_server_that_is_right(handler):
    with serving(handler) as url:
        report = verify_reuse(target_of(url), runs=1)
    reused = {result.scenario: result.reused for result in report.results}
    assert reused["returns"] > 10
    lacking = {result.scenario for result in report.results if result.verdict == "not supported"}
    assert lacking == {"drafts", "tenants", "evicted-device", "evicted-host", "evicted-store"}


def test_a_server_that_is_wrong():
    with serving(Wrong) as url:
        target = target_of(url, warm={"cache_salt": "{trial}"})
        report = verify(target, runs=3, scenarios=["returns"])
    [result] = report.results
    assert result.verdict == "different"
    assert len(result.finding.script) <= 3
    assert result.finding.divergence.against == "cold run"


def test_a_second_server_for_cold_runs():
    with serving(Wrong) as url, serving(Handler) as other:
        target = target_of(url, cold=None, cold_url=other)
        assert not verify(target, runs=3, scenarios=["returns"]).passed


def test_tenants_are_told_apart_by_an_option():
    with serving(Handler) as url:
        target = target_of(url, warm={"cache_salt": "{trial}-{tenant}"})
        [result] = verify_reuse(target, runs=2, scenarios=["tenants"]).results
    assert result.reused > 0


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (Silent, "has to return logprobs of the token behind a prompt; got"),
        (Refusing, "the server answered 503: .*loading the model"),
    ],
)
def test_a_server_that_does_not_serve(handler, message):
    with serving(handler) as url, pytest.raises(EndpointError, match=message):
        verify(target_of(url), runs=1)


def test_no_server():
    with serving(Handler) as url:
        pass
    with pytest.raises(EndpointError, match="did not answer"):
        verify(target_of(url), runs=1)


def test_cold_runs_have_to_be_possible():
    with pytest.raises(ValueError, match="cold runs need a server that reuses nothing"):
        EndpointTarget("http://127.0.0.1:1/v1")


def test_numbers_take_the_place_of_names():
    options = {"salt": "{trial}-{tenant}", "cache": False}
    assert filled(options, trial=3, tenant=1) == {"salt": "3-1", "cache": False}
    assert options["salt"] == "{trial}-{tenant}"

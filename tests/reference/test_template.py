"""Chat templates of strangers: they end, with a text or a named error."""

import json
import subprocess

import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference import template
from kvcache.reference.errors import UnsupportedModelError
from kvcache.reference.template import render_template

NESTED = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
DOUBLED = (
    "{% set ns = namespace(s='x') %}"
    "{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
)


def test_what_goes_in_comes_out():
    text = "naïve 🙂\r\n</s>"
    assert render_template("{{ a }}|{{ b[0].c }}", {"a": text, "b": [{"c": 5}]}) == f"{text}|5"


@pytest.mark.slow
@pytest.mark.parametrize(
    "source",
    [
        NESTED,
        "{% for a in range(99999) %}{% for b in range(99999) %}{{ a }}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        DOUBLED,
        "{{ 'x' * 10**11 }}",
        "{{ 10**(10**10) }}",
        "{{ '%99999999999d' % 1 }}",
        "{{ 'x'|center(10**11) }}",
        "{{ 'x' * 10**8 }}",
        "{{ lipsum(n=10**9) }}",
    ],
)
def test_a_template_without_end_is_given_up(monkeypatch, source):
    """By the time that it computes, not by that of a clock, so a busy machine does not matter."""
    monkeypatch.setattr(template, "SECONDS", 1)
    with pytest.raises(UnsupportedModelError, match=r"this one fails: .*Use plain completion"):
        render_template(source, {})


@pytest.mark.parametrize(
    "source",
    ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ ''.__class__.__mro__ }}", "{{ a.b.c }}", "{% if %}"],
)
def test_whatever_a_template_raises_is_named(source):
    with pytest.raises(UnsupportedModelError, match=r"fails: \w+Error"):
        render_template(source, {})


@pytest.mark.parametrize("output", ["", '{"text": "half', "{}"])
def test_a_process_that_was_ended(monkeypatch, output):
    def ended(command, **options):
        return subprocess.CompletedProcess(command, -9, output, "")

    monkeypatch.setattr(subprocess, "run", ended)
    with pytest.raises(UnsupportedModelError, match="takes more than 5 s, or too much memory"):
        render_template("", {})


def test_a_process_that_nothing_ends(monkeypatch):
    """Where the system does not count what a process computes."""

    def waiting(command, **options):
        assert json.loads(options["input"])["template"] == "x"
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", waiting)
    with pytest.raises(UnsupportedModelError, match="does not come to an end"):
        render_template("x", {})

"""``kvcache inspect``: tables, trees, damage, and removal only where it was asked for."""

import json
import os
import re
import sqlite3
import time

import pytest

pytest.importorskip("typer", reason="needs pip install 'kvcache[cli]'")

from typer.testing import CliRunner

from kvcache.cli import app
from kvcache.errors import StoreError
from kvcache.stores import FileStore, Item, Label, Seal, open_store
from tests.stores.servers import RunningServer, running
from tests.stores.values import key_of, page_item, value_of

NOBODY = bytes(32)
DAY = 24 * 3600


def invoke(*arguments):
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)], env={"COLUMNS": "80"})


def item(number, parent, start, stop, nbytes=1000):
    parent = NOBODY if parent is None else key_of(parent)
    return Item(key_of(number), [value_of(number, nbytes)], Label(NOBODY, parent, start, stop))


@pytest.fixture
def store(tmp_path):
    """A prefix of two pages that branches into two, and one without its beginning.

    Each was used a day before the one behind it; the last of them just now.
    """
    directory = tmp_path / "kv"
    with FileStore(directory) as opened:
        opened.put(
            [
                item(0, None, 0, 64),
                item(1, 0, 64, 128),
                item(2, 1, 128, 192),
                item(3, 1, 128, 160),
                item(4, 99, 64, 128, nbytes=2 << 20),
            ]
        )
    with sqlite3.connect(directory / "index.sqlite") as index:
        for number in range(5):
            moment = time.time() - (4 - number) * DAY
            index.execute("UPDATE entries SET used = ? WHERE key = ?", (moment, key_of(number)))
    index.close()
    return directory


def left_in(directory):
    with FileStore(directory) as opened:
        return {entry.key for entry in opened.entries()}


def damage(directory, number):
    [path] = directory.glob(f"objects/*/{key_of(number).hex()}")
    data = bytearray(path.read_bytes())
    data[300] ^= 1
    path.write_bytes(data)


def rows_of(result):
    assert "…" not in result.stdout
    return [" ".join(line.split()) for line in result.stdout.splitlines()]


def short(number):
    return key_of(number).hex()[:12]


def test_a_table_of_prefixes(store):
    result = invoke(store.as_uri())
    assert result.exit_code == 0, result.output
    rows = rows_of(result)
    assert "5 entries with 2.0 MiB of values, which take 2.0 MiB" in rows
    assert "2 prefixes, 1 without their beginning, 1 layouts" in rows
    first, second = (row for row in rows if row.startswith((short(0), short(4))))
    assert re.fullmatch(rf"{short(4)} 64\.\.128 1 1 2\.0 MiB \d+s 0", first)  # used just now
    assert second == f"{short(0)} 0..192 4 2 3.9 KiB 24h 0"


def test_a_tree_of_prefixes(store):
    rows = invoke(store.as_uri(), "--tree").stdout.splitlines()
    at = next(i for i, row in enumerate(rows) if row.startswith(short(0)))
    assert [row.rstrip() for row in rows[at : at + 3]] == [
        f"{short(0)} 0..128: 2 entries, 2.0 KiB, 3d",
        f"├── {short(3)} 128..160: 1 entry, 1000 B, 24h",
        f"└── {short(2)} 128..192: 1 entry, 1000 B, 2d",
    ]


@pytest.mark.parametrize("shape", ["--tree", "--verify"])
def test_a_limit_says_what_it_hides(store, shape):
    assert "1 prefixes more" in rows_of(invoke(store.as_uri(), shape, "--limit", "1"))


def test_an_empty_store(tmp_path):
    result = invoke(tmp_path.as_uri())
    assert result.exit_code == 0, result.output
    assert "0 entries with 0 B of values, which take 0 B" in rows_of(result)


def test_a_directory_that_is_not_there_is_not_made(tmp_path):
    result = invoke((tmp_path / "typo").as_uri())
    assert isinstance(result.exception, StoreError)
    assert "there is no" in str(result.exception)
    assert not (tmp_path / "typo").exists()


def test_an_address_that_leads_nowhere():
    assert isinstance(invoke("nowhere").exception, StoreError)


def test_a_server_that_is_not_there():
    pytest.importorskip("redis")
    result = invoke("redis://127.0.0.1:1", "--timeout", "5")
    assert isinstance(result.exception, StoreError)
    assert "is not available" in str(result.exception)


def test_whole_values(store):
    result = invoke(store.as_uri(), "--verify")
    assert result.exit_code == 0, result.output
    assert "Values: 5 whole, 0 damaged, 0 foreign, 0 gone, 0 unread" in rows_of(result)


def test_damage_is_reported_and_the_status_says_so(store):
    damage(store, 3)
    result = invoke(store.as_uri(), "--verify")
    assert result.exit_code == 1
    rows = rows_of(result)
    assert "Values: 4 whole, 1 damaged, 0 foreign, 0 gone, 0 unread" in rows
    assert f"{short(3)} damaged the value of" in rows
    assert "not match its checksum" in " ".join(rows)
    assert key_of(3) not in left_in(store)  # as after every read of it


def test_without_verify_no_value_is_read(store):
    damage(store, 3)
    assert invoke(store.as_uri()).exit_code == 0
    assert key_of(3) in left_in(store)


@pytest.mark.parametrize(
    ("options", "gone"),
    [
        ("--older-than 36h", [0, 1, 2]),
        ("--older-than 5d", []),
        ("--down-to 2M", [0, 1, 2, 3]),
        ("--down-to 3M", []),
        ("--down-to 0", [0, 1, 2, 3, 4]),
        ("--older-than 84h --down-to 2099152", [0, 1]),
    ],
)
def test_what_is_chosen_goes_only_with_prune(store, options, gone):
    everything = left_in(store)
    result = invoke(store.as_uri(), *options.split())
    assert "Nothing was removed: add --prune." in rows_of(result)
    assert left_in(store) == everything
    result = invoke(store.as_uri(), *options.split(), "--prune")
    assert result.exit_code == 0, result.output
    assert f"{len(gone)} removed, 0 gone already, 0 not reached" in rows_of(result)
    assert left_in(store) == everything - {key_of(number) for number in gone}


def test_damaged_entries_are_gone_afterwards(store):
    damage(store, 2)
    result = invoke(store.as_uri(), "--damaged", "--prune")
    assert result.exit_code == 1
    assert "0 removed, 1 gone already, 0 not reached" in rows_of(result)  # the read was faster
    assert key_of(2) not in left_in(store)


def test_a_file_holds_everything(store, tmp_path):
    damage(store, 3)
    path = tmp_path / "found.json"
    invoke(store.as_uri(), "--verify", "--older-than", "84h", "--json", path)
    document = json.loads(path.read_text())
    assert document["format"] == "kvcache.inspect/1"
    assert document["usage"]["entries"] == 5
    assert document["removed"] is None
    by_key = {entry["key"]: entry for entry in document["entries"]}
    first, damaged = by_key[key_of(0).hex()], by_key[key_of(3).hex()]
    assert (first["start"], first["stop"], first["nbytes"]) == (0, 64, 1000)
    assert (first["state"], first["chosen"]) == ("whole", True)
    assert (damaged["state"], damaged["chosen"]) == ("damaged", False)
    assert damaged["parent"] == key_of(1).hex()
    assert "checksum" in damaged["reason"]


def test_a_directory_that_can_only_be_read(store):
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    places = [store, *(path for path in store.rglob("*"))]
    for place in places:
        place.chmod(0o555 if place.is_dir() else 0o444)
    try:
        result = invoke(store.as_uri(), "--verify")
        assert result.exit_code == 0, result.output
        assert "5 entries with 2.0 MiB of values, which can only be read" in rows_of(result)
    finally:
        for place in places:
            place.chmod(0o755)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prune"], "--prune needs --older-than, --down-to or --damaged beside it."),
        (["--older-than", "old"], "--older-than takes a time like 90m, 12h, 7d or 2w"),
        (["--down-to", "less"], "--down-to takes bytes like 500M, 64G or 1.5T"),
        (["--limit", "0"], "greater than or equal to 1"),
        (["--secret", "key"], "--secret needs --verify or --damaged beside it."),
        (["--json", "/nowhere/it.json"], "--json takes a file in a folder that exists"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_done(store, options, message):
    everything = left_in(store)
    result = invoke(store.as_uri(), *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert left_in(store) == everything


def test_a_secret_opens_sealed_pages(tmp_path):
    pytest.importorskip("cryptography", reason="needs pip install 'kvcache[seal]'")
    with FileStore(tmp_path / "kv") as opened:
        opened.put([page_item(0, seal=Seal(bytes(range(32)))), page_item(1, seal=Seal(bytes(32)))])
    binary, digits = tmp_path / "binary", tmp_path / "digits"
    binary.write_bytes(bytes(range(32)))
    digits.write_text(bytes(32).hex() + "\n")
    url = (tmp_path / "kv").as_uri()
    assert invoke(url, "--verify").exit_code == 0
    for secret, foreign in ((binary, 1), (digits, 0)):
        result = invoke(url, "--damaged", "--prune", "--secret", secret)
        assert result.exit_code == 1
        rows = rows_of(result)
        assert "Values: 1 whole, 0 damaged, 1 foreign, 0 gone, 0 unread" in rows
        assert any(row.startswith(f"{short(foreign)} foreign") for row in rows)
    assert left_in(tmp_path / "kv") == {key_of(0), key_of(1)}  # a foreign page is another tenant's


def test_options_of_the_store(tmp_path):
    pytest.importorskip("redis", reason="needs pip install 'kvcache[redis]'")
    with running(RunningServer, "redis", tmp_path) as server:
        with open_store(server.url, prefix="4") as opened:
            opened.put([item(0, None, 0, 64)])
        assert "0 entries" in invoke(server.url).stdout
        assert "0 entries" in invoke(server.url, "--option", "prefix=my:").stdout
        result = invoke(server.url, "--option", 'prefix="4"', "--option", "connections=3")
    assert result.exit_code == 0, result.output
    assert "1 entries with 1000 B of values" in result.stdout


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("budget", "--option takes NAME=VALUE; got 'budget'."),
        ("a b=1", "--option takes NAME=VALUE; got 'a b=1'."),
        ("colour=red", "unexpected keyword argument 'colour'"),
        ("budget=-1", "budget"),
    ],
)
def test_wrong_options_of_the_store(store, option, message):
    result = invoke(store.as_uri(), "--option", option)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 64, bytes(33), bytes(200)])
def test_a_file_that_holds_no_secret(store, tmp_path, content):
    path = tmp_path / "secret"
    path.write_bytes(content)
    result = invoke(store.as_uri(), "--verify", "--secret", path)
    assert result.exit_code == 2
    text = " ".join(result.output.replace("│", " ").split())
    assert "--secret takes a file of 32 bytes or 64 hexadecimal digits" in text


def test_help_teaches_by_examples():
    text = " ".join(invoke("--help").stdout.replace("│", " ").split())
    for example in (
        "kvcache inspect file:///var/cache/kv --tree",
        "kvcache inspect redis://127.0.0.1:6379 --verify --json found.json",
        "kvcache inspect redis+cluster://a:6379,b:6379 --option prefix=my: --verify --secret key",
        "--older-than 7d --down-to 50G --prune",
    ):
        assert example in text

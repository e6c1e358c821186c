"""Files that were damaged, or forged with valid checksums; and the memory to read them."""

import hashlib
import json
import struct
import tracemalloc
from copy import deepcopy

from hypothesis import strategies as st

ODD = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 255, 2**31 - 1, 2**31, 2**40, 2**63, 10**40, 0.5, -0.0),
    *(float("nan"), float("inf"), 1e308, "", "keys", "values", "0.keys", "float16", "int8", "no"),
    *([], [0], [1, 2], [[]], {}, {"keys": -2}, {"step": 2**31 - 1}, "\0", "é"),
]
"""JSON values that no field, or hardly one, should have."""
DEEP = "[" * 100_000


def damages(whole):
    """Strategy for bytes like `whole`, but for some of them: flipped, cut off, doubled, new."""
    places = st.integers(0, len(whole) - 1)
    flips = st.lists(st.tuples(places, st.integers(1, 255)), min_size=1, max_size=4)
    return st.one_of(
        flips.map(lambda changes: flipped(whole, changes)),
        places.map(lambda at: whole[:at]),
        st.tuples(places, places).map(lambda span: whole[: span[0]] + whole[span[1] :]),
        st.tuples(places, st.binary(min_size=1, max_size=16)).map(
            lambda new: whole[: new[0]] + new[1] + whole[new[0] + len(new[1]) :]
        ),
    )


def flipped(whole, changes):
    changed = bytearray(whole)
    for at, bits in changes:
        changed[at] ^= bits
    return bytes(changed)


def forgeries(value):
    """Strategy for a function that changes one or two places of a JSON value like `value`."""
    change = st.tuples(
        st.sampled_from(list(places_in(value))),
        st.sampled_from(["set", "drop", "double"]),
        st.sampled_from(ODD),
    )
    return st.lists(change, min_size=1, max_size=2)


def places_in(value, path=()):
    """Yield the path to every value inside of a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs:
        yield (*path, key)
        if isinstance(item, dict | list):
            yield from places_in(item, (*path, key))


def forge(value, changes):
    """Change places of a JSON value, in place; changes that find no place any more are left out."""
    for path, what, chosen in changes:
        try:
            holder = value
            for key in path[:-1]:
                holder = holder[key]
            odd = deepcopy(chosen)  # the next change may be one of its insides
            if what == "drop":
                del holder[path[-1]]
            elif what == "double" and isinstance(holder, list):
                holder.append(holder[path[-1]])
            else:
                holder[path[-1]] = odd
        except (KeyError, IndexError, TypeError):
            continue


def unpacked(whole):
    """Outer header, kvcache's header, and the tensors of a cache file."""
    (size,) = struct.unpack("<Q", whole[:8])
    outer = json.loads(whole[8 : 8 + size])
    return outer, json.loads(outer["__metadata__"]["kvcache"]), whole[8 + size :]


def packed(outer, header, data):
    """A cache file with these parts, and a checksum of the header that is right."""
    text = header if isinstance(header, str) else json.dumps(header)
    seal = hashlib.sha256(text.encode()).hexdigest()
    encoded = json.dumps(outer | {"__metadata__": {"kvcache": text, "kvcache.sha256": seal}})
    return struct.pack("<Q", len(encoded.encode())) + encoded.encode() + data


def peak_of(call):
    """The result of `call`, or the exception that it raised, and the bytes it had at once."""
    tracemalloc.start()
    try:
        result = call()
    except Exception as error:  # noqa: BLE001 - which one is for the caller to judge
        result = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result, peak

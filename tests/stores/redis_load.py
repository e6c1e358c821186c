"""Call one server like a client of many, with values that tell whose they are.

    python redis_load.py URL SEED SECONDS

Makes 60 calls or more, for so many seconds. Prints what went wrong and the number of hits, as JSON.
"""

import json
import random
import sys
import time

from values import is_right, key_of, value_of

from kvcache.stores import Item, Miss, Stored, Unavailable
from kvcache.stores.redis import RedisStore

CHUNK = 1 << 16


def call(store, kind, number):
    """Make one call; return whether its outcome is right, and the outcome."""
    if kind == 0:
        [outcome] = store.delete([key_of(number)])
        return not isinstance(outcome, Unavailable), outcome
    if kind < 4:
        [outcome] = store.put([Item(key_of(number), [value_of(number, 3 * CHUNK + number)])])
        return outcome == Stored(), outcome
    [outcome] = store.get([key_of(number)])
    return outcome == Miss() or is_right(outcome, number), outcome


def main(url, seed, seconds):
    choices, troubles, calls = random.Random(seed), [], 0
    end = time.monotonic() + float(seconds)
    with RedisStore(url, chunk_nbytes=CHUNK) as store:
        while calls < 60 or time.monotonic() < end:
            kind, number = choices.randrange(10), choices.randrange(30)
            fine, outcome = call(store, kind, number)
            calls += 1
            if not fine:
                troubles.append(f"{kind} of {number}: {outcome}")
        print(json.dumps([troubles, store.stats.hits]))


if __name__ == "__main__":
    main(*sys.argv[1:])

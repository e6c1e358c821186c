"""Change one directory from several processes at once, and look at every byte.

    python load.py DIRECTORY PROCESSES CALLS

Prints what is wrong, and nothing if nothing is.
"""

import os
import random
import sys
from pathlib import Path

from values import is_right, item_of, key_of

from kvcache.stores import FileStore, Miss, Refused, Stored, Usage

BUDGET = 200_000
NUMBERS = range(40)


def size_of(number):
    return 2000 + 500 * number


def work(directory, seed, calls):
    """Return what goes wrong in a number of calls."""
    choices, wrong = random.Random(seed), []
    with FileStore(directory, BUDGET) as store:
        for _ in range(calls):
            number = choices.choice(NUMBERS)
            call = choices.randrange(8)
            if call < 3:
                [outcome] = store.put([item_of(number, size_of(number))])
                expected = isinstance(outcome, Stored | Refused)
            elif call == 3:
                [outcome] = store.delete([key_of(number)])
                expected = True
            else:
                [outcome] = store.get([key_of(number)])
                expected = outcome == Miss() or is_right(outcome, number)
            if not expected:
                wrong.append(f"{number}: {outcome}")
        if store.stats.unavailable:
            wrong.append("the store was unavailable")
    return wrong


def nbytes_of(directory):
    """Return the bytes of all values, also of those being written."""
    total = 0
    for folder in ("objects", "partial"):
        for path in (Path(directory) / folder).rglob("*"):
            try:
                total += path.stat().st_size * path.is_file()
            except FileNotFoundError:
                continue
    return total


def main(directory, processes, calls):
    with FileStore(directory, BUDGET) as store:
        store.put([item_of(0)])
    children = []
    for seed in range(processes):
        child = os.fork()
        if not child:
            wrong = work(directory, seed, calls)
            print(*wrong, sep="\n", end="", flush=True)
            os._exit(bool(wrong))
        children.append(child)
    running = set(children)
    with FileStore(directory, BUDGET) as store:
        while running:
            child, status = os.waitpid(-1, os.WNOHANG)
            running.discard(child)
            if child and status:
                print(f"a process ended with {status}")
            if (usage := store.usage()).nbytes > BUDGET:
                print(f"too much: {usage}")
        usage, nbytes = store.usage(), nbytes_of(directory)
    if not isinstance(usage, Usage) or nbytes != usage.nbytes or nbytes > BUDGET:
        print(f"{nbytes} bytes are there, {usage}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

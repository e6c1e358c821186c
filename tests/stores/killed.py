"""Kill writers of one directory at random lines of the code of stores, and look what is left.

    python killed.py DIRECTORY TIMES SEED

Prints what is wrong, and nothing if nothing is.
"""

import os
import random
import signal
import sys
from pathlib import Path

from values import is_right, item_of, key_of

from kvcache.stores import FileStore, Hit, Miss, Usage

BUDGET = 6000
NUMBERS = range(12)
SIZES = {number: 500 + 100 * number for number in NUMBERS}
_STORES = str(Path(sys.modules[FileStore.__module__].__file__).parent)


def changes(store, choices):
    """Put, read and delete, with evictions."""
    for _ in range(6):
        number = choices.choice(NUMBERS)
        call = choices.randrange(5)
        if call == 0:
            store.delete([key_of(number)])
        elif call == 1:
            store.get([key_of(number)])
        else:
            store.put([item_of(number, SIZES[number])])


def work(directory, seed, last_line):
    """Change the store, until the line with that number; return the number of lines."""
    lines = 0

    def trace(frame, event, argument):
        nonlocal lines
        if not frame.f_code.co_filename.startswith(_STORES):
            return None
        if event == "line":
            lines += 1
            if lines == last_line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    with FileStore(directory, BUDGET) as store:
        changes(store, random.Random(seed))
    sys.settrace(None)
    return lines


def fork(directory, seed, last_line):
    child = os.fork()
    if not child:
        work(directory, seed, last_line)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def files_of(directory, folder):
    return [path for path in (Path(directory) / folder).rglob("*") if path.is_file()]


def troubles(directory, store):
    """Return what is wrong with a directory after a writer was killed."""
    wrong = []
    for number in NUMBERS:
        [outcome] = store.get([key_of(number)])
        if outcome != Miss() and not is_right(outcome, number):
            wrong.append(f"{number}: {outcome}")
    usage = store.usage()  # clears up, which reads do not
    files = sum(path.stat().st_size for path in files_of(directory, "objects"))
    partial = sum(path.stat().st_size for path in files_of(directory, "partial"))
    if not isinstance(usage, Usage) or not files + partial <= usage.nbytes <= BUDGET:
        wrong.append(f"{files} + {partial} bytes of {usage}")
    return wrong


def left_over(directory):
    """Return what is left when a writer has looked after those that were killed."""
    with FileStore(directory, BUDGET) as store:
        store.put([item_of(0, SIZES[0])])
        usage = store.usage()
        files = sum(path.stat().st_size for path in files_of(directory, "objects"))
        partials, locks = files_of(directory, "partial"), files_of(directory, "writers")
        hits = sum(isinstance(store.get([entry.key])[0], Hit) for entry in store.entries())
    if partials or len(locks) != 1 or usage.nbytes != files or hits != usage.entries:
        return [f"{partials}, {len(locks)} locks, {files} bytes and {hits} hits of {usage}"]
    return []


def main(directory, times, seed):
    choices = random.Random(seed)
    killed = 0
    for turn in range(times):
        own = random.Random(turn).randrange(10**6)
        # Lines of a run without a kill differ a little, with the state of the directory.
        last_line = choices.randrange(1, 1500)
        killed += fork(directory, own, last_line)
        with FileStore(directory, BUDGET) as store:
            wrong = troubles(directory, store)
        wrong += left_over(directory) if turn % 10 == 9 else []
        if wrong:
            print(f"turn {turn}, killed at line {last_line}:", *wrong, sep="\n  ")
            return
        if len(files_of(directory, "partial")) > 0:
            print(f"turn {turn}: partial files remain")
            return
    if killed < times // 2:
        print(f"only {killed} of {times} were killed")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))

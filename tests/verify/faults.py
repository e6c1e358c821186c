"""Caches with one fault each."""

from .tiny import FULL, KEEP, PAGE, RECURRENT, RING, WINDOW, Full, Recurrent, Ring, Tiny


class PositionOffByOne(Tiny):
    def shift(self, length):
        return 1


class RotationLost(Tiny):
    def shift(self, length):
        return -length


class WindowTooLong(Tiny):
    def ring(self):
        return Ring(self.weights.keep, WINDOW + 1)


class RingRotated(Tiny):
    def restored(self, caches):
        copies = super().restored(caches)
        for cache in copies:
            if isinstance(cache, Ring):
                cache.slots = cache.slots[1:] + cache.slots[:1]
        return copies


class StateOfTheNeighbour(Tiny):
    def stored(self, caches, before):
        return [
            (old if isinstance(cache, Recurrent) else cache).copy()
            for cache, old in zip(caches, before, strict=True)
        ]


class StaleRows(Tiny):
    """A full layer goes on behind the rows of the pass."""

    def undone(self, caches, copies):
        return [
            StaleFull(cache.rows) if isinstance(cache, Full) else copy
            for cache, copy in zip(caches, copies, strict=True)
        ]


class StaleFull(Full):
    def add(self, position, key, value):
        self.rows.append((key, value))


class PageOfAnotherTenant(Tiny):
    """The page of a tenant is found by its number alone, if another one has stored it."""

    def key(self, tenant, ids, page):
        return len(ids) if len(ids) > 4 else (tenant, tuple(ids))


class SaltIgnored(Tiny):
    def key(self, tenant, ids, page):
        return tuple(ids)


class HashWithoutParent(Tiny):
    def key(self, tenant, ids, page):
        return tenant, len(ids), tuple(page)


class SinksDropped(Tiny):
    def visible(self, cache, position, chunked):
        rows = super().visible(cache, position, chunked)
        return rows[KEEP:] if chunked and isinstance(cache, Ring) and position > WINDOW else rows


class RowsSwapped(Tiny):
    """Of equal length."""

    def join(self, conversations):
        first, *_, last = conversations
        if len(first.ids) == len(last.ids):
            first.caches, last.caches = last.caches, first.caches


class ValuesReversedOnReturn(Tiny):
    """The values of the last page are reversed, and its keys are not."""

    def spilled(self, caches):
        copies = super().spilled(caches)
        for cache in copies:
            if isinstance(cache, Full):
                keys, values = zip(*cache.rows[-PAGE:], strict=True)
                cache.rows[-PAGE:] = zip(keys, values[::-1], strict=True)
        return copies


class AnotherPageFromStore(Tiny):
    """The store returns the page put last of all that end there, of whatever tokens."""

    def fetched(self, store, key):
        pages = [page for other, page in store.items() if len(other[1]) == len(key[1])]
        return pages[-1] if key in store else None


FAULTS = {
    "position off by one after a restore": PositionOffByOne(),
    "window one too long": WindowTooLong(),
    "ring restored rotated": RingRotated(),
    "recurrent state of the neighbour position": StateOfTheNeighbour((RECURRENT, FULL)),
    "stale rows after a cancelled pass": StaleRows(),
    "page of another tenant": PageOfAnotherTenant(),
    "salt ignored": SaltIgnored(),
    "rotation lost after a restore": RotationLost((FULL, FULL)),
    "hash without its parent": HashWithoutParent(),
    "sinks dropped in a chunked prefill": SinksDropped((FULL, RING), KEEP),
    "rows of a batch swapped": RowsSwapped(),
    "values reversed on the return from the host": ValuesReversedOnReturn(),
    "another page from the store": AnotherPageFromStore(),
}
RIGHT = {
    "full and ring": Tiny(),
    "ring and sinks": Tiny((RING, FULL), KEEP),
    "recurrent and full": Tiny((RECURRENT, FULL)),
    "full": Tiny((FULL, FULL)),
}

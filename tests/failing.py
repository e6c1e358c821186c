"""A backend that fails at one call: what cannot be provoked with real arrays at will."""

from contextlib import contextmanager

HOOKS = (
    "alloc concat evaluate from_host from_traced_forms read_rows read_slice sync to_host "
    "owned traced_forms write_row_sets write_rows write_slice write_slices"
).split()


class Failing:
    """Counts the calls of the hooks of `backend`, and makes one of them raise before it begins."""

    def __init__(self, backend):
        self.backend = type(backend)(backend.device)
        self.calls, self.at, self.error = 0, None, MemoryError
        for name in HOOKS:
            setattr(self.backend, name, self._counted(getattr(self.backend, name)))

    def _counted(self, hook):
        def call(*arguments, **options):
            self.calls += 1
            if self.calls == self.at:
                raise self.error("injected")
            return hook(*arguments, **options)

        return call

    @contextmanager
    def failing(self, at):
        """Within, the call number `at` raises."""
        self.calls, self.at = 0, at
        try:
            yield
        finally:
            self.at = None

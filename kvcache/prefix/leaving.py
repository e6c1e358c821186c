"""Sessions that are left by an exception: what they computed is kept, and the exception goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable

_logger = logging.getLogger("kvcache.prefix")


def end_after(error: BaseException, end: Callable[[], None]) -> None:
    """End a session that `error` leaves; if that fails, note it at the error, which goes on."""
    try:
        end()
    except Exception as failure:
        error.add_note(
            "What the session had computed was not kept, because that failed as well: "
            f"{type(failure).__name__}: {failure}"
        )
        _logger.warning("a session left by an exception could not be kept", exc_info=failure)

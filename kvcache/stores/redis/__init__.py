"""A store on a Redis or Valkey server, or on a cluster of them.

Needs the client: ``pip install 'kvcache[redis]'``.
"""

try:
    import redis as _client
except ImportError as error:
    raise ImportError(
        "stores on servers need the client redis: pip install 'kvcache[redis]'"
    ) from error

from .store import RedisStore

del _client

__all__ = ["RedisStore"]

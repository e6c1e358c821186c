"""The states of all layers of a model, for plain JAX programs.

::

    states = init(32, batch=2, max_len=4096, kv_heads=8, head_dim=128, dtype="bfloat16")
    states[i], K, V, mask = update(states[i], k, v)         # in the program, in layer i
    step = jax.jit(step, donate_argnums=0)                  # step(states, ...) -> states, ...

A state is a pytree of arrays, a tuple of states is one, too: both go through ``jax.jit``,
``lax.scan``, ``lax.while_loop`` and ``jax.eval_shape``. They are those of
:mod:`kvcache.functional`, whose functions take them as well.

``kinds``     the kinds of layers, and their states without tokens
``steps``     what a program does with the states, of one layer or of all
``rings``     several tokens at once in a ring
"""

from .kinds import Full, Kind, Recurrent, State, States, Window, init
from .steps import advance, layer_of, select, trim, update

__all__ = [
    "Full",
    "Kind",
    "Recurrent",
    "State",
    "States",
    "Window",
    "advance",
    "init",
    "layer_of",
    "select",
    "trim",
    "update",
]

"""Canvases with room: what a network reads of gaps of any length."""

import jax
import jax.numpy as jnp

from nanodlm.types import Objective


class Roomy(Objective):
  """A mixin of objectives whose networks read texts without the room in gaps.

  Room is where a canvas holds its last token, unless that is the mask.
  """

  def room(self, tokens: jax.Array) -> jax.Array:
    """Returns where a canvas [B, L] has room or its end, [B, L] bool."""
    last = tokens[:, -1:]
    return (tokens == last) & (last != self.mask_id)

  def network_input(self, tokens):
    order = jnp.argsort(self.room(tokens), axis=1, stable=True)
    return jnp.take_along_axis(tokens, order, axis=1)

  def places(self, tokens):
    room = self.room(tokens)
    num = jnp.sum(~room, axis=1, keepdims=True)
    return jnp.where(room, num, jnp.cumsum(~room, axis=1) - 1)

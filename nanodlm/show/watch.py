"""Watching a sampler at work: what each call of the network saw and said.

Every sampler asks its network through a `Denoise`. `Watched` stands in for it
and shows each call to a function on the host; no sampler knows whether it is
looked at, and its tokens are the same. `Recorder` is such a function, which
keeps what it is shown as a `Trajectory`.
"""

import dataclasses
from typing import Callable, NamedTuple

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.types import CachedDenoise

# Where the network's input begins before the canvas; see `Asked.start`.
AHEAD = -1


class Asked(NamedTuple):
  """A call of the network that is about to be made, of one device's rows; numpy.

  Attributes:
    first_row: the place in the batch of the first of these rows.
    start: the canvas position of tokens[:, 0]; AHEAD where that is the token
      that an autoregressive network reads before the text.
    tokens: [B, S] int32, the part of the canvas that the network is given.
    positions: [B, K] int32, the canvas positions that it is asked for; none,
      K = 0, where it only reads, for its cache.
  """

  first_row: int
  start: int
  tokens: np.ndarray
  positions: np.ndarray


class Answered(NamedTuple):
  """What it said, right after; numpy.

  Attributes:
    first_row: as in `Asked`.
    positions: [B, K] int32, canvas positions.
    top_tokens: [B, K, A] int32, the most probable tokens there, best first.
    top_probs: [B, K, A] float32, their probabilities: the network's own, before
      temperature, top-k, top-p and guidance.
  """

  first_row: int
  positions: np.ndarray
  top_tokens: np.ndarray
  top_probs: np.ndarray


# Is shown each call, and returns whether to go on (what it returns for an answer
# does not matter). Once it does not, the calls that are left skip the network:
# the sampler ends soon, with tokens that mean nothing.
Watch = Callable[[Asked | Answered], bool]


@dataclasses.dataclass(frozen=True)
class View:
  """Who watches a sampler, and what it is shown.

  Attributes:
    watch: called on the host, for each device in the order of its calls.
    mask_id: the mask's id, which is no alternative.
    num_top: A, the alternatives shown for each position; 0: no `Answered`.
  """

  watch: Watch
  mask_id: int
  num_top: int = 0


@dataclasses.dataclass(frozen=True)
class Watched:
  """A `types.CachedDenoise` that shows its calls.

  Under shard_map: each device shows its own rows, the first of those that
  compute one part of the batch together speaks for all.

  Attributes:
    denoise: the network.
    view: who watches it.
    num_rows: B, of the canvas on this device; a guided call has as many again
      behind them, which are not shown.
    first_row: [] int32, of this device.
    shift: by how many tokens a cached network's input lags behind the canvas.
  """

  denoise: CachedDenoise
  view: View
  num_rows: int
  first_row: jax.Array
  shift: int = 0

  def __call__(self, tokens, level, positions):
    ask = lambda: self.denoise(tokens, level, positions)
    return self._show(ask, lambda logits: logits, tokens, 0, positions)

  def init_cache(self, tokens):
    return self.denoise.init_cache(tokens)

  def advance(self, cache, tokens, start, visible, level=None):
    advance = lambda: self.denoise.advance(cache, tokens, start, visible, level)
    return self._ask(
      advance,
      tokens,
      start - self.shift,
      jnp.zeros((tokens.shape[0], 0), jnp.int32),
    )

  def within(self, cache, tokens, start, level, positions, visible):
    ask = lambda: self.denoise.within(
      cache, tokens, start, level, positions, visible
    )
    return self._show(
      ask, lambda out: out[0], tokens, start - self.shift, start + positions
    )

  def _show(self, ask, logits_of, tokens, start, positions):
    """The output of `ask`, shown before and after; logits_of(output) [B, K, V]."""
    out = self._ask(ask, tokens, start, positions)
    if self.view.num_top:
      rows = slice(self.num_rows)
      mask_id = self.view.mask_id
      log_p = categorical.log_prob(logits_of(out)[rows], mask_id)
      top_log_p, top = jax.lax.top_k(log_p, min(self.view.num_top, mask_id))
      sharding.on_first_device(
        lambda: io_callback(
          self._answered,
          jax.ShapeDtypeStruct((), jnp.int32),
          self.first_row,
          positions[rows],
          top,
          jnp.exp(top_log_p),
        )
      )
    return out

  def _ask(self, ask, tokens, start, positions):
    """The network's output, of `ask`; zeros once the host has had enough."""
    rows = slice(self.num_rows)
    goes_on = sharding.on_first_device(
      lambda: io_callback(
        self._asked,
        jax.ShapeDtypeStruct((), jnp.int32),
        self.first_row,
        jnp.asarray(start, jnp.int32),
        tokens[rows],
        positions[rows],
      )
    )
    return jax.lax.cond(goes_on > 0, ask, lambda: sharding.zeros_like(ask))

  def _asked(self, first_row, start, tokens, positions):
    go_on = self.view.watch(
      Asked(
        int(first_row), int(start), np.asarray(tokens), np.asarray(positions)
      )
    )
    return np.int32(bool(go_on))

  def _answered(self, first_row, positions, top_tokens, top_probs):
    self.view.watch(
      Answered(
        int(first_row), *map(np.asarray, (positions, top_tokens, top_probs))
      )
    )
    return np.int32(1)


class Answer(NamedTuple):
  """What one call said of one row; numpy.

  Attributes:
    positions: [K] int32, canvas positions, each once.
    top_tokens: [K, A] int32, best first.
    top_probs: [K, A] float32.
  """

  positions: np.ndarray
  top_tokens: np.ndarray
  top_probs: np.ndarray


class Trajectory(NamedTuple):
  """How one row of a batch came to be.

  Attributes:
    frames: [F + 1, L] int32, the canvas before each of F calls, and the sample.
    answers: F of them, one for each call; None where the call asked for nothing
      or alternatives were not recorded.
  """

  frames: np.ndarray
  answers: list[Answer | None]

  def changed_at(self) -> np.ndarray:
    """[L] int32, the call that gave each position its last value; -1: none did."""
    changes = self.frames[1:] != self.frames[:-1]
    last = len(changes) - 1 - np.argmax(changes[::-1], axis=0)
    return np.where(changes.any(axis=0), last, -1).astype(np.int32)


class Recorder:
  """A `Watch` that keeps all it is shown.

  Args:
    tokens: [B, L] int32, the canvas, with mask_id in the gaps.
  """

  def __init__(self, tokens: np.ndarray):
    self._canvas = np.array(tokens, np.int32)
    self._frames = [[] for _ in self._canvas]
    self._answers = [[] for _ in self._canvas]

  def __call__(self, event: Asked | Answered) -> bool:
    for i, positions in enumerate(event.positions):
      row = event.first_row + i
      if isinstance(event, Asked):
        paste(self._canvas[row], event.tokens[i], event.start)
        self._frames[row].append(self._canvas[row].copy())
        self._answers[row].append(None)
      else:
        # A row with fewer positions than there are slots asks for some twice.
        positions, first = np.unique(positions, return_index=True)
        self._answers[row][-1] = Answer(
          positions, event.top_tokens[i][first], event.top_probs[i][first]
        )
    return True

  def trajectories(self, samples: np.ndarray) -> list[Trajectory]:
    """The trajectory of each row, given the samples [B, L] that came of it."""
    return [
      Trajectory(np.stack([*frames, np.asarray(sample, np.int32)]), answers)
      for frames, sample, answers in zip(self._frames, samples, self._answers)
    ]


def paste(canvas: np.ndarray, tokens: np.ndarray, start: int):
  """Writes tokens [S] into canvas [L] at `start`, in place; see `Asked.start`.

  What sticks out on either side is left out.
  """
  skipped = max(-start, 0)
  part = tokens[skipped : len(canvas) - start]
  canvas[start + skipped : start + skipped + len(part)] = part

"""Shows the network calls of a sampler to a function on the host.

A sampler calls its network through a `types.CachedDenoise`. `Watched` wraps one
and shows each call; the sampler does not know and its tokens are the same.
`Recorder` keeps what it is shown as a `Trajectory` for each row, `Logprobs` the
log-probabilities of its tokens.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax.experimental import io_callback
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageDraw

from nanodlm.devices import sharding
from nanodlm.noise import categorical
from nanodlm.types import CachedDenoise, Canvas

# Where the input of an autoregressive network starts, see `Asked.start`.
AHEAD = -1
# The number of alternatives to a revealed token, the most of OpenAI's API.
NUM_ALTERNATIVES = 20
# At most this many new tokens of a row are projected again at a time.
_MAX_SLOTS = 16


class Asked(NamedTuple):
  """One device's rows of a network call that is about to be made.

  Attributes:
    first_row: index in the batch of the first of these rows.
    start: [B] int32, canvas positions of tokens[:, 0]; AHEAD if that is the
      token which an autoregressive network reads before the text.
    tokens: [B, S] int32, the part of the canvas that is the network's input.
    positions: [B, K] int32, canvas positions whose output is needed; K = 0 if
      the call only fills the cache.
    num_calls: 2 for a guided call, else 1; see `Samples`.
  """

  first_row: int
  start: np.ndarray
  tokens: np.ndarray
  positions: np.ndarray
  num_calls: int = 1


class Answered(NamedTuple):
  """The output of the call, shown right after it.

  Attributes:
    first_row: see `Asked`.
    positions: [B, K] int32, canvas positions.
    top_tokens: [B, K, A] int32, the most probable tokens, best first.
    top_probs: [B, K, A] float32, their probabilities: the network's own, before
      temperature, top-k, top-p and guidance.
  """

  first_row: int
  positions: np.ndarray
  top_tokens: np.ndarray
  top_probs: np.ndarray


class Revealed(NamedTuple):
  """Log-probabilities of tokens, shown as soon as the sampler has set them.

  They are the network's own, before temperature, top-k, top-p and guidance, in
  the call that set the token: the last after which it did not change, or that
  verified it (see `samplers.speculate`).

  Attributes:
    first_row: see `Asked`.
    positions: [B, K] int32, canvas positions; L in unused slots.
    log_probs: [B, K] float32, those of the tokens on the canvas.
    top_tokens: [B, K, A] int32, the most probable tokens, best first.
    top_log_probs: [B, K, A] float32.
  """

  first_row: int
  positions: np.ndarray
  log_probs: np.ndarray
  top_tokens: np.ndarray
  top_log_probs: np.ndarray


Event = Asked | Answered | Revealed

# Returns whether to continue after an `Asked`. Otherwise the remaining calls
# skip the network, and the sampler soon returns meaningless tokens.
Watch = Callable[[Any], bool]


class Watchers:
  """A `Watch` that forwards to several, which may be replaced."""

  def __init__(self):
    self.those: list[Watch] = []

  def __call__(self, event: Event) -> bool:
    return all([one(event) for one in self.those])


class View(NamedTuple):
  """The function that is shown the calls, and how much it is shown.

  Attributes:
    watch: called on the host, for each device in the order of its calls.
    mask_id: the mask's id, which is never an alternative.
    num_top: A, the number of alternatives per position; 0: no `Answered`.
    reveals: whether each `Revealed` is shown, with NUM_ALTERNATIVES. The hidden
      states of all positions are kept for it, and new tokens projected twice.
  """

  watch: Watch
  mask_id: int
  num_top: int = 0
  reveals: bool = False


class Written(NamedTuple):
  """What a device knows of the tokens of its rows, in references [B, L].

  Attributes:
    canvas: int32, the canvas, as far as it was an input of the network.
    shown: int32, the tokens that were shown as `Revealed`; mask_id if none was.
    is_known: bool, whether there was an output for the position.
    fixed: [B, L] bool, positions of the prompt.
    logits_again: positions [B, K] -> logits [B, K, V] of their last calls.
  """

  canvas: Any
  shown: Any
  is_known: Any
  fixed: jax.Array
  logits_again: Callable[[jax.Array], jax.Array]

  @classmethod
  def make(cls, canvas: Canvas, mask_id: int, logits_again: Any) -> 'Written':
    """Makes the references for a canvas that no call has seen."""
    nothing = canvas.tokens != canvas.tokens
    blank = jnp.where(nothing, canvas.tokens, mask_id)
    tokens, shown, known = map(jax.new_ref, (canvas.tokens, blank, nothing))
    return cls(tokens, shown, known, canvas.fixed, logits_again)


@dataclasses.dataclass(frozen=True)
class Watched:
  """A `types.CachedDenoise` that shows its calls.

  Under shard_map each device shows its own rows; of devices that compute the
  same rows, only the first does.

  Attributes:
    denoise: the network.
    view: what is shown.
    num_rows: B, rows of the canvas on this device. A guided call has as many
      rows again after them, which are not shown.
    first_row: [] int32, index of this device's first row.
    shift: number of tokens by which a cached network's input is delayed.
    written: what `Revealed` needs, or None.
  """

  denoise: CachedDenoise
  view: View
  num_rows: int
  first_row: jax.Array
  shift: int = 0
  written: Written | None = None

  def __call__(self, tokens, level, positions):
    ask = lambda: self.denoise(tokens, level, positions)
    logits = self._ask(ask, tokens, 0, positions, self.calls)
    self._answer(logits, positions)
    return logits

  def recall(self, tokens, level, positions, memory):
    ask = lambda: self.denoise.recall(tokens, level, positions, memory)
    out = self._ask(ask, tokens, 0, positions)
    self._answer(out[0], positions)
    return out

  @property
  def calls(self) -> int:
    return getattr(self.denoise, 'calls', 1)

  @property
  def autoregressive(self) -> 'Watched':
    return dataclasses.replace(
      self, denoise=self.denoise.autoregressive, shift=-AHEAD
    )

  def init_cache(self, tokens):
    return self.denoise.init_cache(tokens)

  def advance(self, cache, tokens, start, visible, level=None):
    ask = lambda: self.denoise.advance(cache, tokens, start, visible, level)
    none = jnp.zeros((tokens.shape[0], 0), jnp.int32)
    return self._ask(ask, tokens, start - self.shift, none)

  def within(self, cache, tokens, start, level, positions, visible):
    ask = lambda: self.denoise.within(
      cache, tokens, start, level, positions, visible
    )
    asked = jnp.full(tokens.shape[:1], start)[:, None] + positions
    out = self._ask(ask, tokens, start - self.shift, asked, self.calls)
    self._answer(out[0], asked)
    if self.written is not None and self.shift:
      # The network did not see these tokens, but drafts may have been shown.
      mask = jnp.full_like(asked, self.view.mask_id)
      self._write(self.written.shown, asked, mask)
    return out

  def finish(self, tokens: jax.Array) -> jax.Array:
    """Shows the last tokens of the samples [B, L], which are returned."""
    start = jnp.zeros_like(tokens[:, 0])
    return self._reveal(tokens, start, _MAX_SLOTS)

  def _write(self, ref, places, values):
    """Writes values [B, S] at places [B, S] that are on the canvas."""
    row = jnp.arange(self.num_rows)[:, None]
    held = ref[...]
    places = jnp.where(places < 0, held.shape[1], places)[: self.num_rows]
    ref[...] = held.at[row, places].set(values[: self.num_rows], mode='drop')

  def _reveal(self, tokens, start, num_slots):
    """Shows what is new in the input [B, S] at `start` [B], which it returns.

    It is projected in up to num_slots positions of each row at a time.
    """
    if self.written is None:
      return tokens
    canvas, shown, is_known, fixed, logits_again = self.written
    mask_id, length = self.view.mask_id, fixed.shape[1]
    self._write(
      canvas, start[:, None] + jnp.arange(tokens.shape[1])[None], tokens
    )
    now, row = canvas[...], jnp.arange(self.num_rows)[:, None]
    is_new = is_known[...] & ~fixed & (now != mask_id) & (now != shown[...])
    shown[...] = jnp.where(is_known[...], now, shown[...])
    num_slots = min(max(num_slots, 1), _MAX_SLOTS, length)

    def show(is_new):
      # The sort is stable: new tokens come first, from left to right.
      places = jnp.argsort(~is_new, axis=1, stable=True)[:, :num_slots]
      logits = logits_again(places)
      log_p = categorical.log_prob(logits, mask_id)
      own = jnp.take_along_axis(log_p, now[row, places][..., None], -1)[..., 0]
      top_log_p, top = jax.lax.top_k(log_p, min(NUM_ALTERNATIVES, mask_id))
      slots = jnp.where(is_new[row, places], places, length)
      done = self._call(Revealed, slots, own, top, top_log_p)
      # Never negative, but what follows has to wait for it.
      return is_new.at[row, places].set(done < 0)

    is_new = jax.lax.while_loop(
      lambda is_new: sharding.on_any_device(jnp.any(is_new)), show, is_new
    )
    return jnp.where(jnp.any(is_new, axis=1, keepdims=True), mask_id, tokens)

  def _answer(self, logits, positions):
    _, mask_id, num_top, _ = self.view
    if self.written is not None:
      is_true = jnp.ones(positions.shape, bool)
      self._write(self.written.is_known, positions, is_true)
    if num_top:
      log_p = categorical.log_prob(logits[: self.num_rows], mask_id)
      top_log_p, top = jax.lax.top_k(log_p, min(num_top, mask_id))
      shown = positions[: self.num_rows], top, jnp.exp(top_log_p)
      self._call(Answered, *shown)

  def _ask(self, ask, tokens, start, positions, calls=1):
    """Returns ask(), or zeros once the host has stopped the sampler."""
    rows = slice(self.num_rows)
    start = jnp.full(tokens.shape[:1], start, jnp.int32)[rows]
    num_calls = jnp.int32(tokens.shape[0] // self.num_rows * calls)
    shown = self._reveal(tokens[rows], start, positions.shape[1])
    go_on = self._call(Asked, start, shown, positions[rows], num_calls)
    return jax.lax.cond(go_on > 0, ask, lambda: sharding.zeros_like(ask))

  def _call(self, event: Callable[..., Event], *values):
    """Returns whether the host wants to continue, [] int32."""

    def show(first_row, *values):
      values = (x if x.ndim else int(x) for x in map(np.asarray, values))
      return np.int32(bool(self.view.watch(event(int(first_row), *values))))

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return sharding.on_first_device(
      lambda: io_callback(show, scalar, self.first_row, *values)
    )


class Answer(NamedTuple):
  """The output of one call for one row.

  Attributes:
    positions: [K] int32, distinct canvas positions.
    top_tokens: [K, A] int32, best first.
    top_probs: [K, A] float32.
  """

  positions: np.ndarray
  top_tokens: np.ndarray
  top_probs: np.ndarray


class Trajectory(NamedTuple):
  """How one row of a batch was made.

  Attributes:
    frames: [F + 1, L] int32, the canvas before each of F calls, and the sample.
    answers: the answers of F calls; None if no output was needed or recorded.
  """

  frames: np.ndarray
  answers: list[Answer | None]

  def changed_at(self) -> np.ndarray:
    """Returns [L] int32, the call that last changed a position, or -1."""
    changes = self.frames[1:] != self.frames[:-1]
    last = len(changes) - 1 - np.argmax(changes[::-1], axis=0)
    return np.where(changes.any(axis=0), last, -1).astype(np.int32)


class Logprobs:
  """Log-probabilities of one row's tokens; see `Revealed`.

  Attributes:
    chosen: [L] float32; NaN for the prompt and what is not set yet.
    top_tokens: [L, A] int32, the most probable tokens, best first.
    top: [L, A] float32, their log-probabilities.
  """

  def __init__(self, length: int):
    self.chosen = np.full(length, np.nan, np.float32)
    self.top_tokens = np.zeros((length, NUM_ALTERNATIVES), np.int32)
    self.top = np.full((length, NUM_ALTERNATIVES), -np.inf, np.float32)

  @staticmethod
  def keep(rows: 'Sequence[Logprobs]', event: Event) -> bool:
    """Adds a `Revealed` to those of all rows of the batch."""
    if isinstance(event, Revealed):
      first_row, *values = event
      for row, places, own, top_tokens, top in zip(rows[first_row:], *values):
        # Slots that are not used, and padding, are after the row.
        is_own = places < len(row.chosen)
        places, num = places[is_own], top.shape[-1]
        row.chosen[places] = own[is_own]
        row.top_tokens[places, :num] = top_tokens[is_own]
        row.top[places, :num] = top[is_own]
    return True


class Recorder:
  """A `Watch` that keeps everything it is shown of the canvases [B, L]."""

  def __init__(self, tokens: np.ndarray):
    self._canvas = np.array(tokens, np.int32)
    self._frames = [[] for _ in self._canvas]
    self._answers = [[] for _ in self._canvas]

  def __call__(self, event: Asked | Answered) -> bool:
    for i, positions in enumerate(event.positions):
      row = event.first_row + i
      if isinstance(event, Asked):
        paste(self._canvas[row], event.tokens[i], event.start[i])
        self._frames[row].append(self._canvas[row].copy())
        self._answers[row].append(None)
      else:
        # Rows with fewer positions than the batch has slots repeat some.
        positions, first = np.unique(positions, return_index=True)
        # A last block may end after the canvas.
        is_inside = positions < len(self._canvas[row])
        positions, first = positions[is_inside], first[is_inside]
        if len(positions):
          self._answers[row][-1] = Answer(
            positions, event.top_tokens[i][first], event.top_probs[i][first]
          )
    return True

  def trajectories(self, samples: np.ndarray) -> list[Trajectory]:
    """Returns the trajectory of each row, which ends with samples [B, L]."""
    return [
      Trajectory(np.stack([*frames, np.asarray(sample, np.int32)]), answers)
      for frames, sample, answers in zip(self._frames, samples, self._answers)
    ]


def paste(canvas: np.ndarray, tokens: np.ndarray, start: int):
  """Writes tokens [S] to canvas [L] from `start`, in place.

  Tokens before and after the canvas are skipped; see `Asked.start`.
  """
  skipped = max(-start, 0)
  part = tokens[skipped : len(canvas) - start]
  canvas[start + skipped : start + skipped + len(part)] = part


# The colors of the first and last call, and of the prompt.
_FIRST, _LAST, _GIVEN = (217, 242, 224), (0, 77, 33), (150, 150, 150)
# In pixels: the least width of an image, the height of a row, a gap, and the
# height of the legend.
_WIDTH, _HEIGHT, _GAP, _LEGEND = 512, 32, 8, 16


def order_image(
  trajectories: Sequence[Trajectory], fixed: np.ndarray
) -> np.ndarray:
  """Draws when each token was last written: rows are samples.

  Returns [H, W, 3] uint8; colors are shares of the number of calls of each
  sample, the prompt, `fixed` [L], is gray, and a legend is below.
  """
  row_width = max(_WIDTH // len(fixed), 1) * len(fixed)
  top = len(trajectories) * (_HEIGHT + _GAP)
  size = (max(row_width, _WIDTH), top + _LEGEND)
  image = PIL.Image.new('RGB', size, 'white')

  def paint(colors: np.ndarray, x: int, y: int, width: int, height: int):
    row = PIL.Image.fromarray(colors[None].round().astype(np.uint8))
    nearest = PIL.Image.Resampling.NEAREST
    image.paste(row.resize((width, height), nearest), (x, y))

  for i, trajectory in enumerate(trajectories):
    last_call = max(len(trajectory.answers) - 1, 1)
    colors = _shade(np.maximum(trajectory.changed_at(), 0) / last_call)
    colors[fixed] = _GIVEN
    paint(colors, 0, i * (_HEIGHT + _GAP), row_width, _HEIGHT)
  paint(_shade(np.linspace(0, 1, 96)), 96, top, 96, _LEGEND)
  paint(np.array([_GIVEN]), 320, top, 24, _LEGEND)
  write = PIL.ImageDraw.Draw(image).text
  for x, text in (0, 'FIRST CALL'), (200, 'LAST CALL'), (352, 'PROMPT'):
    write((x, top), text, 'black', font_size=14)
  return np.array(image)


def _shade(share: np.ndarray) -> np.ndarray:
  """Returns the colors [N, 3] of shares [N] of the calls."""
  return np.outer(1 - share, _FIRST) + np.outer(share, _LAST)

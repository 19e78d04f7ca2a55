"""Exact draws from logits, with temperature, top-k and top-p.

Logits are cast to float32 before normalisation, ids from mask_id on are
excluded before it, and Gumbel noise is drawn with mode='high'. JAX's default
float32 Gumbel noise ends near 16, so that an outcome 16 nats below the best is
never drawn and rare ones too seldom; the same fault in mixtures of float32 and
float64 made published generative perplexities of masked models too good (Zheng
et al., arXiv 2409.02908).
"""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.types import InputError


@dataclasses.dataclass(frozen=True)
class Vocab:
  """The ids on the last axis of logits: all, or this device's share of them.

  The functions below and the objectives use it for reductions over the
  vocabulary, so that one that is split over devices is never gathered.

  Attributes:
    axis: the mesh axis that splits the ids evenly, in order; None: all are
      here.
  """

  axis: str | None = None

  def ids(self, logits: jax.Array) -> jax.Array:
    """Returns the ids of logits [..., V], [1, ..., V] int32."""
    ids = jnp.arange(logits.shape[-1])
    if self.axis is not None:
      ids += jax.lax.axis_index(self.axis) * logits.shape[-1]
    return jnp.expand_dims(ids, range(logits.ndim - 1))

  def sum(self, x: jax.Array) -> jax.Array:
    """Sums x [..., V] over the whole vocabulary, [...]."""
    total = jnp.sum(x, axis=-1)
    return total if self.axis is None else jax.lax.psum(total, self.axis)

  def max(self, x: jax.Array) -> jax.Array:
    """Returns the maximum of x [..., V], [...], without a gradient."""
    best = jax.lax.stop_gradient(jnp.max(x, axis=-1))
    return best if self.axis is None else jax.lax.pmax(best, self.axis)

  def pick(self, x: jax.Array, ids: jax.Array) -> jax.Array:
    """Picks x [..., V] at ids [...] of the whole vocabulary, [...]."""
    # The transpose of a comparison is elementwise and fuses into a softmax's;
    # that of a gather scatters into zeros of the size of x.
    is_it = self.ids(x) == ids[..., None]
    return self.sum(jnp.where(is_it, x, 0.0))


WHOLE = Vocab()

# Finite, so that a row minus itself is not NaN; its exp() is exactly 0.
NEG_INF = -1e30


# A lower temperature has the effect of this one, and does not overflow.
MIN_TEMPERATURE = 1e-20
MAX_TEMPERATURE = 100.0


@dataclasses.dataclass(frozen=True)
class Draw:
  """The settings by which a token is drawn from logits.

  Of equally probable tokens, those with the smallest ids are kept.

  Attributes:
    mask_id: this id and those above it (vocabulary padding) are never drawn.
    temperature: divides the logits, in [0, MAX_TEMPERATURE]; 0 takes the most
      probable token.
    top_k: number of most probable tokens kept; 0: all.
    top_p: the smallest set of tokens at least this probable is kept, at least
      one token; 1: all (nucleus sampling, arXiv 1904.09751).
  """

  mask_id: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    if not 0 <= self.temperature <= MAX_TEMPERATURE:
      raise InputError(
        f'sampler.temperature={self.temperature!r} must be in '
        f'[0, {MAX_TEMPERATURE:g}]'
      )
    if self.top_k < 0:
      raise InputError(f'sampler.top_k={self.top_k!r} must be >= 0 (0: all)')
    if not 0 <= self.top_p <= 1:
      raise InputError(f'sampler.top_p={self.top_p!r} must be in [0, 1]')

  @property
  def is_greedy(self) -> bool:
    """Whether the most probable token is always drawn."""
    return self.temperature == 0 or self.top_k == 1 or self.top_p == 0

  def log_prob(self, logits: jax.Array) -> jax.Array:
    """Returns the log-probabilities of a draw, [..., V] float32."""
    if self.is_greedy:
      return _best(logits, self.mask_id)
    temperature = max(self.temperature, MIN_TEMPERATURE)
    logits = exclude_mask(_float32(logits) / temperature, self.mask_id)
    if not self.top_k and self.top_p == 1:
      return jax.nn.log_softmax(logits)
    top_k = min(self.top_k or self.mask_id, self.mask_id)
    return _keep(logits, top_k, self.top_p)

  def sample(self, keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws one token for each of K positions of each example.

    Args:
      keys: [B], one per example.
      logits: [B, K, V].

    Returns:
      [B, K] int32 ids below mask_id.
    """
    log_p = self.log_prob(logits)
    if self.is_greedy:
      return jnp.argmax(log_p, axis=-1).astype(jnp.int32)
    return jax.vmap(sample_categorical)(keys, log_p)


@dataclasses.dataclass(frozen=True, eq=False)
class RowDraw:
  """A `Draw` with settings per row, [B] arrays, that are not compiled in.

  Each row is drawn as by a `Draw` with its settings.
  """

  mask_id: int
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array

  def log_prob(self, logits: jax.Array) -> jax.Array:
    """Returns the log-probabilities of each row's draw, [B, K, V] float32."""
    temperature, top_k, top_p = (
      x[:, None, None] for x in (self.temperature, self.top_k, self.top_p)
    )
    is_greedy = (temperature == 0) | (top_k == 1) | (top_p == 0)
    best = _best(logits, self.mask_id)
    temperature = jnp.maximum(temperature, MIN_TEMPERATURE)
    logits = exclude_mask(_float32(logits) / temperature, self.mask_id)
    is_cut = ~is_greedy & ((top_k > 0) | (top_p < 1))
    top_k = jnp.where(top_k > 0, top_k, self.mask_id)

    def cut(logits):
      kept = _keep(logits, top_k, top_p)
      return jnp.where(is_cut, kept, jax.nn.log_softmax(logits))

    # Sorting the vocabulary is the expensive part.
    log_p = jax.lax.cond(jnp.any(is_cut), cut, jax.nn.log_softmax, logits)
    return jnp.where(is_greedy, best, log_p)

  def sample(self, keys: jax.Array, logits: jax.Array) -> jax.Array:
    """Draws tokens from logits [B, K, V]; see `Draw.sample`."""
    return jax.vmap(sample_categorical)(keys, self.log_prob(logits))


def _float32(x: jax.Array) -> jax.Array:
  return jnp.asarray(x).astype(jnp.float32)


def _best(logits: jax.Array, mask_id: int) -> jax.Array:
  """Returns 0 for the most probable token, NEG_INF for others, [..., V]."""
  best = jnp.argmax(exclude_mask(logits, mask_id), axis=-1)
  is_best = jax.nn.one_hot(best, logits.shape[-1], dtype=bool)
  return jnp.where(is_best, 0.0, NEG_INF)


def _keep(
  logits: jax.Array, top_k: jax.Array | int, top_p: jax.Array | float
) -> jax.Array:
  """Returns the log-probabilities of the most probable tokens, [..., V].

  Keeps `top_k` >= 1 of them, and of these the smallest set with `top_p` of
  their probability.
  """
  descending = -jnp.sort(-logits, axis=-1)
  rank = WHOLE.ids(logits)
  p = jax.nn.softmax(jnp.where(rank < top_k, descending, NEG_INF))
  # A token is kept if the better ones have less than top_p together; the best
  # always is.
  is_kept = (jnp.cumsum(p, axis=-1) - p < top_p) | (top_p == 1)
  is_kept &= rank < top_k
  num = jnp.maximum(jnp.sum(is_kept, axis=-1, keepdims=True), 1)
  last = jnp.take_along_axis(descending, num - 1, axis=-1)
  is_better, is_last = logits > last, logits == last
  # Some of the tokens that are as probable as the last one.
  num_last = num - jnp.sum(is_better, axis=-1, keepdims=True)
  is_last &= jnp.cumsum(is_last, axis=-1) <= num_last
  return jax.nn.log_softmax(jnp.where(is_better | is_last, logits, NEG_INF))


def exclude_mask(
  logits: jax.Array, mask_id: int, vocab: Vocab = WHOLE
) -> jax.Array:
  """Excludes ids from mask_id on from logits [..., V], cast to float32."""
  return jnp.where(
    vocab.ids(logits) < mask_id, logits.astype(jnp.float32), NEG_INF
  )


def safe_log(p: jax.Array) -> jax.Array:
  """Returns log p, NEG_INF for 0; any shape."""
  return jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), NEG_INF)


def log_prob(
  logits: jax.Array, mask_id: int, vocab: Vocab = WHOLE
) -> jax.Array:
  """Returns the network's own log-probabilities, [..., V] float32."""
  logits = exclude_mask(logits, mask_id, vocab)
  # Shifted first, so that a probability near 1 keeps its distance from 1.
  shifted = logits - vocab.max(logits)[..., None]
  return shifted - jnp.log(vocab.sum(jnp.exp(shifted)))[..., None]


def log_sum_exp(logits: jax.Array, vocab: Vocab = WHOLE) -> jax.Array:
  """Returns log sum_v exp(logits [..., v]), [...]."""
  best = vocab.max(logits)
  return best + jnp.log(vocab.sum(jnp.exp(logits - best[..., None])))


def prob_of(logits: jax.Array, tokens: jax.Array, mask_id: int) -> jax.Array:
  """Returns the probability of tokens [...] under logits [..., V]."""
  log_p = log_prob(logits, mask_id)
  return jnp.exp(jnp.take_along_axis(log_p, tokens[..., None], -1)[..., 0])


def sample_categorical(key: jax.Array, logits: jax.Array) -> jax.Array:
  """Draws one id exactly for each row of [..., V] logits, int32."""
  return jax.random.categorical(
    key, logits.astype(jnp.float32), axis=-1, mode='high'
  ).astype(jnp.int32)


def cross_entropy(
  logits: jax.Array, targets: jax.Array, mask_id: int, vocab: Vocab = WHOLE
) -> tuple[jax.Array, jax.Array]:
  """Computes -log softmax(logits)[target] over the ids below mask_id.

  Args:
    logits: [N, V].
    targets: [N] int32 below mask_id.
    mask_id: this id and those above it are excluded before normalisation.
    vocab: the ids of the logits.

  Returns:
    The cross entropy [N] in nats, and [N] float32, 1 if the target has the
    largest logit, else 0.
  """
  logits = exclude_mask(logits, mask_id, vocab)
  shifted = logits - vocab.max(logits)[:, None]
  target = vocab.pick(shifted, targets)
  log_sum = jnp.log(vocab.sum(jnp.exp(shifted)))
  return log_sum - target, (target >= 0).astype(jnp.float32)

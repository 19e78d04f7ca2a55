"""The protocols that objectives, samplers and their callers agree on."""

import dataclasses
from typing import Any, Callable, NamedTuple, Protocol

import jax


class InputError(ValueError):
  """An error caused by user input: a setting, a file, a prompt, a workdir.

  The message names the key, the value and what is allowed; launch.py prints it
  without a traceback.
  """


class Noised(NamedTuple):
  """One noised batch: what the network sees and what its output is scored on.

  Attributes:
    tokens: [B, L] int32, the network's input.
    t: [B] float32, the time given to a time-conditioned network.
    scored: [B, L] bool, positions with a term in the loss. Only these go
      through the output projection.
    level: [B, L] float32, the noise level at each position, in [0, 1] (masked
      noise: the expected share of masked tokens around it; mixtures: the time);
      used to report the loss by noise level. NaN where the notion does not
      apply.
    fields: pytree of [B, L] arrays that `Objective.terms` needs per position.
    clean: [B, L] int32 or None, the clean text where the network sees it beside
      the noisy one (`Objective.block_size` > 0).
  """

  tokens: jax.Array
  t: jax.Array
  scored: jax.Array
  level: jax.Array
  fields: Any
  clean: jax.Array | None = None


class Terms(NamedTuple):
  """Per-position results of an objective, all [N] float32.

  Attributes:
    loss: what is minimised, nats.
    nll: this position's term of the bound on -log p(x0) (or of the exact
      value), nats; sums over positions, 0 where a position is not scored.
    cross_entropy: -log p(x0) under the network's output, unweighted, nats.
    correct: 1.0 where the clean token has the largest probability.
  """

  loss: jax.Array
  nll: jax.Array
  cross_entropy: jax.Array
  correct: jax.Array


class Objective(Protocol):
  """A training objective: pure functions of arrays, no network, no mesh.

  Objectives inherit it for what those have in common that learn nothing.

  Attributes:
    causal: whether the network must be causal.
    exact: whether `nll` is the exact value, without noise, and not a bound.
    block_size: 0, or S of a network that sees its own block of S noisy tokens
      and the clean blocks before it.
    group_size: examples that share one draw of the noise level; consecutive
      rows of the global batch form a group, so every slice of it (a device's,
      a micro-batch's) must hold whole groups.
    needs_time: whether the network must be time-conditioned.
    num_draws: of the noise, for each example of a training batch.
  """

  causal: bool
  exact: bool
  block_size: int
  group_size: int
  needs_time: bool
  num_draws: int = 1

  def init_params(self) -> dict[str, jax.Array]:
    """What it learns beside the network; by default nothing."""
    return {}

  def bind(self, params: dict[str, jax.Array]) -> 'Objective':
    """The objective with these values of its parameters."""
    del params
    return self

  def noise_surrogate(
    self, noised: Noised, x0: jax.Array, weight: jax.Array, loss: jax.Array
  ) -> jax.Array | float:
    """A term [] whose gradient is the training loss's by the noise's own law.

    Args:
      noised: of the rows, num_draws neighbours for each example.
      x0: [B, L].
      weight: [B, L].
      loss: [B], each row's.
    """
    del noised, x0, weight, loss
    return 0.0

  def sample_levels(
    self, key: jax.Array, batch_size: int, length: int
  ) -> jax.Array:
    """Draws the GLOBAL batch's noise levels, [B, ...] float32 in [0, 1)."""

  def eval_levels(
    self, key: jax.Array, num_draws: int, length: int
  ) -> jax.Array:
    """Draws one example's stratified levels for evaluation, [num_draws, ...]."""

  def corrupt(
    self, keys: jax.Array, levels: jax.Array, x0: jax.Array, weight: jax.Array
  ) -> Noised:
    """Noises x0 [B, L]; keys [B] and levels [B, ...] are each example's own."""

  def terms(self, logits: jax.Array, fields: Any, vocab: Any) -> Terms:
    """Scores logits [N, V] float32 against fields of [N] arrays.

    `vocab`, a `categorical.Vocab`, says which ids the logits are of; sums over
    the vocabulary are its.
    """

  def max_scored(self, batch_size: int, length: int) -> int:
    """A static bound on the scored positions of `batch_size` whole groups."""

  def evaluation(self) -> 'Objective':
    """The form whose mean is reported: no truncation, least variance."""

  def naive(self) -> 'Objective':
    """The bound at independent times: what plain Monte Carlo would do."""

  def network_input(self, tokens: jax.Array) -> jax.Array:
    """Turns a sampler's canvas [B, L] into the network's input [B, L]."""

  def network_time(self, level: jax.Array) -> jax.Array:
    """The time [B] given to the network at a sampler's `level` [B]."""


def sees_right(objective: Objective, length: int) -> bool:
  """Whether a network sees the text behind a gap in a row of `length` tokens."""
  ends_early = 0 < objective.block_size < length
  return not objective.causal and not ends_early


class Canvas(NamedTuple):
  """What a sampler starts from: a blank page, a prompt, or a text with gaps.

  Attributes:
    tokens: [B, L] int32; mask_id wherever `fixed` is False.
    fixed: [B, L] bool, positions the sampler may not touch.
  """

  tokens: jax.Array
  fixed: jax.Array


class Samples(NamedTuple):
  """What a sampler returns.

  Attributes:
    tokens: [B, L] int32 without mask_id.
    num_calls: [] int32, calls of the network, each on the whole batch; a guided
      call, on twice the rows, counts as two.
  """

  tokens: jax.Array
  num_calls: jax.Array


# denoise(tokens [B, L], level [B], positions [B, K]) -> logits [B, K, V] of the
# clean tokens at `positions`: only these go through the output projection.
# `level`, in [0, 1], is for masked noise the expected share of masked tokens in
# the whole row, prompt included, whatever the training's schedule was; for a
# mixture, which has no such share, the time itself. `Objective.network_time`
# turns it into the network's time.
Denoise = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class CachedDenoise(Protocol):
  """A `Denoise` that can also keep keys and values of finished positions."""

  def __call__(
    self, tokens: jax.Array, level: jax.Array, positions: jax.Array
  ) -> jax.Array:
    """See `Denoise`."""

  def init_cache(self, tokens: jax.Array) -> Any:
    """An empty cache for a canvas of the shape of tokens [B, C]."""

  def advance(
    self,
    cache: Any,
    tokens: jax.Array,
    start: jax.Array,
    visible: jax.Array,
    level: jax.Array | None = None,
  ) -> Any:
    """Writes the network's inputs [B, S] at start .. start + S - 1.

    They see each other and the cached positions that `visible` [C] marks.
    """

  def within(
    self,
    cache: Any,
    tokens: jax.Array,
    start: jax.Array,
    level: jax.Array,
    positions: jax.Array,
    visible: jax.Array,
  ) -> tuple[jax.Array, Any]:
    """Logits [B, K, V] at `positions` [B, K] among inputs [B, S] at `start`.

    And the cache as `advance` would leave it.
    """


class Sampler(Protocol):
  """A reverse rule: (key, canvas, denoise) -> samples; pure, jittable.

  Samplers inherit it.
  """

  def with_rule(self, rule: 'ReverseRule') -> 'Sampler':
    """The sampler with the objective as training left it, where it asks for it."""
    del rule
    return self

  def with_draw(self, draw: Any) -> 'Sampler':
    """The sampler with another `categorical.Draw` or `RowDraw`."""
    return dataclasses.replace(self, draw=draw)

  def __call__(
    self, keys: jax.Array, canvas: Canvas, denoise: Denoise
  ) -> Samples:
    """Fills the canvas; keys [B], one per example."""


class ReverseRule(Protocol):
  """How an objective's own noise is undone, step by step; no network.

  Attributes:
    mask_id: the mask's id.
    can_correct: whether the network also predicts tokens that are not masked,
      so that a finished text can be corrected with it.
  """

  mask_id: int
  can_correct: bool

  def sample_prior(self, keys: jax.Array, length: int) -> jax.Array:
    """Draws pure noise, the canvas at t = 1: keys [B] -> [B, length] int32."""

  def level_at(self, t: jax.Array, free_share: jax.Array) -> jax.Array:
    """The `level` [B] of `Denoise` at time t [].

    Args:
      t: [].
      free_share: [B], the share of positions that are not a prompt.
    """

  def reverse(
    self,
    logits: jax.Array,
    xt: jax.Array,
    s: jax.Array,
    t: jax.Array,
    draw: Any,
  ) -> jax.Array:
    """The law of xs given xt, each position's on its own.

    Args:
      logits: [B, L, V], the network's.
      xt: [B, L].
      s: [], the time to go to; at s = 0 no mask_id is left.
      t: [], the time of xt, > s.
      draw: a `categorical.Draw`: temperature, top-k and top-p of the prediction
        of the clean token.

    Returns:
      [B, L, V] float32 log-probabilities.
    """

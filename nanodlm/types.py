"""Interfaces between objectives, networks, samplers and the steps.

To add a method, write one class and list it in one dict, such as
`objectives.OBJECTIVES`, `samplers.SAMPLERS` or `model.NETWORKS`. Facts that
callers need are attributes of the class.

Shapes: B examples, L tokens, K chosen positions, V ids, D hidden width.
"""

import abc
from collections.abc import Callable, Mapping
import dataclasses
import numbers
from typing import Any, NamedTuple, Protocol

import jax
from jax import Array
import jax.numpy as jnp


class InputError(ValueError):
  """An error caused by user input; printed without a traceback.

  The message names the key, its value and the allowed values.
  """


class NoDocumentError(InputError):
  """An error of `Law.posterior`: no document agrees with a text."""


def reason(error: BaseException) -> str:
  """Returns what an error says, which is never empty."""
  return getattr(error, 'strerror', '') or str(error) or type(error).__name__


def check_at_least(bound: int, section: Any, name: str, *keys: str):
  """Raises InputError if an attribute among `keys` is less than the bound.

  `name` is that of the config's section.
  """
  for key in keys:
    value = getattr(section, key)
    if value < bound:
      raise InputError(f'{name}.{key}={value!r} must be >= {bound}')


def check_seed(seed: Any, name: str):
  """Raises InputError unless JAX can use all bits of a seed.

  `name` is that of the key, flag or argument. JAX would use the last 32 bits of
  a larger seed, which then gives the same numbers as a smaller one.
  """
  if not isinstance(seed, numbers.Integral) or not 0 <= int(seed) < 2**32:
    raise InputError(f'{name}={seed!r} must be a whole number in [0, 2^32)')


class Batch(NamedTuple):
  """A batch of texts, as NumPy or JAX arrays.

  Attributes:
    tokens: [B, L] int32.
    eligible: [B, L] bool, tokens to noise and score. The others remain clean
      and do not contribute to the loss.
    weight: [B] float32, factor of each example's loss. It may be negative (an
      advantage) and does not affect the denominator of means.
    num_tokens: [B] int32, denominator of nats per token.
    num_bytes: [B] int32, UTF-8 bytes of the eligible text.
    segment_ids: [B, L] int32 or None; attention is limited to a segment.
    index: [B] int32 or None, position of each example in its split, from which
      evaluation derives the noise. Training uses the row in the global batch.
    law_nats: [B] float32 or None, -log p of each document under the law of its
      source, to which evaluation compares; NaN leaves a document out.
    reports: {name: [B] float32} or None, whose means the objective may report.
  """

  tokens: Any
  eligible: Any
  weight: Any
  num_tokens: Any
  num_bytes: Any
  segment_ids: Any = None
  index: Any = None
  law_nats: Any = None
  reports: Any = None


class SoftTokens(NamedTuple):
  """Mixtures of embeddings, which a network reads instead of tokens.

  Attributes:
    ids: [B, L, K] int32.
    weights: [B, L, K] float32, one for each id.
  """

  ids: Array
  weights: Array


class Noised(NamedTuple):
  """A noised batch: the network's input and the data to score its output.

  Attributes:
    tokens: [B, L] int32, the network's input.
    t: [B] float32, the time given to a time-conditioned network; or [B, n], of
      n equal parts of each row.
    scored: [B, L] bool, positions with a term in the loss. Only these pass
      through the output projection. [2B, L] if the clean copy is scored, too:
      its rows follow, here and in `level` and `fields`.
    level: [B, L] float32 in [0, 1], noise level for reports: the expected share
      of masked tokens for masked noise, the time for mixtures, else NaN.
    fields: pytree of [B, L] arrays, the inputs of `Objective.terms`.
    clean: [B, L] int32 or None, the clean copy if the network also reads one;
      see `Objective.clean_input`.
    soft: what the network reads instead of `tokens`; None: the tokens.
    reference: [B, L, D] or None, states of the frozen network
      (`Score.frozen_states`). `Objective.terms` gets their logits [N, V] as the
      field 'reference'; like the network's own, they exist in chunks only.
  """

  tokens: Array
  t: Array
  scored: Array
  level: Array
  fields: Any
  clean: Array | None = None
  soft: SoftTokens | None = None
  reference: Array | None = None


class Terms(NamedTuple):
  """Per-position results of an objective, all [N] float32.

  Attributes:
    loss: the minimised quantity, in nats.
    nll: term of the bound on -log p(x0), or of its exact value, in nats; summed
      over positions. NaN if the objective gives neither.
    cross_entropy: -log p(x0) under the network's output, unweighted, in nats.
    correct: 1.0 if the clean token has the largest probability, else 0.0.
  """

  loss: Array
  nll: Array
  cross_entropy: Array
  correct: Array


class RowSums(NamedTuple):
  """Sums of `Terms` over the positions of each row, all [B] float32.

  `loss`, `nll` and `ar_nll` are weighted. The others are sums over the scored
  positions, of which there are `scored`. `ar_nll` is the exact -log p of a
  block model that also predicts from left to right, None of others.
  """

  loss: Array
  nll: Array
  cross_entropy: Array
  correct: Array
  scored: Array
  ar_nll: Array | None = None


class Scores(NamedTuple):
  """The scores of a batch.

  Attributes:
    total: [] float32, the sum that training minimises; the only differentiable
      output.
    rows: sums over each scored row.
    by_level: sums by noise level, for reports: {name: [NUM_LEVEL_BINS]}.
    losses: [R, L] float32, the weighted loss of each position, 0 if not scored.
    reports: {name: [B]}, whose means over the examples are metrics; or None.
  """

  total: Array
  rows: RowSums
  by_level: dict[str, Array]
  losses: Array
  reports: Any = None


class Score(Protocol):
  """Runs the network on a noised batch and sums the objective's terms.

  Attributes:
    frozen: `TrainState.frozen`.
  """

  @property
  def frozen(self) -> Any: ...

  def __call__(
    self,
    noised: Noised,
    weight: Array,
    of_losses: Callable[[Array], Array] | None = None,
    params: Any = None,
  ) -> Scores:
    """Scores R rows, R = n B; rows n i to n i + n - 1 belong to example i.

    Args:
      noised: the noised rows.
      weight: [R, L] float32, factor of each position's loss; 0 if not eligible.
        Like `noised.scored`, [2R, L] with the clean copy.
      of_losses: maps `Scores.losses` to the minimised value []; None is their
        sum.
      params: used instead of the trained ones, without a gradient, such as
        `frozen`.
    """
    ...

  def frozen_states(self, noised: Noised) -> Array:
    """Returns the states [R, L, D] of the frozen network, without dropout.

    [2R, L, D] if the clean copy is scored.
    """
    ...

  def draw_frozen(self, keys: Array, states: Array, draw: Any) -> Array:
    """Draws a clean token for each of the frozen network's states.

    Args:
      keys: [R], one per row.
      states: [R, L, D], from `frozen_states`.
      draw: a `categorical.Draw`.

    Returns:
      [R, L] int32.
    """
    ...


class Objective(abc.ABC):
  """A training objective, as pure functions of arrays.

  Subclasses are frozen dataclasses. Their fields are `mask_id`, the largest id,
  and keys of `config.objective`. The ids below `mask_id` are the real tokens.

  Attributes:
    mask_id: the mask's id.
    default_sampler: the sampler selected by sampler.name='auto'.
    predicts_masked: whether the network, normalised over the real tokens,
      predicts masked tokens regardless of when they were masked, as the
      samplers of masked noise require.
    causal: whether the network must be causal.
    exact: whether `nll` is exact and free of noise, instead of a bound.
    block_size: number S of noisy tokens in a block, which sees itself and the
      clean blocks before it; 0 without blocks.
    group_size: number of consecutive rows of the global batch that share one
      draw of the noise level. Devices and micro-batches hold whole groups.
    needs_time: whether the network must be time-conditioned.
    can_correct: whether the network also predicts tokens that are not masked,
      so that it can correct a finished text.
    num_alternatives: number of consecutive rows that belong together, as a
      chosen and a rejected text do; the source must have them.
    num_reads: number of rows of training batches that one example becomes.
    batches: where its training batches come from, with train.batches='auto'.
    uses_frozen: whether training needs `TrainState.frozen`; see `init_frozen`.
    round_steps: number of steps after which `renew_frozen` renews it; 0: never.
    noises: allowed values of objective.noise; see `auto_noise`.
    curriculum_steps: number of first steps that train `curriculum`.
    any_length: whether it also models the length of a document. On a canvas,
      the separators that fill it are room, which the network does not read.
    num_training_draws: number of noisy texts that `loss` scores of each text.
    trains_bound: whether the `Terms.nll` of training, if they are not NaN,
      estimate the bound at its own levels; otherwise they are not reported.
  """

  mask_id: int
  default_sampler: str
  predicts_masked: bool = False
  causal: bool = False
  exact: bool = False
  block_size: int = 0
  group_size: int = 1
  needs_time: bool = False
  can_correct: bool = False
  num_alternatives: int = 1
  num_reads: int = 1
  batches: str = 'text'
  uses_frozen: bool = False
  round_steps: int = 0
  noises: tuple[str, ...] = ()
  curriculum_steps: int = 0
  any_length: bool = False
  num_training_draws: int = 1
  trains_bound: bool = True

  @classmethod
  def auto_noise(cls, settings: Mapping[str, Any]) -> str:
    """Returns what objective.noise='auto' is, given the values of fields."""
    return cls.noises[0]

  def loss(
    self, batch: Batch, levels: Array, keys: Array, score: Score
  ) -> Scores:
    """Computes the training loss; by default, scores one noised batch.

    `levels` [B, ...] are from `sample_levels`; `keys` [B] are one per example.
    """
    noised = self.corrupt(keys, levels, batch.tokens, batch.eligible)
    return score(noised, noised.scored * batch.weight[:, None])

  def init_params(self) -> dict[str, Array]:
    """Returns the parameters that the objective itself learns."""
    return {}

  def bind(self, params: dict[str, Array]) -> 'Objective':
    """Returns the objective with the given values of its parameters."""
    return self

  def init_frozen(self, params: Any) -> Any:
    """Returns the first `TrainState.frozen`: copies of the parameters.

    By default, a single one.
    """
    return jax.tree.map(jnp.copy, params)

  def renew_frozen(self, frozen: Any, params: Any) -> Any:
    """Returns `TrainState.frozen` after a round; by default, the parameters."""
    return params

  def at_step(self, step: Array) -> 'Objective':
    """Returns the objective of the training step after `step` steps, [].

    `terms` is that of the objective itself: `Noised.fields` carry what changes.
    """
    return self

  @abc.abstractmethod
  def sample_levels(self, key: Array, batch_size: int, length: int) -> Array:
    """Draws noise levels of the GLOBAL batch, [B, ...] float32 in [0, 1)."""

  def eval_levels(self, key: Array, num_draws: int, length: int) -> Array:
    """Draws stratified levels of one example, [num_draws, ...]."""
    return self.sample_levels(key, num_draws, length)

  @abc.abstractmethod
  def corrupt(
    self, keys: Array, levels: Array, x0: Array, eligible: Array
  ) -> Noised:
    """Noises the eligible tokens of x0 [B, L]; keys [B], levels [B, ...]."""

  @abc.abstractmethod
  def terms(self, logits: Array, fields: Any, vocab: Any) -> Terms:
    """Scores logits [N, V] float32 against fields of [N] arrays.

    `vocab` is a `categorical.Vocab`: the ids of the logits, and reductions over
    the vocabulary.
    """

  def evaluation(self) -> 'Objective':
    """Returns the unbiased form of least variance, used for evaluation."""
    return self

  def naive(self) -> 'Objective':
    """Returns the plain Monte Carlo form, with independent times."""
    return self.evaluation()

  def curriculum(self) -> 'Objective':
    """Returns the objective of the first `curriculum_steps` steps.

    It may noise texts to `SoftTokens`, if curriculum_steps > 0. It has the same
    facts and parameters.

    Raises:
      InputError: it does not fit the vocabulary.
    """
    return self

  def max_scored(self, batch_size: int, length: int) -> int:
    """Returns a static upper bound on the number of scored positions."""
    return batch_size * length

  def network_input(self, tokens: Array) -> Array:
    """Converts a sampler's canvas [B, L] to the network's input [B, L]."""
    return tokens

  def places(self, tokens: Array) -> Array | None:
    """Returns where in its input the network predicts each canvas position.

    [B, L] int32 of a canvas [B, L]; None: at the same position.
    """
    return None

  def clean_input(self, tokens: Array) -> Array | None:
    """Converts clean texts [B, L] to the network's clean copy; None: none.

    If its positions, each of which sees those to its left, also predict the
    text (`autoregressive`), they are that objective's input.
    """
    own = self.autoregressive
    clean = tokens if own is None else own.network_input(tokens)
    return clean if self.block_size else None

  @property
  def of_block(self) -> 'Objective':
    """The objective of a block alone, whose samplers fill it; or this one."""
    return self

  @property
  def autoregressive(self) -> 'Objective | None':
    """The exact likelihood, from left to right, that the network also gives.

    It is scored with `Network.autoregressive`. None if there is none.
    """
    return self if self.causal else None

  def network_time(self, level: Array) -> Array:
    """Converts a sampler's `level` [B] to the network's time [B]."""
    return level

  def unread_keys(self, uses_time: bool) -> frozenset[str]:
    """Returns the names of fields that are ignored, given the others.

    `uses_time` is whether the network or the sampler depends on the time.
    """
    return frozenset()

  def sees_right(self, length: int) -> bool:
    """Returns whether gaps in a row of `length` tokens see the text after."""
    return not self.causal and not 0 < self.block_size < length


class ReverseRule(abc.ABC):
  """A mixin of objectives whose noise samplers can reverse and add again.

  Attributes:
    starts_masked: whether `sample_prior` consists of masks.
  """

  can_correct: bool
  starts_masked: bool = True

  @abc.abstractmethod
  def sample_prior(self, keys: Array, length: int) -> Array:
    """Draws the canvas at t = 1, pure noise: keys [B] -> [B, length] int32."""

  @abc.abstractmethod
  def noise_at(self, t: Array) -> Array:
    """Returns P(a token is not kept until time t), 1 - alpha, as t."""

  @abc.abstractmethod
  def renoise(self, keys: Array, x0: Array, t: Array, where: Array) -> Array:
    """Draws xt ~ q_t(. | x0) at positions `where` [B, L]; keys [B], t []."""

  def level_at(self, t: Array, free_share: Array) -> Array:
    """Returns the `level` [B] of `Denoise` at time t, [] or [B].

    `free_share` [B] is the share of positions outside the prompt.
    """
    return jnp.full(free_share.shape, t)

  @abc.abstractmethod
  def reverse(
    self, logits: Array, xt: Array, s: Array, t: Array, draw
  ) -> Array:
    """Returns log p(xs | xt), independent across positions, [B, L, V].

    Args:
      logits: [B, L, V], the network's output.
      xt: [B, L] int32.
      s: [], time of the result, s < t; at s = 0 no masks remain.
      t: [], time of xt.
      draw: a `categorical.Draw`: temperature, top-k and top-p of the predicted
        clean token.
    """


class InsertRule(abc.ABC):
  """A mixin of objectives whose networks also say what a text lacks."""

  @abc.abstractmethod
  def num_absent(self, logits: Array, t: Array) -> Array:
    """Returns the expected number of tokens that are absent before a token.

    [...] of its logits [..., V] at time t [...].
    """


class Hidden(NamedTuple):
  """A network's output before the projection to the vocabulary.

  Attributes:
    states: [B, L, D], or [N, D] for chosen positions.
    aux_loss: [] float32 or None, added to `Scores.total`, such as a
      load-balancing loss.
  """

  states: Array
  aux_loss: Array | None = None


class Network(abc.ABC):
  """A network with explicit parameters, for any objective.

  `hidden` and `logits` are separate calls, so that only scored or revealed
  positions pass through the V-wide projection. Implementations are frozen
  dataclasses with global sizes, listed in `model.NETWORKS`. Under a mesh, the
  methods run on the part of the parameters that a device holds.

  Attributes:
    vocab_size: number of ids, including the mask.
    shards: a `sharding.Shards`, how the parameters are split over devices.
    has_dropout: whether `hidden` reads `dropout_keys`.
    knows_time: whether the output depends on t.
    num_positions: maximum number of tokens; 0 is unlimited.
    has_cache: whether `init_cache` and `advance` are implemented.
    reads_soft: whether `hidden` supports `soft`.
    self_conditions: whether `hidden` and `advance` read a `condition`, the
      network's own prediction from a call before. Then the network that is
      evaluated, and whose bound is reported, is that of two calls: the first
      without a condition, the second with the mean embedding (`mix`) of the
      first one's prediction. That is a function of the noisy text, too. In
      training, half of the examples take one call.
  """

  vocab_size: int
  shards: Any
  has_dropout: bool = False
  knows_time: bool = False
  num_positions: int = 0
  has_cache: bool = False
  reads_soft: bool = False
  self_conditions: bool = False

  @classmethod
  @abc.abstractmethod
  def make(
    cls,
    section: Any,
    *,
    vocab_size: int,
    objective: Objective,
    shards: Any,
    platform: str = '',
    lora: Any = None,
  ) -> 'Network':
    """Builds the network of an objective; raises InputError.

    `section` and `lora` are mappings with the keys of `config.model` and
    `config.lora`, the latter None without adapters; `platform`, the compilation
    target, is 'cpu', 'gpu', 'tpu' or '' (the default backend).
    """

  def check(self, length: int):
    """Raises InputError if the network does not support `length` tokens."""
    del length  # By default, any length is supported.

  @abc.abstractmethod
  def init_params(self, key: Array) -> Any:
    """Draws the initial parameters, unsplit: a dict of float32 arrays."""

  def split(self, params: Any) -> tuple[Any, Any]:
    """Splits parameters into those that are trained, and the others.

    By default all are trained, and the others None. `state.join` inverts it.
    """
    return params, None

  def merge(self, params: Any) -> Any:
    """Returns the parameters of the same network without `config.lora`."""
    return params

  @abc.abstractmethod
  def hidden(
    self,
    params: Any,
    tokens: Array,
    t: Array,
    *,
    clean: Array | None = None,
    soft: SoftTokens | None = None,
    condition: Array | None = None,
    segment_ids: Array | None = None,
    dropout_keys: Array | None = None,
    seen: Array | None = None,
    positions: Array | None = None,
  ) -> Hidden:
    """Runs the network up to the output projection.

    Args:
      params: parameters from `gather`.
      tokens: [B, L] int32.
      t: [B] float32 in [0, 1], or [B, n] of n equal parts of each row.
      clean: [B, L] int32, the clean copy, at time 0; block diffusion only.
      soft: embedded instead of the tokens; only if `reads_soft`.
      condition: [B, L, E], mean embeddings; None is zeros.
      segment_ids: [B, L] int32; attention is limited to a segment.
      dropout_keys: [B], one per example; None disables dropout.
      seen: [B, L, L] bool, the attention mask; None is the network's own.
      positions: [N] int32 indices into B * L to return, or into 2 * B * L with
        the clean copy after the noisy one; None is all B * L.
    """

  def autoregressive(self) -> 'Network':
    """Returns the network, of the same parameters, of the clean copy alone.

    It is that of `Objective.autoregressive`.
    """
    return self

  @abc.abstractmethod
  def kernel(self, params: Any) -> Any:
    """Returns the projection's parameters, a pytree of [V, ...] arrays."""

  @abc.abstractmethod
  def logits(self, kernel: Any, states: Array) -> Array:
    """Projects states [..., D] with `kernel` to [..., V] float32."""

  def mix(self, params: Any, p: Array) -> Array:
    """Returns mean embeddings [..., E] under p [..., V], of `logits`' ids."""
    raise InputError(f'{type(self).__name__} does not read its own prediction')

  def gather(self, params: Any) -> Any:
    """Gathers split parameters that every call needs; by default, none."""
    return params

  def init_cache(self, batch_size: int, length: int) -> Any:
    """Returns an empty cache of `length` positions."""
    raise InputError(f'{type(self).__name__} does not support a cache')

  def advance(
    self,
    params: Any,
    tokens: Array,
    t: Array,
    start: Array,
    cache: Any,
    visible: Array,
    positions: Array | None = None,
    condition: Array | None = None,
  ) -> tuple[Array, Any]:
    """Runs S consecutive tokens against the cache.

    Args:
      params: parameters from `gather`.
      tokens: [B, S] int32, at positions start to start + S - 1.
      t: [B] float32.
      start: [] int32, position of the first token; or [B], one for each row.
      cache: keys and values of C positions, start + S <= C.
      visible: [C] bool, the cached positions that the tokens attend to; or
        [B, C].
      positions: [N] int32 indices into B * S to return; None is all.
      condition: [B, S, E], as in `hidden`.

    Returns:
      States [B, S, D] or [N, D], and the cache updated with the tokens.
    """
    raise InputError(f'{type(self).__name__} does not support a cache')

  @abc.abstractmethod
  def flops_per_token(self, length: int) -> float:
    """Returns the FLOPs per token of a forward and backward pass."""


class Canvas(NamedTuple):
  """The input of a sampler: blank, a prompt, or a text with gaps.

  Attributes:
    tokens: [B, L] int32; mask_id where `fixed` is False.
    fixed: [B, L] bool, positions that the sampler may not change.
    memory: the first memory of `CachedDenoise.recall`, for a sampler that
      `remembers`; None: predictions are not remembered.
    segment_ids: [B, L] int32, as in `Network.hidden`; samplers do not read
      them. None: one segment.
  """

  tokens: Any
  fixed: Any
  memory: Any = None
  segment_ids: Any = None


class Samples(NamedTuple):
  """The output of a sampler.

  Attributes:
    tokens: [B, L] int32 without mask_id.
    num_calls: [] int32, network calls on the whole batch. A guided call, which
      has twice the rows, counts as two, as does a prediction that takes two
      (`CachedDenoise.calls`).
  """

  tokens: Any
  num_calls: Any


# denoise(tokens [B, L], level [B], positions [B, K]) -> logits [B, K, V] of the
# clean tokens at `positions`. `level` is in [0, 1]: for masked noise, on any
# schedule, the expected share of masked tokens in the whole row, prompt
# included; for mixtures, the time. `Objective.network_time` converts it.
Denoise = Callable[[Array, Array, Array], Array]


class CachedDenoise(Protocol):
  """A `Denoise` that can also cache keys and values.

  Attributes:
    autoregressive: the network's own autoregressive law, if it has one
      (`Objective.autoregressive`), with the same cache. The input at a position
      is the token before it: `tokens` of `advance` and `within` are those from
      `start` - 1 on, or mask_id before the text.
    calls: network calls of a prediction that does not remember: 2 of a network
      that self-conditions, else 1.
  """

  @property
  def calls(self) -> int: ...

  @property
  def autoregressive(self) -> 'CachedDenoise': ...

  def __call__(self, tokens: Array, level: Array, positions: Array) -> Array:
    """Returns logits [B, K, V]; see `Denoise`."""
    ...

  def recall(
    self, tokens: Array, level: Array, positions: Array, memory: Any
  ) -> tuple[Array, Any]:
    """Returns logits [B, K, V], and what to remember of the call.

    For networks that self-condition. The condition is `memory`, the prediction
    of the call before, where a plain call takes two: of the same canvas, first
    without a condition.
    """
    ...

  def init_cache(self, tokens: Array) -> Any:
    """Returns an empty cache for a canvas with the shape of tokens [B, C]."""

  def advance(
    self,
    cache: Any,
    tokens: Array,
    start: Array | int,
    visible: Array,
    level: Array | None = None,
  ) -> Any:
    """Caches inputs [B, S] of the network at start .. start + S - 1.

    They attend to each other and to the cached positions in `visible` [C] bool.
    Each row can have its own `start` [B] and `visible` [B, C].
    """

  def within(
    self,
    cache: Any,
    tokens: Array,
    start: Array | int,
    level: Array,
    positions: Array,
    visible: Array,
  ) -> tuple[Array, Any]:
    """Returns logits [B, K, V] at `positions` [B, K], and the cache.

    Other arguments are as in `advance`; `positions` are relative to `start`.
    """
    ...


class Sampler(abc.ABC):
  """A sampler, (keys, canvas, denoise) -> samples; pure and jittable.

  Subclasses are frozen dataclasses whose fields are keys of `config.sampler`,
  except for those supplied by the run: `draw` (a `categorical.Draw`),
  `schedule`, `mask_id`, `rule` (the objective), `inner` (the sampler of a
  block), `block_size` and `eos_ids` (see `samplers.reveal.end_texts`).

  Attributes:
    fills_blocks: whether it can be the `inner` sampler of another sampler, if
      it fits `Objective.of_block`.
    can_be_guided: whether sampler.guidance applies, which replaces the prompt
      with masks.
    is_final: whether revealed tokens never change.
    reads_masks: whether its network expects masks among the tokens, as after
      the end of a text that ends within a block.
    caches_noise: whether it caches keys and values of unfinished tokens.
    needs_cache: whether it uses a cache, which not every network has
      (`Network.has_cache`).
    remembers: whether it gives a network that self-conditions its previous
      prediction (`Canvas.memory`). The prediction is that of an earlier canvas,
      so that the law is not that of the bound's network, which takes two calls.
    fills_masks: whether it fills gaps of a given number of tokens, the masks of
      a canvas.
    fills_room: whether it fills gaps of any length, the free positions of a
      canvas that hold the last token of their row (`Objective.any_length`).
    needs: the settings without which it does not fit, for errors; '' if the
      name of the objective says it.
  """

  fills_blocks: bool = False
  can_be_guided: bool = False
  is_final: bool = False
  reads_masks: bool = False
  caches_noise: bool = False
  needs_cache: bool = False
  remembers: bool = False
  fills_masks: bool = True
  fills_room: bool = False
  needs: str = ''

  @classmethod
  @abc.abstractmethod
  def fits(cls, objective: Objective) -> bool:
    """Returns whether the sampler supports networks of the objective."""

  def num_blocks(self, length: int) -> int:
    """Returns how many times num_steps steps fill `length` positions."""
    return 1

  def with_rule(self, rule: Any) -> 'Sampler':
    """Returns the sampler with the objective's learned parameters."""
    return self

  def with_draw(self, draw: Any) -> 'Sampler':
    """Returns the sampler with another `categorical.Draw` or `RowDraw`."""
    return dataclasses.replace(self, draw=draw)  # pyright: ignore

  def unread_keys(self) -> frozenset[str]:
    """Returns the names of fields that are ignored, given the others."""
    return frozenset()

  @abc.abstractmethod
  def __call__(self, keys: Array, canvas: Canvas, denoise: Any) -> Samples:
    """Fills the canvas; keys [B]."""


class Batches(abc.ABC):
  """A source of training batches: text, or rollouts of the current model.

  Args:
    run: the `run.Run`.
    packed: the training text.
    start_step: the first step.
  """

  @abc.abstractmethod
  def __init__(self, run: Any, packed: Any, start_step: int):
    pass

  @classmethod
  def check(cls, run: Any):
    """Raises InputError unless a run can learn from these batches."""
    del run  # By default, any can.

  @abc.abstractmethod
  def __call__(self, state: Any, step: int) -> Batch:
    """Returns the global batch of a step, on the devices.

    Args:
      state: the `TrainState` before the step.
      step: number of steps taken. The batch must depend on (state, step) alone,
        so that a resumed run repeats it.
    """


@dataclasses.dataclass(frozen=True)
class Posterior:
  """The law of what fills the gaps of a text.

  Attributes:
    log_prob: log-probability that a document agrees with the text, in nats.
    fills: probability of each possible filling, one word per gap.
  """

  log_prob: float
  fills: Mapping[tuple[str, ...], float]

  def marginals(self) -> list[dict[str, float]]:
    """Returns the probability of each word of each gap, likeliest first."""
    num_gaps = len(next(iter(self.fills)))
    sums: list[dict[str, float]] = [{} for _ in range(num_gaps)]
    for words, probability in self.fills.items():
      for of_gap, word in zip(sums, words):
        of_gap[word] = of_gap.get(word, 0.0) + probability
    return [
      dict(sorted(of_gap.items(), key=lambda item: -item[1])) for of_gap in sums
    ]


class Law(abc.ABC):
  """The distribution of a source's documents, if it is known exactly.

  Attributes:
    gap: stands for one unknown word in a text given to `posterior`.
  """

  gap: str = '{}'

  @abc.abstractmethod
  def sample(self, seed: int, i: int) -> str:
    """Returns the i-th document of a seed."""

  @abc.abstractmethod
  def log_prob(self, text: str) -> float:
    """Returns the log-probability of a document in nats; -inf if impossible."""

  @abc.abstractmethod
  def explain(self, text: str) -> str | None:
    """Returns the first impossible word of a text and what could be there.

    None if the text is possible.
    """

  @abc.abstractmethod
  def entropy(self, num_samples: int, seed: int = 0) -> tuple[float, float]:
    """Returns the entropy, nats per document, and half its 95% interval."""

  @abc.abstractmethod
  def features(self, text: str) -> frozenset[str]:
    """Returns the features that a text has, by which samples are compared.

    Any text has features, also one that is impossible.
    """

  @abc.abstractmethod
  def num_words(self, text: str) -> int:
    """Returns how many gaps would hide a document, with its stops."""

  @abc.abstractmethod
  def words(self, text: str) -> list[tuple[int, int]]:
    """Returns where the words of a document are that can become gaps.

    Each is [start, stop) in characters.
    """

  @abc.abstractmethod
  def posterior(self, text: str, max_visited: int = 0) -> Posterior:
    """Returns the law of the words in the gaps (a word each) of a text.

    Of beginnings of documents it visits up to `max_visited`; 0: the law's own
    limit.

    Raises:
      NoDocumentError: no document agrees with the text.
      InputError: too many do.
    """

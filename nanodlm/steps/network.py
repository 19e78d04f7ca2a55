"""The network as steps call it: to score noised texts and denoise canvases."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.devices import mesh as meshes
from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import losses
from nanodlm.noise import categorical
from nanodlm.training import state as states
from nanodlm.types import (
  InputError,
  Network,
  Noised,
  Objective,
  RowSums,
  Score,
  Scores,
)

NUM_LEVEL_BINS = 10
# Positions whose prediction becomes a mean embedding at once.
CONDITION_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class Scorer:
  """A network and the objective that scores its output.

  Attributes:
    network: the network.
    objective: the objective.
    chunk_size: number of positions per call of the output projection.
    restarts: whether autoregressive input has the start symbol at the beginning
      of each segment, instead of the last token of the one before.
  """

  network: Network
  objective: Objective
  chunk_size: int
  restarts: bool = False

  @property
  def shards(self) -> Shards:
    """How the parameters are split over devices."""
    return self.network.shards

  def autoregressive(self) -> 'Scorer | None':
    """Returns what scores the likelihood that a block model also gives."""
    own = self.objective.autoregressive
    if own is None or self.objective.exact:
      return None
    network = self.network.autoregressive()
    return dataclasses.replace(self, network=network, objective=own)

  def init_params(self, key: jax.Array) -> Any:
    """Draws the initial parameters, unsplit."""
    return states.init_params(self.network, self.objective, key)

  def specs(self) -> Any:
    """Returns the partition of each parameter on the mesh, a pytree."""
    shapes = jax.eval_shape(lambda: self.init_params(jax.random.key(0)))
    return sharding.specs(shapes, self.shards)

  def scoring(
    self,
    params: Any,
    frozen: Any = None,
    base: Any = None,
    *,
    segment_ids: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    seen: jax.Array | None = None,
    is_conditioned: jax.Array | None = None,
  ) -> Score:
    """Returns the `types.Score` of B examples with the given parameters.

    `params`, `frozen` and `base` (of `TrainState`) are this device's part;
    `is_conditioned` [B] says which rows of a network that self-conditions take
    two calls, None: all. The other arguments are those of `Network.hidden`.
    """
    given = (segment_ids, dropout_keys, seen, is_conditioned)
    return _Scoring(self, params, frozen, base, given)

  def _caller(self, params, noised, segment_ids, seen, is_conditioned) -> Any:
    """Returns `Network.hidden` of a batch, after the first call of two."""
    tokens, clean = noised.tokens, noised.clean
    if self.restarts and segment_ids is not None:
      before = jnp.pad(segment_ids[:, :-1], ((0, 0), (1, 0)))
      is_first = segment_ids != before
      start = lambda x: jnp.where(is_first, self.objective.mask_id, x)
      if self.objective.causal:
        tokens = start(tokens)
      elif self.objective.autoregressive is not None:
        clean = start(clean)
    hidden = functools.partial(
      self.network.hidden,
      tokens=tokens,
      t=noised.t,
      clean=clean,
      soft=noised.soft,
      segment_ids=segment_ids,
      seen=seen,
    )
    condition = None
    if self.network.self_conditions:
      fixed = jax.lax.stop_gradient(params)
      condition = mean_embedding(
        self.network, fixed, hidden(fixed).states, self.objective.mask_id
      )
      if is_conditioned is not None:
        condition = jnp.where(is_conditioned[:, None, None], condition, 0.0)
    return functools.partial(hidden, params, condition=condition)

  def _score(self, params, frozen, noised, weight, of_losses, given) -> Scores:
    segment_ids, dropout_keys, seen, is_conditioned = given
    num_rows, length = noised.tokens.shape
    batch = len(noised.scored)  # Twice num_rows if the clean copy is scored.
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    capacity = self.objective.max_scored(num_rows, length)
    capacity += (batch - num_rows) * length
    if capacity != num_rows * length:
      positions, is_real = losses.gather_scored(noised.scored, capacity)
      take = lambda x: flat(x)[positions]
      row = positions // length
    else:
      positions, is_real = None, flat(noised.scored)
      take = flat
      row = jnp.arange(batch * length) // length
    params = self.network.gather(params)
    call = self._caller(params, noised, segment_ids, seen, is_conditioned)
    hidden = call(dropout_keys=dropout_keys, positions=positions)
    states = hidden.states.reshape(-1, hidden.states.shape[-1])
    states = sharding.split(states, self.shards)
    weight = jnp.where(is_real, take(weight), 0.0)
    vocab = _vocab(self.shards)
    fields = jax.tree.map(take, noised.fields)
    reference = None
    if noised.reference is not None:
      kernel = self.network.kernel(self.network.gather(frozen))
      reference = kernel, take(noised.reference)
    per_row = lambda x: jax.ops.segment_sum(x, row, batch)

    def by_position(x):
      if positions is None:
        return x.reshape(batch, length)
      # What fills the static number of positions has weight 0.
      whole = jnp.zeros(batch * length).at[positions].add(x)
      return whole.reshape(batch, length)

    def project(weight) -> Any:
      return losses.projected_terms(
        self.network.logits,
        lambda logits, learned, fields: self.objective.bind(learned).terms(
          logits, fields, vocab
        ),
        self.chunk_size,
        self.network.kernel(params),
        params.get('objective', {}),
        states,
        fields,
        weight,
        reference,
      )

    if of_losses is None:
      total, terms = project(weight)
      loss = per_row(terms.loss * weight)
    else:
      # The first pass computes the losses, without a gradient. The second
      # weights each of them by the derivative with respect to it, so that the
      # gradient of `total` is that of `value`.
      _, terms = jax.lax.stop_gradient(project(weight))
      value, slope = jax.value_and_grad(of_losses)(
        by_position(terms.loss * weight)
      )
      total, _ = project(weight * jax.lax.stop_gradient(take(slope)))
      total += jax.lax.stop_gradient(value - total)
      loss = jnp.full((batch,), 1 / batch) * value
    if hidden.aux_loss is not None:
      total += hidden.aux_loss
    counted = (weight > 0).astype(jnp.float32)
    cross_entropy = terms.cross_entropy * counted
    rows = RowSums(
      loss=loss,
      nll=per_row(terms.nll * weight),
      cross_entropy=per_row(cross_entropy),
      correct=per_row(terms.correct * counted),
      scored=per_row(counted),
    )
    return Scores(
      total,
      rows,
      _level_sums(take(noised.level), cross_entropy, counted),
      by_position(terms.loss * weight),
    )


@dataclasses.dataclass(frozen=True)
class _Scoring:
  """A `types.Score`; the attributes are the arguments of `Scorer.scoring`."""

  scorer: Scorer
  params: Any
  frozen: Any
  base: Any
  given: tuple[Any, Any, Any, Any]

  def _options(self, noised: Noised) -> Any:
    """Returns what is given for B examples, repeated for R rows."""

    def repeat(x):
      num = len(noised.tokens) // len(x)
      return x if num == 1 else jnp.repeat(x, num, axis=0)

    return jax.tree.map(repeat, self.given)

  def __call__(
    self,
    noised: Noised,
    weight: jax.Array,
    of_losses: Callable[[jax.Array], jax.Array] | None = None,
    params: Any = None,
  ) -> Scores:
    given, score = self._options(noised), self.scorer._score
    if params is not None:
      params = states.join(params, self.base)
      scores: Any = score(params, None, noised, weight, None, given)
      return jax.lax.stop_gradient(scores)
    frozen = None
    if noised.reference is not None:
      frozen = states.join(self.frozen, self.base)
    return score(self.params, frozen, noised, weight, of_losses, given)

  def _gather_frozen(self) -> Any:
    whole = states.join(self.frozen, self.base)
    return self.scorer.network.gather(whole)

  def frozen_states(self, noised: Noised) -> jax.Array:
    params = self._gather_frozen()
    segment_ids, _, seen, _ = self._options(noised)
    call = self.scorer._caller(params, noised, segment_ids, seen, None)
    if len(noised.scored) == len(noised.tokens):
      return call().states
    states = call(positions=jnp.arange(noised.scored.size)).states
    return states.reshape(*noised.scored.shape, -1)

  def draw_frozen(
    self, keys: jax.Array, states: jax.Array, draw: categorical.Draw
  ) -> jax.Array:
    network = self.scorer.network
    kernel = network.kernel(self._gather_frozen())

    def of_row(row):  # Logits of all rows at once would be large.
      key, states = row
      logits = _whole_logits(network, kernel, states[None])
      return draw.sample(key[None], logits)[0]

    num_rows = max(self.scorer.chunk_size // states.shape[1], 1)
    return jax.lax.map(of_row, (keys, states), batch_size=num_rows)


def _whole_logits(network: Network, kernel: Any, states: Any) -> jax.Array:
  """Projects states [..., D] to the logits of all ids, without padding."""
  logits = network.logits(kernel, states)
  logits = sharding.concatenate(logits, network.shards)
  # Padding is removed, since draws depend on the number of outcomes.
  return logits[..., : network.vocab_size]


def _level_sums(level, cross_entropy, counted):
  """Sums terms [N] by noise level [N]; returns [NUM_LEVEL_BINS] each."""
  level_bin = (level * NUM_LEVEL_BINS).astype(jnp.int32)
  in_bin = jax.nn.one_hot(
    jnp.clip(level_bin, 0, NUM_LEVEL_BINS - 1), NUM_LEVEL_BINS
  )
  in_bin = jnp.where(jnp.isnan(level)[:, None], 0.0, in_bin)
  return {
    'bin_cross_entropy': cross_entropy @ in_bin,
    'bin_scored': counted @ in_bin,
  }


def mean_embedding(
  network: Network, params: Any, states: jax.Array, mask_id: int
) -> jax.Array:
  """Returns the mean embedding of the tokens that states [B, L, D] predict.

  Without a gradient: [B, L, E] float32.
  """
  kernel = network.kernel(params)
  vocab = _vocab(network.shards)

  def of_position(state):
    logits = network.logits(kernel, sharding.split(state, network.shards))
    p = jnp.exp(categorical.log_prob(logits, mask_id, vocab))
    return network.mix(params, p)

  flat = states.reshape(-1, states.shape[-1])
  rows = jax.lax.map(of_position, flat, batch_size=CONDITION_CHUNK)
  rows = rows.reshape(*states.shape[:-1], -1).astype(jnp.float32)
  return jax.lax.stop_gradient(rows)


def _vocab(shards: Shards) -> categorical.Vocab:
  return categorical.Vocab(sharding.TENSOR if shards.tensor > 1 else None)


def _take(x: jax.Array, places: jax.Array) -> jax.Array:
  """Returns x [B, L, D] at places [B, K] of each row, [B, K, D]."""
  return jnp.take_along_axis(x, places[..., None], axis=1)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A `types.CachedDenoise` that calls a network.

  For block diffusion, the plain call uses the canvas as both the noisy and the
  clean text, which is correct for a block after finished blocks.

  Attributes:
    network: the network.
    objective: the objective that trained it.
    params: its parameters, from `Network.gather`.
    segment_ids: [B, L] int32 or None, segments of the plain call.
    states: a reference to the states [B, L, D] of the last call at each canvas
      position, for `logits_again`; None: they are not kept.
  """

  network: Network
  objective: Objective
  params: Any
  segment_ids: jax.Array | None = None
  states: Any = None

  @property
  def calls(self) -> int:
    return 2 if self.network.self_conditions else 1

  def __call__(self, tokens, level, positions):
    condition = self._condition(lambda: self._hidden(tokens, level))
    wanted = _flat(self._in_input(tokens, positions), tokens.shape[1])
    states = self._hidden(tokens, level, condition, wanted)
    return self._logits(states, positions)

  def _in_input(self, tokens, positions):
    """Converts canvas positions [B, K] to those of the network's input."""
    places = self.objective.places(tokens)
    if places is None:
      return positions
    return jnp.take_along_axis(places, positions, axis=1)

  def init_memory(self, tokens):
    """Returns the first memory of `recall` for tokens [B, L], zeros."""
    level, positions = jnp.zeros(tokens.shape[:1]), tokens[:, :1]
    return sharding.zeros_like(
      lambda: self.recall(tokens, level, positions, None)[1]
    )

  def recall(self, tokens, level, positions, memory):
    # The memory has the order of the canvas: that of the input changes.
    places = self.objective.places(tokens)
    if places is not None and memory is not None:
      memory = _take(memory, jnp.argsort(places, axis=1, stable=True))
    states = self._hidden(tokens, level, memory)
    chosen = _take(states, self._in_input(tokens, positions))
    memory = self._condition(lambda: states)
    if places is not None and memory is not None:
      memory = _take(memory, places)
    return self._logits(chosen, positions), memory

  def _hidden(self, tokens, level, condition=None, positions=None):
    segment_ids = self.segment_ids
    if segment_ids is not None:  # A guided call repeats the rows.
      segment_ids = jnp.tile(segment_ids, (len(tokens) // len(segment_ids), 1))
    return self.network.hidden(
      self.params,
      self.objective.network_input(tokens),
      self.objective.network_time(level),
      clean=self.objective.clean_input(tokens),
      condition=condition,
      segment_ids=segment_ids,
      positions=positions,
    ).states

  def _condition(self, call):
    """Returns what `call`() -> states [B, S, D] predicts; None: not used."""
    if not self.network.self_conditions:
      return None
    return mean_embedding(
      self.network, self.params, call(), self.objective.mask_id
    )

  @property
  def autoregressive(self) -> 'Denoiser':
    network, own = self.network.autoregressive(), self.objective.autoregressive
    return dataclasses.replace(self, network=network, objective=own)  # pyright: ignore

  @property
  def _has_start(self) -> bool:
    """Whether a start symbol is before the clean tokens of block diffusion."""
    own = self.objective
    return own.block_size > 0 and own.autoregressive is not None

  def init_cache(self, tokens):
    cache = self.network.init_cache(*tokens.shape)
    # Loops under shard_map require a cache that varies over devices as the
    # tokens and heads do.
    zero = sharding.split(jnp.zeros_like(tokens[0, 0]), self.network.shards)
    cache = jax.tree.map(lambda x: x + zero.astype(x.dtype), cache)
    if self._has_start:
      start = jnp.full_like(tokens[:, :1], self.objective.mask_id)
      nothing = jnp.zeros(tokens.shape[1], bool)
      cache = self.autoregressive.advance(cache, start, 0, nothing)
    return cache

  def _places(self, visible):
    """Converts clean tokens to their places in the cache, [..., C] bool."""
    if not self._has_start:
      return visible
    start = jnp.ones_like(visible[..., :1])
    return jnp.concatenate([start, visible[..., :-1]], axis=-1)

  def advance(self, cache, tokens, start, visible, level=None):
    if self._has_start:
      start, visible = start + 1, self._places(visible)
      return self.autoregressive.advance(cache, tokens, start, visible)
    return self._advance(cache, tokens, start, visible, level, None)[1]

  def within(self, cache, tokens, start, level, positions, visible):
    wanted = _flat(positions, tokens.shape[1])
    call = functools.partial(
      self._advance, cache, tokens, start, self._places(visible), level
    )
    condition = self._condition(lambda: call(None)[0])
    states, cache = call(wanted, condition)
    places = jnp.reshape(start, (-1, 1)) + positions
    return self._logits(states, places), cache

  def _advance(
    self, cache, tokens, start, visible, level, positions, condition=None
  ):
    if level is None:  # Clean tokens.
      time = jnp.zeros((tokens.shape[0],))
    else:
      time = self.objective.network_time(level)
    return self.network.advance(
      self.params, tokens, time, start, cache, visible, positions, condition
    )

  def keep_states(self, tokens) -> 'Denoiser':
    """Returns the denoiser of canvases [B, L] that keeps its `states`."""
    level = jnp.zeros(tokens.shape[:1])
    # Samplers extend a canvas to whole blocks.
    room = -tokens.shape[1] % (self.objective.block_size or 1)
    tokens = jnp.pad(tokens, ((0, 0), (0, room)))
    blank = sharding.zeros_like(lambda: self._hidden(tokens, level))
    return dataclasses.replace(self, states=jax.new_ref(blank))

  def logits_again(self, places):
    """Returns the logits [B, K, V] of the last calls at canvas positions."""
    states = _take(self.states[...], places)
    return self._project(states).reshape(*places.shape, -1)

  def _project(self, states):
    kernel = self.network.kernel(self.params)
    return _whole_logits(self.network, kernel, states)

  def _logits(self, states, places):
    if self.states is not None:
      held = self.states[...]
      own = places[: len(held)]  # The other rows are those of a guided call.
      row = jnp.arange(len(held))[:, None]
      new = states.reshape(*places.shape, -1)[: len(held)]
      self.states[...] = held.at[row, own].set(new, mode='drop')
    return self._project(states).reshape(*places.shape, -1)


def _flat(positions: jax.Array, length: int) -> jax.Array:
  """Converts indices into rows, [B, K], to indices into B * length, [B * K]."""
  row = jnp.arange(positions.shape[0])[:, None]
  return (row * length + positions).reshape(-1)


def bind(objective: Objective, params: Any) -> Objective:
  """Returns the objective with its own entry of all parameters."""
  return objective.bind(params.get('objective', {}))


def row_index(num_rows: int) -> jax.Array:
  """Returns the global indices [num_rows] of this device's rows."""
  shard = jax.lax.axis_index(meshes.BATCH_AXES)
  return shard * num_rows + jnp.arange(num_rows)


def fold_in_each(key: jax.Array, index: jax.Array) -> jax.Array:
  """Returns fold_in(key, i) for each i in index [N], [N] keys."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def check_batch_size(
  batch_size: int,
  mesh: jax.sharding.Mesh,
  num_microbatches: int = 1,
  group_size: int = 1,
  key: str = 'train.batch_size',
):
  """Raises InputError unless all micro-batches consist of whole groups."""
  shards = meshes.num_batch_shards(mesh)
  unit = shards * num_microbatches * group_size
  if batch_size < 1 or batch_size % unit:
    raise InputError(
      f'{key}={batch_size!r} must be a positive multiple of {unit} = {shards} '
      f'devices x {num_microbatches} micro-batches x {group_size} (examples '
      'that share one noise draw)'
    )

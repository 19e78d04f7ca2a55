"""Block diffusion: autoregressive over blocks, diffusion within."""

import dataclasses

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.objectives import ar, diffusion, masked, masking, mixture, uniform
from nanodlm.types import InputError, Noised


@dataclasses.dataclass(frozen=True)
class InBlocks(diffusion.Diffusion):
  """Noise of any kind within blocks, given the clean blocks before.

  A mixin, listed before the objective of the noise: the bound is the sum of its
  bounds over blocks, each of which has its own noise level and is noised like a
  row. The network reads a clean copy next to the noisy one. Its time, if it
  reads one, is that of each block, and 0 in the clean copy, so that finished
  blocks can be cached. Source: BD3-LM, arXiv 2503.09573, equation 8.

  Attributes:
    block_size: S, a divisor of the number of tokens of an example.
  """

  block_size: int = 16

  predicts_masked = False
  default_sampler = 'block'

  def __post_init__(self):
    super().__post_init__()
    if self.block_size < 1:
      raise InputError(f'objective.block_size={self.block_size!r} must be >= 1')

  def num_blocks(self, length: int) -> int:
    """Returns the number of blocks in a row of `length` tokens.

    Raises:
      InputError: the block size does not divide `length`.
    """
    if length % self.block_size:
      divisors = [n for n in range(1, length + 1) if length % n == 0]
      raise InputError(
        f'objective.block_size={self.block_size!r} does not divide data.length='
        f'{length!r}; allowed values are {divisors}'
      )
    return length // self.block_size

  def _to_blocks(self, x: jax.Array, num_blocks: int) -> jax.Array:
    """Reshapes rows [B, num_blocks, ...] to [B * num_blocks, ...].

    Blocks at the same place in the rows of a group become neighbours.
    """
    group = self.group_size
    x = x.reshape(-1, group, num_blocks, *x.shape[2:])
    return x.swapaxes(1, 2).reshape(-1, *x.shape[3:])

  def _to_rows(self, x: jax.Array, num_blocks: int) -> jax.Array:
    """Inverts `_to_blocks`: [B * num_blocks, ...] -> [B, num_blocks, ...]."""
    group = self.group_size
    x = x.reshape(-1, num_blocks, group, *x.shape[1:])
    return x.swapaxes(1, 2).reshape(-1, num_blocks, *x.shape[3:])

  def sample_levels(self, key, batch_size, length):
    """Stratifies over all blocks of the global batch, [B, num_blocks]."""
    num_blocks = self.num_blocks(length)
    levels = super().sample_levels(key, batch_size * num_blocks, length)
    return self._to_rows(levels, num_blocks)

  def eval_levels(self, key, num_draws, length):
    """Stratifies the draws of each block, [num_draws, num_blocks]."""
    keys = jax.random.split(key, self.num_blocks(length))
    sample = super().sample_levels
    return jax.vmap(lambda key: sample(key, num_draws, length))(keys).T

  def corrupt(self, keys, levels, x0, eligible):
    num_rows, length = x0.shape
    num_blocks = self.num_blocks(length)
    row, block = (
      self._to_blocks(x, num_blocks)
      for x in jnp.meshgrid(
        jnp.arange(num_rows), jnp.arange(num_blocks), indexing='ij'
      )
    )
    block_keys = jax.vmap(jax.random.fold_in)(keys[row], block)
    split = lambda x: self._to_blocks(
      x.reshape(num_rows, num_blocks, self.block_size), num_blocks
    )
    noised = super().corrupt(
      block_keys,
      self._to_blocks(levels, num_blocks),
      split(x0),
      split(eligible),
    )
    join = lambda x: self._to_rows(x, num_blocks).reshape(num_rows, length)
    return Noised(
      tokens=join(noised.tokens),
      t=self._to_rows(noised.t, num_blocks),
      scored=join(noised.scored),
      level=join(noised.level),
      fields=jax.tree.map(join, noised.fields),
      clean=self.clean_input(x0),
    )

  def max_scored(self, batch_size, length):
    num_blocks = self.num_blocks(length)
    return super().max_scored(batch_size * num_blocks, self.block_size)


@dataclasses.dataclass(frozen=True)
class Block(InBlocks, masking.MaskedNoise):
  """Masked noise within blocks.

      loss_i = scale_b * 1[xt_i = mask] * -log p(x0_i | xt_b, x0_{<b})

  for i in block b. A single block is masked diffusion; blocks of one token give
  the exact autoregressive negative log-likelihood.

  Differs from the paper: the default noise is by count within each block. It
  reduces the variance without the clipped schedules of the paper.

  With `ar_weight` > 0, the clean copy that the network reads anyway also
  predicts the text from left to right, so that one network and one pass give
  two models:

      loss_i += ar_weight * -log p_ar(x0_i | x0_{<i})

  The clean copy is then the input of `ar.Autoregressive`, with the same causal
  attention: block-causal positions would see the token that they predict. The
  exact likelihood of p_ar is reported as ar_nll, next to the bound. The bound
  remains one, since a block still sees all clean tokens before it and none
  other. But their keys and values depend on the tokens to their left only, not
  on their whole block: the network is another one than with ar_weight=0, and in
  sampling finished blocks are cached by the same causal pass. p_ar and the
  block model are two models: neither likelihood bounds the other. Source:
  Nemotron-Labs-Diffusion, arXiv 2607.05722; I-DLM, arXiv 2604.11035. Differs
  from them: both terms are divided by the same number of tokens, and the first
  token is predicted too, from a start symbol.

  Attributes:
    ar_weight: weight of the autoregressive loss; 0 is the paper's network.
  """

  ar_weight: float = 0.0
  # Declared again, since the default of InBlocks would come first.
  noise: str = dataclasses.field(default='count', kw_only=True)

  def __post_init__(self):
    super().__post_init__()
    if not 0 <= self.ar_weight < float('inf'):
      raise InputError(
        f'objective.ar_weight={self.ar_weight!r} must be >= 0 and finite'
      )

  @property
  def of_block(self):
    return self.in_form(masked.Masked)

  @property
  def autoregressive(self) -> ar.Autoregressive | None:
    """The objective of the clean copy, if it is trained."""
    return ar.Autoregressive(self.mask_id) if self.ar_weight else None

  def loss(self, batch, levels, keys, score):
    eligible = jnp.asarray(batch.eligible)
    noised = self.corrupt(keys, levels, batch.tokens, eligible)
    weight = eligible * batch.weight[:, None]
    return self.score_copies(score, self.with_clean(noised, eligible), weight)

  def with_clean(self, noised, eligible):
    if not self.ar_weight:
      return noised
    fields = {**noised.fields, 'scale': eligible.astype(jnp.float32)}
    join = lambda *copies: jnp.concatenate(copies)
    return noised._replace(
      scored=join(noised.scored, eligible),
      level=join(noised.level, jnp.full(eligible.shape, jnp.nan)),
      fields={key: join(x, fields[key]) for key, x in noised.fields.items()},
    )

  def score_copies(self, score, noised, weight):
    if not self.ar_weight:
      return score(noised, weight)
    weight = jnp.concatenate([weight, self.ar_weight * weight])
    scores = score(noised, weight)
    bound, exact = (
      jax.tree.map(lambda x: x.reshape(2, -1)[i], scores.rows) for i in range(2)
    )
    loss, ar_nll = bound.loss + exact.loss, exact.nll / self.ar_weight
    return scores._replace(rows=bound._replace(loss=loss, ar_nll=ar_nll))

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    return self.weighted_cross_entropy(logits, fields, vocab)


@dataclasses.dataclass(frozen=True)
class BlockUniform(InBlocks, uniform.Uniform):
  """Uniform noise within blocks, as in DiffusionGemma, with UDLM's bound."""

  @property
  def of_block(self):
    return self.in_form(uniform.Uniform)


@dataclasses.dataclass(frozen=True)
class BlockHybrid(InBlocks, mixture.Hybrid):
  """Masks and random tokens within blocks, with GIDD's bound."""

  @property
  def of_block(self):
    return self.in_form(mixture.Hybrid)

"""Policy optimisation: samples of high reward become more probable."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.noise import categorical
from nanodlm.objectives import diffusion, masking
from nanodlm.types import InputError, Noised, Objective, Scores, Terms

# Share of the prompt that the one-step estimate hides, as in diffu-GRPO.
PROMPT_MASK_RATE = 0.3
# The coupled estimate draws times from this interval, as its paper does.
COUPLED_TIMES = 0.2, 0.8


@dataclasses.dataclass(frozen=True)
class Tuning(Objective):
  """A base of objectives on estimates of log p(text | what is given).

  All networks that are compared read the same noisy texts: most of the noise of
  an estimate is common to them, and cancels in the difference.

  Attributes:
    base: the objective that trained the network; decides on the noise.
    kl_weight: weight of the divergence from `TrainState.frozen`'s 'reference',
      the parameters at the start; 0: no reference.
  """

  base: Any
  kl_weight: float = 0.0

  ignored = diffusion.LOSS_FIELDS

  def __post_init__(self):
    if not self.kl_weight >= 0:
      raise InputError(f'policy.kl_weight={self.kl_weight!r} must be >= 0')

  @classmethod
  def fits(cls, base: Objective) -> bool:
    """Returns whether networks of an objective can be tuned.

    What an objective itself learns, and a second likelihood, are not supported.
    """
    own = base.autoregressive
    return not base.init_params() and (base.exact or own is None)

  def check(self, settings: Any):
    """Raises InputError unless the other sections fit."""

  @property
  def mask_id(self) -> int:  # pyright: ignore
    return self.base.mask_id

  @property
  def copies(self) -> tuple[str, ...]:
    """The names of the copies of the parameters in `TrainState.frozen`."""
    return ('reference',) if self.kl_weight else ()

  @property
  def uses_frozen(self) -> bool:  # pyright: ignore
    return bool(self.copies)

  def init_frozen(self, params):
    return {name: jax.tree.map(jnp.copy, params) for name in self.copies}

  def evaluation(self):
    return self.base.evaluation()

  def log_p(self, losses: jax.Array, num_rows: int) -> jax.Array:
    """Returns log p of each of `num_rows` texts, by position, [B, L].

    `losses` [R, L] are of the noisy texts of `corrupt`.
    """
    return -jnp.sum(losses.reshape(num_rows, -1, losses.shape[-1]), axis=1)


class Bounds(Tuning):
  """Estimates log p by the bound of the objective: all of it if it is exact.

  Of noise by count, the draws are pairs that hide the first k and the last
  n + 1 - k of n tokens in one random order: each token is hidden once, one of
  them twice. Source: of complementary masks, ESPO, arXiv 2512.03759; of shared
  noise, VRPO, arXiv 2505.19223.

  Subclasses have a field num_draws.
  """

  num_draws: int

  def __post_init__(self):
    super().__post_init__()
    group = self.base.evaluation().group_size
    if self.num_draws < 1 or self.num_draws % group:
      raise InputError(
        f'policy.num_draws={self.num_draws!r} must be a positive multiple of '
        f'{group} with this objective'
      )

  @property
  def _num(self) -> int:
    return 1 if self.base.exact else self.num_draws

  def unread_keys(self, uses_time):
    own = frozenset({'num_draws'} if self.base.exact else ())
    return super().unread_keys(uses_time) | own

  def max_scored(self, batch_size, length):
    return self.base.evaluation().max_scored(batch_size, length)

  def sample_levels(self, key, batch_size, length):
    own = self.base.evaluation()
    keys = jax.random.split(key, batch_size)
    return jax.vmap(lambda key: own.eval_levels(key, self._num, length))(keys)

  def corrupt(self, keys, levels, x0, eligible):
    num = self._num
    fold_in = jax.vmap(jax.random.fold_in, (None, 0))
    keys = jax.vmap(fold_in, (0, None))(keys, jnp.arange(num)).reshape(-1)
    x0, eligible = (jnp.repeat(x, num, axis=0) for x in (x0, eligible))
    levels = levels.reshape(-1, *levels.shape[2:])
    return self.base.evaluation().corrupt(keys, levels, x0, eligible)

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    terms = self.base.evaluation().terms(logits, fields, vocab)
    return terms._replace(loss=terms.nll / self._num, nll=terms.nll / self._num)


@dataclasses.dataclass(frozen=True)
class Policy(Tuning):
  """Raises the expected reward of the samples that make up a batch.

  With A the advantage of a text (its reward above the mean of its group), l the
  estimate of log p and n its number of tokens,

      loss = -n min(r A, clip(r, 1 - c, 1 + c) A) + kl_weight (l - l_ref)^2 / 2,
      r = exp((l - l_old) / n),

  the sum of which is divided by that of n. While the samples are the network's
  own, r = 1, and the gradient is that of the mean reward less kl_weight times
  the divergence from the reference, over the mean of n, if l is log p of the
  sampler. It is not: with bounds it is biased, as in the papers.

  Attributes:
    num_samples: number of samples of each prompt, a group.
    num_updates: number of steps on the same samples; above 1,
      `TrainState.frozen` holds the 'old' parameters, which wrote them.
    clip: c in (0, 1).
    scale_advantages: whether A is divided by the standard deviation of the
      rewards of the group.
  """

  num_samples: int = 8
  num_updates: int = 1
  clip: float = 0.2
  scale_advantages: bool = True

  batches = 'rollouts'
  # Whether r, with n = 1, is that of each token, instead of the text.
  is_tokenwise = False
  # The expected sum of the weights of a token in the estimate of log p.
  total_weight = 1.0

  def __post_init__(self):
    super().__post_init__()
    if self.num_samples < 2:
      raise InputError(
        f'policy.num_samples={self.num_samples!r} must be >= 2: an advantage '
        'is the difference from the mean reward of a group'
      )
    if self.num_updates < 1:
      raise InputError(f'policy.num_updates={self.num_updates!r} must be >= 1')
    if not 0 < self.clip < 1:
      raise InputError(f'policy.clip={self.clip!r} must be in (0, 1)')

  @property
  def num_reads(self) -> int:  # pyright: ignore
    return self.num_samples * self.num_updates

  def check(self, settings):
    if settings.train.batch_size % self.num_samples:
      raise InputError(
        f'policy.num_samples={self.num_samples!r} does not divide '
        f'train.batch_size={settings.train.batch_size!r}'
      )
    data, kind = settings.data, settings.policy['name']
    if data.padding != 'eos' or data.segment_ids:
      raise InputError(
        f'data.padding={data.padding!r} and data.segment_ids='
        f"{data.segment_ids!r} must be 'eos' and False with policy.name="
        f'{kind!r}: nothing says how long a sample is'
      )
    if data.is_chat:
      raise InputError(
        f'data.source={data.source!r} must not be conversations with '
        f'policy.name={kind!r}, which samples one response to a prompt: write '
        'them as pairs:GLOB'
      )
    if not settings.train.reward:
      raise InputError(
        "train.reward='' must say what samples are worth with policy.name="
        f"{kind!r}, such as 'law:valid'"
      )

  @property
  def copies(self):
    return *super().copies, *('old',) * (self.num_updates > 1)

  def unread_keys(self, uses_time):
    # The first update on samples has r = 1.
    own = frozenset({'clip'} if self.num_updates == 1 else ())
    return super().unread_keys(uses_time) | own

  @property
  def round_steps(self) -> int:  # pyright: ignore
    return self.num_updates if self.num_updates > 1 else 0

  def renew_frozen(self, frozen, params):
    return {**frozen, 'old': params}

  def loss(self, batch, levels, keys, score) -> Scores:
    eligible = jnp.asarray(batch.eligible)
    noised = self.corrupt(keys, levels, batch.tokens, eligible)
    num_rows, length = eligible.shape
    num_each = len(noised.tokens) // num_rows
    weight = jnp.repeat(eligible, num_each, axis=0).astype(jnp.float32)

    def log_p(losses):
      own = self.log_p(losses, num_rows)
      return own if self.is_tokenwise else own.sum(axis=1, keepdims=True)

    of_copies = {
      name: log_p(score(noised, weight, params=score.frozen[name]).losses)
      for name in self.copies
    }
    size = jnp.sum(eligible, axis=1, keepdims=True).astype(jnp.float32)
    size = eligible.astype(jnp.float32) if self.is_tokenwise else size
    advantage = batch.weight[:, None]

    def ratio_of(new):
      old = of_copies.get('old', jax.lax.stop_gradient(new))
      return jnp.exp((new - old) / jnp.maximum(size, 1))

    def of_losses(losses):
      new = log_p(losses)
      ratio = ratio_of(new)
      clipped = jnp.clip(ratio, 1 - self.clip, 1 + self.clip)
      value = -size * jnp.minimum(ratio * advantage, clipped * advantage)
      if 'reference' in of_copies:
        value += self.kl_weight / 2 * (new - of_copies['reference']) ** 2
      return jnp.sum(value)

    scores = score(noised, weight, of_losses)
    new = log_p(scores.losses)
    num_tokens = jnp.maximum(jnp.sum(eligible, axis=1), 1)
    reports = {
      **(batch.reports or {}),
      'entropy': -new.sum(axis=1) / (num_tokens * self.total_weight),
    }
    if 'reference' in of_copies:
      change = jnp.sum(new - of_copies['reference'], axis=1)
      reports['kl'] = change / self.total_weight
    if 'old' in of_copies:
      is_clipped = jnp.abs(ratio_of(new) - 1) > self.clip
      num_clipped = jnp.sum(is_clipped * size, axis=1)
      reports['clipped_share'] = num_clipped / num_tokens
    return scores._replace(reports=reports)


@dataclasses.dataclass(frozen=True)
class Sequence(Bounds, Policy):
  """One ratio for each text, from its bound; exact for 'ar'.

  Source: ESPO, arXiv 2512.03759; of exact likelihoods, GSPO, arXiv 2507.18071.

  Attributes:
    num_draws: number of noisy texts for each sample.
  """

  num_draws: int = 2


class Masks(Policy):
  """A ratio for each token, from cross entropies of masked texts.

  They are neither log p of a sampler nor a bound on it.
  """

  is_tokenwise = True

  @classmethod
  def fits(cls, base):
    return (
      super().fits(base)
      and isinstance(base, masking.MaskedNoise)
      and (base.predicts_masked and not base.block_size)
    )

  @abc.abstractmethod
  def hide(
    self, keys: jax.Array, levels: jax.Array, eligible: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Returns the masks [B, D, L] of each text, and weights [B, D]."""

  def sample_levels(self, key, batch_size, length):
    return jax.random.uniform(key, (batch_size,))

  def corrupt(self, keys, levels, x0, eligible):
    hidden, scale = self.hide(keys, levels, eligible)
    num = hidden.shape[1]
    hidden = hidden.reshape(-1, x0.shape[1])
    x0, eligible = (jnp.repeat(x, num, axis=0) for x in (x0, eligible))
    share = jnp.mean(hidden, axis=1)
    of_row = lambda x: jnp.broadcast_to(x.reshape(-1, 1), x0.shape)
    return Noised(
      tokens=jnp.where(hidden, self.mask_id, x0),
      t=self.base.network_time(share),
      scored=eligible & hidden,
      level=of_row(share),
      fields={'target': x0, 'scale': of_row(scale)},
    )

  def terms(self, logits, fields, vocab=categorical.WHOLE):
    ce, correct = categorical.cross_entropy(
      logits, fields['target'], self.mask_id, vocab
    )
    nll = jnp.full_like(ce, jnp.nan)
    return Terms(fields['scale'] * ce, nll, cross_entropy=ce, correct=correct)


@dataclasses.dataclass(frozen=True)
class OneStep(Masks):
  """log p of a token given a part of the prompt, with all of the text hidden.

  Source: diffu-GRPO of d1, arXiv 2504.12216. Differs from it: the divergence is
  that of `Policy`, by token.
  """

  def hide(self, keys, levels, eligible):
    del levels
    draw = lambda key, row: jax.random.bernoulli(
      key, PROMPT_MASK_RATE, row.shape
    )
    hidden = eligible | jax.vmap(draw)(keys, eligible)
    return hidden[:, None], jnp.ones((len(keys), 1))


@dataclasses.dataclass(frozen=True)
class Coupled(Masks):
  """The mean of log p with all hidden, and of one of two complementary masks.

  The second is weighted by 1 / t or 1 / (1 - t), where t is the share of the
  mask: a token's weights add up to 3/2 in expectation. Source: coupled-GRPO of
  DiffuCoder, arXiv 2506.20639.
  """

  total_weight = 1.5

  def hide(self, keys, levels, eligible):
    low, high = COUPLED_TIMES
    t = low + (high - low) * levels
    draw = lambda key, row, t: jax.random.bernoulli(key, t, row.shape)
    first = jax.vmap(draw)(keys, eligible, t)
    masks = jnp.stack([jnp.ones_like(first), first, ~first], axis=1)
    scale = jnp.stack([jnp.ones_like(t), 1 / t, 1 / (1 - t)], axis=1) / 2
    return masks & eligible[:, None], scale

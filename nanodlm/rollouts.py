"""Batches that the current parameters write, weighted by their rewards."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from nanodlm import lm as lms
from nanodlm import rewards
from nanodlm.config import Settings
from nanodlm.data import pipeline
from nanodlm.data.packed import PackedData
from nanodlm.devices import mesh as meshes
from nanodlm.objectives import policy
from nanodlm.run import Run
from nanodlm.samplers import reveal
from nanodlm.training.state import join, TrainState
from nanodlm.types import Batch, Batches, InputError

# Separates the keys of samples from other uses of the run's seed.
_STREAM = 0x5A17
# Added to a standard deviation: a group of equal rewards has advantages of 0.
_EPSILON = 1e-4


def make_reward(settings: Settings) -> rewards.Reward:
  """Returns the reward of train.reward; see `rewards.make_reward`."""
  train = settings.train
  return rewards.make_reward(train.reward, settings.data, train.reward_secs)


class Rollouts(Batches):
  """Groups of samples, which `objectives.policy` learns from.

  What is given in an example of the training text is a prompt: the prompt of a
  pair, or what data.clean_prefix_rate and clean_infill_rate leave; of other
  text, nothing. Each is filled policy.num_samples times by the run's sampler.
  The weight of a sample is its advantage, the reward above the mean of its
  group.
  """

  @classmethod
  def check(cls, run):
    if not isinstance(run.trained, policy.Policy):
      raise InputError(
        f'train.batches={run.settings.train.batches!r} does not fit '
        f'policy.name={run.settings.policy["name"]!r}, which does not learn '
        'from rewards'
      )
    if not run.sampler.fills_masks:
      raise InputError(
        f'sampler.name={run.sampler_name!r} does not fit policy.name='
        f'{run.settings.policy["name"]!r}, which learns from samples of a '
        'given number of tokens'
      )
    make_reward(run.settings)

  def __init__(self, run: Run, packed: PackedData, start_step: int):
    settings, self._policy = run.settings, cast(policy.Policy, run.trained)
    self._run, self._packed = run, packed
    self._reward = make_reward(settings)
    self._fill = lms.make_fill(run)
    self._made: Any = None
    self._open(self._number(start_step))

  def _number(self, step: int) -> int:
    """Returns the number of the samples of a step."""
    return step // (self._policy.round_steps or 1)

  def _open(self, number: int):
    settings, self._next = self._run.settings, number
    self._prompts = pipeline.make_train_iterator(
      self._packed,
      settings.data,
      seed=settings.seed,
      batch_size=settings.train.batch_size // self._policy.num_samples,
      start_step=number,
    )

  def __call__(self, state: TrainState, step: int) -> Batch:
    number = self._number(step)
    if self._made is None or self._made[0] != number:
      self._made = number, self._make(state, number)
    return self._made[1]

  def _is_filler(self, tokens: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """Returns where nothing was drawn, since the texts [N, L] had ended."""
    run = self._run
    eos_ids = getattr(run.sampler, 'eos_ids', ())
    ends = reveal.find_ends(jnp.asarray(tokens), jnp.asarray(fixed), eos_ids)
    is_after = np.asarray(ends[1])
    if size := run.objective.block_size:
      # The block of the end was filled as a whole. Its noise must not show
      # where the text ends.
      is_after = np.repeat(is_after[:, ::size], size, axis=1)
    return is_after

  def _make(self, state: TrainState, number: int) -> Batch:
    """Returns the batch of samples of a number."""
    run, settings = self._run, self._run.settings
    num_each = self._policy.num_samples
    if number != self._next:
      self._open(number)
    self._next += 1
    prompts = next(self._prompts)
    repeat = lambda x: np.repeat(x, num_each, axis=0)
    free = repeat(np.asarray(prompts.eligible))
    canvas = np.where(free, run.tokenizer.mask_id, repeat(prompts.tokens))
    params = (state.frozen or {}).get('old', state.params)
    key = jax.random.fold_in(jax.random.key(settings.seed), _STREAM)
    tokens, num_calls = self._fill(
      join(params, state.base),
      jax.random.fold_in(key, number),
      canvas.astype(np.int32),
      ~free,
    )
    value = self._reward(*lms.read_texts(run, tokens, ~free))
    groups = value.reshape(-1, num_each)
    advantage = groups - groups.mean(axis=1, keepdims=True)
    if self._policy.scale_advantages:
      advantage /= groups.std(axis=1, keepdims=True) + _EPSILON
    sizes = [len(lms.shown_tokens(run, *row)) for row in zip(tokens, ~free)]
    drawn = free & ~self._is_filler(tokens, ~free)
    batch = lms.make_batch(tokens, drawn)._replace(
      weight=advantage.reshape(-1),
      reports={
        'reward': value,
        'length': np.array(sizes, np.float32),
        'num_calls': np.full(len(tokens), num_calls, np.float32),
      },
    )
    return meshes.shard_whole_batch(run.mesh, batch)

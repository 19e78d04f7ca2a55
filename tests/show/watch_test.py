"""Tests of nanodlm.show.watch: it shows all calls and keeps the samples."""

import functools

from absl.testing import absltest, parameterized
import jax
import numpy as np
import pytest

from nanodlm.devices import mesh as meshes
from nanodlm.devices.sharding import Shards
from nanodlm.model.network import TransformerNetwork
from nanodlm.noise.categorical import Draw
from nanodlm.objectives.ar import Autoregressive
from nanodlm.objectives.block import Block
from nanodlm.objectives.masked import Masked
from nanodlm.objectives.mixture import Hybrid
from nanodlm.objectives.uniform import Uniform
from nanodlm.samplers import SAMPLERS
from nanodlm.samplers.guidance import Guided
from nanodlm.show import watch
from nanodlm.steps.network import Scorer
from nanodlm.steps.sample import make_sample_step
from nanodlm.types import Canvas
from tests import toys

VOCAB, LENGTH, BATCH = 13, 8, 4
MASK = VOCAB - 1
DRAW = Draw(MASK)
OBJECTIVES = {
  'hybrid': Hybrid(MASK),
  'expanding': Masked(MASK, expand=True),
  'masked': Masked(MASK),
  'ar': Autoregressive(MASK),
  'block': Block(MASK, block_size=4),
  'block_ar': Block(MASK, block_size=4, ar_weight=1.0),
  'uniform': Uniform(MASK),
}
INNER = SAMPLERS['fixed_count'](DRAW, 2)
# Values are (objective of the network, sampler).
CASES = {
  'ancestral': ('masked', SAMPLERS['ancestral'](DRAW, 6)),
  'ar': ('ar', SAMPLERS['ar'](DRAW)),
  'ar_without_cache': ('ar', SAMPLERS['ar'](DRAW, cache=False)),
  'block': ('block', SAMPLERS['block'](INNER, 4, MASK)),
  'block_without_cache': ('block', SAMPLERS['block'](INNER, 4, MASK, False)),
  'confidence': ('masked', SAMPLERS['confidence'](DRAW, 4, 'random')),
  'edit': ('hybrid', SAMPLERS['edit'](DRAW, 0.3, 0.3, num_corrections=2)),
  'expand': ('expanding', SAMPLERS['expand'](DRAW)),
  'first_hitting': ('masked', SAMPLERS['first_hitting'](DRAW)),
  'fixed_count': ('masked', SAMPLERS['fixed_count'](DRAW, 4)),
  'guided': ('masked', Guided(SAMPLERS['fixed_count'](DRAW, 4), 0.5, MASK)),
  'posterior': (
    'uniform',
    SAMPLERS['posterior'](DRAW, 6, OBJECTIVES['uniform'], num_corrections=2),
  ),
  'prefix_cache': ('masked', SAMPLERS['prefix_cache'](INNER, 4, MASK)),
  'prefix_cache_refreshed': (
    'masked',
    SAMPLERS['prefix_cache'](INNER, 4, MASK, refresh_calls=1),
  ),
  'psi': ('uniform', SAMPLERS['psi'](DRAW, 6, OBJECTIVES['uniform'])),
  'renoise': ('uniform', SAMPLERS['renoise'](DRAW, 6, OBJECTIVES['uniform'])),
  'speculate': ('block_ar', SAMPLERS['speculate'](DRAW, 4)),
  'remask': ('masked', SAMPLERS['remask'](DRAW, 6, remask='conf', eta=1.0)),
}
# One of each kind of loop; the others are slow tests.
QUICK = 'ar', 'block', 'confidence', 'guided', 'posterior', 'speculate'
OTHERS = sorted(CASES.keys() - set(QUICK))


def make_canvas():
  fixed = np.arange(LENGTH)[None] < np.full((BATCH, 1), 3)
  return np.where(fixed, 5, MASK).astype(np.int32), fixed


def sample(name, shape=(1, 1, 1), view=None):
  objective, sampler = CASES[name]
  objective = OBJECTIVES[objective]
  network = TransformerNetwork(
    toys.model_config(
      vocab_size=VOCAB,
      num_heads=4,
      mlp='swiglu',
      causal=objective.autoregressive is not None,
      block_size=objective.block_size,
      time_conditioning=objective.needs_time,
    ),
    Shards(*shape[1:]),
  )
  mesh = meshes.make_mesh(
    meshes.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))]
  )
  params = dict(toys.large_params(network.config))
  padding = ((0, -VOCAB % shape[2]), (0, 0))
  params['embedding'] = np.pad(params['embedding'], padding)
  params = jax.device_put(params, meshes.shardings(mesh, params))
  scorer = Scorer(network, objective, chunk_size=64)
  run = make_sample_step(scorer, sampler, mesh, view)
  canvas = meshes.shard_whole_batch(mesh, Canvas(*make_canvas()))
  return jax.device_get(run(params, jax.random.key(1), canvas))


@functools.cache
def unwatched(name, shape=(1, 1, 1)):
  return sample(name, shape)


@functools.cache
def watched(name, shape=(1, 1, 1), num_top=MASK):
  """Returns samples, trajectories, probabilities [B] and the calls seen.

  All tokens are alternatives unless `num_top` is less.
  """
  tokens, _ = make_canvas()
  recorder, num_calls = watch.Recorder(tokens), 0
  rows = [watch.Logprobs(LENGTH) for _ in tokens]

  def look(event):
    nonlocal num_calls
    if isinstance(event, watch.Revealed):
      return watch.Logprobs.keep(rows, event)
    num_calls += event.num_calls if isinstance(event, watch.Asked) else 0
    return recorder(event)

  view = watch.View(look, MASK, num_top, reveals=True)
  samples = sample(name, shape, view)
  return samples, recorder.trajectories(samples.tokens), rows, num_calls


class WatchTest(parameterized.TestCase):
  def test_has_a_case_for_every_sampler(self):
    filling = {name for name, cls in SAMPLERS.items() if cls.fills_masks}
    self.assertContainsSubset(filling, CASES)

  @parameterized.parameters(*QUICK)
  def test_does_not_change_samples_and_shows_all_calls(self, name):
    self.check_samples_and_calls(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_other_samples_and_their_calls(self, name):
    self.check_samples_and_calls(name)

  def check_samples_and_calls(self, name):
    tokens, fixed = make_canvas()
    samples, trajectories, _, num_calls = watched(name)
    np.testing.assert_array_equal(samples.tokens, unwatched(name).tokens)
    self.assertEqual(num_calls, samples.num_calls)
    objective, _ = CASES[name]
    for row, trajectory in enumerate(trajectories):
      frames, answers = trajectory
      np.testing.assert_array_equal(frames[-1], samples.tokens[row])
      np.testing.assert_array_equal(frames[:, fixed[row]], 5)
      self.assertLen(answers, len(frames) - 1)
      changed = frames[1:] != frames[:-1]
      for change, answer in zip(changed, answers):
        if answer is None:  # The call only fills the cache.
          self.assertFalse(np.any(change))
          continue
        self.assertLess(answer.positions.max(initial=0), tokens.shape[1])
        self.assertEqual(
          answer.top_tokens.shape, (*answer.positions.shape, MASK)
        )
        self.assertTrue(np.all(np.diff(answer.top_probs) <= 0))
        self.assertTrue(np.all(answer.top_probs > 0))
        self.assertTrue(np.all(answer.top_probs.sum(-1) <= 1 + 1e-5))
        self.assertLess(answer.top_tokens.max(), MASK)
        if name != 'remask':  # It masks other tokens again.
          self.assertContainsSubset(np.flatnonzero(change), answer.positions)
      self.assertTrue(
        np.all(changed.any(0) | fixed[row] | (objective == 'uniform'))
      )
      if CASES[name][1].is_final:
        self.assertEqual(changed.sum(0).max(), 1)
      changed_at = trajectory.changed_at()
      np.testing.assert_array_equal(changed_at[fixed[row]], -1)
      for position, call in enumerate(changed_at):
        if call >= 0:
          self.assertTrue(
            np.all(frames[call + 1 :, position] == frames[-1, position])
          )
          self.assertNotEqual(frames[call, position], frames[-1, position])

  @parameterized.parameters('fixed_count', 'block')
  def test_calls_without_what_they_reveal(self, name):
    recorder = watch.Recorder(make_canvas()[0])
    samples = sample(name, view=watch.View(recorder, MASK, num_top=3))
    np.testing.assert_array_equal(samples.tokens, unwatched(name).tokens)
    found = recorder.trajectories(samples.tokens)
    for one, other in zip(found, watched(name)[1]):
      np.testing.assert_array_equal(one.frames, other.frames)

  @parameterized.parameters(*QUICK)
  def test_log_probs_are_those_of_the_call_that_set_a_token(self, name):
    self.check_log_probs(name)

  @parameterized.parameters(*OTHERS)
  @pytest.mark.slow
  def test_other_log_probs(self, name):
    self.check_log_probs(name)

  def check_log_probs(self, name):
    _, fixed = make_canvas()
    samples, trajectories, rows, _ = watched(name)
    for i, (trajectory, row) in enumerate(zip(trajectories, rows)):
      np.testing.assert_array_equal(np.isnan(row.chosen), fixed[i])
      changed_at = np.maximum(trajectory.changed_at(), 0)
      for place in np.flatnonzero(~fixed[i]):
        # The causal law verifies a draft in the call after it.
        last = None if name == 'speculate' else changed_at[place] + 1
        *_, answer = (
          answer
          for answer in trajectory.answers[:last]
          if answer is not None and place in answer.positions
        )
        (k,) = np.flatnonzero(answer.positions == place)
        top, p = answer.top_tokens[k], answer.top_probs[k]
        (own,) = p[top == samples.tokens[i, place]]
        np.testing.assert_allclose(row.chosen[place], np.log(own), rtol=1e-4)
        num = len(top)  # Tokens, fewer than there could be.
        np.testing.assert_array_equal(row.top_tokens[place][:num], top)
        np.testing.assert_allclose(row.top[place][:num], np.log(p), rtol=1e-4)
        assert np.all(row.top[place][num:] == -np.inf)

  def test_probabilities_are_the_networks(self):
    # At temperature 0 a revealed token is the first of the alternatives.
    tokens, _ = make_canvas()
    recorder = watch.Recorder(tokens)
    CASES['greedy'] = ('masked', SAMPLERS['fixed_count'](Draw(MASK, 0.0), 4))
    self.addCleanup(CASES.pop, 'greedy')
    samples = sample('greedy', view=watch.View(recorder, MASK, MASK + 5))
    for trajectory in recorder.trajectories(samples.tokens):
      for call, answer in enumerate(trajectory.answers):
        # All tokens are alternatives, since num_top exceeds the vocabulary.
        np.testing.assert_allclose(answer.top_probs.sum(-1), 1, rtol=1e-5)
        for position, top in zip(answer.positions, answer.top_tokens):
          if (
            trajectory.frames[call, position]
            == MASK
            != (trajectory.frames[call + 1, position])
          ):
            self.assertEqual(trajectory.frames[call + 1, position], top[0])

  @parameterized.parameters(
    ('fixed_count', (1, 4, 1)), ('block', (2, 1, 2)), ('guided', (1, 2, 2))
  )
  def test_many_devices_show_each_row_once(self, name, shape):
    one, many = (watched(name, mesh, 2) for mesh in ((1, 1, 1), shape))
    for a, b in zip(one[2], many[2]):
      np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-4)
      np.testing.assert_array_equal(a.top_tokens, b.top_tokens)
    for expected, actual in zip(one[1], many[1]):
      np.testing.assert_array_equal(expected.frames, actual.frames)
      for a, b in zip(expected.answers, actual.answers, strict=True):
        self.assertEqual(a is None, b is None)
        if a is None:
          continue
        np.testing.assert_array_equal(a.positions, b.positions)
        np.testing.assert_allclose(a.top_probs, b.top_probs, atol=1e-5)

  @parameterized.parameters(
    ('first_hitting', (1, 1, 1)), ('ar', (1, 1, 1)), ('fixed_count', (1, 2, 2))
  )
  def test_stops_calling_the_network(self, name, shape):
    asked = []

    def stop_after_two(event):
      asked.append(event)
      return len(asked) < 3

    view = watch.View(stop_after_two, MASK)
    samples = sample(name, shape, view)
    self.assertGreaterEqual(len(asked), 4)
    expected = unwatched(name, shape)
    first = np.sort(
      np.flatnonzero(np.any(samples.tokens != expected.tokens, axis=0))
    )
    self.assertNotEmpty(first)
    self.assertEqual(samples.num_calls, expected.num_calls)

  def test_paste_skips_tokens_outside_the_canvas(self):
    for start, expected in (
      (-1, [2, 3, 0, 0]),
      (2, [0, 0, 1, 2]),
      (1, [0, 1, 2, 3]),
    ):
      canvas = np.zeros(4, np.int32)
      watch.paste(canvas, np.array([1, 2, 3]), start)
      np.testing.assert_array_equal(canvas, expected)


if __name__ == '__main__':
  absltest.main()

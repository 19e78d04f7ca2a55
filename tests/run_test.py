"""A run is built once, and a start that fails leaves no trace."""

import pathlib
from unittest import mock

import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import samplers, train
from nanodlm.devices import mesh as meshes
from nanodlm.types import InputError
from tests import workdirs
from tests.seams_test import start_of


def counting():
  """Mocks that count how often the objective and the mesh are constructed."""
  return (
    mock.patch.object(runs, 'make_objective', wraps=runs.make_objective),
    mock.patch.object(meshes, 'make_mesh', wraps=meshes.make_mesh),
  )


def test_training_builds_the_objective_and_the_mesh_once(tmp_path):
  objective, mesh = counting()
  with objective as make_objective, mesh as make_mesh:
    assert train.main(start_of(tmp_path)) == 0
  assert (make_objective.call_count, make_mesh.call_count) == (1, 1)


def test_loading_builds_the_objective_and_the_mesh_once(tmp_path):
  workdir = workdirs.make_workdir(tmp_path)
  objective, mesh = counting()
  with objective as make_objective, mesh as make_mesh:
    lm = lms.load(workdir)
    lm.sample(num_steps=2)
    lm.bound(['abc'])
  assert (make_objective.call_count, make_mesh.call_count) == (1, 1)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'objective__noise': 'counts'}, "objective.noise='counts'"),
    ({'data__source': 'text:/no/such/file'}, 'data.source'),
    ({'train__batch_size': 12}, 'train.batch_size=12'),
    ({'checkpoint__init_from': '/no/run'}, 'checkpoint.init_from'),
  ],
)
def test_a_start_that_fails_leaves_no_trace(tmp_path, changes, message):
  start = start_of(tmp_path, **changes)
  with pytest.raises(InputError, match=message):
    train.main(start)
  assert not pathlib.Path(start.workdir).exists()
  # A folder that was there before stays as it was.
  notes = pathlib.Path(start.workdir) / 'notes.txt'
  notes.parent.mkdir()
  notes.write_text('mine')
  with pytest.raises(InputError, match=message):
    train.main(start)
  assert notes.read_text() == 'mine'
  names = {path.name for path in notes.parent.iterdir()}
  assert names <= {'notes.txt', '.lock'}


SAMPLERS = {
  **{k: {} for k, cls in samplers.SAMPLERS.items() if cls.fills_masks},
  'confidence': {'block_size': 3},
}


@pytest.mark.parametrize('name', SAMPLERS)
def test_calls_stay_below_what_a_sampler_states(name):
  config = configs.load()
  config.data.length = config.sampler.length = length = 12
  config.model.update(num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32)
  config.objective.block_size = 4
  fits = {'ar': 'ar', 'block': 'block', 'edit': 'hybrid', 'renoise': 'uniform'}
  if name == 'speculate':
    fits[name], config.objective.ar_weight = 'block', 1.0
  config.model.time_conditioning = name == 'renoise'
  if name == 'expand':
    config.objective.expand, config.data.crop = True, 'document'
  config.objective.name = fits.get(name, 'masked')
  config.sampler.update({'name': name, 'num_steps': 5, **SAMPLERS[name]})
  run = runs.make_run(configs.make_settings(config)).with_vocabulary(9)
  params = run.scorer.init_params(jax.random.key(0))
  fill = lms.make_fill(run)
  for num_free in (length, 7):
    fixed = np.zeros((16, length), bool)
    fixed[:, : length - num_free] = True
    tokens = np.where(fixed, 3, 8).astype(np.int32)
    filled, num_calls = fill(params, jax.random.key(1), tokens, fixed)
    assert filled.max() < 8
    # Expanded masks and drafts take the most.
    assert 0 < num_calls <= 3 * num_free


@pytest.mark.parametrize(
  'changes, ratio',
  [
    ({}, 1),
    ({'objective.name': 'genmd4', 'model.time_conditioning': True}, 2),
    ({'distill.name': 'sdtt'}, 0),  # Not known.
  ],
)
def test_flops_are_those_of_all_network_calls(changes, ratio):
  config = configs.load()
  config.tokenizer.name = 'bytes'
  config.checkpoint.init_from = '/run'
  for key, value in changes.items():
    configs.set_value(config, key, value)
  run = runs.make_run(configs.make_settings(config), refit=True)
  run = run.with_vocabulary(258)
  own = run.network.flops_per_token(run.settings.data.length)
  assert own > 0 and run.flops_per_token() == ratio * own

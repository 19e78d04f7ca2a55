"""Runs that train adapters: what they save, load, merge and refuse."""

import dataclasses
import pathlib
import re
import shutil
from unittest import mock

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import model, train, weights
from nanodlm.show import runs as reading
from nanodlm.types import InputError
from tests import seams_test, workdirs
from tests.distill_test import saved
from tests.launch_test import arrays, assert_identical

NUM_STEPS = 6


def start_from(folder, base, **changes):
  own = dict(
    train__num_steps=NUM_STEPS, lora__rank=2, lora__alpha=6.0, lora__dropout=0.1
  )
  return seams_test.start_from(folder, base, **{**own, **changes})


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return workdirs.make_workdir(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='module')
def adapted(base, tmp_path_factory):
  start = start_from(tmp_path_factory.mktemp('adapted'), base)
  assert train.main(start) == 0
  return start


def test_a_checkpoint_holds_adapters_alone(base, adapted):
  folder = pathlib.Path(adapted.workdir) / 'checkpoints' / str(NUM_STEPS)
  items = {path.name for path in folder.iterdir() if path.is_dir()}
  assert items == {'params', 'ema_params', 'rest', 'meta'}
  names = saved(adapted.workdir, NUM_STEPS, 'params')
  assert {name.split('lora_')[1] for name in names} == {"a']", "b']"}
  assert all(np.any(x) for x in names.values())


def test_it_loads_as_the_whole_model(base, adapted):
  lm = lms.load(adapted.workdir)
  run, params, _ = weights.load_merged(lm.run, adapted.workdir)
  theirs = lms.load(base).params
  own = saved(adapted.workdir, NUM_STEPS, 'ema_params')
  a, b = (own[f"['last_layer']['mlp_out']['lora_{x}']"] for x in 'ab')
  kernel = theirs['last_layer']['mlp_out']['kernel'] + 6 / 2 * (a @ b)
  found = params['last_layer']['mlp_out']['kernel']
  np.testing.assert_allclose(found, kernel, atol=1e-5)
  np.testing.assert_array_equal(params['embedding'], theirs['embedding'])
  assert run.num_params() == lms.load(base).run.num_params()
  tokens = np.arange(12, dtype=np.int32)
  merged = dataclasses.replace(lm, run=run, params=params).logits(tokens)
  np.testing.assert_allclose(merged, lm.logits(tokens), atol=1e-4)


@pytest.mark.slow
def test_resuming(adapted, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(adapted.workdir, workdir)
  for step in (4, 6):
    shutil.rmtree(workdir / 'checkpoints' / str(step))
  start = dataclasses.replace(adapted, workdir=str(workdir))
  assert train.main(start) == 0
  items = 'params', 'ema_params', 'rest'
  assert_identical(
    *(arrays(x, NUM_STEPS, items) for x in (adapted.workdir, start.workdir))
  )


@pytest.mark.slow
def test_a_base_in_bfloat16_is_merged_in_float32(base, tmp_path):
  start = start_from(
    tmp_path, base, train__num_steps=2, model__dtype='bfloat16'
  )
  assert train.main(start) == 0
  lm = lms.load(start.workdir)
  assert str(lm.params['layers']['query']['kernel'].dtype) == 'bfloat16'
  _, params, _ = weights.load_merged(lm.run, start.workdir)
  own = saved(start.workdir, 2, 'ema_params')
  a, b = (own[f"['last_layer']['query']['lora_{x}']"] for x in 'ab')
  kernel = lms.load(base).params['last_layer']['query']['kernel']
  np.testing.assert_allclose(
    params['last_layer']['query']['kernel'], kernel + 3 * (a @ b), atol=1e-6
  )


@pytest.mark.slow
def test_a_base_that_has_moved(base, adapted, tmp_path, monkeypatch):
  # The base is known by its whole path, and may get another.
  monkeypatch.chdir(pathlib.Path(base).parent)
  start = start_from(tmp_path, 'run', train__num_steps=1)
  assert train.main(start) == 0
  monkeypatch.chdir(tmp_path)
  assert lms.load(start.workdir).run.settings.checkpoint.init_from == base
  moved = tmp_path / 'moved'
  shutil.copytree(base, moved)
  again = configs.Start(
    'eval',
    start.workdir,
    configs.load(),
    False,
    {'checkpoint.init_from': str(moved)},
  )
  settings = again.resolve_reading(('eval.',))
  assert settings.checkpoint.init_from == str(moved)
  lms.load(start.workdir, settings=settings)


@pytest.mark.slow
def test_what_the_objective_has_learned(tmp_path):
  genmd4 = dict(objective__name='genmd4', model__time_conditioning=True)
  base = workdirs.make_workdir(tmp_path / 'base', **genmd4)
  start = start_from(tmp_path, base, train__num_steps=1, **genmd4)
  assert train.main(start) == 0
  rate = lms.load(base).params['objective']['rate']
  own = saved(start.workdir, 1, 'params')
  (name,) = [name for name in own if 'objective' in name]
  change = np.abs(own[name] - np.asarray(rate)).max()
  assert 0 < change < 0.01
  lms.load(start.workdir)


def test_a_network_without_adapters(base, tmp_path):
  with mock.patch.dict(model.NETWORKS, mlp=seams_test.Mlp):
    start = start_from(tmp_path, base, model__name='mlp')
    with pytest.raises(InputError, match='lora.rank=2'):
      train.main(start)
  assert not pathlib.Path(start.workdir).exists()


@pytest.mark.slow
def test_the_base_must_stay_as_it_was(base, tmp_path):
  own = tmp_path / 'base'
  shutil.copytree(base, own)
  start = start_from(tmp_path, str(own), train__num_steps=1)
  assert train.main(start) == 0
  other = workdirs.make_workdir(tmp_path / 'other', scale=2.0)
  shutil.rmtree(own / 'checkpoints')
  with pytest.raises(InputError, match=str(own)):
    lms.load(start.workdir)
  shutil.copytree(pathlib.Path(other) / 'checkpoints', own / 'checkpoints')
  for use in lms.load, lambda _: train.train(*again(start)):
    with pytest.raises(InputError, match='has changed'):
      use(start.workdir)


def again(start):
  """The arguments of train.train of a second start with more steps."""
  config = start.config.copy_and_resolve_references()
  config.train.num_steps = 2
  settings, was = dataclasses.replace(start, config=config).resolve()
  return settings, start.workdir, was, 0.0


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'checkpoint__init_from': ''}, "checkpoint.init_from='' must be"),
    ({'checkpoint__init_from': '/no/run'}, "checkpoint.init_from='/no/run'"),
    ({'lora__rank': -1}, 'lora.rank=-1 must be'),
    ({'lora__targets': '('}, 'lora.targets'),
    ({'lora__targets': 'q_proj'}, "lora.targets='q_proj' matches none"),
    (
      {'model__rope_theta': 5.0},
      'model.rope_theta: 10000.0 of that run, 5.0 of this run',
    ),
  ],
)
def test_mistakes(base, tmp_path, changes, named):
  start = start_from(tmp_path, base, **changes)
  with pytest.raises(InputError, match=named):
    train.main(start)
  assert not pathlib.Path(start.workdir).exists()


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'lora__rank': 0}, "'rank': (2, 0)"),
    ({'lora__rank': 3}, "'rank': (2, 3)"),
    ({'lora__alpha': 5.0}, "'alpha': (6.0, 5.0)"),
    ({'lora__rslora': True}, "'rslora': (False, True)"),
    ({'lora__targets': 'query'}, "'targets': ('.*', 'query')"),
  ],
)
def test_other_adapters_on_top_of_adapters(adapted, tmp_path, changes, named):
  start = start_from(tmp_path, adapted.workdir, **changes)
  with pytest.raises(InputError, match=re.escape(named)):
    train.main(start)
  assert not pathlib.Path(start.workdir).exists()


@pytest.mark.slow
def test_adapters_are_trained_further(base, adapted, tmp_path, caplog):
  # A step of size 0 shows where it starts, and keeps the adapters' dropout.
  start = start_from(
    tmp_path / 'more',
    adapted.workdir,
    train__num_steps=1,
    optim__learning_rate=1e-30,
    lora__dropout=0.0,
  )
  with caplog.at_level('INFO'):
    assert train.main(start) == 0
  assert f'starting from the adapters of {adapted.workdir}, step 6' in (
    caplog.text
  )
  assert f'training adapters of {base}, step 0' in caplog.text
  before = saved(adapted.workdir, NUM_STEPS, 'ema_params')
  after = saved(start.workdir, 1, 'params')
  assert before.keys() == after.keys()
  for name, x in before.items():
    np.testing.assert_allclose(after[name], x, rtol=1e-6, atol=1e-20)
  tokens = np.arange(12, dtype=np.int32)
  first, second = (lms.load(x.workdir) for x in (adapted, start))
  np.testing.assert_allclose(
    second.logits(tokens), first.logits(tokens), atol=1e-6
  )
  # Once more, by the command line alone, which takes over all settings.
  again = configs.Start(
    'train',
    str(tmp_path / 'again'),
    configs.load(),
    False,
    {'checkpoint.init_from': start.workdir, 'optim.learning_rate': 0.1},
  )
  assert train.main(again) == 0
  assert weights.find_base(again.workdir) == base
  merged = weights.load_merged(lms.load(again.workdir).run, again.workdir)[1]
  own = saved(again.workdir, 1, 'ema_params')
  a, b = (own[f"['last_layer']['mlp_out']['lora_{x}']"] for x in 'ab')
  kernel = lms.load(base).params['last_layer']['mlp_out']['kernel']
  np.testing.assert_allclose(
    merged['last_layer']['mlp_out']['kernel'], kernel + 3 * (a @ b), atol=1e-5
  )
  assert np.abs(b - after["['last_layer']['mlp_out']['lora_b']"]).max() > 1e-3
  # The numbers of parameters: all of them, and those that are trained.
  plain = lms.load(base).run.num_params()
  num = sum(x.size for x in own.values())
  assert lms.load(again.workdir).run.num_trained() == num
  for workdir in adapted.workdir, again.workdir:
    read = reading.read_run(pathlib.Path(workdir), '')
    assert (read.num_params, read.num_trained) == (plain + num, num)
  read = reading.read_run(pathlib.Path(base), '')
  assert (read.num_params, read.num_trained) == (plain, None)

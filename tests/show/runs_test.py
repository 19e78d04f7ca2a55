"""Tests of nanodlm.show.runs: reading of finished and broken workdirs."""

import json
import shutil

import jax
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from nanodlm.devices import lock
from nanodlm.show import runs
from nanodlm.training import checkpoint
from nanodlm.types import InputError
from tests.show.fake_runs import line_of, write_run


def test_incomplete_line_and_steps_written_twice(tmp_path):
  workdir = write_run(tmp_path / 'run', last=30, num_steps=100)
  lines = [
    # Killed after step 30, restarted from a checkpoint at step 10.
    'no json',
    json.dumps(line_of(20, loss=7.5)),
    json.dumps(line_of(30) | {'train/loss': None}),
    '{"step": 40, "train/lo',
  ]
  with open(workdir / 'metrics.jsonl', 'a') as file:
    file.write('\n'.join(lines))
  run = runs.read_run(workdir, 'run')
  assert run.curve('train/loss') == [(10, 2.5, 0), (20, 7.5, 0)]
  assert run.curve('train/loss', 3) == [(30, 2.5, 0), (60, 7.5, 0)]
  # The evaluation at step 30 belongs to the earlier attempt.
  assert [line['step'] for line in run.metrics] == [10, 20, 30]
  assert run.last_line('eval/nll') == {}
  assert run.problems == [
    'metrics.jsonl: lines [5] are not JSON objects',
    '1 values of metrics are not finite',
  ]


def test_state_by_the_lock(tmp_path):
  workdir = write_run(tmp_path / 'run', last=20, num_steps=30)
  state = lambda: runs.read_run(workdir, '').state
  assert state().startswith('stopped, last written 0:00:0')
  with lock.hold(str(workdir)):
    assert state().startswith('in progress, last written')
    write_run(workdir, last=30, num_steps=30)
    # The last evaluation may still be running.
    assert state().startswith('in progress')
  assert state() == 'finished'


def test_parameters_of_the_last_checkpoint(tmp_path):
  count = lambda: runs.read_run(tmp_path, '').num_params
  assert count() is None
  # A copy on each of several devices, which write a part of it each.
  replicated = jax.NamedSharding(jax.make_mesh((8,), ('x',)), P())
  params = {'a': {'b': jax.device_put(np.zeros((16, 4)), replicated)}}
  checkpoint.save_params(str(tmp_path), {**params, 'c': np.zeros(7)}, {}, {})
  saved = tmp_path / 'checkpoints'
  assert count() == 16 * 4 + 7
  # The last one counts; one of the folders is not complete.
  shutil.copytree(saved / '0', saved / '20')
  (saved / '300.tmp').mkdir()
  assert count() == 16 * 4 + 7
  (saved / '20' / 'params' / '_METADATA').write_text('{"tree_meta')
  assert count() is None
  shutil.rmtree(saved / '20')
  (saved / '0' / 'params' / 'manifest.ocdbt').write_bytes(b'x')
  assert count() is None


@pytest.mark.parametrize(
  'paths, names',
  [
    (['runs/a', 'runs/b/'], ['a', 'b']),
    (['x/a/1', 'y/a/1', 'y/a/2'], ['x/a/1', 'y/a/1', '2']),
    (['a'], ['a']),
  ],
)
def test_short_names(paths, names):
  assert runs.short_names(paths) == names


@pytest.mark.parametrize(
  'text, problem',
  [
    (None, 'no config.json'),
    ('{"train"', 'config.json is not a JSON object'),
    ('[1]', 'config.json is not a JSON object'),
    ('{"train": {"num_steps": "many"}}', "train.num_steps='many'"),
    ('{"seed": 1, "data": {"length": null}}', 'data.length=None'),
  ],
)
def test_broken_config(tmp_path, text, problem):
  workdir = write_run(tmp_path / 'run')
  (workdir / 'config.json').unlink()
  if text is not None:
    (workdir / 'config.json').write_text(text)
  run = runs.read_run(workdir, '')
  assert [problem in each for each in run.problems] == [True]
  assert run.curve('train/loss') and run.config in ({}, {'seed': 1})


def test_optional_files_and_changed_settings(tmp_path):
  workdir = write_run(tmp_path / 'run')
  assert runs.read_run(workdir, '').problems == []
  (workdir / 'eval.jsonl').write_text('{"step": 1}\n[]\n5\n')
  (workdir / 'samples.jsonl').mkdir()
  (workdir / 'config.until_step_20.json').write_text('{}')
  run = runs.read_run(workdir, '')
  assert run.evals == [{'step': 1}]
  for text in ('step 20', 'eval.jsonl: lines [2, 3]', 'samples.jsonl cannot'):
    assert any(text in problem for problem in run.problems), text


@pytest.mark.parametrize(
  'text',
  [
    '{',
    '[]',
    '{"judge": "a"}',
    '{"judge": "a", "runs": [{"workdir": 5, "nll": 1, "points": []}]}',
    '{"judge": "a", "runs": [{"workdir": "a", "nll": 1, "points": [{}]}]}',
  ],
)
def test_broken_comparison(tmp_path, text):
  workdir = write_run(tmp_path / 'a')
  (tmp_path / 'comparison.json').write_text(text)
  with pytest.raises(InputError, match=f'--compare={str(tmp_path)!r}'):
    runs.read_comparison(tmp_path)
  assert list(runs.find_comparisons([workdir])) == []

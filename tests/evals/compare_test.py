"""Tests of the comparison of runs: its numbers and its errors."""

import json
import types

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import objectives
from nanodlm import run as run_module
from nanodlm.evals import compare
from tests import launches, workdirs

DRAW = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
QUALITY = {
  'gen_ppl',
  'gen_bits_per_byte',
  'unigram_entropy',
  'sample_entropy',
  'distinct_1',
  'distinct_2',
  'distinct_3',
  'num_calls',
  'sampler',
  'tokens_per_call',
  'tokens_per_sec',
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  folder = tmp_path_factory.mktemp('runs')
  return (
    workdirs.make_workdir(folder / 'masked'),
    workdirs.make_workdir(folder / 'ar', objective__name='ar'),
  )


def run_main(workdirs_given, *args):
  given = f'--workdirs={",".join(map(str, workdirs_given))}'
  return launches.run_mode(compare, given, *args)


def plan(objective, names, steps, length=64, **sampler):
  """Returns (name, num_steps) of each point planned for an untrained run."""
  config = configs.load()
  config.objective.name = objective
  needs_time = objectives.OBJECTIVES[objective].needs_time
  config.model.time_conditioning = needs_time
  if objectives.OBJECTIVES[objective].any_length is True:
    config.data.crop = 'document'
  config.sampler.update(sampler)
  run = run_module.make_run(configs.make_settings(config), refit=True)
  request = compare.Request(names, steps, 4, 0, DRAW, 0)
  points = compare.plan_points(run, request, length)
  for point in points:
    assert point.items() >= DRAW.items()
    # Other rules than a number of steps are off.
    assert point['threshold'] == point['entropy_budget'] == 0
    run.with_sampler(point)
  return [(point['name'], point.get('num_steps')) for point in points]


def test_points():
  names = ('auto', 'ancestral', 'fixed_count', 'ar')
  assert plan('masked', names, (2, 8)) == [
    ('fixed_count', 2),
    ('fixed_count', 8),
    ('ancestral', 2),
    ('ancestral', 8),
  ]
  # A sampler without a number of steps gives one point.
  assert plan('ar', names, (2, 8)) == [('ar', None)]
  for objective, cls in objectives.OBJECTIVES.items():
    assert plan(objective, names, (2, 8))[0][0] == cls.default_sampler
  # 'auto' is a run's own sampler.
  own = {'name': 'confidence'}
  assert plan('masked', ('auto',), (8,), **own) == [('confidence', 8)]
  # A guided sampler has an inner one, but divides no steps among blocks.
  own = {'name': 'confidence', 'guidance': 2.0}
  assert plan('masked', ('confidence',), (8,), **own) == [('confidence', 8)]
  # A run's own blocks divide the steps.
  own = {'name': 'prefix_cache', 'block_size': 16}
  assert plan('masked', ('prefix_cache',), (8,), **own) == [('prefix_cache', 2)]
  # Four blocks of 16 share the calls, with at least one call each.
  assert plan('block', names, (2, 8)) == [('block', 1), ('block', 2)]
  # Two blocks of 32 share eight steps.
  stepped = [('prefix_cache', 4), ('confidence', 8)]
  assert plan('masked', ('prefix_cache', 'confidence'), (8,)) == stepped
  own = {'name': 'confidence', 'threshold': 0.9, 'num_steps': 0}
  assert plan('masked', ('confidence',), (8,), **own) == stepped[1:]


def test_two_runs(runs, tmp_path, capsys):
  output = tmp_path / 'comparison'
  status = run_main(
    runs,
    f'--output={output}',
    f'--judge={runs[1]}',
    '--samplers=auto',
    '--num_steps=2,4',
    '--num_samples=8',
    '--noplot',
  )
  assert status == 0
  table, messages = capsys.readouterr()
  assert table == (output / 'comparison.txt').read_text()
  assert 'Judge' in table and 'entropy' in table and 'temperature 1' in table
  assert messages.splitlines() == [
    f'{runs[0]}: fixed_count, 2 network calls, setting 1 of 2',
    f'{runs[0]}: fixed_count, 4 network calls, setting 2 of 2',
    f'{runs[1]}: ar, 16 network calls, setting 1 of 1',
  ]
  assert '{' not in table
  assert f'8 samples of {workdirs.LENGTH} tokens per line' in table
  results = json.loads((output / 'comparison.json').read_text())
  masked, ar = results['runs']
  assert (masked['is_exact'], ar['is_exact']) == (False, True)
  assert 0 < masked['nll_ci95'] < masked['nll']
  names = [point['sampler']['name'] for point in masked['points']]
  assert names == ['held-out text', 'fixed_count', 'fixed_count']
  calls = [point['num_calls'] for point in masked['points']]
  assert calls == [None, 2, 4]
  calls = [point['num_calls'] for point in ar['points']]
  assert calls == [None, workdirs.LENGTH]
  per_call = [point['tokens_per_call'] for point in masked['points']]
  assert per_call == [None, workdirs.LENGTH / 2, workdirs.LENGTH / 4]
  for point in masked['points'] + ar['points']:
    assert QUALITY <= set(point)
  # Both runs hold out the same text, which repeats itself.
  for run in (masked, ar):
    assert run['is_held_out'] and run['trained_share'] == 1
  assert 'trained on' in table and 'held out' in table
  assert masked['points'][0]['judge_trained_share'] == 1
  # On the held-out text, the judge nearly finds its own held-out value.
  assert abs(ar['points'][0]['gen_nll'] - ar['nll']) < 0.2
  # Apart from times, another comparison gives the same numbers.
  again = tmp_path / 'again'
  run_main(
    runs[:1],
    f'--output={again}',
    f'--judge={runs[1]}',
    '--samplers=fixed_count',
    '--num_steps=4',
    '--num_samples=8',
    '--noplot',
  )
  (first,) = json.loads((again / 'comparison.json').read_text())['runs']
  second = {**masked, 'points': [masked['points'][0], masked['points'][2]]}
  for result in (first, second):
    for point in result['points']:
      del point['tokens_per_sec']
  assert first == second
  # A folder with files is refused and stays as it is.
  before = (output / 'comparison.txt').read_text()
  assert run_main(runs, f'--output={output}') == 2
  assert 'not an empty folder' in capsys.readouterr().err
  assert (output / 'comparison.txt').read_text() == before


def test_mauve(runs, tmp_path, capsys, monkeypatch):
  pytest.importorskip('mauve')
  monkeypatch.setattr(compare, 'MIN_MAUVE_SAMPLES', 20)
  args = (f'--judge={runs[1]}', '--mauve', '--num_steps=4', '--noplot')
  output = tmp_path / 'new'
  ends = workdirs.make_workdir(tmp_path / 'ends', sampler__stop_at_eos=True)
  few = run_main(runs, f'--output={output}', *args, '--num_samples=40')
  assert few == 2 and '--num_samples=40' in capsys.readouterr().err
  assert not output.exists()
  assert not run_main([ends], f'--output={output}', *args, '--num_samples=30')
  table = capsys.readouterr().out
  assert 'MAUVE' in table and '3 clusters, seed 0' in table
  value = json.loads((output / 'comparison.json').read_text())
  assert 'mauve' in value['panels'] and value['request']['num_samples'] == 30
  real, sampled = value['runs'][0]['points']
  assert {'mauve_clusters': 3, 'mauve_seed': 0}.items() <= sampled.items()
  # The text repeats itself, and an untrained network writes noise.
  assert 0 < sampled['mauve'] < real['mauve'] <= 1 and real['mauve'] > 0.8


def test_settings_of_samples_without_samples_are_refused(
  runs, tmp_path, capsys
):
  assert run_main(runs, f'--output={tmp_path}/new', '--num_steps=4') == 2
  assert "--num_steps=['4'] is ignored without" in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_lengths():
  points = [
    {'num_calls': calls, 'length': length}
    for calls, length in ((None, 16), (4, 32), (8, 32), (None, 8))
  ]
  assert compare._lengths(points, True) == '32'
  assert compare._lengths(points, False) == '8, 16'


def test_common_source(runs, tmp_path):
  source = tmp_path / 'other.txt'
  source.write_text('Something else entirely, once more.\n' * 40)
  output = tmp_path / 'comparison'
  assert run_main(runs, f'--output={output}', f'--source=text:{source}') == 0
  results = json.loads((output / 'comparison.json').read_text())['runs']
  assert {result['source'] for result in results} == {f'text:{source}'}
  assert results[0]['num_examples'] == results[1]['num_examples']
  assert not results[0]['points']
  # All of another file is evaluated, 1,440 bytes and its end.
  assert results[0]['num_examples'] == -(-1441 // 16)
  assert {run['trained_share'] for run in results} == {0}


@pytest.mark.parametrize(
  'args, words',
  [
    (['--samplers=ar'], 'fits none of the runs'),
    (['--samplers=nope'], 'are not among'),
    (['--judge=lw'], "--judge='lw' is not 'law'"),
    (['--num_steps=0'], '--num_steps=0'),
    (['--num_steps=x,4'], '--num_steps=x,4'),
    (['--judge=MASKED'], 'must be autoregressive'),
    (['--output='], 'needs --output'),
    (['--judge=MASKED', '--seed=4294967296'], '--seed=4294967296'),
    (['--mauve'], '--mauve=True'),
    (['--mauve', '--judge=MASKED', '--num_samples=499'], '--num_samples=499'),
    (['--mauve', '--judge=law', '--num_samples=500'], "--judge='law'"),
  ],
)
def test_refused(runs, tmp_path, capsys, args, words):
  args = [arg.replace('MASKED', runs[0]) for arg in args]
  assert run_main(runs[:1], f'--output={tmp_path}/new', '--noplot', *args) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_one_run_under_two_names(runs, tmp_path, capsys):
  (tmp_path / 'link').symlink_to(runs[0])
  given = runs[1], runs[0], tmp_path / 'link'
  assert run_main(given, f'--output={tmp_path}/new') == 2
  assert f"'{tmp_path}/link' is also {runs[0]!r}" in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


@pytest.mark.parametrize('padding', ['eos', 'masked'])
def test_common_source_of_pairs(tmp_path, padding):
  rows = [{'prompt': f'{i} is', 'response': f' {i}.'} for i in range(40)]
  path = tmp_path / 'rows.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  source = f'pairs:{path}'
  workdir = workdirs.make_workdir(
    tmp_path, data__source=source, data__padding=padding
  )
  own, common = (
    compare._open_settings([workdir], x)[0].data for x in ('', source)
  )
  assert own == common and common.padding == padding


def test_ends_of_texts():
  rows = np.array([[1, 2, 256, 3, 256, 256], [256] * 6, [1, 2, 3, 4, 5, 6]])
  # A conversation ends after the last of its messages.
  for is_chat, sizes in (True, [5, 1, 6]), (False, [3, 1, 6]):
    data = types.SimpleNamespace(has_documents=True, is_chat=is_chat)
    run = types.SimpleNamespace(
      settings=types.SimpleNamespace(data=data),
      tokenizer=types.SimpleNamespace(eos_ids=(256,)),
    )
    assert list(map(len, compare._cut_ends(run, rows))) == sizes


def test_folder_without_a_run(tmp_path, capsys):
  assert run_main([tmp_path], f'--output={tmp_path}/new') == 2
  assert f"'{tmp_path}' is not the folder of a run" in capsys.readouterr().err


def test_plot(tmp_path):
  point = {
    'sampler': {'name': 'a'},
    'num_calls': 4,
    'gen_bits_per_byte': 2.0,
    'gen_bits_per_byte_ci95': 0.1,
    'sample_entropy': 3.0,
  }
  real = {**point, 'sampler': {'name': 'held-out text'}, 'num_calls': None}
  path = tmp_path / 'curves.png'
  compare.plot_curves(
    [{'workdir': 'x/run', 'points': [real, point]}],
    {'gen_bits_per_byte': 'bits/byte', 'sample_entropy': 'entropy'},
    path,
  )
  assert path.read_bytes()[:4] == b'\x89PNG'

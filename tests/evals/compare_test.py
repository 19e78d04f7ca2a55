"""The comparison: every number that belongs to a point, and what is refused."""

import json

from absl import flags
from absl.testing import flagsaver
import pytest

from nanodlm import samplers
from nanodlm.evals import compare

# First: where it is imported later (docs_test), its flags replace compare's.
from tests import workdirs

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
  'tokens_per_sec',
}


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  folder = tmp_path_factory.mktemp('runs')
  return (
    workdirs.make_workdir(folder / 'masked'),
    workdirs.make_workdir(folder / 'ar', objective__name='ar'),
  )


def run_main(workdirs_given, **values):
  with flagsaver.flagsaver(**values):
    return compare.main(['compare', *workdirs_given])


def test_points():
  request = compare.Request(
    ('auto', 'ancestral', 'fixed_count', 'ar'), (2, 8), 4, 0, DRAW, 0
  )
  points = compare.plan_points('masked', request, 64)
  assert [(p['name'], p['num_steps']) for p in points] == [
    ('fixed_count', 2),
    ('fixed_count', 8),
    ('ancestral', 2),
    ('ancestral', 8),
  ]
  # A sampler without a number of steps is one point.
  assert compare.plan_points('ar', request, 64) == [{'name': 'ar', **DRAW}]
  for objective, default in samplers.DEFAULTS.items():
    assert compare.plan_points(objective, request, 64)[0]['name'] == default
  # Each of the four blocks of 16 takes its share, at least one call.
  assert [
    p['num_steps'] for p in compare.plan_points('block', request, 64, 16)
  ] == [1, 2]
  stepped = compare.Request(('prefix_cache', 'confidence'), (8,), 4, 0, DRAW, 0)
  stale, confident = compare.plan_points('masked', stepped, 64)
  assert stale['num_steps'] == 4  # two blocks of 32
  assert (confident['num_steps'], confident['threshold']) == (8, 0.0)


def test_two_runs(runs, tmp_path, capsys):
  output = tmp_path / 'comparison'
  status = run_main(
    runs,
    output=str(output),
    judge=runs[1],
    samplers=['auto'],
    num_steps=['2', '4'],
    num_samples=8,
    plot=False,
  )
  assert status == 0
  table = capsys.readouterr().out
  assert table == (output / 'comparison.txt').read_text()
  assert 'Judge' in table and 'entropy' in table and 'temperature' in table
  results = json.loads((output / 'comparison.json').read_text())
  masked, ar = results['runs']
  assert (masked['is_exact'], ar['is_exact']) == (False, True)
  assert 0 < masked['nll_ci95'] < masked['nll']
  names = [point['sampler']['name'] for point in masked['points']]
  assert names == ['held-out text', 'fixed_count', 'fixed_count']
  calls = [point['num_calls'] for point in masked['points']]
  assert calls == [0, 2, 4]
  assert [point['num_calls'] for point in ar['points']] == [0, workdirs.LENGTH]
  for point in masked['points'] + ar['points']:
    assert QUALITY <= set(point)
  # The judge on the text of its own evaluation: nearly its own held-out value.
  assert abs(ar['points'][0]['gen_nll'] - ar['nll']) < 0.2
  # The same again, times apart; and nothing is overwritten.
  again = tmp_path / 'again'
  run_main(
    runs[:1],
    output=str(again),
    judge=runs[1],
    samplers=['fixed_count'],
    num_steps=['4'],
    num_samples=8,
    plot=False,
  )
  (first,) = json.loads((again / 'comparison.json').read_text())['runs']
  second = {**masked, 'points': [masked['points'][0], masked['points'][2]]}
  for result in (first, second):
    for point in result['points']:
      del point['tokens_per_sec']
  assert first == second
  before = (output / 'comparison.txt').read_text()
  assert run_main(runs, output=str(output)) == 2
  assert 'not an empty folder' in capsys.readouterr().err
  assert (output / 'comparison.txt').read_text() == before


def test_settings_of_samples_that_nobody_asked_for(runs, tmp_path, capsys):
  with flagsaver.as_parsed(output=str(tmp_path / 'new'), num_steps='4'):
    assert compare.main(['compare', *runs]) == 2
  assert "--num_steps=['4'] has no effect without" in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()


def test_common_source(runs, tmp_path):
  source = tmp_path / 'other.txt'
  source.write_text('Something else entirely, once more.\n' * 40)
  output = tmp_path / 'comparison'
  assert run_main(runs, output=str(output), source=f'text:{source}') == 0
  results = json.loads((output / 'comparison.json').read_text())['runs']
  assert {result['source'] for result in results} == {f'text:{source}'}
  assert results[0]['num_examples'] == results[1]['num_examples']
  assert not results[0]['points']  # no samples were asked for


@pytest.mark.parametrize(
  'values, words',
  [
    ({'samplers': ['ar']}, 'fits none of the runs'),
    ({'samplers': ['nope']}, 'are not among'),
    ({'num_steps': ['0']}, '--num_steps=0'),
    ({'num_steps': ['x', '4']}, '--num_steps=x,4'),
    ({'judge': 'MASKED'}, 'must be autoregressive'),
    ({'output': None}, '--output is needed'),
  ],
)
def test_refused(runs, tmp_path, capsys, values, words):
  values = {'output': str(tmp_path / 'new'), 'plot': False, **values}
  if values.get('judge'):
    values['judge'] = runs[0]
  assert run_main(runs[:1], **values) == 2
  assert words in capsys.readouterr().err
  assert not (tmp_path / 'new').exists()
  assert run_main([str(tmp_path)], output=str(tmp_path / 'new')) == 2


def test_plot(tmp_path):
  pytest.importorskip('matplotlib')
  point = {
    'sampler': {'name': 'a'},
    'num_calls': 4,
    'gen_bits_per_byte': 2.0,
    'gen_bits_per_byte_ci95': 0.1,
    'sample_entropy': 3.0,
  }
  real = {**point, 'sampler': {'name': 'held-out text'}, 'num_calls': 0}
  path = tmp_path / 'curves.png'
  compare.plot_curves(
    [{'workdir': 'x/run', 'points': [real, point]}], 'judge', path
  )
  assert path.read_bytes()[:4] == b'\x89PNG'


def test_plot_without_matplotlib(runs, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(compare.importlib.util, 'find_spec', lambda name: None)
  output = tmp_path / 'new'
  assert (
    run_main(
      runs[:1],
      output=str(output),
      samplers=['auto'],
      num_steps=['4'],
      num_samples=8,
    )
    == 0
  )
  assert 'no curves.png' in capsys.readouterr().err
  assert sorted(path.name for path in output.iterdir()) == [
    'comparison.json',
    'comparison.txt',
  ]

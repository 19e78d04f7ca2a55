"""Tests of studies: what they train, measure, remember and refuse."""

import dataclasses
import json
import math
import os
import signal
import statistics

import jax
import pytest

from nanodlm import config as configs
from nanodlm import evaluate, laws, train
from nanodlm import lm as lms
from nanodlm.data.sources import stories
from nanodlm.evals import compare, study
from nanodlm.types import InputError
from tests import launches
from tests.data.stories_test import TINY

FILE = """
from nanodlm import config as configs

VARIANTS = {
  'masked': {'objective.name': 'masked'},
  'left_to_right': {'objective.name': 'ar'},
}

def get_config(name='masked'):
  config = configs.load('base')
  config.data.update(
    source='stories:small:0-480', eval_source='stories:small:500-532',
    crop='document', length=112, data_dir=DATA_DIR)
  config.tokenizer.update(name='sentencepiece', vocab_size=512)
  config.model.update(
    num_layers=1, embed_dim=16, num_heads=2, mlp_dim=32, unroll=True)
  config.train.update(
    batch_size=16, num_steps=2, eval_every_steps=1, num_samples=0)
  config.eval.update(num_draws=2, max_examples=16)
  config.checkpoint.update(every_steps=1, max_to_keep=9)
  config.sampler.num_steps = 2
  return configs.vary(config, VARIANTS, name)
"""
FLAGS = (
  '--seeds=3,5',
  '--num_steps=1,2',
  '--num_samples=2',
  '--infill=0.1',
  '--infill_examples=4',
  '--noplot',
)


@pytest.fixture(scope='module', autouse=True)
def tiny_world():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stories, 'WORLDS', {'small': TINY})
    patch.setattr(laws, 'NUM_REFERENCES', 200)
    # Small programs are not compiled again.
    patch.setattr(jax, 'clear_caches', lambda: None)
    yield


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp('study')
  text = FILE.replace('DATA_DIR', repr(str(folder / 'data')))
  (folder / 'pair.py').write_text(text)
  return folder


def start(folder, *args, changes=None, path='pair.py'):
  """Returns the exit status of --mode=study; `path` is its config."""
  given = configs.Start(
    'study', '', configs.load(), True, changes or {}, str(folder / path)
  )
  output = f'--output={folder / "out"}'
  return launches.run_mode(study, *FLAGS, output, *args, start=given)


@pytest.fixture(scope='module')
def finished(folder):
  """A study that is interrupted in its second run, and started again."""
  read = train.TextBatches.__call__
  read_at = []

  def read_and_interrupt(self, state, step):
    read_at.append(step)
    if len(read_at) == 3:
      os.kill(os.getpid(), signal.SIGTERM)
    return read(self, state, step)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(train.TextBatches, '__call__', read_and_interrupt)
    assert start(folder) == 128 + signal.SIGTERM
    partial = json.loads((folder / 'out' / 'study.json').read_text())
    assert start(folder) == 0
  # Two steps of each run, none of them twice.
  assert read_at == [0, 1] * 4
  assert [run['variant'] for run in partial['runs']] == ['masked']
  return folder


def read(finished):
  return json.loads((finished / 'out' / 'study.json').read_text())


def answers(finished, run):
  """The results in the file of a run, by what they are of."""
  text = (finished / 'out' / run / 'measured.json').read_text()
  found = {}
  for entry in json.loads(text):
    assert entry['asked'].pop('step') == 2
    found.setdefault(entry['asked']['what'], []).append(entry['result'])
  return found


def test_means_are_those_of_the_runs(finished):
  value = read(finished)
  order = [(run['variant'], run['seed']) for run in value['runs']]
  names = ('masked', 'left_to_right')
  assert order == [(name, seed) for seed in (3, 5) for name in names]
  for summary, name in zip(value['variants'], names, strict=True):
    runs = [answers(finished, f'{name}-seed{seed}') for seed in (3, 5)]
    assert summary['seed'] == [3, 5]
    for key in ('nll', 'excess_nats', 'nats_per_document'):
      a, b = (run['bound'][0][key] for run in runs)
      assert summary[key] == pytest.approx((a + b) / 2)
      assert summary[f'{key}_low'] == min(a, b) < summary[f'{key}_high']
      assert f'{key}_ci95' not in summary
    samples = [run['samples'] for run in runs]
    # The held-out text is shown once.
    points = (samples[0][0], *summary['points'])[-len(samples[0]) :]
    assert len(points) == (2 if name == 'left_to_right' else 3)
    for a, b, point in zip(*samples, points):
      assert point['num_calls'] == a['num_calls'] == b['num_calls']
      mean = (a['sample_entropy'] + b['sample_entropy']) / 2
      assert point['sample_entropy'] == pytest.approx(mean)
  masked, other = value['variants']
  filled = [
    answers(finished, f'masked-seed{seed}')['infilling'][0] for seed in (3, 5)
  ]
  # The gaps are the same.
  assert filled[0][0]['bayes_accuracy'] == masked['infill'][0]['bayes_accuracy']
  assert [gap['pattern'] for gap in masked['infill']] == ['uniform', 'span']
  assert other['infill'] == []
  texts = [p['num_calls'] for v in value['variants'] for p in v['points']]
  assert texts == [None, 1, 2, 112]
  table = (finished / 'out' / 'study.txt').read_text()
  low, high = masked['nll_low'], masked['nll_high']
  assert f'{masked["nll"]:.4f} ({low:.4f} to {high:.4f})' in table


def test_curves_are_in_epochs(finished):
  value = read(finished)
  for run in value['runs']:
    # 480 stories in batches of 16.
    points = [(point['step'], point['epochs']) for point in run['curve']]
    # The second run was interrupted before its first evaluation.
    is_whole = run is not value['runs'][1]
    assert points == [(1, 1 / 30), (2, 2 / 30)][not is_whole :]
    workdir = finished / 'out' / f'{run["variant"]}-seed{run["seed"]}'
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    found = {
      key: value for line in lines for key, value in json.loads(line).items()
    }
    # The whole point of step 2 is on the same 16 stories as that of step 1.
    lm = lms.load(str(workdir))
    text = evaluate.open_text(lm)
    means = evaluate.make_evaluate(lm.run, text.packed)(lm.params, 16)
    by_step = {2: means['eval_subset/excess_nats']}
    if is_whole:
      by_step[1] = found['eval_subset/excess_nats']
    for point in run['curve']:
      assert point['excess_nats'] == pytest.approx(by_step[point['step']])
    assert run['lowest'] == pytest.approx(min(by_step.values()))
    assert run['lowest_at'] == min(by_step, key=by_step.get) / 30
    assert run['excess_nats'] == pytest.approx(found['eval/excess_nats'], 1e-5)
    assert run['excess_nats'] != pytest.approx(by_step[2])
  curve, short = (variant['curve'] for variant in value['variants'])
  assert [point['step'] for point in short] == [2]
  ends = [run['curve'][1]['excess_nats'] for run in value['runs'][::2]]
  assert curve[1]['excess_nats'] == pytest.approx(statistics.fmean(ends))
  assert curve[1]['excess_nats_high'] == max(ends)


def test_nothing_is_done_twice(finished, monkeypatch):
  table = (finished / 'out' / 'study.txt').read_text()
  calls = []

  def sample(lm, *args):
    calls.append(lm.run.sampler_name)
    return sample_point(lm, *args)

  sample_point = compare.sample_point
  monkeypatch.setattr(compare, 'sample_point', sample)
  monkeypatch.setattr(train, 'train', None)
  monkeypatch.setattr(compare, 'measure_bound', lambda *args: 1 / 0)
  assert start(finished) == 0
  assert not calls and (finished / 'out' / 'study.txt').read_text() == table
  # Another request samples what is missing alone.
  assert start(finished, '--num_steps=1,4', '--plot') == 0
  assert calls == ['fixed_count'] * 2
  points = read(finished)['variants'][0]['points']
  assert [point['num_calls'] for point in points] == [None, 1, 4]
  assert (finished / 'out' / 'study.png').read_bytes()[:4] == b'\x89PNG'
  assert start(finished) == 0
  assert (finished / 'out' / 'study.txt').read_text() == table
  # A part of it.
  args = '--variants=left_to_right', '--seeds=5'
  assert start(finished, *args) == 0
  (summary,) = read(finished)['variants']
  assert (
    summary['nll']
    == answers(finished, 'left_to_right-seed5')['bound'][0]['nll']
  )
  assert summary['nll_ci95'] > 0
  assert start(finished) == 0


def test_a_text_that_has_changed(finished, monkeypatch, capsys):
  world = dataclasses.replace(TINY, openings=('Some day',))
  monkeypatch.setattr(stories, 'WORLDS', {'small': world})
  assert start(finished) == 2
  assert 'has changed' in capsys.readouterr().err


def test_the_best_checkpoint(finished, monkeypatch):
  # As if the first evaluation had been better.
  point = {'step': 1, 'epochs': 1.0, 'excess_nats': -1.0}
  curve = [point, {**point, 'step': 2, 'excess_nats': 0.0}]
  monkeypatch.setattr(study, 'learning_curve', lambda *args: curve)
  args = ('--variants=masked', '--seeds=3', '--num_steps=1', '--infill=')
  assert start(finished, *args, '--checkpoint=best') == 0
  (summary,) = read(finished)['variants']
  assert (summary['step'], summary['lowest']) == (1, -1.0)
  path = finished / 'out' / 'masked-seed3' / 'measured.json'
  entries = json.loads(path.read_text())
  kept = [entry for entry in entries if entry['asked']['step'] == 2]
  assert len(kept) < len(entries)
  path.write_text(json.dumps(kept))
  assert start(finished) == 0


def test_runs_that_fail_are_left_out(finished, monkeypatch, capsys):
  is_trained = lambda workdir: workdir.endswith('seed3')
  monkeypatch.setattr(study, '_is_trained', is_trained)
  monkeypatch.setattr(train, 'main', lambda start: 1)
  assert start(finished) == 1
  value = read(finished)
  assert [run['seed'] for run in value['runs']] == [3, 3]
  assert 'left_to_right' in capsys.readouterr().out
  monkeypatch.undo()
  assert start(finished) == 0


@pytest.mark.slow
def test_a_variant_that_starts_from_another(finished, tmp_path):
  student = (
    "'student': {'checkpoint.init_from': 'masked', 'distill.name': 'sdtt',"
    "'distill.num_steps': 4, 'distill.round_steps': 1},\n"
  )
  text = (finished / 'pair.py').read_text()
  path = tmp_path / 'student.py'
  path.write_text(text.replace("  'left", f"  {student}  'left"))
  one = configs.Start('study', '', configs.load(), True, {}, str(path))
  plan = lambda output: study.plan_members(one, output, ['student'], ['5'])
  (member,) = plan(str(finished / 'out'))
  teacher = str(finished / 'out' / 'masked-seed5')
  assert member.settings.checkpoint.init_from == teacher
  assert train.main(member.start) == 0
  with pytest.raises(InputError, match="'student' starts from 'masked'"):
    plan(str(tmp_path / 'out'))
  path.write_text(text.replace("  'masked': {", f"  {student}  'masked': {{"))
  with pytest.raises(InputError, match='must come before it'):
    plan(str(finished / 'out'))


def test_summaries():
  summarize = study.summarize
  one = {'a': 1.0, 'a_ci95': 0.5, 'n': 2, 'name': 'x', 'list': [{'b': 1}]}
  assert summarize([one]) == one
  two = {
    'a': 4.0,
    'a_ci95': 0.1,
    'n': 2,
    'name': 'x',
    'list': [{'b': 3, 'c': 5}],
  }
  assert summarize([one, two]) == {
    'a': 2.5,
    'a_low': 1.0,
    'a_high': 4.0,
    'n': 2,
    'name': 'x',
    'list': [{'b': 2.0, 'b_low': 1, 'b_high': 3, 'c': 5}],
  }
  # Samples of one seed alone may be possible.
  nats = summarize([{'law_nats': None}, {'law_nats': 3.0}, {}])
  assert nats == {'law_nats': 3.0}


@pytest.mark.parametrize(
  'args, changes, words',
  [
    (['--seeds=1,1'], {}, '--seeds=1,1'),
    (['--seeds=x'], {}, '--seeds=x'),
    (['--variants=masked,typo'], {}, "--variants=['typo']"),
    (['--infill=2'], {}, "--infill='2'"),
    (['--samplers=posterior,block'], {}, '--samplers=block fits none'),
    ([], {'seed': 1}, '--config.seed=1'),
    ([], {'objective.name': 'ar'}, "--config.objective.name='ar'"),
    ([], {'train.num_steps': 3}, 'train.num_steps: 2 saved, 3 now'),
    ([], {'data.crop': 'nope'}, "data.crop='nope'"),
    (['--output='], {}, 'needs --output'),
  ],
)
def test_refused(finished, capsys, args, changes, words):
  before = sorted((finished / 'out').rglob('*'))
  assert start(finished, *args, changes=changes) == 2
  assert words in capsys.readouterr().err
  assert sorted((finished / 'out').rglob('*')) == before


def test_other_files_and_folders(finished, tmp_path, capsys):
  (finished / 'none.py').write_text('VARIANTS = ()')
  (finished / 'other.py').write_text((finished / 'pair.py').read_text())
  (tmp_path / 'notes.txt').write_text('')
  for path, output, words in (
    ('none.py', tmp_path / 'new', 'none.py'),
    ('pair.py:masked', tmp_path / 'new', '--variants'),
    ('pair.py', tmp_path, f'--output={str(tmp_path)!r}'),
    ('other.py', finished / 'out', "'pair', not of 'other'"),
  ):
    assert start(finished, f'--output={output}', path=path) == 2
    assert words in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['notes.txt']


@pytest.mark.slow
def test_text_whose_law_is_unknown(folder, tmp_path, capsys):
  source, other = tmp_path / 'text.txt', tmp_path / 'other.txt'
  source.write_text('The quick brown fox jumps over the lazy dog.\n' * 200)
  other.write_text('Pack my box with five dozen liquor jugs.\n' * 20)
  changes = {
    'data.source': f'text:{source}',
    'data.eval_source': f'text:{other}',
    'eval.max_examples': 0,
    'data.crop': 'chunk',
    'data.length': 16,
    'tokenizer.name': 'bytes',
    'tokenizer.vocab_size': 0,
  }
  args = ('--seeds=0', '--variants=masked', f'--output={tmp_path / "out"}')
  assert start(folder, *args, changes=changes) == 2
  # Nothing is sampled, since nothing could judge the samples.
  assert 'is ignored without --samplers' in capsys.readouterr().err
  args += ('--samplers=auto',)
  assert start(folder, *args, changes=changes) == 0
  value = json.loads((tmp_path / 'out' / 'study.json').read_text())
  (summary,) = value['variants']
  curve = [point['nll'] for point in summary['curve']]
  assert summary['lowest'] == min(curve) and len(curve) == 2
  assert math.isclose(curve[-1], summary['nll'], rel_tol=1e-5)
  assert summary['source'] == f'text:{other}'
  assert 'excess_nats' not in summary
  assert summary['points'][1].keys() >= {'sample_entropy'}
  assert summary['infill'][0]['unit'] == 'token'
  table = (tmp_path / 'out' / 'study.txt').read_text()
  assert 'law' not in table and 'nats/token.' in table

"""The launcher as people use it: real processes, killed, resumed, misused."""

import io
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from nanodlm import __main__ as command_line
from nanodlm.data.tokenizers import base
from nanodlm.training import checkpoint
from tests import launches
from tests.launches import launch, ROOT, start

TINY = '--config=configs/tiny.py'
# Enough steps to be killed in the middle of, in a few seconds.
LONG = (
  TINY,
  '--config.train.num_steps=120',
  '--config.train.eval_every_steps=0',
  '--config.checkpoint.every_steps=10',
  '--config.train.num_samples=0',
  '--config.checkpoint.max_to_keep=100',
  '--config.eval.max_examples=8',
)


@pytest.fixture(scope='module', autouse=True)
def data_dir(tmp_path_factory):
  """One prepared dataset for all processes of this file."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('NANODLM_DATA_DIR', str(tmp_path_factory.mktemp('data')))
    yield


def wait_for(condition, process):
  for _ in range(3000):
    if condition():
      return
    assert process.poll() is None, process.communicate()[0]
    time.sleep(0.02)
  raise AssertionError('never happened')


def arrays(workdir, step, items=('params', 'ema_params', 'rest')):
  """Every array of a checkpoint, by name."""
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    found = {}
    for item in items:
      tree = manager.restore(
        step,
        args=checkpoint.ocp.args.Composite(
          **{item: checkpoint.ocp.args.StandardRestore()}
        ),
      )[item]
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found[item + jax.tree_util.keystr(path)] = np.asarray(leaf)
    return found


def assert_identical(a, b):
  assert a.keys() == b.keys()
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def metric_lines(workdir):
  with open(workdir / 'metrics.jsonl') as file:
    return [json.loads(line) for line in file]


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """A run of LONG that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('runs') / 'finished'
  # By the command that people type, not forked.
  status, output = launch(*LONG, f'--workdir={workdir}', prefix=('env',))
  assert status == 0, output
  return workdir, output


def test_train_leaves_what_people_look_for(finished):
  workdir, output = finished
  names = {path.name.strip('.').split('.')[0] for path in workdir.iterdir()}
  # No compiled programs, since a workdir may come from other people.
  assert names == {
    'config',
    'metrics',
    'checkpoints',
    'events',
    'tokenizer',
    'trained_on',
    'lock',
  }
  assert list(
    pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR']).glob('jit_step*')
  )
  for words in (
    'nats/token',
    'bits/byte',
    'tokens/s',
    ' left',
    'held-out bound',
  ):
    assert words in output
  assert 'Traceback' not in output
  lines = metric_lines(workdir)
  losses = [line['train/loss'] for line in lines if 'train/loss' in line]
  assert len(losses) == 12
  assert losses[-1] < losses[0] - 1.0  # it learns
  (held_out,) = [line for line in lines if 'eval/nll' in line]
  assert 0 < held_out['eval/nll_ci95'] < held_out['eval/nll'] < losses[0]
  config = json.loads((workdir / 'config.json').read_text())
  assert config['model']['embed_dim'] == 64
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    meta = checkpoint.restore_meta(manager, 120)
  assert meta['data'].pop('fingerprint')
  assert meta['data'] == {'step': 120, 'example': 120 * 8}
  assert meta['config'] == config


def test_a_finished_run_is_not_evaluated_again(finished):
  workdir, _ = finished
  before = (workdir / 'metrics.jsonl').read_bytes()
  status, output = launch(f'--workdir={workdir}')
  assert status == 0, output
  assert '120 of train.num_steps=120' in output
  assert f'--mode=sample --workdir={workdir}' in output
  assert (workdir / 'metrics.jsonl').read_bytes() == before


@pytest.mark.parametrize(
  'number',
  [
    signal.SIGTERM,
    pytest.param(signal.SIGKILL, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, marks=pytest.mark.slow),
  ],
)
def test_interrupted_run_ends_bit_identical(finished, tmp_path, number):
  reference, _ = finished
  workdir = tmp_path / 'run'
  process = start(*LONG, f'--workdir={workdir}')
  checkpoints = workdir / 'checkpoints'
  # Any moment will do: the kill lands during a step, or during a save.
  wait_for((checkpoints / '20').exists, process)
  process.send_signal(number)
  output, _ = process.communicate(timeout=120)
  if number == signal.SIGKILL:
    assert process.returncode == -signal.SIGKILL
  else:
    assert process.returncode == 128 + number, output
    assert 'saving a checkpoint' in output
  steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdigit())
  assert 20 <= steps[-1] < 120, 'not interrupted in the middle'
  status, output = launch(*LONG, f'--workdir={workdir}')
  assert status == 0, output
  assert f'at step {steps[-1]}' in output
  assert_identical(arrays(reference, 120), arrays(workdir, 120))


def test_eval_and_sample_need_only_the_workdir(finished):
  workdir, output = finished
  status, output = launch('--mode=eval', f'--workdir={workdir}')
  assert status == 0, output
  (trained,) = [line for line in metric_lines(workdir) if 'eval/nll' in line]
  evaluated = json.loads((workdir / 'eval.jsonl').read_text())
  assert evaluated['step'] == 120
  assert evaluated['eval/nll'] == pytest.approx(trained['eval/nll'], rel=1e-6)
  args = (
    '--mode=sample',
    f'--workdir={workdir}',
    '--prompt=import {} as {5}.',
    '--config.sampler.num_samples=2',
    '--config.sampler.num_steps=8',
  )
  status, output = launch(*args)
  assert status == 0, output
  samples = [
    json.loads(line)
    for line in (workdir / 'samples.jsonl').read_text().splitlines()
  ]
  assert len(samples) == 2
  for sample in samples:
    assert bytes(sample['tokens'][:7]) == b'import '
    assert sample['num_calls'] == 8
    assert sample['tokens_per_call'] == 52 / 8
    assert 257 not in sample['tokens']
    assert base.escape_controls(sample['text']) in output


def test_ended_evaluation_says_so(finished):
  workdir, _ = finished
  files = lambda: {path: path.read_bytes() for path in workdir.glob('*.json*')}
  before = files()
  process = start(
    '--mode=eval',
    f'--workdir={workdir}',
    '--config.data.source=text:*.md',
    '--config.eval.num_draws=100000',
  )
  wait_for(lambda: 'evaluating on' in process.output, process)
  process.send_signal(signal.SIGTERM)
  output, _ = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert output.splitlines()[-1] == 'interrupted by SIGTERM'
  assert files() == before


@pytest.mark.slow
def test_starts_from_another_runs_weights(finished, tmp_path):
  reference, _ = finished
  status, output = launch(
    TINY,
    f'--workdir={tmp_path}/run',
    '--config.train.num_steps=1',
    '--config.optim.learning_rate=1e-9',
    '--config.train.num_samples=0',
    '--config.optim.ema_decay=0.0',
    '--config.eval.max_examples=8',
    f'--config.checkpoint.init_from={reference}',
    '--config.checkpoint.init_step=120',
  )
  assert status == 0, output
  ours, theirs = arrays_of_params(tmp_path / 'run', 1), arrays(reference, 120)
  for name, value in ours.items():
    np.testing.assert_allclose(value, theirs['ema_params' + name], atol=1e-6)


@pytest.mark.slow
def test_fine_tunes_on_pairs_and_answers(finished, tmp_path):
  workdir = tmp_path / 'run'
  pairs = tmp_path / 'pairs.jsonl'
  pairs.write_text(
    ''.join(
      json.dumps({'prompt': f'{{{i}}}?', 'response': 'yes'}) + '\n'
      for i in range(30)
    )
  )
  status, output = launch(
    TINY,
    f'--workdir={workdir}',
    f'--config.data.source=pairs:{pairs}',
    '--config.train.num_steps=40',
    '--config.train.eval_every_steps=0',
    '--config.optim.ema_decay=0.0',
    '--config.optim.learning_rate=3e-3',
    f'--config.checkpoint.init_from={finished[0]}',
  )
  assert status == 0, output
  assert re.search(r'sample:\n    \{\d+\}\?', output)  # after a held-out prompt
  (events,) = workdir.glob('events.out.tfevents.*')
  for tag in (
    b'samples/reveal_order',
    b'params/last_layer/query/kernel',
    b'_hparams_',
    b'"num_layers": 2',
  ):
    assert tag in events.read_bytes()
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text('{"prompt": "{{7}}?"}\n{"prompt": "{{8}}?"}\n')
  status, output = launch(
    '--mode=sample',
    f'--workdir={workdir}',
    f'--prompt_file={prompts}',
    '--config.sampler.num_samples=2',
  )
  assert status == 0, output
  in_training, *samples = [
    json.loads(line)
    for line in (workdir / 'samples.jsonl').read_text().splitlines()
  ]
  assert in_training['step'] == 40
  assert in_training['prompt'].startswith('{{')  # As in --prompt.
  assert [s['shown'][:4] for s in samples] == ['{7}?'] * 2 + ['{8}?'] * 2
  # Most of what it was trained on is padding.
  assert sum(256 in s['tokens'] for s in samples) > 1, output
  for s in samples:
    end = [*s['tokens'], 256].index(256)
    assert len(s['tokens']) == 64
    assert s['text'].startswith(s['shown'])
    assert base.escape_controls(s['shown']) in output
    assert end == 64 or f'ends after {end} of 64 tokens' in output


def arrays_of_params(workdir, step):
  with checkpoint.open_manager(workdir, read_only=True) as manager:
    tree = manager.restore(
      step,
      args=checkpoint.ocp.args.Composite(
        params=checkpoint.ocp.args.StandardRestore()
      ),
    )['params']
  return {
    jax.tree_util.keystr(path): np.asarray(leaf)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


@pytest.mark.parametrize(
  'named, args',
  [
    (
      "--config.model.num_layer: unknown key; did you mean 'num_layers'?",
      ['--config.model.num_layer=2'],
    ),
    (
      '--config.train.learning_rate: unknown key; did you mean '
      'config.optim.learning_rate?',
      ['--config.seed=2', '--config.train.learning_rate=1'],
    ),
    (
      "--config.optimizer.name: unknown section 'optimizer'; did you mean "
      "'optim'?",
      ['--config.optimizer.name=adamw'],
    ),
    ('model.num_heads=3', ['--config.model.num_heads=3']),
    ('/no/such/*.txt', ['--config.data.source=text:/no/such/*.txt']),
    ('lm1b', ['--config.data.source=tfds:lm1b']),
    ('data.length', ['--config.data.length=1000000']),
    (
      'README.md',
      [
        '--config.tokenizer.name=sentencepiece',
        '--config.tokenizer.path=README.md',
      ],
    ),
    ('/no/such/run', ['--config.checkpoint.init_from=/no/such/run']),
  ],
)
def test_bad_setting_is_named_before_anything_is_written(tmp_path, named, args):
  workdir = tmp_path / 'run'
  status, output = launch(TINY, f'--workdir={workdir}', *args)
  assert status not in (0, None)
  assert named in output
  assert 'Traceback' not in output
  assert not workdir.exists()


@pytest.mark.slow
def test_full_disk_ends_the_run_and_keeps_its_checkpoints(tmp_path):
  workdir = tmp_path / 'run'
  args = (
    TINY,
    f'--workdir={workdir}',
    '--config.train.num_samples=0',
    '--config.eval.max_examples=8',
    '--config.train.eval_every_steps=0',
    '--config.checkpoint.every_steps=5',
  )
  status, output = launch(*args, '--config.train.num_steps=5')
  assert status == 0, output
  before = arrays(workdir, 5)
  # No file may grow past 100 kB from here on, as on a disk that is full.
  status, output = launch(
    *args,
    '--config.train.num_steps=40',
    prefix=('bash', '-c', 'ulimit -f 100; exec "$0" "$@"'),
  )
  assert status == 1, output
  # Orbax's own threads may still print afterwards.
  assert re.search(
    r'error: a checkpoint in \S+ could not be written: .*'
    r'The complete ones there: \[5\]',
    output,
    re.DOTALL,
  ), output
  assert_identical(before, arrays(workdir, 5))


def test_other_settings_on_one_workdir_are_refused(finished):
  workdir, _ = finished
  before = (workdir / 'config.json').read_text()
  status, output = launch(
    *LONG,
    f'--workdir={workdir}',
    '--config.model.num_layers=3',
    '--config.seed=1',
  )
  assert status == 2, output
  assert 'model.num_layers: 2 saved, 3 now' in output and 'seed: 0' in output
  assert (workdir / 'config.json').read_text() == before


def test_a_reader_that_has_seen_enough():
  read, write = os.pipe()
  os.close(read)
  try:
    process = subprocess.run(
      [sys.executable, 'launch.py', '--help'],
      cwd=ROOT,
      stdout=write,
      stderr=subprocess.PIPE,
      text=True,
    )
  finally:
    os.close(write)
  assert (process.returncode, process.stderr) == (128 + signal.SIGPIPE, '')


def test_help_without_a_mode_lists_them_all():
  status, output = launch('--help')
  assert status == 0, output
  for mode in command_line.MODES:
    assert re.search(rf'^  {mode} +[A-Z].*[.?]$', output, re.MULTILINE), mode
  status, output = launch('--help', '--mode=eval')
  assert status == 0 and '--infill' in output and '  chat ' not in output


def test_misused_modes(finished, tmp_path):
  workdir, _ = finished
  for args, words in (
    (('--mode=sample', f'--workdir={tmp_path}'), 'is not the folder of a run'),
    (('--mode=train', TINY), 'needs --workdir'),
    (
      (TINY, f'--workdir={tmp_path}/x', '--config.train.num_steps=1e3'),
      '--config.train.num_steps=1e3 is not a whole number',
    ),
    (
      (TINY, f'--workdir={tmp_path}/x', '--config.data.source=README.md'),
      'did you mean text:README.md?',
    ),
    # absl takes values after a space as well.
    (('--mode', 'sample', f'--workdir={tmp_path}'), 'is not the folder of a'),
    (('--config', 'missing.py', '--workdir=x'), "'missing.py' is not a file"),
    (('--config=objectives:typo', '--workdir=x'), "a variant 'typo'; known: ["),
    (('--config=tiny:typo', '--workdir=x'), 'tiny.py lacks variants'),
    ((f'--workdir={tmp_path}/mistyped',), 'a new one needs a --config'),
    (
      (TINY, f'--workdir={tmp_path}', '--prompt_file=x'),
      '--prompt_file is not a flag of --mode=train',
    ),
    (
      ('--mode=sample', f'--workdir={workdir}', '--temperature=0.5'),
      'did you mean --config.sampler.temperature?',
    ),
    (('--mode=import', f'--workdir={tmp_path}/new'), 'needs --from'),
    (
      ('--mode=export', f'--workdir={workdir}', f'--output={workdir}'),
      'is not empty',
    ),
    (
      ('--mode=sample', f'--workdir={workdir}', '--prompt=' + 'x' * 65),
      'at least 66 tokens',
    ),
    (
      ('--mode=sample', f'--workdir={workdir}', '--config.sampler.name=ar'),
      'does not fit',
    ),
    (
      ('--mode=eval', f'--workdir={workdir}', '--infill_examples=8'),
      '--infill_examples=8 needs --infill',
    ),
    (
      (
        '--mode=eval',
        f'--workdir={workdir}',
        '--config.data.clean_prefix_rate=1.0',
      ),
      'data.clean_prefix_rate=1.0 is ignored by --mode=eval',
    ),
    (
      ('--mode=eval', f'--workdir={workdir}', '--config.sampler.num_steps=8'),
      '--config.sampler.num_steps=8 needs --infill',
    ),
    (
      ('--mode=eval', f'--workdir={workdir}', '--infill=0.5,2'),
      "--infill='0.5,2'",
    ),
    ((TINY, f'--workdir={workdir}/config.json/run'), 'cannot be written'),
  ):
    status, output = launch(*args)
    assert status == 2, output
    assert words in output
    assert 'Traceback' not in output


FULL = """
from nanodlm.data import prepare
def main(start):
  raise OSError(28, 'No space left on device', 'a file')
prepare.main = main
"""


def test_a_full_disk_is_one_line():
  args = '--mode=prepare', '--config=configs/tiny.py'
  output = launches.start(*args, before=FULL).communicate()[0]
  assert output.endswith(
    "disk is full: [Errno 28] No space left on device: 'a file'\n"
  )
  assert 'Traceback' not in output


CACHES = """
import os, sys
sys.path.insert(0, '')
stat, hidden = os.stat, os.path.expanduser('~/.cache')
def refusing(path, *args, **kwargs):
  if os.fspath(path).startswith(hidden):
    raise PermissionError(path)
  return stat(path, *args, **kwargs)
import jax
from nanodlm import __main__ as launch
os.stat, access = refusing, os.access
os.access = lambda path, mode: False  # which never holds for root
launch._set_up_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
os.stat, os.access = stat, access
launch._set_up_compilation_cache()
print(jax.config.jax_compilation_cache_dir)
"""


def test_a_terminal_may_lack_characters(monkeypatch):
  out = io.TextIOWrapper(io.BytesIO(), encoding='ascii')
  monkeypatch.setattr(sys, 'stdout', out)
  show = lambda *args, **kwargs: print('é\ufffd!')
  monkeypatch.setattr(command_line.app, 'run', show)
  command_line.run()
  out.flush()
  assert out.buffer.getvalue() == b'??!\n'


def test_compiled_programs_are_kept_in_the_home_that_can_be_written(tmp_path):
  env = {
    key: value
    for key, value in os.environ.items()
    if key != 'JAX_COMPILATION_CACHE_DIR'
  } | {'HOME': str(tmp_path)}
  done = subprocess.run(
    [sys.executable, '-c', CACHES],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
  )
  assert done.stdout.split() == [
    'None',
    str(tmp_path / '.cache' / 'nanodlm' / 'compilation_cache'),
  ], done.stderr

"""The README's worked examples, run as they stand, with fewer and smaller steps.

What is different here: a `python` that comes first on the PATH adds SMALLER to the
commands that train. The examples run at the same time.
"""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()
BLOCKS = re.findall(
  r'```bash\n(.*?)```',
  README.partition('\n## Worked examples\n')[2].partition('\n## ')[0],
  re.DOTALL,
)
# The command that the third one goes on from.
QUICKSTART = re.search(
  r'&& (python launch\.py --config=configs/quickstart\.py '
  r'--workdir=\S+)\n',
  README,
)[1]
SMALLER = ' '.join(
  f'--config.{change}'
  for change in (
    'train.num_steps=4',
    'train.eval_every_steps=0',
    'train.batch_size=4',
    'train.num_samples=0',
    'model.num_layers=1',
    'model.embed_dim=32',
    'model.num_heads=2',
    'optim.name=adamw',
    'optim.warmup_steps=1',
    'eval.num_draws=2',
    'eval.batch_size=16',
    'data.eval_fraction=0.01',
  )
)
PYTHON = f"""#!/bin/bash
case " $* " in
  *" --mode="*) ;;
  " launch.py "*) set -- "$@" {SMALLER} ;;
esac
exec {shlex.quote(sys.executable)} "$@"
"""


@pytest.fixture(scope='module')
def examples(tmp_path_factory):
  """(folder, output) of each example, in a clone of its own."""
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'NANODLM_DATA_DIR': str(tmp_path_factory.mktemp('data')),
  }
  folders, processes = [], []
  scripts = [*BLOCKS[:2], f'{QUICKSTART}\n{BLOCKS[2]}']
  for i, script in enumerate(scripts):
    folder = tmp_path_factory.mktemp(f'example{i}')
    for name in ('launch.py', 'configs', 'nanodlm'):
      (folder / name).symlink_to(ROOT / name)
    (folder / 'bin').mkdir()
    (folder / 'bin' / 'python').write_text(PYTHON)
    (folder / 'bin' / 'python').chmod(0o755)
    folders.append(folder)
    processes.append(
      subprocess.Popen(
        ['bash', '-euo', 'pipefail', '-c', script],
        cwd=folder,
        text=True,
        env={**environment, 'PATH': f'{folder}/bin:{os.environ["PATH"]}'},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
      )
    )
  try:
    outputs = [process.communicate(timeout=600)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, output in zip(processes, outputs):
    assert process.returncode == 0, output
  return list(zip(folders, outputs))


def samples_of(workdir):
  return [
    json.loads(line)
    for line in (workdir / 'samples.jsonl').read_text().splitlines()
  ]


def test_there_are_three():
  assert len(BLOCKS) == 3


def test_train_and_infill(examples):
  folder, output = examples[0]
  assert (folder / 'capitals.txt').read_text().count('\n') == 8000
  samples = samples_of(folder / 'runs' / 'capitals')
  assert len(samples) == 4
  for sample in samples[:2]:
    assert sample['shown'] in output
    assert bytes(sample['tokens'][5:]) == b' is the capital of France.'
  for sample in samples[2:]:
    text = bytes(sample['tokens'])
    assert text[:15] == b'The capital of ' and text[-1:] == b'.'
    assert text[20:-7] == b' is Rome. The capital of Spain is '


def test_compare_and_report(examples):
  folder, output = examples[1]
  table = (folder / 'runs' / 'compared' / 'comparison.txt').read_text()
  assert table in output
  for name in ('masked', 'ar'):
    assert re.search(rf'^runs/{name} +{name} +4 ', table, re.MULTILINE), table
    assert re.search(
      rf'^runs/{name} +(fixed_count|ar) ', table, re.MULTILINE
    ), table
  page = (folder / 'runs' / 'report.html').read_text()
  for words in (
    'masked, fixed_count',
    'ar, ar',
    'Judged by runs/ar',
    'finished',
    'objective.name',
  ):
    assert words in page, words


def test_fine_tune_and_answer(examples):
  folder, output = examples[2]
  pairs = [
    json.loads(line)
    for line in (folder / 'pairs.jsonl').read_text().splitlines()
  ]
  assert len(pairs) == 3000
  words = pairs[0]['prompt'].removeprefix('Reverse: ').split()
  assert pairs[0]['response'].split() == words[::-1]
  assert 'starting from the weights of runs/quickstart, step 4' in output
  samples = samples_of(folder / 'runs' / 'sft')
  assert [sample['shown'].split('\n')[0] for sample in samples] == [
    'Reverse: white gold red blue',
    'Reverse: pink brown silver black',
  ]
  assert not {sample['prompt'] for sample in samples} & {
    pair['prompt'] for pair in pairs
  }

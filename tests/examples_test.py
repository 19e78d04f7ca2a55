"""The README's examples, run as printed, with fewer and smaller steps.

A `python` that comes first on the PATH adds SMALLER to the commands that train.
The examples run at the same time. What the README says about objectives,
samplers, configs and files is compared with the code.
"""

import importlib
import inspect
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from nanodlm import __main__ as command_line
from nanodlm import config as configs
from nanodlm import run as runs
from nanodlm.data.tokenizers import base
from nanodlm.objectives import OBJECTIVES
from nanodlm.samplers import SAMPLERS

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / 'README.md').read_text()


def code_of(title, language='bash'):
  """Returns the first block of code in a section of the README."""
  section = README.partition(f'\n## {title}\n')[2].partition('\n## ')[0]
  return re.search(rf'```{language}\n(.*?)```', section, re.DOTALL)[1]


def command_of_config(name):
  """Returns the first block of code in the docstring of a config."""
  source = (ROOT / 'configs' / f'{name}.py').read_text()
  doc = inspect.cleandoc(re.search(r'"""(.*?)"""', source, re.DOTALL)[1])
  block = re.search(r'((?:    .*\n)(?:(?:    .*)?\n)*)', doc)[1]
  return block.replace('\n    ', '\n')[4:]


# The Python example uses the quickstart's run, and fine-tuning that of docs.py.
QUICKSTART = re.search(
  r'\n(python launch\.py --config=configs/quickstart\.py --workdir=\S+)\n',
  README,
)[1]
PYTHON_CODE = code_of('From Python', 'python')
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
  """Returns (folder, output) of each example, each in its own clone."""
  environment = {
    **os.environ,
    'XLA_FLAGS': '--xla_backend_optimization_level=0',
    'NANODLM_DATA_DIR': str(tmp_path_factory.mktemp('data')),
  }
  folders, processes = [], []
  scripts = [
    code_of('Your own text'),
    code_of('Evaluate'),
    f'{command_of_config("docs")}\n{command_of_config("sft")}',
    f"{QUICKSTART}\npython - <<'END'\n{PYTHON_CODE}END",
  ]
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


def test_sudokus_and_what_solves_them(tmp_path, monkeypatch):
  script = command_of_config('sudoku').partition('python launch.py')[0]
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  subprocess.run(
    ['bash', '-euc', script],
    cwd=tmp_path,
    env={**os.environ, 'PATH': path},
    check=True,
  )
  lines = (tmp_path / 'sudokus.jsonl').read_text().splitlines()
  prompts, answers = zip(*(json.loads(line).values() for line in lines))
  monkeypatch.syspath_prepend(tmp_path)
  solved = importlib.import_module('sudoku').solved
  texts = [prompt + answer for prompt, answer in zip(prompts, answers)]
  assert abs(sum(solved(texts, prompts)) / len(texts) - 0.7) < 0.01
  puzzle, other = '1..............1=', '2..............1='
  grid, rows = '1234341221434321', '1234123412341231'
  wrong = [puzzle + grid[:15], puzzle, other + grid]
  assert not any(solved(wrong, [puzzle, puzzle, other]))
  assert solved([puzzle + grid, puzzle + rows], 2 * [puzzle]) == [True, False]


def samples_of(workdir):
  return [
    json.loads(line)
    for line in (workdir / 'samples.jsonl').read_text().splitlines()
  ]


@pytest.mark.slow
def test_train_and_infill(examples):
  folder, output = examples[0]
  assert (folder / 'topics.txt').read_text().count('\n') > 1000
  samples = samples_of(folder / 'runs' / 'topics')
  assert len(samples) == 4
  for sample in samples:
    assert base.escape_controls(sample['shown']) in output
    text = bytes(sample['tokens'])
    assert text[:4] == b'The ' and text[13:] == b' statement'


@pytest.mark.slow
def test_evaluate_compare_and_report(examples):
  folder, output = examples[1]
  assert (folder / 'runs' / 'masked' / 'eval.jsonl').is_file()
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
    'Bits/byte under runs/ar',
    'finished',
    'objective.name',
  ):
    assert words in page, words


@pytest.mark.slow
def test_fine_tune_and_answer(examples):
  folder, output = examples[2]
  pairs = [
    json.loads(line)
    for line in (folder / 'pairs.jsonl').read_text().splitlines()
  ]
  assert len(pairs) == 3000
  words = pairs[0]['prompt'].removeprefix('Reverse: ').split()
  assert pairs[0]['response'].split() == words[::-1]
  assert 'starting from the weights of runs/docs, step 4' in output
  samples = samples_of(folder / 'runs' / 'sft')
  assert [sample['shown'].split('\n')[0] for sample in samples] == [
    'Reverse: white gold red blue',
    'Reverse: pink brown silver black',
  ]
  assert not {sample['prompt'] for sample in samples} & {
    pair['prompt'] for pair in pairs
  }


@pytest.mark.slow
def test_python(examples):
  _, output = examples[3]
  # A long array is printed on several lines.
  printed, _, logprobs = output.rpartition('\n[')
  texts, bits_per_byte, choices = printed.splitlines()[-3:]
  assert len(eval(texts)) == 2
  assert float(bits_per_byte) > 0
  shares = re.findall(r"text='(\w+)', probability=([\d.e-]+)", choices)
  assert [text for text, _ in shares] == ['Ada', 'Clara']
  assert abs(sum(float(share) for _, share in shares) - 1) < 1e-6
  # NaN for the prompt.
  values = [float(x) for x in logprobs.rstrip(']\n').split()]
  assert sum(value <= 0 for value in values) == 3 < len(values)


def rows_of(header):
  """Returns the cells of a table's rows: {name: [cell, ...]}."""
  table = README.partition(f'| `{header}` |')[2].partition('\n\n')[0]
  rows = [
    [cell.strip() for cell in line.strip('|').split('|')]
    for line in table.splitlines()[2:]
  ]
  return {
    name: cells for names, *cells in rows for name in re.findall(r'\w+', names)
  }


def objective_of(name):
  config = configs.load()
  config.objective.name = name
  return runs.make_objective(configs.make_settings(config))


def test_table_of_objectives():
  rows = rows_of('objective.name')
  assert set(rows) == set(OBJECTIVES)
  for name, (_, value, reads_time, sampler) in rows.items():
    objective = objective_of(name)
    assert value == ('exact' if objective.exact else 'bound'), name
    assert reads_time == ('always' if objective.needs_time else 'optional')
    assert sampler == f'`{objective.default_sampler}`', name


def test_table_of_samplers():
  rows = rows_of('sampler.name')
  assert set(rows) == set(SAMPLERS)
  for name, (fits, _, guided, final, _) in rows.items():
    cls = SAMPLERS[name]
    fitting = {x for x in OBJECTIVES if cls.fits(objective_of(x))}
    listed = set(re.findall(r'`(\w+)`', fits))
    if fits.startswith('all but'):
      listed = set(OBJECTIVES) - listed
    assert listed == fitting, name
    assert guided == ('yes' if cls.can_be_guided else 'no'), name
    if isinstance(cls.is_final, property):
      assert final == 'inner', name
    else:
      assert final == ('yes' if cls.is_final else 'no'), name


def test_files_and_modes_exist():
  for path in re.findall(r'\]\(([^)#]+)\)', README):
    assert (ROOT / path).exists(), path
  for path in re.findall(r'--config=(\S+)', README):
    assert (ROOT / path).is_file(), path
  assert set(re.findall(r'--mode=(\w+)', README)) <= set(command_line.MODES)

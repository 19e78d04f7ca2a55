"""A run's folder: the names of its files, and how they are written.

config.json       settings; older ones in config.until_step_N.json
metrics.jsonl     scalars of training, a line for each log or evaluation
eval.jsonl        results of --mode=eval
samples.jsonl     samples of --mode=sample
trained_on.npz    hashes of what was trained on; see data/overlap.py
tokenizer.json    the tokenizer, perhaps with tokenizer.model
checkpoints/N/    the state after step N
events.out.*      TensorBoard
.lock             held while a training run writes here
"""

import json
import os
import pathlib
from typing import Any

from nanodlm.types import InputError

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
EVAL = 'eval.jsonl'
SAMPLES = 'samples.jsonl'
CHECKPOINTS = 'checkpoints'
TRAINED_ON = 'trained_on.npz'
TOKENIZER = 'tokenizer.json'
TOKENIZER_MODEL = 'tokenizer.model'
LOCK = '.lock'


def check_writable(workdir: str):
  """Raises InputError if the workdir is not a folder one can write to."""
  path = pathlib.Path(workdir)
  existing = next(
    parent for parent in (path, *path.absolute().parents) if parent.exists()
  )
  if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
    raise InputError(
      f'--workdir={workdir!r} cannot be written: {existing} is not a writable '
      'folder'
    )


def make(workdir: str):
  """Creates the folder; InputError if that fails."""
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'--workdir={workdir!r} cannot be written: {error}'
    ) from error


def write(path: pathlib.Path, text: str):
  """Writes a file so that readers see its old or its new content, whole."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def append(workdir: str, name: str, *lines: dict[str, Any]):
  """Appends JSON objects, one per line, to a file of the workdir."""
  with open(pathlib.Path(workdir) / name, 'a', encoding='utf-8') as file:
    file.writelines(json.dumps(line) + '\n' for line in lines)


def has_tokenizer(workdir: str) -> bool:
  """Returns whether the folder holds a tokenizer, as that of any run does."""
  return (pathlib.Path(workdir) / TOKENIZER).is_file()

"""A run's folder: the names of its files, and how they are written.

config.json       settings; older ones in config.until_step_N.json
metrics.jsonl     scalars of training, a line for each log or evaluation
eval.jsonl        results of --mode=eval
measured.json     what --mode=study measured of the run
samples.jsonl     samples of --mode=sample, and those at each evaluation
trained_on.npz    hashes of what was trained on; see data/overlap.py
tokenizer.json    the tokenizer, perhaps with tokenizer.model
checkpoints/N/    the state after step N
events.out.*      TensorBoard
.lock             held while a training run writes here
"""

import errno
import json
import os
import pathlib
from typing import Any

from nanodlm.types import InputError, reason

CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
EVAL = 'eval.jsonl'
MEASURED = 'measured.json'
SAMPLES = 'samples.jsonl'
CHECKPOINTS = 'checkpoints'
TRAINED_ON = 'trained_on.npz'
TOKENIZER = 'tokenizer.json'
TOKENIZER_MODEL = 'tokenizer.model'
LOCK = '.lock'
# Errors of a disk without space.
FULL = (errno.ENOSPC, errno.EDQUOT)


def check_writable(folder: str, name: str = '--workdir'):
  """Raises InputError unless `folder` can be written to, or made.

  `name` is the flag or key that names it.
  """
  path = pathlib.Path(folder).absolute()
  found = next(p for p in (path, *path.parents) if os.path.lexists(p))
  reason = ''
  if not os.path.exists(found):
    reason = f'a link to {os.path.realpath(found)}, which does not exist'
  elif not os.path.isdir(found) or not os.access(found, os.W_OK | os.X_OK):
    reason = 'not a writable folder'
  if reason:
    raise InputError(
      f'{name}={folder!r} cannot be written: {found} is {reason}; give another '
      'folder'
    )


def make(workdir: str):
  """Creates the folder; InputError if that fails."""
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as error:
    raise InputError(
      f'--workdir={workdir!r} cannot be written: {reason(error)}'
    ) from error


def write(path: pathlib.Path, text: str):
  """Writes a file so that readers see its old or its new content, whole."""
  temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')
  try:
    temporary.write_text(text, encoding='utf-8')
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file with a JSON object; InputError if it is not one."""
  try:
    value = json.loads(path.read_bytes())
  # Thousands of brackets raise a RecursionError.
  except (OSError, ValueError, RecursionError) as error:
    raise InputError(f'{path} cannot be read: {reason(error)}') from error
  if not isinstance(value, dict):
    raise InputError(f'{path} is not an object but {type(value).__name__}')
  return value


def to_json(value: Any, indent: int | None = None) -> str:
  """Returns a value as JSON, with null for what is not finite."""
  value = json.loads(json.dumps(value), parse_constant=lambda _: None)
  return json.dumps(value, indent=indent) + '\n'


def append(workdir: str, name: str, *lines: dict[str, Any]):
  """Appends JSON objects, one per line, to a file of the workdir.

  Raises:
    InputError: the file cannot be written, and is left as it was.
  """
  path = pathlib.Path(workdir) / name
  data = ''.join(map(to_json, lines)).encode()
  try:
    with open(path, 'ab', buffering=0) as file:
      size = file.tell()
      # A disk may have space for a part of it.
      if file.write(data) < len(data):
        file.truncate(size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  except OSError as error:
    raise InputError(f'{path} cannot be written: {reason(error)}') from error


def parse_lines(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
  """Returns the JSON objects of whole lines, and the numbers of other lines.

  A run that was killed may have left a part of a line.
  """
  found, bad = [], []
  # The text after the last newline is still being written.
  for number, line in enumerate(data.split(b'\n')[:-1], 1):
    try:
      value = json.loads(line)
    except (ValueError, RecursionError):
      value = None
    if isinstance(value, dict):
      found.append(value)
    else:
      bad.append(number)
  return found, bad


def has_tokenizer(workdir: str) -> bool:
  """Returns whether the folder holds a tokenizer, as that of any run does."""
  return (pathlib.Path(workdir) / TOKENIZER).is_file()

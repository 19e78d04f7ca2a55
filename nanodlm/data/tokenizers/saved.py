"""Tokenizers saved in a folder, such as the workdir of a run."""

import dataclasses
import json
import os
import pathlib
import shutil

from nanodlm import workdir as workdirs
from nanodlm.data import tokenizers
from nanodlm.data.tokenizers import base
from nanodlm.types import InputError


def save_tokenizer(
  tokenizer: base.Tokenizer, folder: str | os.PathLike[str]
) -> None:
  """Writes a JSON file, and a model if any, which `load_tokenizer` reads."""
  folder = pathlib.Path(folder)
  described = tokenizer.to_json()
  if path := described.pop('path', ''):
    # A copy, so that the folder is complete even if the original is removed.
    shutil.copyfile(path, folder / workdirs.TOKENIZER_MODEL)
  (folder / workdirs.TOKENIZER).write_text(
    json.dumps(described, indent=2) + '\n'
  )


def load_tokenizer(folder: str | os.PathLike[str]) -> base.Tokenizer:
  """Returns the tokenizer that `save_tokenizer` wrote.

  Raises:
    InputError: it is missing or damaged, or it no longer produces the ids that
      it produced when it was saved.
  """
  path = pathlib.Path(folder, workdirs.TOKENIZER)
  described = workdirs.read_json(path)
  try:
    cls = tokenizers.find_class(described['name'])
    model_path = path.with_name(workdirs.TOKENIZER_MODEL)
    tokenizer = cls.from_json(described, str(model_path))
    # Workdirs of older versions do not have all of them.
    kept = {
      key: described[key]
      for key in ('eos_ids', 'chat_template', 'start_id')
      if key in described
    }
    if 'eos_ids' in kept:
      kept['eos_ids'] = tuple(kept['eos_ids'])
    tokenizer = dataclasses.replace(tokenizer, **kept)
    is_same = tokenizer.fingerprint == described['fingerprint']
  except (KeyError, TypeError) as error:
    raise InputError(f'{path} is not a saved tokenizer: {error!r}') from error
  if not is_same:
    raise InputError(
      f'{path}: the {described["name"]} tokenizer found here makes different '
      'ids from the one that was saved'
    )
  return tokenizer


class RunTokenizer(base.Tokenizer):
  """Stands for the tokenizer of another run, whose workdir is the path."""

  reads_path = True

  @classmethod
  def make(cls, name: str, path: str) -> base.Tokenizer:
    del name
    return load_tokenizer(path)

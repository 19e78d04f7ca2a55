"""Tests of nanodlm.workdir: folders and files that cannot be written."""

import json
import math
import os
from unittest import mock

import pytest

from nanodlm import workdir as workdirs
from nanodlm.data import folder as folders
from nanodlm.interop import convert
from nanodlm.types import InputError


def test_a_link_that_leads_nowhere(tmp_path):
  link = tmp_path / 'link'
  link.symlink_to(tmp_path / 'gone')
  (tmp_path / 'loop').symlink_to('loop')
  for folder, target in (
    (link, tmp_path / 'gone'),
    (link / 'run', tmp_path / 'gone'),
    (tmp_path / 'loop', tmp_path / 'loop'),
  ):
    with pytest.raises(InputError, match=f"--workdir='{folder}'.*{target},"):
      workdirs.check_writable(str(folder))
  with pytest.raises(InputError, match=f"data_dir='{link}'.*{tmp_path}/gone,"):
    with folders.build(link / 'dataset'):
      pass
  with pytest.raises(InputError, match=f"--output='{link}'.*{tmp_path}/gone,"):
    with convert.new_folder(str(link), '--output'):
      pass
  (tmp_path / 'gone').mkdir()
  workdirs.check_writable(str(link / 'run'))
  assert sorted(os.listdir(tmp_path)) == ['gone', 'link', 'loop']


def test_append_to_a_full_disk(tmp_path):
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full')
  (tmp_path / workdirs.EVAL).symlink_to('/dev/full')
  with pytest.raises(
    InputError, match=f'{tmp_path}/eval.jsonl .*No space left'
  ):
    workdirs.append(str(tmp_path), workdirs.EVAL, {'loss': 1.5})


def test_what_is_not_finite_is_null(tmp_path):
  workdirs.append(str(tmp_path), 'x.jsonl', {'a': [math.nan], 'b': -math.inf})
  assert (tmp_path / 'x.jsonl').read_text() == '{"a": [null], "b": null}\n'


def test_a_line_is_appended_whole_or_not_at_all(tmp_path):
  folder, lines = str(tmp_path), [{'loss': 1.5}, {'text': 'é\n'}, {'loss': 2}]
  workdirs.append(folder, 'x.jsonl', lines[0])
  real_open = open

  def nearly_full(*args, **kwargs):
    file = real_open(*args, **kwargs)
    wrapped = mock.MagicMock(wraps=file)
    wrapped.__enter__.return_value = wrapped
    wrapped.write = lambda data: file.write(data[:7])
    return wrapped

  with mock.patch('builtins.open', nearly_full):
    with pytest.raises(InputError, match='x.jsonl .*No space left'):
      workdirs.append(folder, 'x.jsonl', {'loss': 3})
  workdirs.append(folder, 'x.jsonl', *lines[1:])
  with open(tmp_path / 'x.jsonl', encoding='utf-8') as file:
    assert list(map(json.loads, file)) == lines

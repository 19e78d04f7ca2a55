"""The chat template of a checkpoint, exported and imported."""

import json
import shutil

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm.data.tokenizers import chat, sandbox
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.interop import convert, export
from tests import workdirs

SAID = [
  {'role': 'system', 'content': 'Be brief.'},
  {'role': 'user', 'content': ' Hi \n'},
  {'role': 'assistant', 'content': 'Hello\n'},
  {'role': 'user', 'content': 'Bye'},
]


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
  pytest.importorskip('tokenizers')
  folder = tmp_path_factory.mktemp('chat')
  workdir = workdirs.make_workdir(folder / 'run', data__length=96)
  tokenizer = chat.with_template(load_tokenizer(workdir), 'plain')
  save_tokenizer(tokenizer, workdir)
  export.export_checkpoint(str(workdir), str(folder / 'exported'))
  # As if another program had written it.
  shutil.rmtree(folder / 'exported' / convert.OWN)
  return lms.load(str(workdir)), folder / 'exported'


def test_a_checkpoint_brings_its_template(exported, tmp_path):
  lm, folder = exported
  workdir = str(tmp_path / 'run')
  convert.import_checkpoint(str(folder), workdir)
  settings = configs.make_settings(configs.read_run(workdir))
  again = lms.load(workdir, settings=settings)
  encode = lambda lm: chat.make_format(lm.tokenizer).encode(lm.tokenizer, SAID)
  for ours, theirs in zip(encode(lm), encode(again)):
    np.testing.assert_array_equal(ours, theirs)
  options = {'num_samples': 2, 'num_steps': 4}
  assert again.sample(SAID, **options) == lm.sample(SAID, **options)


def test_ids_are_those_of_transformers(exported):
  transformers = pytest.importorskip('transformers')
  lm, folder = exported
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  ids = tokenizer.apply_chat_template(
    SAID, add_generation_prompt=True, tokenize=True, return_dict=False
  )
  ours = chat.make_format(lm.tokenizer).encode(
    lm.tokenizer, SAID, generation=True
  )
  assert lm.tokenizer.swap_mask(ours.ids).tolist() == ids


def test_the_start_of_a_text_is_not_written_twice(tmp_path):
  # An autoregressive network begins with it, whatever the template does.
  run = workdirs.make_workdir(
    tmp_path / 'run', data__length=96, objective__name='ar'
  )
  export.export_checkpoint(str(run), str(tmp_path / 'exported'))
  shutil.rmtree(tmp_path / 'exported' / convert.OWN)
  path = tmp_path / 'exported' / 'tokenizer_config.json'
  described = json.loads(path.read_text())
  template = '{{ bos_token }}' + chat.TEMPLATES['plain']
  path.write_text(json.dumps({**described, 'chat_template': template}))
  rows = {}
  for objective in ('ar', 'masked'):
    workdir = str(tmp_path / objective)
    changes = {'objective.name': objective}
    convert.import_checkpoint(str(path.parent), workdir, changes=changes)
    tokenizer = load_tokenizer(workdir)
    rows[objective] = chat.make_format(tokenizer).encode(tokenizer, SAID)
  start = rows['masked'].ids[0]
  assert tokenizer.controls[described['bos_token']] == start
  assert start not in rows['ar'].ids
  for own, whole in zip(rows['ar'][:4], rows['masked'][:4]):
    np.testing.assert_array_equal(own, whole[1:])


def check_ids(folder, expected):
  """Compares ids to those of transformers; returns whether it is there."""
  try:
    import transformers
  except ImportError:
    return False
  theirs = transformers.AutoTokenizer.from_pretrained(folder)
  ids = theirs.apply_chat_template(
    SAID, add_generation_prompt=True, tokenize=True, return_dict=False
  )
  assert ids == expected
  return True


def test_an_autoregressive_export_writes_the_start(tmp_path):
  run = workdirs.make_workdir(
    tmp_path / 'run', data__length=96, objective__name='ar'
  )
  save_tokenizer(chat.with_template(load_tokenizer(run), 'plain'), run)

  def encode(workdir):
    tokenizer = load_tokenizer(workdir)
    form = chat.make_format(tokenizer)
    return tokenizer, form.encode(tokenizer, SAID, generation=True)

  expected = encode(run)[1]
  # The template of the first run does not write the start, the others do.
  for i in range(3):
    out = tmp_path / f'exported_{i}'
    export.export_checkpoint(run, str(out))
    shutil.rmtree(out / convert.OWN)
    tokenizer, ours = encode(run)
    start = json.loads((out / 'config.json').read_text())['bos_token_id']
    text = sandbox.render(chat.read_template(out), messages=SAID)
    token = chat.read_described(out)['bos_token']
    assert text.startswith(token) and text.count(token) == 1
    has_peer = check_ids(out, [start, *tokenizer.swap_mask(ours.ids).tolist()])
    run = str(tmp_path / f'run_{i}')
    convert.import_checkpoint(str(out), run)
    assert load_tokenizer(run).start_id == start
    for old, new in zip(expected, encode(run)[1]):
      np.testing.assert_array_equal(old, new)
  # By its own folder, and for an objective that does not read a start.
  again, other = (str(tmp_path / name) for name in ('again', 'other'))
  export.export_checkpoint(run, str(tmp_path / 'whole'))
  convert.import_checkpoint(str(tmp_path / 'whole'), again)
  assert load_tokenizer(again).start_id == load_tokenizer(run).start_id
  changes = {'objective.name': 'masked'}
  convert.import_checkpoint(str(tmp_path / 'whole'), other, changes=changes)
  assert load_tokenizer(other).start_id == -1
  if not has_peer:
    pytest.skip('transformers is not installed: ids were not compared')


def test_a_template_that_cannot_be_read_is_left_out(exported, tmp_path):
  _, folder = exported
  copy = shutil.copytree(folder, tmp_path / 'copy')
  path = copy / 'tokenizer_config.json'
  described = json.loads(path.read_text())
  path.write_text(json.dumps({**described, 'chat_template': [{'name': 'x'}]}))
  workdir = str(tmp_path / 'run')
  convert.import_checkpoint(str(copy), workdir)
  assert load_tokenizer(workdir).chat_template == ''

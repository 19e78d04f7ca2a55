"""Tokenizers that change texts: spaces stay, and bytes are the text's."""

import pickle

import numpy as np
import pytest

from nanodlm import prompts
from nanodlm.data import prepare
from nanodlm.data.tokenizers import normalizing
from nanodlm.types import InputError
from tests import foreign_tokenizers as foreign
from tests import workdirs

TEXTS = (
  'Hello',
  ' Hello the',
  'the fox\n\n  and the dog ',
  'a\u2581b \u2581',
  '\uff21\ufb01 caf\u00e9 e\u0301 of',
  '\u6f22\u5b57 the \u20ac\u20ac\U0001f600 dog',
  '\u20ac',
  '\ufdd1\u2581x',
)


@pytest.fixture(scope='module', params=foreign.MAKERS)
def made(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  return request.param, foreign.MAKERS[request.param](folder)


@pytest.fixture(scope='module')
def kinds(tmp_path_factory):
  make = lambda name: foreign.MAKERS[name](tmp_path_factory.mktemp(name))
  return {name: make(name) for name in ('default', 'llama', 'metaspace')}


def test_bytes_are_those_of_the_text(made):
  _, tokenizer = made
  assert not tokenizer.is_lossless
  copy = pickle.loads(pickle.dumps(tokenizer))
  for text in TEXTS:
    ids, rest = tokenizer.encode(text), tokenizer.encode_rest(text)
    np.testing.assert_array_equal(copy.encode_batch([text, 'x'], 2)[0], ids)
    for row, is_start in ((ids, True), (rest, False)):
      sizes = tokenizer.count_bytes(text, row, is_start)
      assert sizes.shape == row.shape and np.all(sizes >= 0)
      assert sizes.sum() == len(text.encode()), (text, is_start)


def test_bytes_by_token(kinds):
  def sizes(name, text):
    tokenizer = kinds[name]
    ids = tokenizer.encode(text)
    texts = [tokenizer.pieces[i].decode(errors='replace') for i in ids]
    return list(zip(texts, tokenizer.count_bytes(text, ids).tolist()))

  # A full-width letter is three bytes of text and one of a piece; two spaces
  # become one; unknown characters are joined to a piece of no text.
  assert sizes('default', '\uff21  e\u20ac\u20ac') == [
    (' ', 0),
    ('', 3),
    (' ', 2),
    ('e', 1),
    ('', 6),
  ]
  assert sizes('default', 'a\nb')[-2:] == [(' ', 1), ('b', 1)]
  assert sum(n for _, n in sizes('llama', 'Hello the')) == 9


def test_round_trips_gain_no_space(kinds):
  for name in ('llama', 'metaspace'):
    tokenizer = kinds[name]
    assert tokenizer.adds_space
    for text in TEXTS:
      # The library does not add a second space, but decodes without the first.
      expected = text.removeprefix(' ' if name == 'metaspace' else '')
      assert tokenizer.decode(tokenizer.encode(text)) == expected
      rest = tokenizer.encode_rest(text)
      assert tokenizer.decode(rest, is_start=False) == text
      assert ''.join(tokenizer.spell(rest, is_start=False)) == text
    # Each document begins anew.
    ids = tokenizer.encode('Hello the')
    both = [*ids, tokenizer.separator_id, *ids]
    assert tokenizer.decode(both) == 'Hello the\n\nHello the'
    assert ''.join(tokenizer.spell(both)) == 'Hello the\n\nHello the'
    assert tokenizer.text_bytes(both) == 18


def test_published_ids_of_ordinary_text(kinds):
  tokenizer = kinds['llama']
  for text in ('Hello', 'the fox\n  and', '\U0001f600'):
    assert tokenizer.encode(text).tolist() == tokenizer.processor.encode(text)
  tokenizer = kinds['metaspace']
  for text in ('Hello', 'the fox\n  and', '\U0001f600'):
    theirs = tokenizer.processor.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode(text).tolist() == theirs


def test_lost_bytes(made):
  name, tokenizer = made
  lost = lambda text: tokenizer.lost_bytes(text, tokenizer.encode(text))
  assert lost('the fox') == lost('the lazy dog') == 0
  # The ligature, a line break, and two of four spaces.
  text = '\ufb01  the\n  dog'
  assert lost(text) == (3 + 1 + 2 if name in ('default', 'word_piece') else 0)
  # e and its accent become another character.
  assert lost('e\u0301') == {'default': 3, 'nfc': 3}.get(
    name, 2 if name == 'word_piece' else 0
  )


def test_spaces_of_a_model_that_never_saw_one(tmp_path):
  tokenizer = foreign.make_own(tmp_path, foreign.CHINESE, 268)
  assert tokenizer.is_lossless and not tokenizer.has_space
  text = 'the  fox \u2581\u6f22 \u6f22'
  ids = tokenizer.encode(text)
  assert tokenizer.decode(ids) == text
  assert tokenizer.num_bytes[ids].sum() == len(text.encode())
  space = tokenizer.byte_ids[ord(' ')]
  assert (ids == space).sum() == 4
  assert tokenizer.revision == 1


def canvas(tokenizer, prompt):
  tokens, fixed = prompts.make_canvas(prompt, tokenizer, 32, True)
  assert np.all((tokens == tokenizer.mask_id) == ~fixed)
  return tokens.tolist()


@pytest.mark.parametrize('name', ['default', 'llama', 'metaspace'])
def test_parts_of_a_prompt_are_encoded_in_context(kinds, name):
  tokenizer = kinds[name]
  for prompt, text in (
    ('in{2}ing', 'in__ing'),
    ('{2}the', '__the'),
    ('the{2} of', 'the__ of'),
    ('the{2} of{1} fox{1}ing', 'the__ of_ fox_ing'),
  ):
    assert tokenizer.decode(canvas(tokenizer, prompt)) == text


def test_a_word_piece_after_a_gap_continues_a_word(tmp_path):
  tokenizer = foreign.make_word_piece(tmp_path)
  inside = {x.decode() for x in tokenizer.pieces if x[:1].isalpha()}
  words = {x.decode()[1:] for x in tokenizer.pieces if x[:1] == b' '}
  text = max(inside & words, key=len)
  assert (
    tokenizer.decode(canvas(tokenizer, f'the{{2}}{text}')) == f'the__{text}'
  )
  assert tokenizer.decode(canvas(tokenizer, 'the{2} dog')) == 'the__ dog'


def test_a_space_before_a_gap_belongs_to_the_gap(kinds, tmp_path):
  own = foreign.make_own(tmp_path, foreign.ENGLISH, 320)
  for tokenizer in (own, *kinds.values()):
    for prompt in ('the {3}', 'the {3} of {2}', 'the {3}ing'):
      same = prompt.replace(' {', '{')
      assert canvas(tokenizer, prompt) == canvas(tokenizer, same)
  # Only one space is a part of the next word.
  assert own.decode(canvas(own, 'a\n   {1}')) == 'a\n  _'


def test_what_is_lost_is_said_before_it_is_scored(kinds, caplog):
  texts = ['the fox', 'the\n\u20ac fox']
  rows = kinds['default'].encode_to_score(texts)
  for text, row in zip(texts, rows, strict=True):
    np.testing.assert_array_equal(row, kinds['default'].encode(text))
  # A line break and a euro, of 7 and 11 bytes.
  assert '22.22%' in caplog.text and '4 of 18 bytes' in caplog.text
  caplog.clear()
  kinds['llama'].encode_to_score(texts)
  assert not caplog.text


def test_a_text_that_the_probes_did_not_foresee(tmp_path, monkeypatch):
  tokenizer = foreign.make_default(tmp_path)
  monkeypatch.setattr(normalizing, '_PROBES', ())
  assert tokenizer.is_lossless
  path = tmp_path / 'text.txt'
  path.write_text('the  fox\n' * 99)
  settings = workdirs.DataConfig(
    source=f'text:{path}', data_dir=str(tmp_path / 'data')
  )
  with pytest.raises(InputError, match="tokenizer.name='sentencepiece'"):
    prepare.prepare(settings, tokenizer)

"""Prompts: what becomes fixed, what is left to fill."""

import dataclasses
from unittest import mock

import numpy as np
import pytest

from nanodlm import prompts
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.prompts import Gap
from nanodlm.types import InputError

BYTES = BytesTokenizer()


@pytest.mark.parametrize(
  'prompt, parts',
  [
    ('', [Gap(None)]),
    ('def f', ['def f', Gap(None)]),
    ('def {} return {}', ['def ', Gap(None), ' return ', Gap(None)]),
    ('{12}.', [Gap(12), '.']),
    ('{}{3}', [Gap(None), Gap(3)]),
    ('a {{b}} {}', ['a {b} ', Gap(None)]),
    ('if (x) { y; } {2}', ['if (x) { y; } ', Gap(2)]),
    ('{{}}', ['{}', Gap(None)]),
  ],
)
def test_parse_prompt(prompt, parts):
  assert prompts.parse_prompt(prompt) == parts


@pytest.mark.parametrize(
  'prompt, literal',
  [
    ('', []),
    ('a {} b {12} c', []),
    ('{{x}} {}', []),
    ('a {x} {}', ['{x}']),
    ('{x} {x} {-1} {1 2}', ['{x}', '{-1}', '{1 2}']),
    ('if (a) {\n{}', ['{']),
    ('a } {{b', ['}']),
    ('{{{x}}} {3}', ['{', '}']),
  ],
)
def test_braces_that_are_no_gap(prompt, literal):
  assert prompts.literal_braces(prompt) == literal


def canvas(prompt, length, sees_right=True):
  tokens, fixed = prompts.make_canvas(prompt, BYTES, length, sees_right)
  assert np.all((tokens == BYTES.mask_id) == ~fixed)
  return ''.join(chr(t) if f else '_' for t, f in zip(tokens, fixed))


def test_spaces_before_gaps():
  tokenizer = dataclasses.replace(BYTES)
  with mock.patch.object(type(tokenizer), 'joins_spaces', True):
    encode = lambda prompt, **options: [
      len(x)
      for x in prompts.encode_parts(prompt, tokenizer, 20, True, **options)
    ]
    assert encode('{2} {2}') == [2, 0, 2]
    # Also if the prompt ends with the same text.
    assert encode('{2} {2} ') == [2, 0, 2, 1]
    assert encode('a {2}b {3}') == [1, 2, 1, 3]
    # The prompts of pairs were encoded alone.
    assert encode('a {2}b {3}', is_pairs=True) == [1, 2, 2, 3]


@pytest.mark.parametrize(
  'prompt, length, text',
  [
    ('', 4, '____'),
    ('ab', 5, 'ab___'),
    ('a{}b', 6, 'a____b'),
    ('a{}b{}', 7, 'a__b___'),
    ('a{2}b{}', 8, 'a__b____'),
    ('a{2}b', 8, 'a__b'),  # All gaps have a size, so the canvas is shorter.
    ('abc{}', 4, 'abc_'),
  ],
)
def test_make_canvas(prompt, length, text):
  assert canvas(prompt, length) == text


@pytest.mark.parametrize(
  'prompt, length, size',
  [('', 4, 0), ('ab', 4, 0), ('{{}}a{2}', 9, 0), ('a{}b', 6, 4)]
  + [('a{}b{3}c{}', 11, 2), ('{}{}{}', 11, 3)],
)
def test_automatic_size(prompt, length, size):
  num_free = canvas(prompt, length).count('_')
  assert prompts.automatic_size(prompt, num_free) == size


@pytest.mark.parametrize('prompt', ['abcde', 'abc{}d{}', 'a{9}'])
def test_prompt_that_does_not_fit(prompt):
  with pytest.raises(InputError, match=r'a.* \d tokens'):
    canvas(prompt, 4)


def test_causal_models_take_a_gap_at_the_end_only():
  assert canvas('ab{}', 4, sees_right=False) == 'ab__'
  with pytest.raises(InputError, match='left to right'):
    canvas('a{}b', 4, sees_right=False)


def test_read_prompts(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text(
    '\ufeff{"prompt": "a\\n{}", "response": "b"}\n\n{"prompt": "\u2028é"}'
  )
  assert prompts.read_prompts(str(path)) == ['a\n{}', '\u2028é']


@pytest.mark.parametrize(
  'text, message',
  [
    ('', 'is empty'),
    ('\n \n', 'is empty'),
    ('{"prompt": "a"}\nplain', 'line 2 must be'),
    ('{"prompt": "a", "id": ' + '1' * 5000 + '}', 'line 1 must be'),
    ('["prompt"]', 'line 1 must be'),
    ('{"text": "a"}', 'line 1 must be'),
    ('{"prompt": 3}', 'line 1 must be'),
    ('{"prompt": ""}', 'line 1 must be'),
  ],
)
def test_invalid_prompt_file(tmp_path, text, message):
  path = tmp_path / 'a.jsonl'
  path.write_text(text)
  with pytest.raises(InputError, match=f'--prompt_file=.*a.jsonl.*{message}'):
    prompts.read_prompts(str(path))


def test_missing_prompt_file(tmp_path):
  with pytest.raises(InputError, match='--prompt_file=.*cannot be read'):
    prompts.read_prompts(str(tmp_path / 'gone'))


@pytest.mark.parametrize(
  'tokens, end, end_of_blank',
  [
    ([3, 4, 9, 5, 9, 9], 2, 2),
    ([3, 7, 9], 1, 1),
    ([9, 9], 0, 0),
    ([9, 7, 3, 7, 4], 0, 3),
    ([9, 3, 4], 0, 3),
    ([3, 4], 2, 2),
    ([], 0, 0),
  ],
)
def test_find_end(tokens, end, end_of_blank):
  tokens = np.array(tokens, np.int32)
  assert prompts.find_end(tokens, (9, 7)) == end
  assert prompts.find_end(tokens, (9, 7), is_blank=True) == end_of_blank
  assert prompts.find_end(tokens, ()) == len(tokens)


def test_unknown_characters():
  pieces = list(BYTES.pieces)
  pieces[ord('?')] = b''  # As SentencePiece's unknown piece.
  tokenizer = dataclasses.replace(BYTES, name='toy', pieces=tuple(pieces))
  with pytest.raises(InputError, match="'a\\?' .*toy tokenizer"):
    prompts.make_canvas('a?{}', tokenizer, 8, True)
  assert len(prompts.make_canvas('ab{}', tokenizer, 8, True)[0]) == 8


def test_a_space_before_a_gap_of_bytes_stays():
  assert canvas('ab {2}', 8) == 'ab __'


def test_a_gap_of_any_size_is_counted_before_it_is_made():
  with pytest.raises(InputError, match='has 4 tokens'):
    canvas('{999999999999999999}', 4)

"""Gaps of any length in Python, on the command line, and in the server."""

import json
import pathlib

import jax
import numpy as np
import pytest

import nanodlm
from nanodlm import lm as lms
from nanodlm import prompts, sample
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.evals import compare, infill
from nanodlm.show import live, replay
from nanodlm.types import InputError
from tests import launches, workdirs
from tests.serving import servers

BYTES = BytesTokenizer()
TEXTS = ['a cat', 'a small cat', 'the dog ran', 'no']


def make(folder, **changes):
  folder.mkdir()
  rows = [json.dumps({'text': text}) for text in TEXTS * 30]
  (folder / 'rows.jsonl').write_text('\n'.join(rows))
  return workdirs.make_workdir(
    folder,
    data__source=f'jsonl:{folder}/rows.jsonl',
    data__crop='document',
    model__time_conditioning=True,
    **changes,
  )


@pytest.fixture(scope='module')
def flex(tmp_path_factory):
  folder = tmp_path_factory.mktemp('flex') / 'one'
  return nanodlm.load(make(folder, objective__name='flex', scale=0.5))


@pytest.mark.parametrize(
  'prompt, shown',
  [
    ('', '_______-'),
    ('a', 'a______-'),
    ('a{*}b', 'a_____b-'),
    ('{*}ab{*}', '__ab___-'),
    ('a{}b', 'a_____b-'),
  ],
)
def test_room(prompt, shown):
  tokens, fixed = prompts.make_canvas(prompt, BYTES, 8, True, False, True)
  text = ''.join(
    '_' if not f else '-' if t == BYTES.separator_id else chr(t)
    for t, f in zip(tokens, fixed)
  )
  assert text == shown and np.all(tokens[~fixed] == BYTES.separator_id)


def test_room_next_to_masks():
  tokens, fixed = prompts.make_canvas('a{2}b{*}', BYTES, 8, True, True, True)
  mask, end = BYTES.mask_id, BYTES.separator_id
  assert tokens.tolist() == [97, mask, mask, 98, end, end, end, end]
  assert fixed.tolist() == [True, False, False, True, *[False] * 3, True]
  assert prompts.automatic_size('a{}b{*}', 9) == 4


@pytest.mark.parametrize(
  'prompt, length, fills_masks, fills_room, key',
  [
    ('a{*}', 8, True, False, r'a\{\*\}.*any length'),
    ('a{3}', 8, False, True, r'a\{3\}.*\{\*\}'),
    ('abc{*}d', 5, False, True, '5 tokens.*canvas has 4'),
  ],
)
def test_gaps_that_cannot_be(prompt, length, fills_masks, fills_room, key):
  with pytest.raises(InputError, match=key):
    prompts.make_canvas(prompt, BYTES, length, True, fills_masks, fills_room)


def test_samples(flex, caplog):
  samples = flex.sample('a{*} cat', num_samples=20, details=True)
  texts = [one.text for one in samples]
  assert all(x.startswith('a') and x.endswith(' cat') for x in texts)
  assert len({len(one.tokens) for one in samples}) == 1
  for one in samples:
    ends = one.tokens == flex.tokenizer.separator_id
    size = int(np.argmax(ends))
    assert np.all(ends[size:]) and np.all(one.fixed[size:])
    assert (
      size == len(one.text.encode(errors='replace')) or '\ufffd' in one.text
    )
    assert np.sum(~one.fixed) == size - 5
    assert np.all(np.isnan(one.logprobs))
  assert texts == flex.sample('a{*} cat', num_samples=20)
  # Room for a single token is soon full, and that is said.
  (cut,) = flex.sample('a{*} cat', length=7, temperature=0.0)
  assert cut.endswith(' cat')
  texts = flex.sample('a{*} cat', num_samples=20, length=7)
  assert 'sampler.length=7' in caplog.text
  with pytest.raises(InputError, match=r'\{3\}'):
    flex.sample('a{3}')
  with pytest.raises(InputError, match="not support sampler.name='insert'"):
    infill.check_run(flex.run)
  with pytest.raises(InputError, match='insert.*any length'):
    fill = lms.make_fill(flex.run)
    tokens = np.full((1, 8), flex.tokenizer.mask_id, np.int32)
    fill(flex.params, jax.random.key(0), tokens, np.zeros((1, 8), bool))


def test_compared_on_other_documents(flex, tmp_path):
  rows = [json.dumps({'text': text}) for text in [*TEXTS, 'a' * 500] * 20]
  (tmp_path / 'rows.jsonl').write_text('\n'.join(rows))
  args = [
    f'--workdirs={flex.workdir}',
    f'--source=jsonl:{tmp_path}/rows.jsonl',
    f'--output={tmp_path}/out',
  ]
  assert launches.run_mode(compare, *args) == 0
  text = (tmp_path / 'out' / 'comparison.json').read_text()
  (run,) = json.loads(text)['runs']
  assert 0 < run['nats_per_document'] < np.inf


def test_bounds_and_choices(flex):
  short, long = flex.bound(['a cat', 'a small cat'])
  assert 0 < short.nats < np.inf and 0 < long.nats < np.inf
  choices = flex.choose('a {cat|small cat}')
  np.testing.assert_allclose(sum(x.probability for x in choices), 1)
  assert [x.nats for x in choices] == [short.nats, long.nats]
  logits = flex.logits([97, 98, flex.tokenizer.separator_id])
  assert logits.shape == (3, flex.tokenizer.vocab_size)


def test_other_models_do_not_fill_them(tmp_path):
  lm = nanodlm.load(make(tmp_path / 'masked'))
  with pytest.raises(InputError, match=r'\{\*\}.*configs/flex'):
    lm.sample('a{*}')
  with pytest.raises(InputError, match="'expand'.*objective.expand=True"):
    lm.sample('a{*}', sampler='expand')
  with pytest.raises(InputError, match=r"data.padding='masked' must be 'eos'"):
    make(tmp_path / 'a', objective__name='flex', data__padding='masked')
  with pytest.raises(InputError, match="data.long_documents='cut' must be"):
    make(tmp_path / 'b', objective__name='flex', data__long_documents='cut')


@pytest.mark.slow
def test_masks_that_expand(tmp_path, caplog):
  lm = nanodlm.load(make(tmp_path / 'expand', objective__expand=True))
  for sampler in ('fixed_count', 'expand'):
    (text,) = lm.sample('a{3} cat', sampler=sampler)
    assert text.startswith('a') and text.endswith(' cat')
  assert 'fill a gap' not in caplog.text  # A gap of three has three.
  with pytest.raises(InputError, match=r"\{\*\}.*'expand'"):
    lm.sample('a{*} cat')
  with pytest.raises(InputError, match='num_masks=0'):
    lm.sample('a{*} cat', sampler='expand', num_masks=0)
  samples = lm.sample(
    'a{*} cat', sampler='expand', num_samples=20, num_masks=2, details=True
  )
  sizes = {int(np.sum(~one.fixed)) for one in samples}
  assert len(sizes) > 1
  for one in samples:
    assert one.text.startswith('a') and one.text.endswith(' cat')
  assert lm.bound(['a cat'])[0].nats > 0
  # What a network takes for room is at the end.
  for prompt in ('', 'a{3}', 'a{2}c'):
    tokens, fixed = lms.lay_out(lm.run, prompt, 16)
    assert len(tokens) == 16 and fixed[-1]
    assert tokens[-1] == lm.tokenizer.separator_id
  with servers.serving(lm) as (_, server):
    body = {'prompt': 'a{*} cat', 'num_samples': 2, 'sampler': 'expand'}
    status, answer = servers.post(server, '/api/generate', body)
    assert status == 200
    for one in answer['samples']:
      assert one['shown'].startswith('a') and one['shown'].endswith(' cat')
    body['sampler'] = 'fixed_count'
    status, _ = servers.post(server, '/api/generate', body)
    assert status == 400
    for prompt in 'a c', [97, 32, 99]:
      body = {'prompt': prompt, 'max_tokens': 3, 'echo': True}
      body['sampler'] = 'fixed_count'
      status, answer = servers.post(server, '/v1/completions', body)
      assert status == 200, answer
      assert answer['choices'][0]['text'].startswith('a c')
    body = {'tokens': [97, None], 'sampler': 'fixed_count'}
    status, answer = servers.post(server, '/api/generate', body)
    assert status == 400 and 'must end with the separator' in str(answer)


def test_command_line_and_page(flex, tmp_path, capsys):
  page = replay.Page(str(tmp_path / 'a.html'), 3)
  sample.check_prompts(flex, ['a{*} cat'])
  sample.sample_prompts(flex, ['a{*} cat'], page=page)
  assert "prompt 'a{*} cat'" in capsys.readouterr().out
  path = pathlib.Path(flex.workdir) / 'samples.jsonl'
  line = json.loads(path.read_text().splitlines()[-1])
  assert line['shown'].endswith(' cat')
  assert line['text'].rstrip('\n').endswith(' cat')
  take = page.takes[0]
  frames, fixed = take.trajectory.frames, take.fixed
  # The prompt stays at its places, and the room is known.
  assert np.all(frames[:, fixed] == frames[0][fixed])
  np.testing.assert_array_equal(take.room, ~fixed)
  data = replay.make_data([take], flex.tokenizer, 3, '', '')
  (shown,) = data['takes']
  assert shown['text'].startswith('a') and shown['text'].endswith(' cat')
  assert shown['room'] == np.flatnonzero(~fixed).tolist()
  assert not data['takes_back'] and not data['changes']
  assert 0 <= data['separator'] < len(data['vocab'])


def test_live_view(flex):
  tokens, fixed = lms.lay_out(flex.run, 'a{*}t', 8)
  canvas = live._Canvas(tokens, BYTES.mask_id, ~fixed)
  paint = lambda: (
    live._paint(BYTES, canvas.tokens, canvas.kinds(fixed), canvas.room).plain
  )
  assert paint() == 'at¶\n'
  canvas.see(tokens, 0)
  tokens[1] = BYTES.mask_id
  canvas.see(tokens, 0)
  assert paint() == 'a·t¶\n'
  tokens[1:3] = BYTES.mask_id, ord('b')
  canvas.see(tokens, 0)
  assert paint() == 'a·bt¶\n'
  assert not canvas.replaced.any()


def test_server(flex):
  with servers.serving(flex) as (_, server):
    body = {'prompt': 'a{*} cat', 'num_samples': 3, 'seed': 1}
    status, answer = servers.post(server, '/api/generate', body)
    assert status == 200
    for one in answer['samples']:
      assert one['shown'].startswith('a') and one['shown'].endswith(' cat')
      assert one['text'].rstrip('\n').endswith(' cat')
      num = one['tokens_per_call'] * one['num_calls']
      room = np.array(one['tokens'][1:-5]) == flex.tokenizer.separator_id
      np.testing.assert_allclose(num, np.sum(~room))
    for body in (
      {'prompt': 'a{3}'},
      {'prompt': 'a{*}', 'logprobs': 0},
      {'tokens': [97, None]},
    ):
      status, answer = servers.post(server, '/api/generate', body)
      assert status == 400, answer


def test_texts_whose_end_does_not_fit_are_refused(flex):
  length = flex.run.settings.data.length
  assert flex.bound(['a' * (length - 1)])[0].nats > 0
  for text in 'a' * length, 'a' * (length + 1):
    with pytest.raises(InputError, match=f'{len(text)} tokens is too long'):
      flex.bound(['b', text])
  with pytest.raises(InputError, match='must end with the separator'):
    flex.logits([97, 98, 99])


def test_messages_and_lists_of_texts_are_refused(flex):
  with pytest.raises(InputError, match="'insert' cannot answer messages"):
    flex.sample([{'role': 'user', 'content': 'a'}])

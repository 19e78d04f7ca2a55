"""How texts end: at an EOS, a stop or max_tokens; and what usage counts."""

import asyncio
import dataclasses
import json
import types

import numpy as np
import pytest

from nanodlm import prompts
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.serving import app, openai, schemas, service
from nanodlm.serving import engine as engines
from tests import foreign_tokenizers
from tests.serving.servers import ask, events, post, serving

# Many, so that most texts end early.
EOS_IDS = tuple(range(1, 256, 4))
BODY = {'prompt': 'a', 'max_tokens': 12, 'seed': 2, 'n': 4}


@pytest.fixture(scope='module')
def ending(opened):
  """A model with many ends of texts, and its server."""
  tokenizer = dataclasses.replace(opened.tokenizer, eos_ids=EOS_IDS)
  run = opened.run.with_tokenizer(tokenizer)
  run = run.with_sampler({'stop_at_eos': True})
  with serving(dataclasses.replace(opened, run=run)) as (model, server):
    yield model, server


def until_eos(tokens):
  ends = [i for i, token in enumerate(tokens) if token in EOS_IDS]
  return tokens[: min(ends, default=len(tokens))]


def complete(server, body):
  """(texts, reasons, usage), which are the same in a stream."""
  status, answer = post(server, '/v1/completions', body)
  assert status == 200, answer
  choices = answer['choices']
  texts = [one['text'] for one in choices]
  reasons = [one['finish_reason'] for one in choices]
  options = {'stream': True, 'stream_options': {'include_usage': True}}
  text = ask(server, 'POST', '/v1/completions', body | options)[2]
  *chunks, usage, done = [data for _, data in events(text)]
  streamed, last = [''] * len(texts), [None] * len(texts)
  for chunk in chunks:
    (choice,) = chunk['choices']
    assert last[choice['index']] is None
    streamed[choice['index']] += choice['text']
    last[choice['index']] = choice['finish_reason']
  assert (streamed, last, done) == (texts, reasons, '[DONE]')
  assert usage['usage'] == answer['usage']
  return texts, reasons, answer['usage']['completion_tokens']


@pytest.mark.parametrize('sampler', ['fixed_count', 'remask'])
def test_texts_end_at_their_first_eos(ending, sampler):
  model, server = ending
  body = {'prompt': 'a{12}', 'seed': 2, 'num_samples': 4, 'sampler': sampler}
  samples = post(server, '/api/generate', body)[1]['samples']
  expected = [until_eos(one['tokens'][1:]) for one in samples]
  assert len({len(tokens) for tokens in expected}) > 1
  decoded = [model.tokenizer.decode(tokens) for tokens in expected]
  assert [one['shown'] for one in samples] == ['a' + text for text in decoded]
  texts, reasons, num_tokens = complete(server, BODY | {'sampler': sampler})
  assert texts == decoded
  assert reasons == [
    'stop' if len(tokens) < 12 else 'length' for tokens in expected
  ]
  assert num_tokens == sum(map(len, expected))


def test_given_text_is_not_cut(ending):
  _, server = ending
  eos, rest = chr(EOS_IDS[9]), 'cb'
  body = {'prompt': f'{eos}{{8}}{eos}{rest}', 'seed': 1, 'num_samples': 2}
  for one in post(server, '/api/generate', body)[1]['samples']:
    assert one['shown'] == one['text'] and one['text'].endswith(eos + rest)
  body = {'prompt': f'b{eos}', 'suffix': eos + rest, 'max_tokens': 8, 'n': 2}
  generated = post(
    server,
    '/api/generate',
    {'prompt': f'b{eos}{{8}}{eos}{rest}', 'seed': 3, 'num_samples': 2},
  )[1]
  expected = [until_eos(one['tokens'][2:10]) for one in generated['samples']]
  num_tokens = complete(server, body | {'seed': 3})[2]
  assert num_tokens == sum(map(len, expected))


def test_usage_counts_the_text_before_a_stop(running):
  model, server = running
  body = {'prompt': 'a', 'max_tokens': 12, 'seed': 2}
  (whole,), _, _ = complete(server, body)
  generated = {'prompt': 'a{12}', 'seed': 2}
  (one,) = post(server, '/api/generate', generated)[1]['samples']
  decode, tokens = model.tokenizer.decode, one['tokens'][1:]
  for stops in ([whole[5:7]], [whole[6], whole[5:]], [whole[0]]):
    (text,), reasons, num = complete(server, body | {'stop': stops})
    # The stop that is complete first.
    ends = [(whole.find(x) + len(x), whole.find(x)) for x in stops]
    assert text == whole[: min(ends)[1]] and reasons == ['stop']
    assert decode(tokens[:num]) == text
    assert not num or decode(tokens[: num - 1]) != text


def test_nothing_to_complete_is_answered_at_once(running):
  _, server = running
  for prompt, texts, num in (
    ('ab', ['ab'], 2),
    ('', [''], 0),
    ([[97], [98, 99]], ['a', 'bc'], 3),
  ):
    body = {'prompt': prompt, 'max_tokens': 0, 'echo': True}
    assert complete(server, body) == (texts, ['length'] * len(texts), 0)
    usage = post(server, '/v1/completions', body)[1]['usage']
    assert usage['prompt_tokens'] == usage['total_tokens'] == num
  assert complete(server, {'prompt': 'ab', 'max_tokens': 0})[0] == ['']
  body = {'prompt': [400], 'max_tokens': 0}
  status, answer = post(server, '/v1/completions', body)
  assert status == 400 and '400 is not an id' in answer['error']['message']


def test_the_most_probable_text_is_always_the_same(running):
  _, server = running
  body = {'prompt': 'a', 'max_tokens': 12, 'temperature': 0}
  (text,), _, _ = complete(server, body)
  assert complete(server, body | {'n': 2})[0] == [text] * 2
  both = complete(server, body | {'prompt': ['bc', 'a']})[0]
  assert both[1] == text
  for greedy in ({'top_p': 0}, {'top_k': 1}):
    own = {key: x for key, x in body.items() if key != 'temperature'}
    assert complete(server, own | greedy)[0] == [text]
  # A seed is the seed of the order.
  seeded = complete(server, body | {'seed': 0, 'n': 2})[0]
  assert seeded[0] == text
  body = {'prompt': 'a', 'num_samples': 2}
  seeds = {post(server, '/api/generate', body)[1]['seed'] for _ in range(2)}
  assert len(seeds) == 2
  answer = post(server, '/api/generate', body | {'temperature': 0})[1]
  assert answer['seed'] == 0


@pytest.mark.parametrize(
  'method, path, body, status, words',
  [
    ('POST', '/v1/chat', {}, 404, ['/v1/chat/completions']),
    ('POST', '/v1/embeddings', {}, 404, ['POST /v1/completions']),
    ('GET', '/v1/completions', None, 405, ['POST /v1/completions']),
    ('POST', '/v1/completions', {'prompt': [-1]}, 422, ['prompt.ids.0', '-1']),
    ('POST', '/v1/completions', {'prompt': [[5, -1]]}, 422, ['.0.1', '-1']),
    ('POST', '/v1/completions', {'prompt': ['a', 5]}, 422, ['texts.1', '5']),
    ('POST', '/v1/completions', {'prompt': [97.5]}, 422, ['ids.0', '97.5']),
    ('POST', '/v1/completions', {'prompt': 5}, 422, ['prompt', '5']),
    (
      'POST',
      '/v1/completions',
      {'prompt': [257], 'max_tokens': 3},
      400,
      ['prompt', '257'],
    ),
    ('POST', '/v1/completions', {'stop': ['a', 5]}, 422, ['stop', '5']),
    ('POST', '/api/generate', {'tokens': [None, -1]}, 422, ['tokens.1', '-1']),
  ],
)
def test_errors_say_what_is_wrong(running, method, path, body, status, words):
  _, server = running
  actual, _, text = ask(server, method, path, body)
  message = json.loads(text)['error']['message']
  assert actual == status and all(word in message for word in words), message
  if '-1' in words:
    assert 'string' not in message


@pytest.mark.parametrize('end', ['eos', 'stop'])
def test_rows_are_freed_as_soon_as_every_text_has_ended(opened, ending, end):
  # The engine is not started, so no row is ever done.
  engine = engines.Engine(ending[0].engine.lm if end == 'eos' else opened)
  model = app.Service(engine, 'tiny')
  body = schemas.CompletionRequest(
    prompt='a', max_tokens=8, n=2, stop='yz' if end == 'stop' else None
  )
  request = types.SimpleNamespace(client=('here', 1))
  written = 'xyz' if end == 'stop' else f'x{chr(EOS_IDS[9])}'

  async def run(is_stream):
    completions = openai.Completions(model, body)
    canvases = [completions.lay_out('a')]
    submission = model.submit(request, body, canvases, 2)
    chunks = []

    async def read():
      if is_stream:
        stream = service.EventStream(submission, completions.stream(submission))
        chunks.extend([chunk async for chunk in stream.body_iterator])
        submission.cancel()  # As the end of the response does.
      else:
        await submission.finish(request, completions.have_ended)

    async def is_connected():
      return False

    request.is_disconnected = is_connected
    reading = asyncio.create_task(read())
    for row in submission.rows:
      await asyncio.sleep(0.01)
      assert not reading.done()
      canvas = row.canvas.copy()
      canvas[1 : 1 + len(written)] = [ord(x) for x in written]
      row.change(state='running', frame=(1, canvas))
    await asyncio.wait_for(reading, 30)
    assert all(row.is_cancelled for row in submission.rows)
    answer = completions.respond(submission.rows)
    assert [one['text'] for one in answer['choices']] == ['x', 'x']
    assert {one['finish_reason'] for one in answer['choices']} == {'stop'}
    assert answer['usage']['completion_tokens'] == 2
    assert not is_stream or chunks[-1] == b'data: [DONE]\n\n'

  for is_stream in (False, True):
    asyncio.run(run(is_stream))
  assert engine.num_waiting() == 0


def model_of(tokenizer, eos_ids=()):
  """What `openai.Completions` reads of a `service.Service`."""
  data = types.SimpleNamespace(is_pairs=False)
  run = types.SimpleNamespace(
    tokenizer=tokenizer,
    eos_ids=eos_ids,
    settings=types.SimpleNamespace(data=data),
  )
  return types.SimpleNamespace(run=run, tokenizer=tokenizer, name='tiny')


@pytest.mark.parametrize('is_pairs', [False, True])
@pytest.mark.parametrize('suffix', ['', ' and red'])
def test_the_space_that_is_left_to_the_gap(is_pairs, suffix, tmp_path):
  tokenizer = foreign_tokenizers.make_nfc(tmp_path)
  assert tokenizer.joins_spaces
  model = model_of(tokenizer)
  model.run.settings.data.is_pairs = is_pairs
  body = schemas.CompletionRequest(prompt='it is ', suffix=suffix)
  given = openai.Completions(model, body)._given(0)
  before, *_ = prompts.encode_parts(
    f'it is {{2}}{suffix}', tokenizer, 64, sees_right=True, is_pairs=is_pairs
  )
  assert tokenizer.decode(before) + given == 'it is '


def test_a_separator_at_the_start_of_a_blank_text_does_not_end_it():
  tokenizer = BytesTokenizer()
  completions = openai.Completions(
    model_of(tokenizer, tokenizer.eos_ids), schemas.CompletionRequest(prompt='')
  )
  end, mask = tokenizer.eos_ids[0], tokenizer.mask_id
  sampler = types.SimpleNamespace(is_final=True)
  row = types.SimpleNamespace(
    state='running',
    fixed=np.zeros(4, bool),
    run=types.SimpleNamespace(sampler=sampler),
  )
  for ids, text, reason in (
    ([end, mask, mask, mask], '', None),
    ([end, 97, mask, mask], '\na', None),
    ([end, 97, end, mask], '\na', 'stop'),
  ):
    row.canvas = np.array(ids)
    found = completions._complete(0, row)
    assert found[1] == reason
    assert found[0].endswith(text[-1:])


@pytest.mark.parametrize('space', ['', ' '])
def test_prompt_and_completion_join_with_one_space(tmp_path, space):
  tokenizer = foreign_tokenizers.make_llama(tmp_path)
  model = model_of(tokenizer)
  ids = tokenizer.encode('the quick brown fox')
  row = types.SimpleNamespace(
    state='done',
    canvas=ids,
    fixed=np.arange(len(ids)) < len(tokenizer.encode('the quick')),
  )
  prompt = f'the quick{space}'
  body = schemas.CompletionRequest(prompt=prompt, echo=True)
  answer = openai.Completions(model, body).respond([row])
  assert answer['choices'][0]['text'] == 'the quick brown fox'


@pytest.mark.parametrize('text, num', [('ab\U0001f600', 6), ('ab\u00e9', 4)])
def test_the_tokens_before_a_stop_are_whole_characters(text, num):
  tokenizer = BytesTokenizer()
  ids = tokenizer.encode(f'>{text}STOP.')
  row = types.SimpleNamespace(
    state='done', canvas=ids, fixed=np.arange(len(ids)) < 1
  )
  body = schemas.CompletionRequest(prompt='>', stop='STOP')
  answer = openai.Completions(model_of(tokenizer), body).respond([row])
  assert answer['choices'][0]['text'] == text
  assert answer['usage']['completion_tokens'] == num


def test_ids_are_laid_out_as_their_text_is(opened):
  data = dataclasses.replace(opened.run.settings.data, crop='document')
  settings = dataclasses.replace(opened.run.settings, data=data)
  run = dataclasses.replace(opened.run, settings=settings)
  engine = types.SimpleNamespace(
    length=settings.sample_length, choose=lambda name: run
  )
  model = service.Service.__new__(service.Service)
  vars(model).update(
    engine=engine, run=run, tokenizer=run.tokenizer, name='tiny'
  )
  layouts = []
  for prompt in 'ab', [97, 98]:
    body = schemas.CompletionRequest(prompt=prompt, suffix='cd', max_tokens=4)
    layouts.append(openai.Completions(model, body).lay_out(prompt))
  np.testing.assert_array_equal(*layouts)
  assert len(layouts[0][0]) == settings.data.length

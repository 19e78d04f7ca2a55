"""Log-probabilities of tokens in the answers of the server."""

import json

import numpy as np
import pytest

from nanodlm.serving import engine as engines
from tests.serving.servers import ask, events, finish, post, row

BODY = {'prompt': 'ab', 'max_tokens': 6, 'seed': 3, 'user': 'me'}
# One token per call, from left to right.
CONFIDENT = {'sampler': 'confidence', 'num_steps': 16}
KEYS = ('tokens', 'token_logprobs', 'top_logprobs', 'text_offset')


def expected(lm, tokens, first):
  """The log-probabilities of tokens that are revealed from left to right."""
  values = []
  for i in range(first, len(tokens)):
    canvas = np.array(tokens, np.int32)
    canvas[i:] = lm.tokenizer.mask_id
    logits = lm.logits(canvas)[i, : lm.tokenizer.mask_id].astype(np.float64)
    values.append(logits - np.logaddexp.reduce(logits))
  return np.array(values)


@pytest.fixture(scope='module')
def left_to_right(opened):
  """The server of a sampler that reveals one token after the other."""
  from tests.serving import servers

  changes = {'name': 'confidence', 'num_steps': 16, 'block_size': 1}
  with servers.serving(opened.with_sampler(changes)) as (model, server):
    yield model, server


def test_are_those_of_the_canvas_before_the_call(left_to_right):
  model, server = left_to_right
  lm, body = model.engine.lm, BODY | {'temperature': 0.7, 'top_p': 0.9}
  plain = post(server, '/v1/completions', body)[1]['choices'][0]
  assert plain['logprobs'] is None
  (choice,) = post(server, '/v1/completions', body | {'logprobs': 2})[1][
    'choices'
  ]
  assert choice['text'] == plain['text']
  found = choice['logprobs']
  assert ''.join(found['tokens']) == choice['text']
  generate = {'prompt': 'ab{6}', 'seed': 3, 'logprobs': 20}
  generate |= {'temperature': 0.7, 'top_p': 0.9}
  (sample,) = post(server, '/api/generate', generate)[1]['samples']
  log_p = expected(lm, sample['tokens'], 2)
  own = log_p[np.arange(6), sample['tokens'][2:]]
  np.testing.assert_allclose(found['token_logprobs'], own, rtol=1e-4)
  assert found['text_offset'][0] == 0 and len(found['text_offset']) == 6
  for token, value, top, values in zip(
    found['tokens'], own, found['top_logprobs'], log_p
  ):
    assert len(top) in (2, 3) and np.isclose(top[token], value, rtol=1e-4)
    assert np.isclose(max(top.values()), values.max(), rtol=1e-4)
  scores = sample['logprobs']
  assert scores['tokens'][:2] == [None, None] and scores['top'][:2] == [[], []]
  np.testing.assert_allclose(scores['tokens'][2:], own, rtol=1e-4)
  for top, values in zip(scores['top'][2:], log_p):
    best = np.argsort(-values)[:20]
    assert [one['token'] for one in top] == best.tolist()
    np.testing.assert_allclose(
      [one['logprob'] for one in top], values[best], rtol=1e-4
    )
  text = ask(server, 'POST', '/api/stream', generate)[2]
  assert events(text)[-1][1]['samples'][0]['logprobs'] == scores


@pytest.mark.parametrize('changes', [{}, {'stop': 'STOP'}, {'max_tokens': 0}])
def test_streams_have_those_of_their_text(left_to_right, changes):
  _, server = left_to_right
  body = BODY | {'logprobs': 1, 'echo': True, 'n': 2} | changes
  if 'stop' in body:
    whole = post(server, '/v1/completions', body)[1]['choices'][0]
    body['stop'] = ''.join(whole['logprobs']['tokens'][4:6])
  choices = post(server, '/v1/completions', body)[1]['choices']
  text = ask(server, 'POST', '/v1/completions', {**body, 'stream': True})[2]
  for choice in choices:
    found = choice['logprobs']
    num = len(found['tokens'])
    assert {len(found[key]) for key in KEYS} == {num}
    assert ''.join(found['tokens']).startswith(choice['text'])
    for token, offset in zip(found['tokens'], found['text_offset']):
      assert choice['text'][offset : offset + len(token)] == token[:8]
    assert (
      found['token_logprobs'][:2] == found['top_logprobs'][:2] == [None] * 2
    )
    assert all(x <= 0 for x in found['token_logprobs'][2:])
    streamed = {key: [] for key in KEYS}
    for _, data in events(text)[:-1]:
      (part,) = data['choices']
      if part['index'] == choice['index']:
        for key in KEYS:
          streamed[key] += part['logprobs'][key]
    assert streamed == {key: found[key] for key in KEYS}


def test_others_neither_wait_nor_compile(opened):
  engine = engines.Engine(opened)
  compile_one, compiled = engine._compile, []

  def recording(group, size):
    compiled.append(group.reveals)
    return compile_one(group, size)

  engine._compile = recording
  engine.start(warm_up=False)
  plain = finish(engine, row(engine, 'a{}'))
  scored = row(engine, 'a{}')
  scored.logprobs = engines.watch.Logprobs(16)
  assert finish(engine, scored, row(engine, 'a{}')) == [plain[0]] * 2
  assert compiled == [False, True]
  assert np.isnan(scored.logprobs.chosen).tolist() == [True] + 15 * [False]
  assert engine.close()


@pytest.mark.parametrize('value', [21, -1, 'a', 1.5, True])
def test_other_numbers_are_refused(running, value):
  for path in ('/v1/completions', '/api/generate'):
    body = {'prompt': 'a', 'logprobs': value}
    status, answer = post(running[1], path, body)
    assert status == 422 and 'logprobs' in json.dumps(answer['error'])

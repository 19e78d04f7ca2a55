"""/v1/completions and /v1/models."""

import json

from tests.serving.servers import ask, events, post


def test_completes_as_openai_does(running):
  model, server = running
  body = {
    'model': 'tiny',
    'prompt': ['a{', 'bc'],
    'max_tokens': 5,
    'n': 2,
    'seed': 4,
    'suffix': '}',
    'echo': True,
    'user': 'someone',
  }
  status, answer = post(server, '/v1/completions', body)
  assert status == 200 and answer['object'] == 'text_completion'
  assert [one['index'] for one in answer['choices']] == [0, 1, 2, 3]
  assert all(
    one['text'].startswith(prompt) and one['finish_reason'] == 'length'
    for one, prompt in zip(answer['choices'], ['a{', 'a{', 'bc', 'bc'])
  )
  assert answer['usage'] == {
    'prompt_tokens': 6,
    'completion_tokens': 20,
    'total_tokens': 26,
  }
  text = ask(
    server,
    'POST',
    '/v1/completions',
    {**body, 'stream': True, 'stream_options': {'include_usage': True}},
  )[2]
  chunks = [data for _, data in events(text)]
  assert chunks[-1] == '[DONE]' and chunks[-2]['usage'] == answer['usage']
  streamed = [''] * 4
  for chunk in chunks[:-2]:
    (choice,) = chunk['choices']
    streamed[choice['index']] += choice['text']
  assert streamed == [one['text'] for one in answer['choices']]
  assert (
    post(
      server,
      '/v1/completions',
      {'prompt': [97, 98], 'seed': 1, 'max_tokens': 3},
    )[0]
    == 200
  )
  assert ask(server, 'GET', '/v1/models/tiny')[0] == 200
  assert post(server, '/v1/completions', {'model': 'gpt'})[0] == 404
  assert (
    json.loads(ask(server, 'GET', '/v1/models')[2])['data'][0]['id'] == 'tiny'
  )


def test_a_completion_ends_before_a_stop(running):
  model, server = running
  body = {'prompt': 'a', 'max_tokens': 12, 'seed': 2}
  whole = post(server, '/v1/completions', body)[1]['choices'][0]['text']
  stop = whole[5:7]
  for stream in (False, True):
    text = ask(
      server,
      'POST',
      '/v1/completions',
      {**body, 'stop': ['never there', stop], 'stream': stream},
    )[2]
    if stream:
      chunks = [data['choices'][0] for _, data in events(text)[:-1]]
      text, reason = (
        ''.join(c['text'] for c in chunks),
        chunks[-1]['finish_reason'],
      )
    else:
      (choice,) = json.loads(text)['choices']
      text, reason = choice['text'], choice['finish_reason']
    assert (text, reason) == (whole[: whole.find(stop)], 'stop')


def test_all_bits_of_a_seed_count(running):
  seeds, body = (3, 3 + 2**31, 3 + 2**63), {'prompt': 'a', 'max_tokens': 12}
  ask_for = lambda seed: post(running[1], '/v1/completions', body | seed)[1]
  texts = {ask_for({'seed': x})['choices'][0]['text'] for x in seeds}
  assert len(texts) == 3

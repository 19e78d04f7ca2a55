"""Serving: the worker's batches and turns, the two APIs, and what is refused."""

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest

pytest.importorskip('fastapi')
pytest.importorskip('uvicorn')

from nanodlm import evaluate, sample
from nanodlm.noise.categorical import Draw
from nanodlm.serving import app
from nanodlm.serving import engine as engines
from nanodlm.serving.engine import Task
from nanodlm.show import pages
from nanodlm.types import InputError
from tests import launches, workdirs

NEVER = 60.0  # seconds


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  workdir = workdirs.make_workdir(tmp_path_factory.mktemp('masked'))
  return workdir, *evaluate.open_run(workdir)


@pytest.fixture(scope='module')
def running(opened):
  """A service with its engine, and its port."""
  _, run, params, step = opened
  with serving(run, params, step) as (service, server):
    yield service, server


@contextlib.contextmanager
def serving(run, params, step):
  engine = engines.Engine(run, params)
  engine.start()
  service = app.Service(run, step, 'tiny', engine)
  server = app.make_server(service, '127.0.0.1')
  listening = app.open_socket('127.0.0.1', 0)
  # Of the connections too: little fits into the system's own buffers.
  listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
  server.port = listening.getsockname()[1]
  thread = threading.Thread(target=server.run, args=([listening],))
  thread.start()
  yield service, server
  server.should_exit = True
  thread.join(NEVER)
  assert engine.close()


def wait_for(condition):
  end = time.monotonic() + NEVER
  while not condition():
    assert time.monotonic() < end, 'never happened'
    time.sleep(0.01)


# The worker.


def task(engine, text, index=0, seed=7, draw=None, **choice):
  tokens, fixed = sample.lay_out(engine.run, text, engine.length)
  return Task(
    tokens,
    fixed,
    engine.choose(**choice),
    draw or Draw(engine.run.tokenizer.mask_id),
    seed,
    index,
  )


def finish(engine, *tasks, client='me'):
  """The canvases of tasks that were submitted together."""
  changed = threading.Event()
  rows = engine.submit(client, tasks, changed.set)
  wait_for(lambda: all(row.is_over for row in rows))
  assert not [row.error for row in rows if row.error]
  return [row.canvas.tolist() for row in rows]


@contextlib.contextmanager
def held(engine):
  """The worker stands still inside."""
  holds, go_on = threading.Event(), threading.Event()

  def block():
    holds.set()
    go_on.wait(NEVER)

  engine.submit('blocker', [task(engine, 'a{}')], block)
  assert holds.wait(NEVER)
  try:
    yield
  finally:
    go_on.set()


def test_same_seed_is_the_same_text_in_any_company(running):
  engine = running[0].engine
  others = [
    task(
      engine,
      'ab{3}c{}',
      i,
      seed=i,
      draw=Draw(engine.run.tokenizer.mask_id, 0.5, 3, 0.7),
    )
    for i in range(11)
  ]
  mine = [task(engine, 'q{}z', i) for i in range(2)]
  alone = [finish(engine, one)[0] for one in mine]
  together = finish(engine, *others[:5], mine[1], *others[5:], mine[0])
  assert [together[-1], together[5]] == alone
  assert alone[0] != alone[1]


def test_same_seed_is_the_same_text_as_of_mode_sample(opened, running):
  _, run, params, _ = opened
  engine = running[0].engine
  # Temperature, top-k and top-p are no part of the program here.
  run = evaluate.with_sampler(
    run, {'temperature': 0.8, 'top_k': 40, 'top_p': 0.9}
  )
  key = jax.random.fold_in(jax.random.key(3), 0)
  expected, _ = sample.make_sample(run)(params, 'a{}b', 3, key, engine.length)
  draw = Draw(run.tokenizer.mask_id, 0.8, 40, 0.9)
  actual = finish(engine, *(task(engine, 'a{}b', i, 3, draw) for i in range(3)))
  np.testing.assert_array_equal(actual, expected)


def test_shows_each_row_its_own_canvas(running):
  engine = running[0].engine
  frames = []
  one, two = task(engine, 'a{}'), task(engine, 'b{4}c')
  done = threading.Event()

  def look():
    frames.append([row.canvas for row in rows] if rows else None)
    if rows and all(row.is_over for row in rows):
      done.set()

  rows = []
  rows += engine.submit('me', [one, two], look)
  wait_for(lambda: all(row.is_over for row in rows))
  mask_id = engine.run.tokenizer.mask_id
  assert [len(row.canvas) for row in rows] == [16, 6]
  for i, row in enumerate(rows):
    given = row.task.fixed
    for frame in filter(None, frames):
      np.testing.assert_array_equal(frame[i][given], row.task.tokens[given])
      is_drawn = frame[i] != mask_id
      np.testing.assert_array_equal(frame[i][is_drawn], row.canvas[is_drawn])
    assert not np.any(row.canvas == mask_id)
  num_hidden = {
    int(np.sum(frame[0] == mask_id)) for frame in filter(None, frames)
  }
  assert len(num_hidden) > 2  # step by step


def test_clients_take_turns(opened):
  _, run, params, _ = opened
  engine = engines.Engine(
    run, params, engines.Limits(max_client_rows=40, max_rows=60)
  )
  tasks = [task(engine, 'a{}', i) for i in range(30)]
  engine.submit('greedy', tasks, lambda: None)
  for name in ('one', 'two'):
    engine.submit(name, [task(engine, name, seed=len(name))], lambda: None)
  other = task(engine, 'a{}', num_steps=3)
  engine.submit('other settings', [other], lambda: None)

  def take():
    with engine._changed:
      return engine._take()

  group = engine._group(tasks[0])
  assert take() is None  # nothing is compiled
  engine._programs[group, 8] = 'first'
  rows, program, size = take()
  assert (program, size, len(rows)) == ('first', 8, 8)
  assert sum(row.task in tasks for row in rows) == 6
  # Its turn comes although the greedy one has plenty left.
  engine._programs[engine._group(other), 8] = 'second'
  assert [take()[1] for _ in range(2)] == ['second', 'first']
  with pytest.raises(engines.FullError, match='of yours'):
    engine.submit('greedy', tasks, lambda: None)
  engine.submit('third', tasks[:30], lambda: None)
  with pytest.raises(engines.FullError, match='60 texts'):
    engine.submit('fourth', tasks, lambda: None)


def test_cancelled_rows_stop_the_network(opened):
  _, run, params, _ = opened
  engine = engines.Engine(run, params)
  watch, returned = engine._watch, []

  def recording(event):
    returned.append(watch(event))
    return returned[-1]

  engine._watch = recording
  engine.start()
  del returned[:]
  rows = []

  def cancel_after_two():
    if rows and rows[0].num_calls == 2:
      rows[0].cancel()

  rows += engine.submit('me', [task(engine, 'a{}')], cancel_after_two)
  wait_for(lambda: not engine._current and not engine.num_waiting())
  num_devices = jax.device_count()  # each asks for its own rows
  assert returned[0] and not returned[-1]
  assert sum(returned) <= 2 * num_devices
  waiting = engine.submit('me', [task(engine, 'a{}')], lambda: None)
  waiting[0].cancel()
  assert engine.num_waiting() == 0
  assert finish(engine, task(engine, 'b{}'))
  assert engine.close()
  assert not engine.is_alive()
  with pytest.raises(engines.FullError, match='stopping'):
    engine.submit('me', [task(engine, 'a{}')], lambda: None)


def test_rows_taken_as_the_engine_closes_have_failed(opened, monkeypatch):
  _, run, params, _ = opened
  engine = engines.Engine(run, params)
  states = []
  (row,) = engine.submit(
    'me', [task(engine, 'a{}')], lambda: states.append(row.state)
  )
  engine._programs[row.group, engine._sizes[0]] = 'program'
  with engine._changed:
    rows, program, size = engine._take()
  engine._current = rows
  assert engine.close()
  monkeypatch.setattr(engine, '_call', lambda *args: ([row.canvas], 1))
  engine._fill(rows, program, size)
  assert states == [engines.FAILED] and row.is_over


def test_programs_are_compiled_for_who_waits(opened):
  _, run, params, _ = opened
  engine = engines.Engine(run, params)
  compile_one, holds, go_on = (
    engine._compile,
    threading.Event(),
    threading.Event(),
  )
  compiled = []

  def compile_held(group, size):
    compiled.append((group.sampler.num_steps, size))
    holds.set()
    go_on.wait(NEVER)
    return compile_one(group, size)

  engine._compile = compile_held
  engine.start(warm_up=False)
  (first,) = engine.submit(
    'me', [task(engine, 'a{}', num_steps=2)], lambda: None
  )
  assert holds.wait(NEVER)
  (second,) = engine.submit(
    'them', [task(engine, 'a{}', num_steps=3)], lambda: None
  )
  (third,) = engine.submit(
    'you', [task(engine, 'a{}', num_steps=4)], lambda: None
  )
  wait_for(lambda: len(engine._wanted) == 3)
  second.cancel()
  go_on.set()
  wait_for(lambda: first.is_over and third.is_over and not engine._wanted)
  assert [num_steps for num_steps, _ in compiled] == [2, 4]
  assert engine.close()


def test_a_size_that_does_not_compile_is_tried_once(opened):
  _, run, params, _ = opened
  engine = engines.Engine(run, params)
  compile_one, tried = engine._compile, []

  def compile_small(group, size):
    tried.append(size)
    if size > engine._sizes[0]:
      raise RuntimeError('out of memory')
    return compile_one(group, size)

  engine._compile = compile_small
  engine.start(warm_up=False)
  for _ in range(2):
    finish(
      engine, *(task(engine, 'a{}', i) for i in range(4 * engine._sizes[0]))
    )
  assert len(tried) == len(set(tried)) > 1
  assert engine.close()


def test_padding_is_not_seen(opened, monkeypatch):
  _, run, params, _ = opened
  greedy = Draw(run.tokenizer.mask_id, 0.0)
  choice = {'name': 'confidence', 'num_steps': 8}  # no chance in it
  filled = []
  for min_length in (8, 16):
    monkeypatch.setattr(engines, 'MIN_LENGTH', min_length)
    engine = engines.Engine(run, params)
    engine.start(warm_up=False)
    one = task(engine, 'ab{4}c', draw=greedy, **choice)
    assert engine._group(one).length == min_length
    filled += finish(engine, one)
    assert engine.close()
  assert filled[0] == filled[1] and len(filled[0]) == 7


# HTTP.


def ask(server, method, path, body=None, headers=(), raw=False):
  """(status, headers, body) of a request."""
  connection = http.client.HTTPConnection(
    '127.0.0.1', server.port, timeout=NEVER
  )
  data = body if raw or body is None else json.dumps(body)
  connection.request(
    method, path, data, {'Content-Type': 'application/json', **dict(headers)}
  )
  answer = connection.getresponse()
  text = answer.read()
  connection.close()
  return answer.status, answer.headers, text


def post(server, path, body, **kwargs):
  status, headers, text = ask(server, 'POST', path, body, **kwargs)
  return status, json.loads(text) if text.startswith(b'{') else text


def events(text):
  """[(name, data)] of a finished stream."""
  found = []
  for part in text.decode().split('\n\n'):
    lines = dict(
      line.split(': ', 1)
      for line in part.split('\n')
      if line and not line.startswith(':')
    )
    if lines:
      data = lines['data']
      found.append(
        (lines.get('event'), data if data == '[DONE]' else json.loads(data))
      )
  return found


def test_generates(running):
  _, server = running
  body = {
    'prompt': 'a{}b{{{3}',
    'seed': 5,
    'num_samples': 2,
    'temperature': 0.5,
    'num_steps': 4,
  }
  status, answer = post(server, '/api/generate', body)
  assert status == 200
  assert answer['seed'] == 5
  assert answer['sampler'] == {
    'name': 'fixed_count',
    'num_steps': 4,
    'temperature': 0.5,
    'top_k': 0,
    'top_p': 1.0,
  }
  for one in answer['samples']:
    assert len(one['tokens']) == 16 and one['num_calls'] == 4
    assert one['text'] == one['shown']
    for token, text in zip(one['tokens'], one['texts']):
      assert token >= 128 or text == chr(token)
    assert one['tokens'][0] == ord('a') and ord('{') in one['tokens']
  assert post(server, '/api/generate', body)[1] == answer
  # What was drawn, masked again and filled.
  again = answer['samples'][0]['tokens']
  masked = [None if 2 <= i < 5 else token for i, token in enumerate(again)]
  status, answer = post(server, '/api/generate', {'tokens': masked, 'seed': 1})
  (one,) = answer['samples']
  assert [token for i, token in enumerate(one['tokens']) if not 2 <= i < 5] == [
    token for token in masked if token is not None
  ]


def test_streams_what_it_generates(running, monkeypatch):
  _, server = running
  change = engines.Row.change

  def slow(row, **values):  # so that there is time to send each
    change(row, **values)
    time.sleep(0.1)

  monkeypatch.setattr(engines.Row, 'change', slow)
  body = {'prompt': 'a{}b', 'seed': 5, 'num_samples': 2}
  _, headers, text = ask(server, 'POST', '/api/stream', body)
  assert headers['Content-Type'].startswith('text/event-stream')
  found = events(text)
  # A row is done behind its last tokens.
  for i in range(2):
    kinds = [
      data.get('state', name) for name, data in found if data.get('row') == i
    ]
    assert kinds[-1] == 'done' and kinds.index('canvas') < kinds.index('reveal')
    assert 'running' in kinds
  canvases = {}
  num_reveals = 0
  for name, data in found[:-1]:
    if name == 'canvas':
      canvases[data['row']] = data
    elif name == 'reveal':
      num_reveals += 1
      for i, token, part in data['changes']:
        canvases[data['row']]['tokens'][i] = token
        canvases[data['row']]['texts'][i] = part
  name, done = found[-1]
  assert name == 'done' and num_reveals >= 4
  assert done == post(server, '/api/generate', body)[1]
  for i, one in enumerate(done['samples']):
    assert canvases[i]['tokens'] == one['tokens']
    assert canvases[i]['texts'] == one['texts']


def test_answers_as_openai_does(running):
  service, server = running
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
  service, server = running
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


LONG = 'x' * 17


@pytest.mark.parametrize(
  'path, body, status, words',
  [
    ('/api/generate', {'prompt': LONG}, 400, 'the canvas has 16 tokens'),
    ('/api/stream', {'prompt': LONG}, 400, 'the canvas has 16 tokens'),
    (
      '/v1/completions',
      {'prompt': 'abc', 'max_tokens': 14},
      400,
      'has 16 tokens',
    ),
    ('/v1/completions', {'prompt': [97] * 3, 'max_tokens': 14}, 400, '16'),
    ('/api/generate', {'tokens': [None] * 17}, 400, 'between 1 and 16'),
    ('/api/generate', {'tokens': [257]}, 400, 'ids in'),
    ('/api/generate', {'prompt': '{' + '9' * 5000 + '}'}, 400, 'canvas has'),
    ('/api/generate', {'prompt': 'a', 'tokens': [1]}, 400, 'either'),
    ('/api/generate', {'prompt': 'a', 'sampler': 'ar'}, 400, 'does not fit'),
    (
      '/api/generate',
      {'prompt': 'a', 'sampler': 'first_hitting', 'num_steps': 3},
      400,
      'has no effect',
    ),
    ('/api/generate', {'prompt': 'a', 'tempratur': 1}, 422, 'tempratur'),
    ('/v1/completions', {'prompt': 'a', 'messages': []}, 422, 'messages'),
    (
      '/api/generate',
      {'prompt': 'a', 'num_samples': 17},
      422,
      'num_samples: Input should be less than or equal to 16, not 17',
    ),
    ('/api/generate', {'prompt': 'a', 'num_steps': 10**9}, 422, 'num_steps'),
    ('/api/generate', {'prompt': 'a', 'top_p': 0}, 422, 'top_p'),
    (
      '/api/generate',
      {'prompt': 'a', 'temperature': float('nan')},
      422,
      'temp',
    ),
    ('/api/generate', {'prompt': 3}, 422, 'prompt'),
    (
      '/api/generate',
      {'prompt': 'a', 'user': 'u' * 10_000},
      422,
      f", not '{'u' * 99}",
    ),
    ('/api/generate', [], 422, 'body'),
    ('/v1/completions', {'prompt': 'a', 'logprobs': 0}, 400, 'logprobs'),
    ('/v1/completions', {'prompt': 'a', 'stop': ['']}, 400, 'stop'),
    (
      '/v1/completions',
      {'prompt': ['a'] * 5, 'n': 16, 'max_tokens': 3},
      400,
      '80 texts in one request (num_samples, or n for each prompt); at most 64',
    ),
    (
      '/v1/completions',
      {'prompt': ['a'] * 5, 'n': 16, 'max_tokens': 3, 'stream': True},
      400,
      'at most 64',
    ),
  ],
)
def test_refuses(running, path, body, status, words):
  _, server = running
  actual, answer = post(server, path, body)
  assert actual == status
  assert words in answer['error']['message']
  assert 'Traceback' not in str(answer)
  assert ask(server, 'GET', '/health')[0] == 200


@pytest.mark.parametrize(
  'body, headers, status',
  [
    (b'{bad', {}, 400),
    (b'[' * 100_000, {}, 400),
    (b'', {}, 422),
    (b'{"prompt": "\\ud800"}', {}, 400),
    (b'\xff\xfe', {}, 400),
    (b'{"\\ud800": 1}', {}, 422),
    (b' ' * 10_000_000, {}, 413),
    (iter([b' ' * 1_000_000] * 10), {}, 413),  # in chunks of unknown number
    (b'{}', {'Content-Length': '99999999999'}, 413),
    (b'{}', {'Content-Type': 'text/plain'}, 415),
    (b'{}', {'Host': 'attacker.example:80'}, 421),
    (b'{}', {'Origin': 'http://attacker.example'}, 403),
    (b'{}', {'Origin': 'http://['}, 403),
  ],
)
def test_refuses_raw(running, body, headers, status):
  _, server = running
  actual, answer = post(
    server, '/api/generate', body, headers=headers, raw=True
  )
  assert actual == status
  assert answer['error']['message']
  if status == 400 and b'surrogate' not in answer['error']['message'].encode():
    assert answer['error']['code'] == 'malformed_json'
  assert ask(server, 'GET', '/health')[0] == 200


def test_errors_with_half_a_surrogate_pair_are_sent(running, monkeypatch):
  service, server = running

  def refuse(*args):
    raise InputError('\ud800 is none')

  monkeypatch.setattr(service.engine, 'choose', refuse)
  status, answer = post(server, '/api/generate', {'prompt': 'a'})
  assert (status, answer['error']['message']) == (400, '? is none')


def test_slow_and_unreading_clients_are_cut_off(running, monkeypatch):
  _, server = running
  monkeypatch.setattr(app, 'READ_SECS', 0.3)
  monkeypatch.setattr(app, 'STALL_SECS', 0.3)
  connections = server.server_state.connections
  wait_for(lambda: not connections)
  silent = socket.create_connection(('127.0.0.1', server.port))
  slow = socket.create_connection(('127.0.0.1', server.port))
  slow.sendall(
    b'POST /api/generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
    b'application/json\r\nContent-Length: 9\r\n\r\n{'
  )
  deaf = socket.socket()
  deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
  deaf.connect(('127.0.0.1', server.port))
  deaf.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 60)
  wait_for(lambda: len(connections) == 3)
  for client in (silent, slow):
    client.settimeout(NEVER)
  assert b' 408 ' in slow.recv(1000).split(b'\r\n')[0]
  assert silent.recv(1) == b''
  wait_for(lambda: not connections)
  assert ask(server, 'GET', '/health')[0] == 200
  for client in (silent, slow, deaf):
    client.close()


def test_who_leaves_is_not_waited_for(running):
  service, server = running
  engine = service.engine
  clients = []
  with held(engine):
    for path in ('/api/stream', '/api/generate', '/v1/completions'):
      client = http.client.HTTPConnection('127.0.0.1', server.port)
      client.request(
        'POST',
        path,
        json.dumps(
          {'prompt': 'a'} | ({'max_tokens': 3} if 'v1' in path else {})
        ),
        {'Content-Type': 'application/json'},
      )
      clients.append(client)
    wait_for(lambda: engine.num_waiting() == 3)
    for client in clients:
      client.close()
    wait_for(lambda: engine.num_waiting() == 0)
  assert finish(engine, task(engine, 'b{}'))


def test_many_clients_lose_nothing_and_are_served_alike(opened, capsys):
  """With NANODLM_CLIENTS=50 for a minute, of NANODLM_WORKDIR; prints what came."""
  is_load = 'NANODLM_CLIENTS' in os.environ
  num_clients = int(os.environ.get('NANODLM_CLIENTS', 6))
  secs, num_steps = (60.0, 16) if is_load else (1.0, 4)
  _, run, params, step = opened
  if 'NANODLM_WORKDIR' in os.environ:
    run, params, step = evaluate.open_run(os.environ['NANODLM_WORKDIR'])
  answers = [[] for _ in range(num_clients)]  # (status, seconds, whether whole)

  def ask_on(server, client, end):
    rng = random.Random(client)
    while (start := time.monotonic()) < end or len(answers[client]) < 2:
      body = {
        'prompt': ''.join(rng.choices('abc ', k=rng.randint(0, 8))),
        'temperature': rng.choice([0.0, 0.7, 1.0]),
        'num_steps': num_steps,
        'user': f'client {client}',
      }
      path = rng.choice(['/api/generate', '/api/stream', '/v1/completions'])
      if path.startswith('/v1'):
        body['max_tokens'] = 8
      status, _, text = ask(server, 'POST', path, body)
      whole = {
        '/api/generate': b'"samples"',
        '/api/stream': b'event: done',
        '/v1/completions': b'"finish_reason":"length"',
      }[path] in text
      answers[client].append((status, time.monotonic() - start, whole))

  with serving(run, params, step) as (service, server):
    wait_for(lambda: not service.engine._wanted)  # no compilation in between
    post(server, '/api/generate', {'prompt': 'a', 'num_steps': num_steps})
    wait_for(lambda: not service.engine._wanted)
    end = time.monotonic() + secs
    threads = [
      threading.Thread(target=ask_on, args=(server, client, end))
      for client in range(num_clients)
    ]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join(secs + NEVER)
  numbers = sorted(map(len, answers))
  all_answers = [each for own in answers for each in own]
  assert {(status, whole) for status, _, whole in all_answers} == {(200, True)}
  assert numbers[-1] <= 2 * numbers[0] + (2 if is_load else 10)
  with capsys.disabled():
    if is_load:
      delays = sorted(delay for _, delay, _ in all_answers)
      print(
        f'\n{num_clients} clients, {secs:g} s: {len(delays)} requests, '
        f'{numbers[0]} to {numbers[-1]} each, latency '
        f'{delays[len(delays) // 2]:.2f} s (median), '
        f'{delays[len(delays) * 95 // 100]:.2f} s (95%)'
      )


def test_waits_no_longer_than_there_is_room(running, monkeypatch):
  service, server = running
  monkeypatch.setattr(service.engine, 'limits', engines.Limits(max_rows=3))
  engine = service.engine
  with held(engine):
    engine.submit('other', [task(engine, 'a{}')], lambda: None)
    status, headers, text = ask(
      server, 'POST', '/api/generate', {'prompt': 'a', 'num_samples': 3}
    )
  assert status == 429 and int(headers['Retry-After']) > 0
  assert 'waiting' in json.loads(text)['error']['message']
  # However long it waits: there is never room for these.
  status, headers, _ = ask(
    server, 'POST', '/api/generate', {'prompt': 'a', 'num_samples': 4}
  )
  assert status == 400 and 'Retry-After' not in headers


@pytest.mark.parametrize('path', ['/api/stream', '/v1/completions'])
def test_who_leaves_before_the_first_byte_is_not_waited_for(opened, path):
  _, run, params, step = opened
  engine = engines.Engine(run, params)  # not started: all rows wait
  submitted, submit = [], engine.submit
  engine.submit = lambda *args: submitted.extend(submit(*args)) or submitted
  asgi = app.make_app(app.Service(run, step, 'tiny', engine))
  body = {'prompt': 'a'} | (
    {'max_tokens': 3, 'stream': True} if 'v1' in path else {}
  )
  messages = [{'type': 'http.request', 'body': json.dumps(body).encode()}]
  sent = []

  async def receive():
    return messages.pop() if messages else {'type': 'http.disconnect'}

  async def send(message):
    sent.append(message)
    await asyncio.sleep(0.01)  # as where the connection takes no more

  scope = {
    'type': 'http',
    'method': 'POST',
    'path': path,
    'query_string': b'',
    'headers': [(b'content-type', b'application/json')],
    'asgi': {'version': '3.0', 'spec_version': '2.3'},
    'root_path': '',
    'http_version': '1.1',
    'scheme': 'http',
    'client': ('127.0.0.1', 1),
  }
  asyncio.run(asgi(scope, receive, send))
  assert submitted and not [m for m in sent if m.get('body')]
  assert engine.num_waiting() == 0


def test_pages_ask_nobody_else(running):
  _, server = running
  for path in ('/', '/docs'):
    status, headers, page = ask(server, 'GET', path)
    assert status == 200
    assert "default-src 'none'" in headers['Content-Security-Policy']
    assert b'http://' not in page and b'https://' not in page
  api = json.loads(ask(server, 'GET', '/openapi.json')[2])
  assert {'/api/generate', '/api/stream', '/v1/completions'} <= set(
    api['paths']
  )
  info = json.loads(ask(server, 'GET', '/api/info')[2])
  assert info['length'] == 16 and info['sees_right']
  assert {'fixed_count', 'remask'} <= {one['name'] for one in info['samplers']}
  assert post(server, '/api/tokenize', {'text': 'é{}'})[1] == {
    'tokens': [0xC3, 0xA9, 123, 125],
    'texts': ['é', '', '{', '}'],
  }


@pytest.mark.parametrize('name', ['replay.html', 'playground.html'])
def test_pages_have_the_script_that_they_share(name):
  page = pages.read(name)
  assert re.search(
    r'function visible.*?\n}\nconst point.*?;\n', page, re.DOTALL
  )
  assert '.js*/' not in page


def test_pages_are_read_once(running):
  ask(running[1], 'GET', '/')
  with mock.patch.object(
    pages.importlib.resources, 'files', side_effect=AssertionError
  ):
    assert ask(running[1], 'GET', '/')[0] == 200


def test_left_to_right_models(tmp_path):
  workdir = workdirs.make_workdir(tmp_path, objective__name='ar')
  run, params, step = evaluate.open_run(workdir)
  with serving(run, params, step) as (service, server):
    engine = service.engine
    short, long = task(engine, 'ab{5}'), task(engine, 'cdefg', 1)
    assert (
      finish(engine, short, long)
      == [*finish(engine, long), *finish(engine, short)][::-1]
    )
    body = {'prompt': 'ab', 'max_tokens': 6, 'seed': 1}
    whole = post(server, '/v1/completions', body)[1]['choices'][0]['text']
    text = ask(server, 'POST', '/v1/completions', {**body, 'stream': True})[2]
    parts = [data['choices'][0]['text'] for _, data in events(text)[:-1]]
    assert ''.join(parts) == whole
    for path, body in (
      ('/api/generate', {'prompt': 'a{2}b'}),
      ('/v1/completions', {'max_tokens': 2, 'suffix': 'b'}),
      ('/api/generate', {'tokens': [None, 97]}),
    ):
      status, answer = post(server, path, body)
      assert status == 400 and 'left to right' in answer['error']['message']


def test_a_signal_ends_streams_and_process(opened):
  workdir = opened[0]
  process = launches.start('--mode=serve', f'--workdir={workdir}', '--port=0')
  try:
    for line in process.stdout:
      if 'ready' in line:
        break
    port = int(line.split('127.0.0.1:')[1].split()[0])
    client = http.client.HTTPConnection('127.0.0.1', port, timeout=NEVER)
    # Enough steps that it cannot be done before the signal.
    client.request(
      'POST',
      '/api/stream',
      json.dumps(
        {
          'prompt': 'a',
          'sampler': 'ancestral',
          'num_steps': 1024,
          'num_samples': 16,
        }
      ),
      {'Content-Type': 'application/json'},
    )
    answer = client.getresponse()
    assert answer.readline() == b': nanodlm\n'
    process.send_signal(signal.SIGTERM)
    assert b'"the server is stopping"' in answer.read()
    output = process.communicate(timeout=NEVER)[0]
    assert process.returncode == 143, output
    assert 'Traceback' not in output and 'stopped' in output
  finally:
    process.kill()


def test_where_it_cannot_listen(running):
  for host, port in (('256.1.1.1', 0), ('127.0.0.1', running[1].port)):
    with pytest.raises(InputError, match=f'--host={host!r} --port={port}'):
      app.open_socket(host, port)


def test_names_of_its_own():
  assert app.allowed_hosts('0.0.0.0') is None
  for host in ('127.0.0.1', '::1', 'localhost'):
    assert 'localhost' in app.allowed_hosts(host)
    assert 'attacker.example' not in app.allowed_hosts(host)


@contextlib.contextmanager
def browsing():
  """A page of a browser without a window, and Playwright's `expect`."""
  playwright = pytest.importorskip('playwright.sync_api')
  chromium = shutil.which('chromium') or shutil.which('chromium-browser')
  if not chromium:
    pytest.skip('no Chromium')
  with playwright.sync_playwright() as driver:
    browser = driver.chromium.launch(
      executable_path=chromium, args=['--no-sandbox']
    )
    yield browser.new_page(), playwright.expect
    browser.close()


def test_in_a_browser(running):
  _, server = running
  with browsing() as (page, expect):
    wrong = []
    page.on('pageerror', lambda error: wrong.append(error))
    page.goto(f'http://127.0.0.1:{server.port}/')
    expect(page.locator('#facts')).to_contain_text('canvas of 16')
    state = page.locator('#state')
    page.fill('#text', 'ab{}cd')
    page.click('#run')
    expect(state).to_have_text('Done')
    assert page.locator('#result .drawn').count() == 12
    assert page.locator('#result .token').count() == 16
    before = page.locator('#result .token').all_text_contents()
    page.focus('#result')
    for key in ('ArrowRight', 'Shift+ArrowRight', 'Shift+ArrowRight', 'Delete'):
      page.keyboard.press(key)
    expect(page.locator('#result .masked')).to_have_count(3)
    page.click('#again')
    expect(state).to_have_text('Done')
    after = page.locator('#result .token').all_text_contents()
    assert before[:1] + before[4:] == after[:1] + after[4:]
    assert page.locator('#result .masked').count() == 0
    page.fill('#text', 'say {{ this')
    page.focus('#text')
    page.keyboard.press('Home')
    for _ in range(6):
      page.keyboard.press('Shift+ArrowRight')
    page.click('#mask-text')
    expect(page.locator('#text')).to_have_value('{5} this')
    page.fill('#text', LONG)
    page.keyboard.press('Control+Enter')
    expect(page.locator('#error')).to_contain_text('has 16 tokens')
    page.evaluate(
      r"show([1, 2, null], ['a\u202eb\u200b', '\x07\n', ''], "
      '[true, false, false])'
    )
    assert page.locator('#result .token').all_text_contents() == [
      'a\u2039U+202E\u203ab\u2039U+200B\u203a',
      '\u2039U+0007\u203a\u21b5\n',
      '',
    ]
    # To be edited and copied they are what they are.
    assert page.evaluate('asText()') == 'a\u202eb\u200b\x07\n{1}'
    assert not wrong


# From the click to the frame after the first token.
FIRST_TOKEN = """() => new Promise(resolve => {
  const start = performance.now();
  new MutationObserver((_, observer) => {
    if (!document.querySelector('#result .drawn')) return;
    observer.disconnect();
    requestAnimationFrame(() => resolve(performance.now() - start));
  }).observe(document.querySelector('#result'),
             {subtree: true, childList: true, attributes: true});
  document.querySelector('#run').click();
})"""


def test_the_first_token_comes_soon(opened, capsys):
  """With NANODLM_WORKDIR of that run, 64 calls, twenty times; prints how soon."""
  _, run, params, step = opened
  workdir = os.environ.get('NANODLM_WORKDIR')
  if workdir:
    run, params, step = evaluate.open_run(workdir)
  with (
    serving(run, params, step) as (service, server),
    browsing() as (page, expect),
  ):
    wait_for(lambda: not service.engine._wanted)
    millisecs = []
    for _ in range(21 if workdir else 3):
      page.goto(f'http://127.0.0.1:{server.port}/')
      expect(page.locator('#facts')).to_contain_text('canvas of')
      page.fill('#num-steps', '64' if workdir else '8')
      page.fill('#text', 'The {}.')
      millisecs.append(page.evaluate(FIRST_TOKEN))
      expect(page.locator('#state')).to_have_text('Done')
  if workdir:
    with capsys.disabled():
      del millisecs[0]  # compiles it
      print(
        f'\nclick to first token: {np.median(millisecs):.0f} ms, median of '
        f'{len(millisecs)} ({min(millisecs):.0f} to {max(millisecs):.0f})'
      )
  assert np.median(millisecs) < 2000  # any machine

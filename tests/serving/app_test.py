"""The routes, the playground, and how the server stops."""

import asyncio
import http.client
import json
import os
import random
import re
import signal
import threading
import time
from unittest import mock

import jax
import numpy as np
import pytest

from nanodlm import config
from nanodlm import lm as lms
from nanodlm.serving import app, service
from nanodlm.serving import engine as engines
from nanodlm.show import pages
from nanodlm.types import InputError
from tests import browsers, launches, workdirs
from tests.serving.servers import (
  ask,
  events,
  finish,
  held,
  NEVER,
  post,
  row,
  serving,
  wait_for,
)


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
    assert one['tokens_per_call'] == 13 / 4
    assert one['text'] == one['shown']
    for token, text in zip(one['tokens'], one['texts']):
      assert token >= 128 or text == chr(token)
    assert one['tokens'][0] == ord('a') and ord('{') in one['tokens']
  assert post(server, '/api/generate', body)[1] == answer
  # Drawn tokens are masked and filled again.
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

  def slow(row, **values):  # Leaves time to send each change.
    change(row, **values)
    time.sleep(0.1)

  monkeypatch.setattr(engines.Row, 'change', slow)
  body = {'prompt': 'a{}b', 'seed': 5, 'num_samples': 2}
  _, headers, text = ask(server, 'POST', '/api/stream', body)
  assert headers['Content-Type'].startswith('text/event-stream')
  found = events(text)
  # A row is done after its last tokens.
  for i in range(2):
    kinds = [
      data.get('state', name) for name, data in found if data.get('row') == i
    ]
    assert kinds[-1] == 'done' and kinds.index('canvas') < kinds.index('reveal')
    assert 'running' in kinds
  canvases = {}
  calls = {0: [], 1: []}
  for name, data in found[:-1]:
    if name == 'canvas':
      assert data['tokens'].count(None) == 14  # Before the first call.
      canvases[data['row']] = data
    elif name == 'reveal':
      calls[data['row']].append(data['num_calls'])
      for i, token, part in data['changes']:
        canvases[data['row']]['tokens'][i] = token
        canvases[data['row']]['texts'][i] = part
  name, done = found[-1]
  assert name == 'done'
  assert calls == {0: [1, 2, 3, 4], 1: [1, 2, 3, 4]}
  assert done == post(server, '/api/generate', body)[1]
  for i, one in enumerate(done['samples']):
    assert canvases[i]['tokens'] == one['tokens']
    assert canvases[i]['texts'] == one['texts']


LONG = 'x' * 17


def is_compiled(engine):
  """Whether no compilation is under way or wanted."""
  with engine._changed:
    return engine._next_program() is None


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
    ('/api/generate', {'tokens': [257]}, 400, 'tokens: 257'),
    ('/api/generate', {'prompt': '{' + '9' * 5000 + '}'}, 400, 'canvas has'),
    ('/api/generate', {'prompt': 'a', 'tokens': [1]}, 400, 'either'),
    ('/api/generate', {'prompt': 'a', 'sampler': 'ar'}, 400, 'does not fit'),
    (
      '/api/generate',
      {'prompt': 'a', 'sampler': 'first_hitting', 'num_steps': 3},
      400,
      'sampler.num_steps=3 is ignored',
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
    ('/api/generate', {'prompt': 'a', 'top_p': -1}, 422, 'top_p'),
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
    ('/v1/completions', {'prompt': 'a', 'logprobs': 21}, 422, 'logprobs'),
    (
      '/v1/completions',
      {'prompt': 'a', 'presence_penalty': 0.5},
      422,
      'presence_penalty: Input should be 0, not 0.5',
    ),
    ('/v1/completions', {'prompt': 'a', 'best_of': 2}, 400, 'best_of=2'),
    ('/v1/completions', {'prompt': 'a', 'stop': ['']}, 400, 'stop'),
    (
      '/v1/completions',
      {'prompt': ['a'] * 5, 'n': 16, 'max_tokens': 3},
      400,
      '80 texts (num_samples, or n for each prompt); at most 64',
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


def test_errors_with_half_of_a_surrogate_pair_are_sent(running, monkeypatch):
  model, server = running

  def refuse(*args):
    raise InputError('\ud800 is none')

  monkeypatch.setattr(model.engine, 'choose', refuse)
  status, answer = post(server, '/api/generate', {'prompt': 'a'})
  assert (status, answer['error']['message']) == (400, '? is none')


@pytest.mark.parametrize('path', ['/api/stream', '/v1/completions'])
def test_a_quiet_stream_has_comments(running, monkeypatch, path):
  model, server = running
  monkeypatch.setattr(service, 'HEARTBEAT_SECS', 0.05)
  body = {'prompt': 'a', 'max_tokens': 3, 'stream': True}
  if path == '/api/stream':
    body = {'prompt': 'a'}
  client = http.client.HTTPConnection('127.0.0.1', server.port, timeout=NEVER)
  with held(model.engine):
    client.request(
      'POST', path, json.dumps(body), {'Content-Type': 'application/json'}
    )
    answer = client.getresponse()
    comments = 0
    while comments < 4:
      comments += answer.readline() == b': nanodlm\n'
  assert events(answer.read())
  client.close()


def test_rows_of_clients_that_left_are_cancelled(running):
  model, server = running
  engine = model.engine
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
  assert finish(engine, row(engine, 'b{}'))


def test_many_clients_lose_nothing_and_are_served_alike(opened, capsys):
  """Prints the latencies of NANODLM_CLIENTS clients, with NANODLM_WORKDIR."""
  is_load = 'NANODLM_CLIENTS' in os.environ
  num_clients = int(os.environ.get('NANODLM_CLIENTS', 6))
  secs, num_steps = (60.0, 16) if is_load else (1.0, 4)
  workdir = os.environ.get('NANODLM_WORKDIR')
  lm = lms.load(workdir) if workdir else opened
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

  with serving(lm) as (model, server):
    wait_for(lambda: is_compiled(model.engine))
    post(server, '/api/generate', {'prompt': 'a', 'num_steps': num_steps})
    wait_for(lambda: is_compiled(model.engine))
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


def test_a_full_queue_refuses_requests(running, monkeypatch):
  model, server = running
  monkeypatch.setattr(engines, 'MAX_ROWS', 3)
  engine = model.engine
  with held(engine):
    engine.submit('other', [row(engine, 'a{}')], lambda: None)
    status, headers, text = ask(
      server, 'POST', '/api/generate', {'prompt': 'a', 'num_samples': 3}
    )
  assert status == 429 and int(headers['Retry-After']) > 0
  assert 'waiting' in json.loads(text)['error']['message']
  # These never fit, so that a retry cannot succeed.
  status, headers, _ = ask(
    server, 'POST', '/api/generate', {'prompt': 'a', 'num_samples': 4}
  )
  assert status == 400 and 'Retry-After' not in headers


@pytest.mark.parametrize('path', ['/api/stream', '/v1/completions'])
def test_rows_of_clients_that_left_before_the_first_byte_are_cancelled(
  opened, path
):
  engine = engines.Engine(opened)  # Not started: all rows wait.
  submit, submitted = engine.submit, []

  def recording(client, rows, on_change):
    submitted.extend(rows)
    submit(client, rows, on_change)

  engine.submit = recording
  asgi = app.make_app(app.Service(engine, 'tiny'))
  body = {'prompt': 'a'} | (
    {'max_tokens': 3, 'stream': True} if 'v1' in path else {}
  )
  messages = [{'type': 'http.request', 'body': json.dumps(body).encode()}]
  sent = []

  async def receive():
    return messages.pop() if messages else {'type': 'http.disconnect'}

  async def send(message):
    sent.append(message)
    await asyncio.sleep(0.01)  # As if the connection were busy.

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


def test_the_page_loads_nothing_from_other_servers(running):
  _, server = running
  status, headers, page = ask(server, 'GET', '/')
  assert status == 200
  assert "default-src 'none'" in headers['Content-Security-Policy']
  assert b'http://' not in page and b'https://' not in page
  assert b'href="/openapi.json"' in page
  assert ask(server, 'GET', '/docs')[0] == 404


def test_describes_its_api(running):
  _, server = running
  api = json.loads(ask(server, 'GET', '/openapi.json')[2])
  assert {'/api/generate', '/api/stream', '/v1/completions'} <= set(
    api['paths']
  )
  for verbs in api['paths'].values():
    assert all(' ' in call['summary'] for call in verbs.values())
  described = api['components']['schemas']['GenerateRequest']['properties']
  assert 'gap of 12 tokens' in described['prompt']['description']
  assert '`reveal`' in api['paths']['/api/stream']['post']['description']
  info = json.loads(ask(server, 'GET', '/api/info')[2])
  assert info['length'] == 16 and info['sees_right']
  assert {'fixed_count', 'remask'} <= {one['name'] for one in info['samplers']}
  assert post(server, '/api/tokenize', {'text': 'é{}'})[1] == {
    'tokens': [0xC3, 0xA9, 123, 125],
    'texts': ['é', '', '{', '}'],
  }


@pytest.mark.parametrize(
  'page',
  [pages.read('replay.html'), pages.read('playground.html', 'nanodlm.serving')],
  ids=['replay', 'playground'],
)
def test_pages_include_their_shared_script(page):
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
  with serving(lms.load(workdir)) as (model, server):
    engine = model.engine
    short, long = row(engine, 'ab{5}'), row(engine, 'cdefg', 1)
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
  process = launches.start(
    '--mode=serve', f'--workdir={opened.workdir}', '--port=0', prefix=('env',)
  )
  try:
    for line in process.stdout:
      if 'ready' in line:
        break
    port = int(line.split('127.0.0.1:')[1].split()[0])
    client = http.client.HTTPConnection('127.0.0.1', port, timeout=NEVER)
    # With this many steps it cannot be done before the signal.
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
    assert answer.readline()
    process.send_signal(signal.SIGTERM)
    assert b'"the server is stopping"' in answer.read()
    output = process.communicate(timeout=NEVER)[0]
    assert process.returncode == 143, output
    assert 'Traceback' not in output and 'stopped' in output
  finally:
    process.kill()


def serve_briefly(workdir, *args, **changes):
  start = config.Start('serve', workdir, config.load(), False, changes)
  return launches.run_mode(app, *args, start=start)


def test_mistakes_are_reported_before_the_model_is_loaded(
  opened, running, capsys, monkeypatch
):
  port = running[1].port
  assert serve_briefly(opened.workdir, f'--port={port}') == 2
  assert f'--port={port}: cannot listen' in capsys.readouterr().err
  changes = {'sampler.num_samples': 3}
  assert serve_briefly(opened.workdir, **changes) == 2
  assert '--config.sampler.num_samples=3 is ignored' in capsys.readouterr().err
  assert serve_briefly(opened.workdir, '--port=-1') == 2
  assert '-1' in capsys.readouterr().err
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  assert serve_briefly(opened.workdir, '--port=0') == 2
  assert 'one process; there are 2' in capsys.readouterr().err


def test_addresses_to_which_it_cannot_bind(running):
  for host, port in (('256.1.1.1', 0), ('127.0.0.1', running[1].port)):
    with pytest.raises(InputError, match=f'--host={host!r} --port={port}'):
      app.open_socket(host, port)


def test_a_browser_keeps_what_was_typed_before_the_server_answered(running):
  _, server = running
  with browsers.opened() as browser:
    page, expect = browser.new_page(), browsers.expect()
    held = []
    page.route('**/api/info', lambda route: held.append(route))
    page.goto(f'http://127.0.0.1:{server.port}/')
    typed = {'#temperature': '0.5', '#num-steps': '3', '#text': 'my {} text'}
    for field, value in typed.items():
      page.fill(field, value)
    held[0].continue_()
    expect(page.locator('#facts')).to_contain_text('canvas of 16')
    for field, value in typed.items():
      expect(page.locator(field)).to_have_value(value)
    expect(page.locator('#top-p')).to_have_value('1')
    # Another sampler proposes its own number, the default.
    page.select_option('#sampler', 'ancestral')
    expect(page.locator('#num-steps')).to_have_value('128')


def test_in_a_browser(running):
  _, server = running
  with browsers.visiting(f'http://127.0.0.1:{server.port}/') as page:
    expect = browsers.expect()
    expect(page.locator('#facts')).to_contain_text('canvas of 16')
    state = page.locator('#state')
    page.fill('#text', 'ab{}cd')
    page.click('#run')
    expect(state).to_have_text('Done')
    calls, why = page.locator('#calls'), page.locator('#why')
    expect(calls).to_have_text('4')
    expect(why).to_have_text('')
    page.fill('#num-steps', '64')
    page.click('#run')
    expect(calls).to_have_text('12')
    expect(why).to_contain_text('each token that is drawn; 64 were asked for')
    # An error leaves the last result, also when it comes in mid-stream.
    result = page.locator('#result').inner_html()
    engine = running[0].engine
    for place in (engine, '_fill'), (engine, 'choose'):
      failing = mock.patch.object(*place, side_effect=InputError('no luck'))
      with failing, page.expect_response('**/api/stream'):
        page.click('#run')
        expect(page.locator('#error')).not_to_have_text('')
      assert page.locator('#result').inner_html() == result
      expect(state).to_have_text('Done')
      expect(calls).to_have_text('12')
    assert page.locator('#result .drawn').count() == 12
    assert page.locator('#result .given').count() == 4
    assert page.locator('#result .token').count() == 16
    ids = 'tokens.map((token) => token.id)'
    before = page.evaluate(ids)
    page.focus('#result')
    for key in ('ArrowRight', 'Shift+ArrowRight', 'Shift+ArrowRight', 'Delete'):
      page.keyboard.press(key)
    expect(page.locator('#result .masked')).to_have_count(3)
    page.click('#again')
    expect(state).to_have_text('Done')
    after = page.evaluate(ids)
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
    # The text to edit is unchanged.
    assert page.evaluate('asText()') == 'a\u202eb\u200b\x07\n{1}'


# The time from the click to the frame with the first token.
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
  """Prints the median latency of 20 runs of 64 calls, with NANODLM_WORKDIR."""
  workdir = os.environ.get('NANODLM_WORKDIR')
  lm = lms.load(workdir) if workdir else opened
  with serving(lm) as (model, server), browsers.opened() as browser:
    page, expect = browser.new_page(), browsers.expect()
    wait_for(lambda: is_compiled(model.engine))
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
      del millisecs[0]  # It includes the compilation.
      print(
        f'\nclick to first token: {np.median(millisecs):.0f} ms, median of '
        f'{len(millisecs)} ({min(millisecs):.0f} to {max(millisecs):.0f})'
      )

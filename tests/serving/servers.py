"""Running servers, requests to them, and rows for their engines."""

import contextlib
import http.client
import json
import socket
import threading
import time

from nanodlm import lm as lms
from nanodlm.noise.categorical import Draw
from nanodlm.serving import app
from nanodlm.serving import engine as engines

NEVER = 60.0  # seconds


@contextlib.contextmanager
def serving(lm):
  """A model and its server, with the port as an attribute."""
  engine = engines.Engine(lm)
  engine.start()
  model = app.Service(engine, 'tiny')
  try:
    with listening(model) as server:
      yield model, server
  finally:  # Also if a test skips itself: a thread that compiles ends badly.
    has_ended = engine.close()
  assert has_ended


@contextlib.contextmanager
def listening(model):
  """A server of a model whose engine has started."""
  server = app.make_server(model, '127.0.0.1')
  opened = app.open_socket('127.0.0.1', 0)
  # Connections inherit the small buffer, which a client soon fills.
  opened.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
  server.port = opened.getsockname()[1]
  thread = threading.Thread(target=server.run, args=([opened],))
  thread.start()
  try:
    yield server
  finally:
    server.should_exit = True
    thread.join(NEVER)


def wait_for(condition):
  """Waits until a function returns something true."""
  end = time.monotonic() + NEVER
  while not condition():
    assert time.monotonic() < end, 'never happened'
    time.sleep(0.01)


def row(engine, text, index=0, seed=7, draw=None, **choice):
  """A row that fills the gaps of `text`."""
  tokens, fixed = lms.lay_out(engine.lm.run, text, engine.length)
  draw = draw or Draw(engine.lm.tokenizer.mask_id)
  return engines.Row(tokens, fixed, engine.choose(**choice), draw, seed, index)


def finish(engine, *rows, client='me'):
  """The canvases of rows that are submitted together."""
  changed = threading.Event()
  engine.submit(client, rows, changed.set)
  wait_for(lambda: all(row.is_over for row in rows))
  assert not [row.error for row in rows if row.error]
  return [row.canvas.tolist() for row in rows]


@contextlib.contextmanager
def held(engine):
  """Within this context, the engine's sampling thread is blocked."""
  holds, proceed = threading.Event(), threading.Event()

  def block():
    holds.set()
    proceed.wait(NEVER)

  engine.submit('blocker', [row(engine, 'a{}')], block)
  assert holds.wait(NEVER)
  try:
    yield
  finally:
    proceed.set()


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
  """(status, body) of a POST request; the body is parsed if it is JSON."""
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

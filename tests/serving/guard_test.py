"""Requests that are refused, and clients that send or read too slowly."""

import contextlib
import json
import socket

import pytest

from nanodlm.serving import app, guard
from tests.serving.servers import ask, listening, NEVER, post, wait_for


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
    (iter([b' ' * 1_000_000] * 10), {}, 413),  # In chunks, of unknown number.
    (b'{}', {'Content-Length': '99999999999'}, 413),
    (b'{}', {'Content-Length': '300000', 'Expect': '100-continue'}, 413),
    (b'{}', {'Content-Type': 'text/plain'}, 415),
    (b'{}', {'Host': 'attacker.example:80'}, 421),
    (b'{}', {'Origin': 'http://attacker.example'}, 403),
    (b'{}', {'Origin': 'http://['}, 403),
    (b'{}', {'Origin': 'null'}, 403),
  ],
)
def test_refuses_raw(running, body, headers, status):
  _, server = running
  actual, answer = post(
    server, '/api/generate', body, headers=headers, raw=True
  )
  assert actual == status
  assert answer['error']['message']
  if status == 400 and 'surrogate' not in answer['error']['message']:
    assert answer['error']['code'] == 'malformed_json'
  assert ask(server, 'GET', '/health')[0] == 200


def test_allows_its_own_page_and_names(running):
  _, server = running
  for host in (f'127.0.0.1:{server.port}', 'localhost', '[::1]:80'):
    headers = {'Host': host, 'Origin': f'http://{host}'}
    body = {'text': 'a'}
    assert post(server, '/api/tokenize', body, headers=headers)[0] == 200


@pytest.mark.parametrize('host', ['0.0.0.0', '::', '192.0.2.1', 'example'])
def test_any_host_is_allowed_elsewhere(host):
  assert not guard.is_loopback(host)


@pytest.mark.parametrize('host', ['127.0.0.1', '::1', 'localhost'])
def test_loopback_addresses(host):
  assert guard.is_loopback(host)


def test_slow_and_silent_clients_do_not_block_others(running, monkeypatch):
  model, _ = running
  monkeypatch.setattr(guard, 'READ_SECS', 0.3)
  monkeypatch.setattr(app, 'HEAD_SECS', 1)
  monkeypatch.setattr(app, 'STALL_SECS', 1)
  head = b'POST /api/%b HTTP/1.1\r\nHost: localhost\r\nContent-Type: '
  head += b'application/json\r\nContent-Length: %d\r\n\r\n'
  body = json.dumps({'prompt': 'a{}', 'num_samples': 16}).encode()
  with listening(model) as server, contextlib.ExitStack() as stack:
    clients = [stack.enter_context(socket.socket()) for _ in range(5)]
    silent, in_head, in_body, deaf, deaf_stream = clients
    for client in (deaf, deaf_stream):
      client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    for client in clients:
      client.settimeout(NEVER)
      client.connect(('127.0.0.1', server.port))
    in_head.sendall(head[:20])
    in_body.sendall(head % (b'generate', 9) + b'{')
    deaf.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n' * 60)
    deaf_stream.sendall((head % (b'stream', len(body)) + body) * 9)
    connections = server.server_state.connections
    wait_for(lambda: len(connections) == len(clients))
    # The rows of a client that does not read end as any others.
    assert post(server, '/api/generate', {'prompt': 'a'})[0] == 200
    wait_for(lambda: not model.engine.num_waiting())
    assert b' 408 ' in in_body.recv(1000).split(b'\r\n')[0]
    for client in (silent, in_head):
      with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b''
    if hasattr(socket, 'TCP_USER_TIMEOUT'):
      wait_for(lambda: not connections)
    assert ask(server, 'GET', '/health')[0] == 200


def test_idle_connections_between_requests_are_kept(running, monkeypatch):
  model, _ = running
  monkeypatch.setattr(app, 'HEAD_SECS', 1)
  with listening(model) as server, socket.socket() as client:
    client.settimeout(NEVER)
    client.connect(('127.0.0.1', server.port))
    for _ in range(2):
      client.sendall(b'GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n')
      assert client.recv(10_000).startswith(b'HTTP/1.1 200')
      client.settimeout(3)
      with pytest.raises(TimeoutError):  # Neither data nor the end.
        client.recv(1)

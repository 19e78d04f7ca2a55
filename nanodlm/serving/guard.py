"""Refuses requests of other web sites, and bodies that are large or slow."""

import asyncio
import ipaddress
import re

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nanodlm.serving.schemas import MAX_BODY_BYTES
from nanodlm.serving.service import ApiError

# The body of a request has to arrive in this time.
READ_SECS = 10.0


class Guard:
  """ASGI middleware that protects a local server from other web sites.

  Their pages can send requests to this machine, either with their own Origin or
  through a DNS name that points here, which is then the Host.

  Args:
    app: the application.
    host: the address that the server listens on. For a loopback address, only
      its names are allowed as Host; other names of this machine are unknown.
  """

  def __init__(self, app: ASGIApp, host: str):
    self._app = app
    self._names = ('localhost', '127.0.0.1', '[::1]', host.lower())
    self._checks_host = is_loopback(host)

  async def __call__(self, scope: Scope, receive: Receive, send: Send):
    try:
      self._check(scope['method'], Headers(scope=scope))
    except ApiError as error:
      return await error.response()(scope, receive, send)
    await self._app(scope, _limited(receive), send)

  def _check(self, method: str, headers: Headers):
    host = headers.get('host', '')
    if self._checks_host and re.sub(r':\d*$', '', host) not in self._names:
      raise ApiError(421, f'this is not host {host[:100]!r}', 'wrong_host')
    origin = headers.get('origin')
    if origin is not None and origin.partition('://')[2] != host:
      message = f'pages of {origin[:100]!r} may not use this server'
      raise ApiError(403, message, 'wrong_origin')
    kind = headers.get('content-type', '').partition(';')[0].strip().lower()
    if method == 'POST' and kind != 'application/json':
      message = f'Content-Type {kind[:100]!r} must be application/json'
      raise ApiError(415, message, 'wrong_content_type')
    _check_size(int(headers.get('content-length', 0)))


def _check_size(num_bytes: int):
  if num_bytes > MAX_BODY_BYTES:
    message = f'the body is larger than {MAX_BODY_BYTES} bytes'
    raise ApiError(413, message, 'too_large')


def _limited(receive: Receive) -> Receive:
  """Wraps `receive` with limits on the time and size of the body."""
  deadline = asyncio.get_running_loop().time() + READ_SECS
  num_bytes, is_complete = 0, False

  async def limited():
    nonlocal num_bytes, is_complete
    try:
      async with asyncio.timeout_at(None if is_complete else deadline):
        message = await receive()
    except TimeoutError:
      text = f'the body did not arrive within {READ_SECS:g} s'
      raise ApiError(408, text, 'too_slow', {'Connection': 'close'}) from None
    num_bytes += len(message.get('body', b''))
    is_complete = not message.get('more_body')
    _check_size(num_bytes)
    return message

  return limited


def is_loopback(host: str) -> bool:
  """Whether a host name or address is only reachable from this machine."""
  try:
    return host.lower() == 'localhost' or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False

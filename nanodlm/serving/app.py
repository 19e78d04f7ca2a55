r"""--mode=serve: a playground in the browser, and an HTTP API.

    pip install -e '.[serve]'
    python launch.py --mode=serve --workdir=runs/quickstart
    curl -N http://127.0.0.1:8000/api/stream \
      -H 'Content-Type: application/json' \
      -d '{"prompt": "One fine day, {1} met Ben at the {1}. {}", "seed": 0}'

Routes; bodies are JSON, and /openapi.json describes every field:

    GET  /                 the playground
    GET  /health           status, model, step, waiting; 503 while it stops
    GET  /api/info         the model, the samplers that fit, defaults, limits
    POST /api/tokenize     the ids and texts of the tokens of `text`
    POST /api/generate     fills the gaps of a text
    POST /api/stream       the same, with an event for each network call
    POST /api/score        bounds the log-probability of texts
    POST /api/choose       the probability of each choice of a {yes|no} slot
    POST /v1/completions   completions as in OpenAI's API
    POST /v1/chat/completions
                           answers to conversations, if there is a chat template
    GET  /v1/models        the model; also /v1/models/NAME

/api/generate and /api/stream take either `prompt`, a text with gaps as in
--mode=sample, `tokens`, ids with null in the gaps, or `messages`, a
conversation to answer, as /v1/chat/completions does; and `num_samples`,
`sampler`, `num_steps`, `temperature`, `top_k`, `top_p`, `seed`. Settings that
are left out come from the run's config, and the seed is random, or 0 if the
most probable tokens are taken (temperature 0). The same prompt, settings and
seed give the text of --mode=sample, up to float rounding, whatever else is
sampled at the same time.

OpenAI's clients use base_url='http://127.0.0.1:8000/v1', any key, and the name
of the workdir's folder as `model`. /v1/completions takes `prompt` (one or
several, as text or ids), `suffix` (for models that read in both directions),
`max_tokens`, `n`, `stop`, `echo`, `stream`, `stream_options`, and the settings
above, with `n` for `num_samples`. /v1/chat/completions takes `messages` with
role and content instead, which are written as the chat template of the model
says (--config.tokenizer.chat_template); what is said never becomes a control
token, and an answer ends at the template's own. Streamed text is sent in its
order, as it becomes final. Penalties and logit_bias are refused. A text ends
before a stop and, with sampler.stop_at_eos (as for imported checkpoints), at an
end-of-text token: finish_reason is "stop", and usage counts the tokens before
it. Token ids are those of /api/tokenize; of an imported checkpoint, the mask
and the last id are exchanged.

With `logprobs`, from 0 to 20 (of chat completions true, with top_logprobs), the
answers have the log-probability of each token and of that many alternatives:
the network's own, before temperature, top_k and top_p, in the call that
revealed the token. Such texts have batches and programs of their own.

`max_tokens` is the size of the gap that is filled, so that another one may give
another text; of chat completions, it is by default the rest of the canvas.

Sampling. Texts of all clients are sampled together, up to 16 in a batch if they
have the same sampler and number of steps, and clients take turns. A client is a
connection or, with `user`, all connections of an address with that name. A new
sampler or number of steps is compiled first, while others are sampled; 24
programs are kept. Shorter canvases are padded to the full length halved any
number of times, at least 32 tokens; but networks that know the time, and
samplers with a cache of the whole canvas, compile a program for each length. A
client that disconnects cancels its texts.

/api/score takes `texts`, one or several, or `messages`, of which the answers
are scored given the rest, and returns the nats and bits per byte of each: an
upper bound on -log p with its 95% interval, or the exact value (`is_exact`).
/api/choose takes a `prompt` with one slot, such as 'The sky is {blue|green}.',
or `messages` whose last one, the assistant's, has it, and returns the
probability of each choice, and whether it is exact; see LanguageModel.choose.
Both are computed one after the other, in steps that take turns with the batches
of texts.

Limits. A prompt and its gaps fit in sampler.length tokens (by default
data.length). A request asks for at most 16 texts of each of 16 prompts, 64
texts in all, with 1024 steps and 4 stops of 200 characters; its body has at
most 256 KiB, which arrive within 10 s. At most 64 texts of a client wait, and
256 of all clients. A request scores at most 64 texts, which fill at most 64
rows of data.length tokens, or 64 choices; at most 4 such requests of a client
wait, and 32 of all clients. There are at most 512 connections; those that send
no whole head of a request within 10 to 20 s are closed and, on Linux, those
whose client reads nothing for 30 s. A quiet stream has a comment every 5 s.
SIGINT and SIGTERM end the streams within 5 s; the exit status is 128 + the
number of the signal.

Errors are {"error": {"message", "type", "param", "code"}}, as in OpenAI's API,
or the last event of a stream:

    400, 404, 422     invalid values, an unknown model, an unknown field
    408, 413, 415     a body that is slow, too large, or not application/json
    403, 421          a page of another site; a Host that is not this machine
    429, 503          a full queue, a server that stops; see Retry-After
    500               an error of the server, explained in its log

The server asks for no password and does not encrypt. With a --host other than a
loopback address, anyone who reaches the port can use the model. On a loopback
address, only programs of this machine can, and no page of another site.
"""

from __future__ import annotations

import asyncio
from concurrent import futures
import logging
import pathlib
import re
import signal
import socket
import time

from absl import flags
import jax

from nanodlm import lm as lms
from nanodlm.config import Start
from nanodlm.devices import multihost
from nanodlm.show import pages
from nanodlm.types import InputError, reason

try:
  import fastapi
  from fastapi import exceptions, responses
  import starlette.exceptions
  import uvicorn

  from nanodlm.serving import guard, openai, schemas
  from nanodlm.serving.engine import Engine
  from nanodlm.serving.service import ApiError, check_one, EventStream, Service
except ImportError as error:  # Raised by main(), so that --help needs nothing.
  _missing = error
else:
  _missing = None

log = logging.getLogger('nanodlm')

# The sections that --mode=serve reads, and keys that each request has instead.
READS = ('sampler.', 'mesh.', 'model.', 'objective.', 'tokenizer.chat_template')
UNREAD = ('sampler.num_samples', 'sampler.seed')

MAX_CONNECTIONS = 512
# A connection that sends no whole head of a request for one to two periods of
# this length is closed.
HEAD_SECS = 10
# On Linux, a connection whose client reads nothing for this time is closed.
STALL_SECS = 30
# The time from a signal to the end of the last stream.
STOP_SECS = 5

PAGE_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; style-src 'unsafe-inline'; "
  "script-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
  "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
  'Cache-Control': 'no-store',
}


def define_flags():
  """Defines the flags of --mode=serve."""
  flags.DEFINE_string(
    'host',
    '127.0.0.1',
    'The address to listen on. Any other than a loopback address lets other '
    'machines in; the server asks for no password.',
  )
  flags.DEFINE_integer(
    'port',
    8000,
    'The port to listen on; 0: any free one.',
    lower_bound=0,
    upper_bound=65535,
  )


def make_app(model: Service, host: str = '') -> guard.Guard:
  """Builds the ASGI application for a server that listens on `host`."""
  app = fastapi.FastAPI(
    title='nanodlm',
    version=str(model.step),
    # Their pages load scripts from another server.
    docs_url=None,
    redoc_url=None,
    description='Fills the gaps of texts with a diffusion language model. '
    "Clients of OpenAI's API can use /v1 with any key.",
    responses={'4XX': {'description': 'An error; error.message explains it.'}},
  )
  for kind in (
    InputError,
    exceptions.RequestValidationError,
    starlette.exceptions.HTTPException,
    Exception,
  ):
    app.add_exception_handler(kind, _respond_to_error)
  _add_routes(app, model)
  openai.add_routes(app, model)
  return guard.Guard(app, host)


async def _respond_to_error(request: fastapi.Request, error: Exception):
  match error:
    case ApiError():  # pyright: ignore[reportGeneralTypeIssues]
      pass
    case InputError():  # It may name a flag of the command line.
      message = str(error)
      error = ApiError(400, message, 'invalid_value')
    case exceptions.RequestValidationError():
      # The error that is deepest in the body says most.
      first = max(error.errors(), key=lambda each: len(each['loc']))
      error = _invalid_body(first)
    case starlette.exceptions.HTTPException(status_code=400):
      message = 'the body is not valid JSON in UTF-8, or is nested too deeply'
      error = ApiError(400, message, 'malformed_json')
    case starlette.exceptions.HTTPException(status_code=404 | 405):
      known = [
        f'{method.upper()} {path}'
        for path, methods in request.app.openapi()['paths'].items()
        for method in methods
      ]
      message = f'there is no {request.method} {request.url.path[:100]}'
      message += f'. The routes are: {", ".join(known)}'
      error = ApiError(error.status_code, message, 'not_found', error.headers)
    case starlette.exceptions.HTTPException():
      error = ApiError(error.status_code, error.detail, None, error.headers)
    case _:
      error = ApiError(500, 'internal error; see the log of the server')
  return error.response()


def _invalid_body(first) -> ApiError:
  """Names an invalid field, its value and what is allowed."""
  message = first['msg']
  if first['type'] == 'json_invalid':
    reason = f'the body is not JSON: {first["ctx"]["error"]}'
    return ApiError(400, reason, 'malformed_json')
  if first['type'] == 'extra_forbidden':
    message = 'unknown field; /openapi.json lists the allowed ones'
  elif isinstance(first.get('input'), (bool, int, float, str)):
    message += f', not {first["input"]!r:.100}'
  # A field of several types is followed by the name of one, as in list[int].
  names = [str(x) for x in first['loc'][1:] if x not in ('str', 'int')]
  names = [name for name in names if re.fullmatch(r'\w+', name)]
  where = '.'.join(names) or 'body'
  param = names[0] if names else None
  return ApiError(422, f'{where}: {message}', 'invalid_field', param=param)


def _add_routes(app: fastapi.FastAPI, model: Service):
  """Adds the page and the routes of /api to `app`."""
  engine = model.engine

  @app.get('/', include_in_schema=False)
  async def playground():
    page = pages.read('playground.html', 'nanodlm.serving')
    return responses.HTMLResponse(page, headers=PAGE_HEADERS)

  @app.get('/health', summary='Report whether the server can sample')
  async def health():
    is_healthy = engine.is_alive() and not engine.is_closing
    status = {
      'status': 'ok' if is_healthy else 'stopping',
      'model': model.name,
      'step': model.step,
      'waiting': engine.num_waiting(),
    }
    return responses.JSONResponse(status, 200 if is_healthy else 503)

  @app.get('/api/info', summary='Describe the model, its samplers and limits')
  async def info():
    return model.info

  @app.post('/api/tokenize', summary='Split a text into tokens')
  async def tokenize(body: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
    ids = model.tokenizer.encode(body.text)
    texts = model.tokenizer.spell(ids)
    return schemas.TokenizeResponse(tokens=ids.tolist(), texts=texts)

  async def submit(body: schemas.GenerateRequest, request: fastapi.Request):
    check_one(prompt=body.prompt, tokens=body.tokens, messages=body.messages)
    if body.tokens is not None:
      canvas = model.lay_out_ids(body.tokens)
    elif body.messages is not None:
      messages = [message.plain() for message in body.messages]
      # A chat template may take seconds, in which others are served.
      lay_out = model.lay_out
      canvas = await asyncio.to_thread(lay_out, messages, body.sampler)
    else:
      canvas = model.lay_out(body.prompt or '', body.sampler)
    has_logprobs = body.logprobs is not None
    return model.submit(request, body, [canvas], body.num_samples, has_logprobs)

  @app.post('/api/generate', summary='Fill the gaps of a text')
  async def generate(
    body: schemas.GenerateRequest, request: fastapi.Request
  ) -> schemas.GenerateResponse:
    submission = await submit(body, request)
    await submission.finish(request)
    return model.respond(body, submission.rows)

  @app.post(
    '/api/stream',
    summary='Fill the gaps of a text, with an event for every network call',
    response_class=responses.StreamingResponse,
    responses={200: {'content': {'text/event-stream': {}}}},
  )
  async def stream(body: schemas.GenerateRequest, request: fastapi.Request):
    """Sends server-sent events, each with a JSON object.

    - `canvas`, the first event of each row: row, tokens (null: not drawn yet),
      texts, fixed.
    - `state`: row, state (waiting, compiling, running, done).
    - `reveal`, after each network call: row, num_calls (made so far), changes,
      a list of [position, token, text]. If the client reads slowly, one event
      may tell of several calls.
    - `done`: the response of /api/generate.
    - `error`: the body of an error response.

    Lines that begin with a colon are comments.
    """
    submission = await submit(body, request)
    return EventStream(submission, model.events(body, submission), 'error')

  app.post('/api/score', summary='Bound the log-probability of texts')(
    model.score
  )
  app.post('/api/choose', summary='Compare the texts that can fill a slot')(
    model.choose
  )


def make_server(model: Service, host: str) -> uvicorn.Server:
  """Builds a server to be run on a socket that listens on `host`."""
  idle = set()

  async def close_idle():
    """Closes connections that have not sent a request since the last call."""
    nonlocal idle
    last, idle = idle, set()
    connections: set = server.server_state.connections
    for connection in connections:
      cycle = connection.cycle
      is_between = cycle is None or cycle.response_complete
      # uvicorn limits the time after a response, but not before the first
      # request or within a head.
      if is_between and connection.timeout_keep_alive_task is None:
        idle.add((connection, cycle))
    for connection, _ in idle & last:
      connection.transport.abort()

  server = uvicorn.Server(
    uvicorn.Config(
      make_app(model, host),
      http='h11',
      ws='none',
      lifespan='off',
      log_config=None,
      access_log=False,
      server_header=False,
      proxy_headers=False,
      limit_concurrency=MAX_CONNECTIONS,
      timeout_keep_alive=30,
      timeout_graceful_shutdown=STOP_SECS,
      timeout_notify=HEAD_SECS,
      callback_notify=close_idle,
    )
  )
  return server


def open_socket(host: str, port: int) -> socket.socket:
  """Opens a listening socket.

  Raises:
    InputError: the address is not of this machine or the port is in use.
  """
  is_v6 = ':' in host
  family = socket.AF_INET6 if is_v6 else socket.AF_INET
  dual = is_v6 and socket.has_dualstack_ipv6()
  address = host, port
  try:
    opened = socket.create_server(address, family=family, dualstack_ipv6=dual)
  except OSError as error:
    raise InputError(
      f'--host={host!r} --port={port!r}: cannot listen ({reason(error)}); '
      '--host must be an address of this machine and --port a free port'
    ) from error
  if hasattr(socket, 'TCP_USER_TIMEOUT'):  # Connections inherit it.
    option = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT
    opened.setsockopt(*option, 1000 * STALL_SECS)
  return opened


def main(start: Start) -> int:
  """Runs --mode=serve: serves the last checkpoint of a run until a signal."""
  if _missing:
    raise InputError(
      f"--mode=serve requires pip install -e '.[serve]' ({_missing})"
    ) from _missing
  host, port = flags.FLAGS.host, flags.FLAGS.port
  settings = start.resolve_reading(READS, UNREAD)
  if jax.process_count() > 1:
    raise InputError(
      f'--mode=serve runs in one process; there are {jax.process_count()}'
    )
  listening = open_socket(host, port)  # Fails before the slow part.
  lm = lms.load(start.workdir, settings=settings)
  engine = Engine(lm)
  log.info('compiling the sampler ...')
  begin = time.monotonic()
  engine.start()
  name = pages.printable(pathlib.Path(lm.workdir).resolve().name)
  model = Service(engine, name)
  server = make_server(model, host)
  received = []

  def stop(number, frame):
    del frame
    received.append(number)
    # The next signal ends the process at once.
    signal.signal(number, signal.SIG_DFL)

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  log.info(
    'step %d, ready after %.1f s: http://%s:%d (press Ctrl-C to stop)',
    lm.step,
    time.monotonic() - begin,
    f'[{host}]' if ':' in host else host,
    listening.getsockname()[1],
  )
  if not guard.is_loopback(host):
    log.warning(
      '--host=%s: anyone who reaches this port can use the model, without a '
      'password',
      host,
    )
  # uvicorn leaves the signals alone in a thread. It waits for all streams to
  # end, so the engine has to end them.
  with futures.ThreadPoolExecutor(1) as pool:
    serving = pool.submit(server.run, [listening])
    while not (received or serving.done()):
      time.sleep(0.1)
    server.should_exit = True
    has_ended = engine.close(STOP_SECS)
    serving.result()
  log.info('stopped')
  status = 128 + received[0] if received else 0
  # A compilation cannot be interrupted.
  if model.is_computing or not has_ended:
    multihost.leave(status)
  return status

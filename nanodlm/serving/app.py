"""--mode=serve: a playground in the browser, a JSON API, an OpenAI-compatible one.

An ASGI application around `engine.Engine`, under uvicorn. Needs
pip install -e '.[serve]'.
"""

import asyncio
import dataclasses
import functools
import ipaddress
import json
import logging
import pathlib
import secrets
import signal
import socket
import threading
import time
from typing import Annotated, Any, AsyncIterator
import urllib.parse

from ml_collections import config_dict
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, sample, types
from nanodlm.data import tokenizers
from nanodlm.devices import multihost
from nanodlm.noise import categorical
from nanodlm.serving import engine as engines
from nanodlm.serving.engine import Row, Task
from nanodlm.show import pages, plots
from nanodlm.types import InputError

try:
  import fastapi
  from fastapi import exceptions, responses
  import pydantic
  import starlette.exceptions
  import uvicorn
  from uvicorn.protocols.http import h11_impl
except ImportError as error:
  raise InputError(
    '--mode=serve needs FastAPI and uvicorn: pip install -e '
    f"'.[serve]' ({error})"
  ) from error

log = logging.getLogger('nanodlm')

# Of a request's body; the longest canvas has far less text.
MAX_BODY_BYTES = 2**18
# So much of a body that is too large is read, for clients that only listen
# after they have sent all of it.
MAX_DRAINED_BYTES = 2**26
# For a request's head, and for its body.
READ_SECS = 10.0
# A client that has not read for so long, with WRITE_BUFFER_BYTES waiting for it
# here (and more in the system), is cut off.
STALL_SECS = 10.0
WRITE_BUFFER_BYTES = 2**15
# A comment is sent in a quiet stream, so that it is seen whether anyone listens.
HEARTBEAT_SECS = 5.0
# From a signal to the end of the last stream.
STOP_SECS = 5.0
MAX_CONNECTIONS = 512
MAX_SAMPLES = 16
MAX_PROMPTS = 16
MAX_STEPS = 1024
MAX_SEED = 2**31 - 1
RETRY_AFTER_SECS = 2

PAGE_HEADERS = {
  'Content-Security-Policy': "default-src 'none'; style-src 'unsafe-inline'; script-src "
  "'unsafe-inline'; connect-src 'self'; img-src data:; form-action 'none'; "
  "base-uri 'none'; frame-ancestors 'none'",
  'X-Content-Type-Options': 'nosniff',
  'Referrer-Policy': 'no-referrer',
  'Cache-Control': 'no-store',
}
STREAM_HEADERS = {'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'}

_Seed = Annotated[int, pydantic.Field(ge=0, le=MAX_SEED)]
_Temperature = Annotated[
  float, pydantic.Field(ge=0, le=100, allow_inf_nan=False)
]
_TopK = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]
_TopP = Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)]
_NumSteps = Annotated[int, pydantic.Field(ge=1, le=MAX_STEPS)]
_Name = Annotated[str, pydantic.Field(max_length=200)]
_Id = Annotated[int, pydantic.Field(ge=0, le=2**31 - 1)]


class _Strict(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True)


class Sampling(_Strict):
  """How to sample; what is left out is as in the run's config."""

  sampler: _Name | None = pydantic.Field(
    None, description='The name of a sampler; /api/info lists those that fit.'
  )
  num_steps: _NumSteps | None = pydantic.Field(
    None, description='Network calls; of each block, where there are blocks.'
  )
  temperature: _Temperature | None = pydantic.Field(
    None, description='0 takes the most probable token.'
  )
  top_k: _TopK | None = pydantic.Field(None, description='0 keeps all.')
  top_p: _TopP | None = pydantic.Field(None, description='1 keeps all.')
  seed: _Seed | None = pydantic.Field(
    None,
    description='The same seed gives the same texts. By default a '
    'random one, which the answer names.',
  )
  user: _Name | None = pydantic.Field(
    None,
    description='Those who name the same user take turns as one client; '
    'else each connection is one.',
  )


class GenerateRequest(Sampling):
  """A text with gaps, or its tokens."""

  prompt: str | None = pydantic.Field(
    None,
    description='A text; {} is a gap that takes an equal share of the '
    'free room, {12} one of 12 tokens, {{ and }} are braces. Without a gap it '
    'is continued.',
    examples=['Return the {} of the {12}.'],
  )
  tokens: list[_Id | None] | None = pydantic.Field(
    None,
    description='Instead of a prompt: token ids, null where one is to '
    'be drawn.',
  )
  num_samples: Annotated[int, pydantic.Field(ge=1, le=MAX_SAMPLES)] = 1


class Sample(pydantic.BaseModel):
  """One filled canvas."""

  text: str = pydantic.Field(description='All of it.')
  shown: str = pydantic.Field(
    description='What --mode=sample prints: of a model of prompts with '
    'responses, up to the end of the response.'
  )
  tokens: list[int]
  texts: list[str] = pydantic.Field(
    description="What each token spells; a character of several is the first's."
  )
  num_calls: int = pydantic.Field(
    description='Network calls of the batch it was in.'
  )


class GenerateResponse(pydantic.BaseModel):
  """Filled canvases, and how they were filled."""

  model: str
  step: int
  seed: int
  sampler: dict[str, Any]
  samples: list[Sample]


class TokenizeRequest(_Strict):
  """A text, taken as it is: braces are no gaps."""

  text: str


class TokenizeResponse(pydantic.BaseModel):
  """Its tokens."""

  tokens: list[int]
  texts: list[str]


class StreamOptions(_Strict):
  """As in OpenAI's API."""

  include_usage: bool = False
  include_obfuscation: bool = False


class CompletionRequest(_Strict):
  """As in OpenAI's API, with this server's samplers beside."""

  model: _Name | None = None
  prompt: str | list[str] | list[_Id] | list[list[_Id]] = pydantic.Field(
    '', description='Text or token ids; braces are no gaps here.'
  )
  suffix: str | None = pydantic.Field(
    None, description='Text behind the gap, for models that read both ways.'
  )
  max_tokens: Annotated[int, pydantic.Field(ge=1)] | None = 16
  temperature: _Temperature | None = None
  top_p: _TopP | None = None
  n: Annotated[int, pydantic.Field(ge=1, le=MAX_SAMPLES)] | None = 1
  stream: bool | None = False
  stream_options: StreamOptions | None = None
  stop: str | list[str] | None = pydantic.Field(
    None, description='Up to 4 texts; the completion ends before the first.'
  )
  seed: int | None = pydantic.Field(None, description='Taken modulo 2^31.')
  echo: bool | None = False
  user: _Name | None = None
  best_of: int | None = pydantic.Field(None, description='n, if anything.')
  logprobs: int | None = pydantic.Field(None, description='Not offered: null.')
  frequency_penalty: float | None = pydantic.Field(
    None, description='Not offered: 0.'
  )
  presence_penalty: float | None = pydantic.Field(
    None, description='Not offered: 0.'
  )
  logit_bias: dict[str, float] | None = pydantic.Field(
    None, description='Not offered: {}.'
  )
  sampler: _Name | None = None
  num_steps: _NumSteps | None = None
  top_k: _TopK | None = None


class ApiError(Exception):
  """What a client did wrong, or why it has to wait."""

  def __init__(
    self,
    status: int,
    message: str,
    code: str | None = None,
    headers: dict[str, str] | None = None,
  ):
    super().__init__(message)
    self.status, self.code, self.headers = status, code, headers


def error_body(
  status: int, message: str, code: str | None = None
) -> dict[str, Any]:
  """In OpenAI's form, which their clients show."""
  # JSON can spell half a surrogate pair; quoted as it is it could not be sent.
  message = message.encode('utf-8', 'replace').decode()
  kind = 'invalid_request_error' if status < 500 else 'server_error'
  return {
    'error': {
      'message': message[:1000],
      'type': kind,
      'param': None,
      'code': code,
    }
  }


def _error_response(status, message, code=None, headers=None):
  return responses.JSONResponse(
    error_body(status, message, code), status, headers=headers
  )


@dataclasses.dataclass(frozen=True, eq=False)
class Service:
  """What the routes are made of.

  Attributes:
    run: the network, and the sampler in its config.
    step: of its checkpoint.
    name: of the model.
    engine: fills canvases.
    stopping: set once the server is to end.
  """

  run: evaluate.Run
  step: int
  name: str
  engine: engines.Engine
  stopping: threading.Event = dataclasses.field(default_factory=threading.Event)

  @property
  def tokenizer(self) -> tokenizers.Tokenizer:
    """The run's."""
    return self.run.tokenizer

  @functools.cached_property
  def info(self) -> dict[str, Any]:
    """What the playground needs to know."""
    section, fitting = self.run.config.sampler, []
    own = self.engine.choose()
    for name in configs.fitting_samplers(self.run.config.objective.name):
      try:
        choice = self.engine.choose(name)
      except InputError:  # the defaults do not suit it
        continue
      fitting.append(
        {
          'name': name,
          'reads_steps': choice.reads_steps,
          'num_steps': choice.num_steps,
        }
      )
    return {
      'model': self.name,
      'step': self.step,
      'objective': self.run.config.objective.name,
      'num_params': self.run.network.num_params(self.run.objective),
      'length': self.engine.length,
      'sees_right': types.sees_right(self.run.objective, self.engine.length),
      'tokenizer': self.tokenizer.name,
      'vocab_size': self.tokenizer.vocab_size,
      'samplers': fitting,
      'sampler': own.name,
      'defaults': {
        key: section[key]
        for key in ('num_steps', 'temperature', 'top_k', 'top_p')
      },
      'limits': {
        'num_samples': MAX_SAMPLES,
        'num_steps': MAX_STEPS,
        'seed': MAX_SEED,
        'body_bytes': MAX_BODY_BYTES,
      },
    }

  def make_draw(
    self, temperature: float | None, top_k: int | None, top_p: float | None
  ) -> categorical.Draw:
    """How tokens are drawn; what is None is as the run's config says."""
    section = self.run.config.sampler
    given = {'temperature': temperature, 'top_k': top_k, 'top_p': top_p}
    return categorical.Draw(
      self.tokenizer.mask_id,
      **{
        key: section[key] if value is None else value
        for key, value in given.items()
      },
    )

  def lay_out_ids(self, ids: list[int | None]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and fixed [n] of ids with null in the gaps."""
    mask_id, length = self.tokenizer.mask_id, self.engine.length
    if not 0 < len(ids) <= length:
      raise InputError(
        f'tokens has {len(ids)} of them; between 1 and {length} '
        'are allowed (sampler.length, by default data.length)'
      )
    if any(i is not None and i >= mask_id for i in ids):
      raise InputError(f'tokens must be ids in [0, {mask_id}), or null')
    fixed = np.array([i is not None for i in ids])
    if not types.sees_right(self.run.objective, length) and np.any(
      fixed[1:] & ~fixed[:-1]
    ):
      raise InputError(
        'tokens: a model that reads from left to right (by tokens or blocks) '
        'fills one gap at the end; text after a gap needs '
        'objective.name=masked'
      )
    return np.array([mask_id if i is None else i for i in ids], np.int32), fixed

  def describe(self, task: Task) -> dict[str, Any]:
    """The settings that a task was sampled with."""
    used = {
      'name': task.choice.name,
      'temperature': task.draw.temperature,
      'top_k': task.draw.top_k,
      'top_p': task.draw.top_p,
    }
    if task.choice.reads_steps:
      used['num_steps'] = task.choice.num_steps
    return used

  def make_sample(self, row: Row) -> Sample:
    """What is answered of a row."""
    decode = self.tokenizer.decode
    return Sample(
      text=decode(row.canvas),
      shown=decode(sample.shown_tokens(self.run, row.canvas)),
      tokens=row.canvas.tolist(),
      texts=self.tokenizer.spell(row.canvas),
      num_calls=row.num_calls,
    )


class Waiting:
  """Rows that a coroutine waits for; cancelled once it no longer does."""

  def __init__(self, service: Service, client: Any, tasks: list[Task]):
    self._loop = asyncio.get_running_loop()
    self._changed = asyncio.Event()
    self._service = service
    try:
      self.rows = service.engine.submit(client, tasks, self._notify)
    except engines.FullError as error:
      status = 503 if service.stopping.is_set() else 429
      raise ApiError(
        status, str(error), 'queue_full', {'Retry-After': str(RETRY_AFTER_SECS)}
      ) from error

  def _notify(self):
    try:
      self._loop.call_soon_threadsafe(self._changed.set)
    except RuntimeError:  # the loop has ended: nobody listens
      pass

  @property
  def is_over(self) -> bool:
    """Whether nothing more will come of it."""
    return all(row.is_over or row.is_cancelled for row in self.rows)

  def cancel(self):
    """Drops what is not done yet."""
    for row in self.rows:
      row.cancel()

  async def wait(self, timeout_secs: float) -> bool:
    """Until something changed; whether it did."""
    try:
      async with asyncio.timeout(timeout_secs):
        await self._changed.wait()
    except TimeoutError:
      return False
    self._changed.clear()
    return True

  def check(self):
    """Raises ApiError where a row has failed."""
    for row in self.rows:
      if row.state == engines.FAILED:
        raise ApiError(
          503 if self._service.stopping.is_set() else 500, row.error
        )

  async def finish(self, request: fastapi.Request) -> bool:
    """Waits for all rows; False if the client has gone, and they are cancelled."""
    try:
      while not self.is_over:
        await self.wait(1.0)
        if await request.is_disconnected():
          return False
      self.check()
      return True
    finally:
      self.cancel()


def make_app(service: Service, allowed_hosts: tuple[str, ...] | None = None):
  """The ASGI application.

  Args:
    service: what it serves.
    allowed_hosts: what the header Host may say, without a port; None: anything.
  """
  app = fastapi.FastAPI(
    title='nanodlm',
    version=str(service.step),
    docs_url=None,
    redoc_url=None,
    description='A diffusion language model: texts with gaps, filled in.',
    exception_handlers={
      ApiError: lambda request, error: _error_response(
        error.status, str(error), error.code, error.headers
      ),
      InputError: lambda request, error: _error_response(
        400, _in_words(error), 'invalid_value'
      ),
      exceptions.RequestValidationError: _invalid,
      starlette.exceptions.HTTPException: _http_error,
      Exception: lambda request, error: _error_response(
        500, 'something is wrong here; the log of the server has more'
      ),
    },
  )
  _add_pages(app, service)
  _add_native(app, service)
  _add_openai(app, service)
  return Guard(app, allowed_hosts)


def _in_words(error: InputError) -> str:
  """Its message, which speaks of a flag of the command line."""
  return str(error).replace('--prompt=', 'prompt=')


def _http_error(request, error):
  """An error of the framework's own; its 400 is a body that json cannot read."""
  del request
  if error.status_code == 400:
    return _error_response(
      400,
      'the body is not JSON that can be read: it is not UTF-8, is nested too '
      'deeply, or has a number of too many digits',
      'malformed_json',
    )
  return _error_response(
    error.status_code, str(error.detail), None, error.headers
  )


def _invalid(request, error):
  """What is wrong with a body: malformed, or not what is asked for."""
  del request
  first = error.errors()[0]
  if first['type'] == 'json_invalid':
    return _error_response(
      400,
      f'the body is not JSON: {first.get("ctx", {}).get("error", "")}',
      'malformed_json',
    )
  where = '.'.join(str(part) for part in first['loc'] if part != 'body')
  message = first['msg']
  if first['type'] == 'extra_forbidden':
    message = 'no such field'
  elif isinstance(first.get('input'), (bool, int, float, str)):
    message += f', not {first["input"]!r:.100}'
  return _error_response(422, f'{where or "body"}: {message}', 'invalid_field')


def _add_pages(app, service: Service):

  @app.get('/', include_in_schema=False)
  async def playground():
    return responses.HTMLResponse(
      pages.read('playground.html'), headers=PAGE_HEADERS
    )

  @app.get('/docs', include_in_schema=False)
  async def docs():
    return responses.HTMLResponse(pages.read('api.html'), headers=PAGE_HEADERS)

  @app.get('/favicon.ico', include_in_schema=False)
  async def icon():
    return responses.Response(status_code=204)

  @app.get('/health', summary='Whether the server can do its work')
  async def health():
    is_well = service.engine.is_alive() and not service.stopping.is_set()
    return responses.JSONResponse(
      {
        'status': 'ok' if is_well else 'stopping',
        'model': service.name,
        'step': service.step,
        'waiting': service.engine.num_waiting(),
      },
      200 if is_well else 503,
    )


def _add_native(app, service: Service):

  def make_tasks(body: GenerateRequest) -> list[Task]:
    if (body.prompt is None) == (body.tokens is None):
      raise InputError('give either prompt or tokens')
    if body.tokens is not None:
      tokens, fixed = service.lay_out_ids(body.tokens)
    else:
      tokens, fixed = sample.lay_out(
        service.run, body.prompt, service.engine.length
      )
    choice = service.engine.choose(body.sampler, body.num_steps)
    draw = service.make_draw(body.temperature, body.top_k, body.top_p)
    seed = secrets.randbelow(MAX_SEED + 1) if body.seed is None else body.seed
    return [
      Task(tokens, fixed, choice, draw, seed, i)
      for i in range(body.num_samples)
    ]

  def make_response(waiting: Waiting) -> GenerateResponse:
    task = waiting.rows[0].task
    return GenerateResponse(
      model=service.name,
      step=service.step,
      seed=task.seed,
      sampler=service.describe(task),
      samples=[service.make_sample(row) for row in waiting.rows],
    )

  @app.get('/api/info', summary='The model, its samplers and limits')
  async def info():
    return service.info

  @app.post(
    '/api/tokenize',
    summary='The tokens of a text',
    response_model=TokenizeResponse,
  )
  async def tokenize(body: TokenizeRequest):
    ids = service.tokenizer.encode(body.text)
    return {'tokens': ids.tolist(), 'texts': service.tokenizer.spell(ids)}

  @app.post(
    '/api/generate', summary='Fills gaps', response_model=GenerateResponse
  )
  async def generate(body: GenerateRequest, request: fastapi.Request):
    waiting = Waiting(service, _client(request, body.user), make_tasks(body))
    if not await waiting.finish(request):
      return responses.Response(status_code=499)
    return make_response(waiting)

  @app.post(
    '/api/stream',
    summary='Fills gaps, and shows how',
    response_class=responses.StreamingResponse,
    responses={
      200: {
        'content': {'text/event-stream': {}},
        'description': STREAM_DESCRIPTION,
      }
    },
  )
  async def stream(body: GenerateRequest, request: fastapi.Request):
    waiting = Waiting(service, _client(request, body.user), make_tasks(body))

    async def events():
      seen = [None] * len(waiting.rows)
      states = [None] * len(waiting.rows)
      async for changed in _changes(waiting):
        if not changed:
          yield b': waiting\n\n'
        for i, row in enumerate(waiting.rows):
          state = row.state
          is_new = state not in (states[i], engines.FAILED)
          states[i] = state
          if is_new and state != engines.DONE:
            yield _event('state', {'row': i, 'state': state})
          canvas, num_calls = row.canvas, row.num_calls
          if seen[i] is not canvas:
            event = _difference(service, i, row, seen[i], canvas, num_calls)
            seen[i] = canvas
            if event:
              yield event
          if is_new and state == engines.DONE:  # behind its last tokens
            yield _event('state', {'row': i, 'state': state})
        if waiting.is_over:
          waiting.check()
          yield _event('done', make_response(waiting).model_dump())

    return _streamed(waiting, events(), 'error')


STREAM_DESCRIPTION = (
  'Server-sent events, each a JSON object. `state`: row, state (waiting, '
  'compiling, running, done). `canvas`, first for each row: tokens (null: not '
  'yet drawn), texts, fixed. `reveal`: row, num_calls, changes, a list of '
  '[position, token or null, text]. `done`: as /api/generate. `error`: as the '
  "body of an error's answer. Lines that begin with a colon say nothing."
)


def _difference(service, i, row, old, new, num_calls) -> bytes | None:
  """The event that turns one canvas into the next; None where nothing changed."""
  mask_id = service.tokenizer.mask_id
  ids = lambda canvas: [
    None if token == mask_id else token for token in canvas.tolist()
  ]

  def spell(canvas):
    return [
      '' if token == mask_id else text
      for token, text in zip(canvas, service.tokenizer.spell(canvas))
    ]

  texts = spell(new)
  if old is None:
    return _event(
      'canvas',
      {
        'row': i,
        'tokens': ids(new),
        'texts': texts,
        'fixed': row.task.fixed.tolist(),
      },
    )
  before = spell(old)
  # The text of a token can change with its neighbour: they may share a character.
  changes = [
    [j, token, text]
    for j, (token, text) in enumerate(zip(ids(new), texts))
    if new[j] != old[j] or text != before[j]
  ]
  if not changes:
    return None
  return _event(
    'reveal', {'row': i, 'num_calls': num_calls, 'changes': changes}
  )


def _event(name: str | None, data: Any) -> bytes:
  head = f'event: {name}\n' if name else ''
  return f'{head}data: {json.dumps(data)}\n\n'.encode()


async def _changes(waiting: Waiting) -> AsyncIterator[bool]:
  """Once at first, and whenever the rows changed, until they are over."""
  while True:
    is_over = waiting.is_over
    yield True
    if is_over:
      return
    while not await waiting.wait(HEARTBEAT_SECS):
      yield False


class _Stream(responses.StreamingResponse):
  """A stream of events; its end cancels the rows.

  Not the generator's end: one that was never begun, as the client had left, has
  none.
  """

  def __init__(self, waiting: Waiting, events: AsyncIterator[bytes]):
    super().__init__(
      events, media_type='text/event-stream', headers=STREAM_HEADERS
    )
    self._waiting = waiting

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._waiting.cancel()


def _streamed(
  waiting: Waiting, events: AsyncIterator[bytes], error_event: str | None
):
  """The response of a stream of events."""

  async def guarded():
    yield b': nanodlm\n\n'
    try:
      async for event in events:
        yield event
    except ApiError as error:
      yield _event(error_event, error_body(error.status, str(error)))

  return _Stream(waiting, guarded())


def _client(request: fastapi.Request, user: str | None):
  """Who takes turns with others: a named user, or a connection."""
  address = request.client or ('', 0)
  return (address[0], user) if user else tuple(address)


def _add_openai(app, service: Service):

  model = {
    'id': service.name,
    'object': 'model',
    'created': int(time.time()),
    'owned_by': 'nanodlm',
  }

  @app.get('/v1/models', summary='The one model')
  async def models():
    return {'object': 'list', 'data': [model]}

  @app.get('/v1/models/{name}', summary='The one model')
  async def one_model(name: str):
    check_model(name)
    return model

  def check_model(name: str | None):
    if name not in (None, service.name):
      raise ApiError(
        404,
        f'model={name!r} is not here; {service.name!r} is',
        'model_not_found',
      )

  @app.post('/v1/completions', summary="Continues a text, as OpenAI's API does")
  async def completions(body: CompletionRequest, request: fastapi.Request):
    check_model(body.model)
    job = Completions(service, body)
    waiting = Waiting(service, _client(request, body.user), job.tasks)
    if body.stream:
      return _streamed(waiting, job.stream(waiting), None)
    if not await waiting.finish(request):
      return responses.Response(status_code=499)
    return responses.JSONResponse(job.response(waiting))


class Completions:
  """A request to /v1/completions: its canvases, and what to say of them."""

  def __init__(self, service: Service, body: CompletionRequest):
    self._service, self._body = service, body
    refused = {
      'logprobs': body.logprobs,
      'logit_bias': body.logit_bias,
      'frequency_penalty': body.frequency_penalty,
      'presence_penalty': body.presence_penalty,
    }
    for name, value in refused.items():
      # logprobs=0 asks for the tokens' own.
      if (
        value and name != 'logprobs' or name == 'logprobs' and value is not None
      ):
        raise InputError(f'{name}={value!r} is not offered here')
    num = body.n or 1
    if body.best_of not in (None, num):
      raise InputError(f'best_of={body.best_of!r} is not offered here')
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(stops) > 4 or not all(0 < len(stop) <= 200 for stop in stops):
      raise InputError('stop: at most 4 texts, of 1 to 200 characters each')
    self._stops = stops
    prompts = body.prompt
    if isinstance(prompts, str) or not prompts or isinstance(prompts[0], int):
      prompts = [prompts or '']
    if len(prompts) > MAX_PROMPTS:
      raise InputError(f'prompt: {len(prompts)} of them; at most {MAX_PROMPTS}')
    choice = service.engine.choose(body.sampler, body.num_steps)
    draw = service.make_draw(body.temperature, body.top_k, body.top_p)
    seed = (
      secrets.randbelow(MAX_SEED + 1)
      if body.seed is None
      else body.seed % (MAX_SEED + 1)
    )
    self.tasks = []
    for prompt in prompts:
      tokens, fixed = self._lay_out(prompt)
      for _ in range(num):
        self.tasks.append(
          Task(tokens, fixed, choice, draw, seed, len(self.tasks))
        )
    self._prompts = [
      text for prompt in prompts for text in [self._text(prompt)] * num
    ]
    self._id = f'cmpl-{secrets.token_hex(12)}'
    self._created = int(time.time())

  def _text(self, prompt) -> str:
    if isinstance(prompt, str):
      return prompt
    return self._service.tokenizer.decode(prompt)

  def _lay_out(self, prompt) -> tuple[np.ndarray, np.ndarray]:
    body, room = self._body, self._body.max_tokens or 16
    braces = str.maketrans({'{': '{{', '}': '}}'})
    suffix = (body.suffix or '').translate(braces)
    length, encode = self._service.engine.length, self._service.tokenizer.encode
    ids = encode(prompt) if isinstance(prompt, str) else prompt
    around = len(ids) + len(encode(body.suffix or ''))
    if around + room > length:
      raise InputError(
        f'max_tokens={room} beside {around} tokens of prompt and '
        f'suffix: the canvas has {length} tokens'
      )
    if isinstance(prompt, str):
      return sample.lay_out(
        self._service.run,
        f'{prompt.translate(braces)}{{{room}}}{suffix}',
        length,
      )
    suffix = encode(body.suffix or '').tolist()
    return self._service.lay_out_ids([*prompt, *[None] * room, *suffix])

  def _completion(self, row: Row) -> tuple[str, str | None, int]:
    """Text so far, why it has ended (or None), and its number of tokens."""
    service, task = self._service, row.task
    tokens = row.canvas[~task.fixed]
    is_done = row.state == engines.DONE
    if not is_done:
      if not task.choice.is_final:
        tokens = tokens[:0]
      hidden = np.flatnonzero(tokens == service.tokenizer.mask_id)
      tokens = tokens[: hidden[0]] if hidden.size else tokens
    shown = sample.shown_tokens(service.run, tokens)
    has_ended = len(shown) < len(tokens)
    text = service.tokenizer.decode(shown)
    ends = [end for stop in self._stops if (end := text.find(stop)) >= 0]
    if ends:
      return text[: min(ends)], 'stop', len(shown)
    if has_ended:
      return text, 'stop', len(shown)
    if is_done:
      return text, 'length', len(shown)
    # What may yet become another character, or the beginning of a stop.
    text = text.rstrip('\ufffd')
    held = max(
      (
        size
        for stop in self._stops
        for size in range(len(stop))
        if text.endswith(stop[:size])
      ),
      default=0,
    )
    return text[: len(text) - held], None, len(shown)

  def _body_of(self, choices, usage=None) -> dict[str, Any]:
    return {
      'id': self._id,
      'object': 'text_completion',
      'created': self._created,
      'model': self._service.name,
      'choices': choices,
      'usage': usage,
    }

  def _usage(self, waiting: Waiting) -> dict[str, int]:
    num = self._body.n or 1
    prompt = sum(int(row.task.fixed.sum()) for row in waiting.rows[::num])
    completion = sum(self._completion(row)[2] for row in waiting.rows)
    return {
      'prompt_tokens': prompt,
      'completion_tokens': completion,
      'total_tokens': prompt + completion,
    }

  def response(self, waiting: Waiting) -> dict[str, Any]:
    """The whole answer, in the form of OpenAI's API."""
    choices = []
    for i, row in enumerate(waiting.rows):
      text, reason, _ = self._completion(row)
      echoed = self._prompts[i] if self._body.echo else ''
      choices.append(
        {
          'index': i,
          'text': echoed + text,
          'logprobs': None,
          'finish_reason': reason,
        }
      )
    return self._body_of(choices, self._usage(waiting))

  async def stream(self, waiting: Waiting) -> AsyncIterator[bytes]:
    """Chunks in the order of the text, as it becomes final; then [DONE]."""
    sent = [''] * len(waiting.rows)
    ended = [False] * len(waiting.rows)
    if self._body.echo:
      for i, prompt in enumerate(self._prompts):
        yield self._chunk(i, prompt, None)
    async for changed in _changes(waiting):
      if not changed:
        yield b': waiting\n\n'
      for i, row in enumerate(waiting.rows):
        if ended[i] or row.state == engines.FAILED:
          continue
        text, reason, _ = self._completion(row)
        if text != sent[i] or reason:
          new, sent[i], ended[i] = text[len(sent[i]) :], text, bool(reason)
          yield self._chunk(i, new, reason)
      waiting.check()
    options = self._body.stream_options
    if options and options.include_usage:
      yield _event(None, self._body_of([], self._usage(waiting)))
    yield b'data: [DONE]\n\n'

  def _chunk(self, i: int, text: str, reason: str | None) -> bytes:
    return _event(
      None,
      self._body_of(
        [{'index': i, 'text': text, 'logprobs': None, 'finish_reason': reason}]
      ),
    )


class Guard:
  """What is refused before it is looked at, around an ASGI application.

  Hosts that this server is not (a name that an attacker's DNS points here), pages
  of other origins, bodies that are no JSON, too large or too slow.
  """

  def __init__(self, app, allowed_hosts: tuple[str, ...] | None):
    self._app, self._allowed_hosts = app, allowed_hosts

  async def __call__(self, scope, receive, send):
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    headers = {}
    for name, value in scope['headers']:
      headers.setdefault(name.decode('latin-1'), value.decode('latin-1'))
    try:
      self._check(scope, headers)
      body = await self._read(scope, headers, receive)
    except ApiError as error:
      response = _error_response(
        error.status, str(error), error.code, {'Connection': 'close'}
      )
      await response(scope, receive, send)
      return
    except ConnectionError:  # gone
      return
    messages = [{'type': 'http.request', 'body': body, 'more_body': False}]

    async def replay():
      return messages.pop() if messages else await receive()

    await self._app(scope, replay, send)

  def _check(self, scope, headers: dict[str, str]):
    host = headers.get('host', '')
    if self._allowed_hosts is not None and (
      _host_name(f'//{host}') not in self._allowed_hosts
    ):
      raise ApiError(421, f'this is not {host[:100]!r}', 'wrong_host')
    origin = headers.get('origin')
    if origin is not None and _origin_host(origin) != host:
      raise ApiError(
        403, 'a page of another origin may not ask here', 'wrong_origin'
      )
    if (
      scope['method'] == 'POST'
      and headers.get('content-type', '').partition(';')[0].strip().lower()
      != 'application/json'
    ):
      raise ApiError(
        415,
        'the body must be JSON, and say so: Content-Type: application/json',
        'wrong_content_type',
      )

  async def _read(self, scope, headers: dict[str, str], receive) -> bytes:
    """The body; one that is too large is read to its end, but not kept."""
    del scope
    length = headers.get('content-length', '0')
    announced = int(length) if length.isascii() and length.isdigit() else 0
    too_large = ApiError(
      413, f'the body is larger than {MAX_BODY_BYTES} bytes', 'too_large'
    )
    if (
      announced > MAX_DRAINED_BYTES
      or announced > MAX_BODY_BYTES
      and ('expect' in headers)
    ):
      raise too_large
    body, size = bytearray(), 0
    try:
      async with asyncio.timeout(READ_SECS):
        while True:
          message = await receive()
          if message['type'] == 'http.disconnect':
            raise ConnectionError
          size += len(message.get('body', b''))
          if size > MAX_DRAINED_BYTES:
            raise too_large
          if max(size, announced) <= MAX_BODY_BYTES:
            body += message.get('body', b'')
          if not message.get('more_body'):
            break
    except TimeoutError:
      raise ApiError(
        408, f'the body did not come within {READ_SECS:g} s', 'too_slow'
      ) from None
    if max(size, announced) > MAX_BODY_BYTES:
      raise too_large
    return bytes(body)


def _origin_host(origin: str) -> str | None:
  try:
    return urllib.parse.urlsplit(origin).netloc
  except ValueError:
    return None


def _host_name(address: str) -> str:
  try:
    return urllib.parse.urlsplit(address).hostname or ''
  except ValueError:
    return ''


class Protocol(h11_impl.H11Protocol):
  """HTTP on one connection, cut off where it takes too long.

  uvicorn's own waits for ever for a request's head, and for a client that does
  not read.
  """

  _head_timer = _stall_timer = None

  def connection_made(self, transport):
    super().connection_made(transport)
    transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
    self._time_head()

  def data_received(self, data):
    super().data_received(data)
    self._time_head()

  def _time_head(self):
    """Times a head that has begun, or the first one."""
    is_between = self.cycle is None or self.cycle.response_complete
    if not is_between and self._head_timer:
      self._head_timer.cancel()
      self._head_timer = None
    elif is_between and not self._head_timer:
      self._head_timer = self.loop.call_later(READ_SECS, self._end_head)

  def _end_head(self):
    self._head_timer = None
    if self.cycle is None or self.cycle.response_complete:
      self.transport.close()

  def pause_writing(self):
    super().pause_writing()
    if not self._stall_timer:
      self._stall_timer = self.loop.call_later(STALL_SECS, self._stalled)

  def _stalled(self):
    log.info('a client that does not read was cut off')
    self.transport.abort()

  def resume_writing(self):
    super().resume_writing()
    if self._stall_timer:
      self._stall_timer.cancel()
      self._stall_timer = None

  def connection_lost(self, exc):
    super().connection_lost(exc)
    for timer in (self._head_timer, self._stall_timer):
      if timer:
        timer.cancel()


class Server(uvicorn.Server):
  """uvicorn's server, which tells its streams when it is to stop."""

  def __init__(self, config: uvicorn.Config, service: Service):
    super().__init__(config)
    self._service = service

  def handle_exit(self, sig, frame):
    """Ends the running streams before uvicorn waits for them."""
    self.stop_streams()
    super().handle_exit(sig, frame)

  def stop_streams(self):
    """Fails what waits and what runs, from a thread: a signal may not wait."""
    self._service.stopping.set()
    threading.Thread(target=self._service.engine.close, daemon=True).start()


def make_server(service: Service, host: str) -> Server:
  """A server of `service`, to be run on sockets that the caller opens."""
  app = make_app(service, allowed_hosts(host))
  return Server(
    uvicorn.Config(
      app,
      http=Protocol,
      ws='none',
      lifespan='off',
      log_config=None,
      access_log=False,
      server_header=False,
      proxy_headers=False,
      limit_concurrency=MAX_CONNECTIONS,
      timeout_keep_alive=30,
      timeout_graceful_shutdown=int(STOP_SECS),
    ),
    service,
  )


def allowed_hosts(host: str) -> tuple[str, ...] | None:
  """What the header Host may say where the server listens on `host`.

  On the loopback device only its own names; elsewhere the name that others know
  this machine by is unknown here.
  """
  if not is_loopback(host):
    return None
  return ('localhost', '127.0.0.1', '::1', host.lower())


def is_loopback(host: str) -> bool:
  """Whether a host's name or address is this machine's own."""
  if host.lower() == 'localhost':
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def open_socket(host: str, port: int) -> socket.socket:
  """A listening socket; InputError where there is none to be had."""
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    opened = socket.socket(family, kind, protocol)
    try:
      opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      opened.bind(address)
      opened.listen(1024)
      return opened
    except OSError:
      opened.close()
      raise
  except OSError as error:
    raise InputError(
      f'--host={host!r} --port={port!r}: cannot listen there '
      f'({error.strerror}). --host must be an address of this machine, '
      'and --port a free one'
    ) from error


def serve_workdir(
  config: config_dict.ConfigDict,
  settings: configs.Settings,
  workdir: str,
  host: str,
  port: int,
) -> int:
  """--mode=serve: serves the last checkpoint until a signal; returns its number.

  Args:
    config: the run's, with its sampler section.
    settings: its checked sections.
    workdir: of the run.
    host: to listen on.
    port: to listen on; 0: any.
  """
  run = evaluate.make_run(config, settings, tokenizers.load(workdir))
  listening = open_socket(host, port)  # before the slow part
  params, step = evaluate.load_params(run, workdir)
  engine = engines.Engine(run, params)
  log.info('compiling the sampler ...')
  start = time.monotonic()
  engine.start()
  name = plots.printable(pathlib.Path(workdir).resolve().name)
  service = Service(run, step, name, engine)
  server = make_server(service, host)
  received = []
  for number in (signal.SIGINT, signal.SIGTERM):
    # uvicorn has its own while it runs, and raises the signal again afterwards.
    signal.signal(number, lambda number, frame: received.append(number))
  port = listening.getsockname()[1]
  shown = f'[{host}]' if ':' in host else host
  log.info(
    'step %d, ready after %.1f s: http://%s:%d (the API: /docs); Ctrl-C '
    'ends it',
    step,
    time.monotonic() - start,
    shown,
    port,
  )
  if not is_loopback(host):
    log.warning(
      '--host=%s: anyone who reaches this port can use the model; '
      'nothing asks for a password',
      host,
    )
  server.run([listening])
  service.stopping.set()
  has_ended = engine.close(STOP_SECS)
  log.info('stopped')
  number = received[0] if received else 0
  if not has_ended:  # a compilation cannot be stopped
    multihost.leave(128 + number if number else 0)
  return number

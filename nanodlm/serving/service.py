"""What the routes share: the model, the rows of a request, errors, events."""

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from concurrent import futures
import contextlib
import dataclasses
import functools
import json
import secrets
import threading
from typing import Any

import fastapi
from fastapi import responses
import numpy as np

from nanodlm import lm as lms
from nanodlm import prompts
from nanodlm import run as runs
from nanodlm.lm import LanguageModel
from nanodlm.noise import categorical
from nanodlm.run import Run
from nanodlm.serving import schemas
from nanodlm.serving.engine import Engine, FullError, Row
from nanodlm.show import watch
from nanodlm.types import InputError

# A stream in which nothing changes repeats a comment this often.
HEARTBEAT_SECS = 5.0
COMMENT = b': nanodlm\n\n'
RETRY_AFTER_SECS = 2
# Scores and choices that wait or are computed, of all clients and of one.
MAX_JOBS = 32
MAX_CLIENT_JOBS = 4
# Rows of a text that are scored between two batches.
ROWS_PER_STEP = 16

# The settings of a draw, in the config and in requests.
DRAW = ('temperature', 'top_k', 'top_p')

Canvas = tuple[np.ndarray, np.ndarray]


class ApiError(fastapi.HTTPException):
  """An error response: the client's mistake, or why it has to wait."""

  def __init__(
    self,
    status: int,
    message: str,
    code: str | None = None,
    headers=None,
    param: str | None = None,
  ):
    super().__init__(status, message, headers)
    self.code, self.param = code, param

  def content(self) -> dict[str, Any]:
    """The error in OpenAI's form, which its clients can show."""
    kind = 'server' if self.status_code >= 500 else 'invalid_request'
    # JSON can spell half of a surrogate pair, which UTF-8 cannot encode.
    message = self.detail.encode('utf-8', 'replace').decode()[:1000]
    error = dict(message=message, type=f'{kind}_error', code=self.code)
    return {'error': error | {'param': self.param}}

  def response(self) -> responses.JSONResponse:
    """The error as a response."""
    return responses.JSONResponse(
      self.content(), self.status_code, self.headers
    )


def queue_full(status: int, message: str) -> ApiError:
  """An error that asks the client to retry later."""
  headers = {'Retry-After': str(RETRY_AFTER_SECS)}
  return ApiError(status, message, 'queue_full', headers)


def client_of(request: fastapi.Request, user: str | None) -> Hashable:
  """Returns whose turns a request uses: a connection's or a named user's."""
  host, port = request.client or ('', 0)
  return host, user or port


def check_one(**fields: Any) -> None:
  """Raises InputError unless one of the fields of a request is given."""
  if sum(value is not None for value in fields.values()) != 1:
    raise InputError(f'give either {" or ".join(fields)}')


def make_event(name: str | None, data: Any) -> bytes:
  """A server-sent event with JSON data."""
  head = f'event: {name}\n' if name else ''
  return f'{head}data: {json.dumps(data)}\n\n'.encode()


class Submission:
  """The rows of one request, for which a coroutine waits.

  They use the turns of `client`.

  Raises:
    ApiError: the queue is full, or the server is stopping.
  """

  def __init__(self, engine: Engine, client: Hashable, rows: Sequence[Row]):
    loop = asyncio.get_running_loop()
    self.rows = rows
    self._engine, self._changed = engine, asyncio.Event()

    def notify():
      with contextlib.suppress(RuntimeError):  # The loop has ended.
        loop.call_soon_threadsafe(self._changed.set)

    try:
      if waiting := [row for row in rows if not row.is_over]:
        engine.submit(client, waiting, notify)
    except FullError as error:
      status = 503 if engine.is_closing else 429
      raise queue_full(status, str(error)) from error

  def cancel(self):
    """Drops the rows that are not done."""
    for row in self.rows:
      row.is_cancelled = True

  async def changes(self, timeout_secs: float) -> AsyncIterator[bool]:
    """Yields True after each change, until all rows are done.

    Yields False whenever nothing has changed for timeout_secs, and may do so at
    first.

    Raises:
      ApiError: a row has failed.
    """
    while True:
      has_changed = self._changed.is_set()
      self._changed.clear()
      is_over = all(row.is_over or row.is_cancelled for row in self.rows)
      yield has_changed
      for row in self.rows:
        if row.error:
          raise ApiError(503 if self._engine.is_closing else 500, row.error)
      if is_over:
        return
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_secs):
          await self._changed.wait()

  async def finish(
    self,
    request: fastapi.Request,
    have_ended: Callable[[Sequence[Row]], bool] = lambda rows: False,
  ):
    """Waits until all rows are done or `have_ended` says so.

    Cancels what is left, also if a row fails or the client leaves.
    """
    try:
      async for _ in self.changes(timeout_secs=1.0):
        if have_ended(self.rows):
          return
        if await request.is_disconnected():
          raise ApiError(499, 'the client has closed the connection')
    finally:
      self.cancel()


class EventStream(responses.StreamingResponse):
  """A stream of server-sent events; its end cancels the rows.

  The generator of the events cannot cancel them: it never runs if the client
  leaves before the first byte.
  """

  def __init__(
    self, submission: Submission, events: AsyncIterator[bytes], error_event=''
  ):
    async def guarded():
      try:
        async for event in events:
          yield event
      except ApiError as error:
        yield make_event(error_event, error.content())

    headers = {'Cache-Control': 'no-store', 'X-Accel-Buffering': 'no'}
    super().__init__(guarded(), 200, headers, 'text/event-stream')
    self._submission = submission

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:
      self._submission.cancel()


class Service:
  """A model to serve, its name and the engine that fills its canvases."""

  def __init__(self, engine: Engine, name: str):
    self.engine, self.name = engine, name
    self.run, self.step = engine.lm.run, engine.lm.step
    self.tokenizer = engine.lm.tokenizer
    self._pool, self.is_computing = futures.ThreadPoolExecutor(1), False
    self._jobs = collections.Counter[Hashable]()

  @functools.cached_property
  def info(self) -> dict[str, Any]:
    """What a client has to know about the model."""
    settings, objective = self.run.settings, self.run.objective
    samplers = []
    for name in runs.fitting_samplers(objective):
      with contextlib.suppress(InputError):  # It rejects the run's settings.
        num = self._num_steps(self.engine.choose(name))
        sampler = {'name': name, 'reads_steps': num is not None}
        samplers.append(sampler | {'num_steps': num})
    return {
      'model': self.name,
      'step': self.step,
      'objective': settings.objective['name'],
      'num_params': self.run.num_params(),
      'length': self.engine.length,
      'sees_right': objective.sees_right(self.engine.length),
      'tokenizer': self.tokenizer.name,
      'has_chat': bool(self.tokenizer.chat_template),
      'vocab_size': self.tokenizer.vocab_size,
      'samplers': samplers,
      'sampler': self.run.sampler_name,
      'defaults': {key: settings.sampler[key] for key in ('num_steps', *DRAW)},
      'limits': {
        'num_samples': schemas.MAX_SAMPLES,
        'num_steps': schemas.MAX_STEPS,
        'seed': schemas.MAX_SEED,
        'body_bytes': schemas.MAX_BODY_BYTES,
      },
    }

  def _num_steps(self, run: Run) -> int | None:
    """The number of steps of a run's sampler; None if it ignores it."""
    reads = runs.reads_steps(run.sampler)
    return run.settings.sampler['num_steps'] if reads else None

  def lay_out(
    self, prompt: str | list[dict[str, str]], sampler: str | None
  ) -> Canvas:
    """Returns tokens and fixed [n] of a text with gaps, or of messages."""
    run = self.engine.choose(sampler)
    return lms.lay_out(run, prompt, self.engine.length)

  def lay_out_ids(
    self, ids: Sequence[int | None], field: str = 'tokens'
  ) -> Canvas:
    """Returns tokens and fixed [n] of the ids in a field, None in the gaps."""
    mask_id, length = self.tokenizer.mask_id, self.engine.length
    if not 0 < len(ids) <= length:
      raise InputError(
        f'{field} has {len(ids)} entries; between 1 and {length} are allowed '
        '(sampler.length, by default data.length)'
      )
    if wrong := [i for i in ids if i is not None and i >= mask_id]:
      raise InputError(f'{field}: {wrong[0]} is not an id in [0, {mask_id})')
    separator_id = self.tokenizer.separator_id
    if self.run.objective.any_length and ids[-1] != separator_id:
      raise InputError(
        f'{field} must end with the separator, {separator_id}, for a model of '
        'gaps of any length'
      )
    fixed = np.array([i is not None for i in ids])
    sees_right = self.run.objective.sees_right(length)
    if not sees_right and np.any(fixed[1:] & ~fixed[:-1]):
      raise InputError(
        f'{field}: this model reads from left to right (by tokens or blocks) '
        'and fills one gap at the end; text after a gap requires a model with '
        'objective.name=masked'
      )
    return np.array([mask_id if i is None else i for i in ids], np.int32), fixed

  def submit(
    self,
    request: fastapi.Request,
    body: schemas.Sampling,
    canvases: Sequence[Canvas],
    num: int,
    logprobs: bool = False,
  ) -> Submission:
    """Submits `num` rows for each canvas, to be sampled as `body` says.

    With `logprobs`, the rows have log-probabilities.
    """
    run = self.engine.choose(body.sampler, body.num_steps)
    mask_id, name = self.tokenizer.mask_id, run.sampler_name
    if logprobs and run.sampler.fills_room:
      raise InputError(
        f'logprobs: sampler={name!r} moves tokens, and does not record '
        'their log-probabilities'
      )
    is_masked = any(np.any(tokens == mask_id) for tokens, _ in canvases)
    if is_masked and not run.sampler.fills_masks:
      raise InputError(
        f'sampler={name!r} fills gaps of any length, {{*}}, and not '
        'those of a given number of tokens'
      )
    values = {key: self.run.settings.sampler[key] for key in DRAW}
    values |= body.model_dump(include={*DRAW}, exclude_none=True)
    draw = categorical.Draw(mask_id, **values)
    seed, is_fixed = body.seed, body.seed is None and draw.is_greedy
    if seed is None:
      # Without a seed, a greedy text depends on its own prompt alone.
      seed = 0 if is_fixed else secrets.randbelow(schemas.MAX_SEED + 1)
    rows = []
    for canvas in canvases:
      for _ in range(num):
        index = 0 if is_fixed else len(rows)
        row = Row(*canvas, run, draw, seed % 2**64, index)
        if logprobs:
          row.logprobs = watch.Logprobs(len(row.tokens))
        row.state = 'done' if np.all(row.fixed) else 'waiting'
        rows.append(row)
    return Submission(self.engine, client_of(request, body.user), rows)

  async def compute(
    self,
    request: fastapi.Request,
    user: str | None,
    work: Callable[[LanguageModel], Any],
  ) -> Any:
    """Returns work(lm), computed in a thread between the batches.

    Raises:
      ApiError: too many are waiting, the client has left, or the server stops.
    """
    client, is_unwanted = client_of(request, user), threading.Event()
    num, num_own = self._jobs.total(), self._jobs[client]
    if num >= MAX_JOBS or num_own >= MAX_CLIENT_JOBS:
      message = (
        f'{num} scores and choices are being computed, {num_own} of them '
        f'yours; at most {MAX_JOBS} are allowed, and {MAX_CLIENT_JOBS} yours'
      )
      raise queue_full(429, message)

    def call(step: Any, *args: Any) -> Any:
      if is_unwanted.is_set():
        raise futures.CancelledError
      return self.engine.call(step, *args)

    def run() -> Any:
      self.is_computing = True
      try:
        return work(dataclasses.replace(self.engine.lm, call=call))
      finally:
        self.is_computing = False

    job = asyncio.get_running_loop().run_in_executor(self._pool, run)
    self._jobs[client] += 1
    try:
      while not (await asyncio.wait([job], timeout=1.0))[0]:
        if self.engine.is_closing:
          raise queue_full(503, 'the server is stopping')
        if await request.is_disconnected():
          raise ApiError(499, 'the client has closed the connection')
      return job.result()
    finally:
      is_unwanted.set()
      job.cancel()
      self._jobs.subtract([client])
      self._jobs = +self._jobs  # Without clients that have none.

  async def score(
    self, request: fastapi.Request, body: schemas.ScoreRequest
  ) -> schemas.ScoreResponse:
    """Scores texts, or a conversation."""
    check_one(texts=body.texts, messages=body.messages)
    texts: list[Any] = (
      [body.texts] if isinstance(body.texts, str) else body.texts or []
    )
    longest, most = self.run.settings.data.length, schemas.MAX_SCORED
    sizes = map(len, self.tokenizer.encode_batch(texts))
    num_rows = sum(-(-size // longest) for size in sizes)
    if body.messages is not None:
      texts = [[message.plain() for message in body.messages]]
    if not 0 < len(texts) <= most or num_rows > most:
      raise InputError(
        f'texts: {len(texts)} texts make {num_rows} rows of {longest} tokens '
        f'(data.length); at most {most} of each are allowed, at least one text'
      )
    work = lambda lm: lm.bound(texts, seed=body.seed, batch_size=ROWS_PER_STEP)
    scores = await self.compute(request, body.user, work)
    return schemas.ScoreResponse(model=self.name, step=self.step, scores=scores)

  async def choose(
    self, request: fastapi.Request, body: schemas.ChooseRequest
  ) -> schemas.ChooseResponse:
    """Compares the choices of a prompt with a slot."""
    check_one(prompt=body.prompt, messages=body.messages)
    prompt: Any = body.prompt
    text = prompt
    if body.messages is not None:
      prompt = [message.plain() for message in body.messages]
      text = prompts.choices_of(prompt)
    before, choices, after = prompts.split_choices(text)
    size = len(self.tokenizer.encode(before + max(choices, key=len) + after))
    most, length = schemas.MAX_SCORED, self.engine.length
    if len(choices) > most or size > length:
      raise InputError(
        f'prompt: {len(choices)} choices, {size} tokens with the longest of '
        f'them; at most {most} choices and {length} tokens are allowed'
      )
    work = lambda lm: lm.choose(prompt, seed=body.seed)
    chosen = await self.compute(request, body.user, work)
    return schemas.ChooseResponse(
      model=self.name, step=self.step, choices=chosen
    )

  def score_tokens(
    self, row: Row, places: Sequence[int] | np.ndarray, num_top: int
  ) -> list[tuple[float | None, list[schemas.Alternative]]]:
    """Returns log-probabilities of the tokens at some places of a row.

    For each the value, None in the prompt, and the `num_top` most probable
    tokens.
    """
    scored, logprobs = [], row.logprobs
    assert logprobs is not None  # For type checkers.
    for place in places:
      own = float(logprobs.chosen[place])
      if np.isnan(own):
        scored.append((None, []))
        continue
      best = zip(logprobs.top_tokens[place], logprobs.top[place].tolist())
      top = [
        schemas.Alternative(
          token=int(token), text=self.name_token(token), logprob=value
        )
        for token, value in [*best][:num_top]
        if np.isfinite(value)  # There may be fewer tokens.
      ]
      scored.append((own, top))
    return scored

  def name_token(self, token: int) -> str:
    """Returns the text of a token, as OpenAI writes a part of a character."""
    (text,) = self.tokenizer.spell([token], is_start=False)
    if '\ufffd' not in text:
      return text
    codes = [f'\\x{byte:02x}' for byte in self.tokenizer.piece(token)]
    return f'bytes:{"".join(codes)}'

  def respond(
    self, body: schemas.GenerateRequest, rows: Sequence[Row]
  ) -> schemas.GenerateResponse:
    """Returns the response for rows that are done."""
    is_chat = body.messages is not None
    show = lms.answer_tokens if is_chat else lms.shown_tokens
    first, decode = rows[0], self.tokenizer.decode
    used: dict[str, Any] = {'name': first.run.sampler_name}
    used |= {key: getattr(first.draw, key) for key in DRAW}
    if (num_steps := self._num_steps(first.run)) is not None:
      used['num_steps'] = num_steps
    samples = []
    for row in rows:
      tokens, fixed = lms.without_room(row.run, row.canvas, row.fixed)
      logprobs = None
      if body.logprobs is not None:
        scored = self.score_tokens(row, range(len(row.tokens)), body.logprobs)
        logprobs = schemas.Logprobs(
          tokens=[own for own, _ in scored], top=[top for _, top in scored]
        )
      sample = schemas.Sample(
        # Without what is left of the room of gaps.
        text=decode(tokens[: np.sum(row.fixed) - np.sum(fixed) or None]),
        shown=decode(show(row.run, tokens, fixed), is_start=not is_chat),
        tokens=row.canvas.tolist(),
        texts=self.tokenizer.spell(row.canvas),
        num_calls=row.num_calls,
        tokens_per_call=lms.tokens_per_call(fixed, row.num_calls),
        logprobs=logprobs,
      )
      samples.append(sample)
    return schemas.GenerateResponse(
      model=self.name,
      step=self.step,
      seed=first.seed,
      sampler=used,
      samples=samples,
    )

  async def events(
    self, body: schemas.GenerateRequest, submission: Submission
  ) -> AsyncIterator[bytes]:
    """Yields the events of /api/stream."""
    seen: list[Any] = []
    for i, row in enumerate(submission.rows):
      tokens = self._spell(row.tokens)
      ids, texts = zip(*tokens)
      event = dict(row=i, tokens=ids, texts=texts, fixed=row.fixed.tolist())
      yield make_event('canvas', event)
      seen.append((None, (0, row.tokens), tokens))
    async for has_changed in submission.changes(HEARTBEAT_SECS):
      if not has_changed:
        yield COMMENT
      for i, row in enumerate(submission.rows):
        old_state, old_frame, old = seen[i]
        # In this order: a row that is done has its last tokens.
        state, frame = row.state, row.frame
        num_calls, canvas = frame
        tokens = old if canvas is old_frame[1] else self._spell(canvas)
        seen[i] = state, frame, tokens
        if num_calls != old_frame[0] or tokens != old:
          # Neighbours change too, if they share a character with the token.
          changed = [j for j, token in enumerate(tokens) if token != old[j]]
          changes = [(j, *tokens[j]) for j in changed]
          event = dict(row=i, num_calls=num_calls, changes=changes)
          yield make_event('reveal', event)
        if state not in (old_state, 'failed'):
          yield make_event('state', {'row': i, 'state': state})
    response = self.respond(body, submission.rows)
    yield make_event('done', response.model_dump())

  def _spell(self, canvas: np.ndarray) -> list[tuple[int | None, str]]:
    """The id and text of each token, None and '' for a mask."""
    mask_id = self.tokenizer.mask_id
    return [
      (None, '') if token == mask_id else (token, text)
      for token, text in zip(canvas.tolist(), self.tokenizer.spell(canvas))
    ]

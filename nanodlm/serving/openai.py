"""/v1: the models, completions and conversations of OpenAI's API."""

import asyncio
import bisect
from collections.abc import AsyncIterator, Iterable, Sequence
import itertools
import secrets
import time
from typing import Any, NamedTuple

import fastapi
import numpy as np

from nanodlm import lm as lms
from nanodlm import prompts
from nanodlm.data.tokenizers import chat
from nanodlm.serving import schemas, service
from nanodlm.serving.engine import Row
from nanodlm.serving.service import ApiError, Canvas, Service, Submission
from nanodlm.types import InputError

_BRACES = str.maketrans({'{': '{{', '}': '}}'})


class Part(NamedTuple):
  """A token: its place on the canvas, and its part of a choice's text."""

  place: int
  start: int
  text: str


def add_routes(app: fastapi.FastAPI, model: Service):
  """Adds the routes of /v1 to `app`."""
  described: dict[str, Any] = {'id': model.name, 'object': 'model'}
  described |= {'created': int(time.time()), 'owned_by': 'nanodlm'}

  @app.get('/v1/models', summary='List the model')
  async def list_models():
    return {'object': 'list', 'data': [described]}

  @app.get('/v1/models/{name}', summary='Describe the model')
  async def describe_model(name: str):
    check_name(model, name)
    return described

  @app.post('/v1/completions', summary='Complete a text')
  async def complete(body: schemas.CompletionRequest, request: fastapi.Request):
    """Continues a text or fills the gap before `suffix`, as OpenAI's API does.

    With `stream`, the text is sent in its order, as it becomes final.
    """
    check_name(model, body.model)
    return await Completions(model, body).run(request)

  @app.post('/v1/chat/completions', summary='Answer a conversation')
  async def answer(body: schemas.ChatRequest, request: fastapi.Request):
    """Answers messages, as OpenAI's API does.

    With `stream`, the text is sent in its order, as it becomes final.
    """
    check_name(model, body.model)
    return await ChatCompletions(model, body).run(request)


def check_name(model: Service, name: str | None):
  """Raises ApiError unless `name` is None or the model's."""
  if name not in (None, model.name):
    message = f'model={name!r} is not served here; use {model.name!r}'
    raise ApiError(404, message, 'model_not_found')


class Completions:
  """The choices of one request."""

  kind = part_kind = 'text_completion'
  id_prefix = 'cmpl'

  def __init__(self, model: Service, body: Any):
    self._model, self._body = model, body
    self._num = body.n or 1
    self._stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    if len(self._stops) > 4 or not all(0 < len(x) <= 200 for x in self._stops):
      raise InputError(
        f'stop={body.stop!r:.100}: at most 4 texts, of 1 to 200 characters each'
      )
    self.prompts = self._make_prompts()
    self._head = {
      'id': f'{self.id_prefix}-{secrets.token_hex(12)}',
      'object': self.part_kind if body.stream else self.kind,
      'created': int(time.time()),
      'model': model.name,
    }

  async def run(self, request: fastapi.Request) -> Any:
    """Returns the response, or a stream of it."""
    body = self._body
    # A chat template may take seconds, in which others are served.
    lay_out = lambda: [self.lay_out(prompt) for prompt in self.prompts]
    canvases = await asyncio.to_thread(lay_out)
    submission = self._model.submit(
      request, body, canvases, self._num, self._num_top is not None
    )
    if body.stream:
      return service.EventStream(submission, self.stream(submission))
    await submission.finish(request, self.have_ended)
    return self.respond(submission.rows)

  @property
  def _num_top(self) -> int | None:
    """The number of alternatives to a token; None: no log-probabilities."""
    return self._body.logprobs

  @property
  def _ends(self) -> tuple[int, ...]:
    """The tokens that end a text."""
    return self._model.run.eos_ids

  def _make_prompts(self) -> list[Any]:
    given, best_of = self._body.prompt, self._body.best_of
    if best_of not in (None, self._num):
      raise InputError(f'best_of={best_of!r} is not supported; use n')
    if isinstance(given, str) or not given or isinstance(given[0], int):
      given = [given or '']
    most = schemas.MAX_PROMPTS
    if len(given) > most:
      raise InputError(f'{len(given)} prompts; at most {most} are allowed')
    return given

  def lay_out(self, prompt: str | list[int]) -> Canvas:
    """Returns tokens and fixed [n] of a prompt, its gap and the suffix."""
    model, size = self._model, self._body.max_tokens
    if not model.engine.choose(self._body.sampler).sampler.fills_masks:
      raise InputError(
        'the model chooses how many tokens it writes, which max_tokens says '
        "here: use POST /api/generate with the gap '{*}'"
      )
    size = 16 if size is None else size
    encode, length = model.tokenizer.encode, model.engine.length
    suffix = self._body.suffix or ''
    ids = encode(prompt).tolist() if isinstance(prompt, str) else prompt
    suffix_ids = model.tokenizer.encode_rest(suffix).tolist()
    # What a network takes for room is at the end.
    end = [model.tokenizer.separator_id] * model.run.objective.any_length
    num_given = len(ids) + len(suffix_ids) + len(end)
    if num_given + size > length:
      raise InputError(
        f'max_tokens={size} and the {num_given} tokens of prompt and suffix do '
        f'not fit; the canvas has {length} tokens'
      )
    if size and isinstance(prompt, str):  # This rejects unknown characters.
      text, suffix = prompt.translate(_BRACES), suffix.translate(_BRACES)
      prompt = f'{text}{{{size}}}{suffix}'
      return model.lay_out(prompt, self._body.sampler)
    if not ids + suffix_ids and not size:
      return np.zeros(0, np.int32), np.zeros(0, bool)
    given = [*ids, *[None] * size, *suffix_ids, *end]
    canvas = model.lay_out_ids(given, 'prompt')
    # Without a gap there is nothing to fill.
    if not size:
      return canvas
    return lms.end_as_trained(model.run, *canvas, length)

  def _given(self, i: int) -> str:
    """The space before completion i that was left to the gap.

    The client has it.
    """
    prompt, tokenizer = self.prompts[i // self._num], self._model.tokenizer
    if not isinstance(prompt, str):
      return ''
    is_whole = self._model.run.settings.data.is_pairs and not self._body.suffix
    return prompt.removeprefix(prompts.before_gap(prompt, tokenizer, is_whole))

  def _complete(self, i: int, row: Row) -> tuple[str, str | None, int]:
    """The text so far, the reason why it ended, and its number of tokens."""
    is_done = row.state == 'done'  # Read first: then the canvas is the last.
    run, tokenizer = self._model.run, self._model.tokenizer
    tokens = row.canvas[~row.fixed]
    if not is_done:
      hidden = [*(tokens == run.tokenizer.mask_id), True]
      is_final = row.run.sampler.is_final
      tokens = tokens[: np.argmax(hidden) if is_final else 0]
    is_blank, given = not row.fixed[:1].any(), self._given(i)
    if not is_done and is_blank and np.isin(tokens, self._ends).all():
      return '', None, 0  # Separators may begin the text, or end it.

    def decode(ids: np.ndarray) -> str:
      return tokenizer.decode(ids, is_start=is_blank).removeprefix(given)

    num_tokens = prompts.find_end(tokens, self._ends, is_blank)
    text = decode(tokens[:num_tokens])
    found = [(text.find(stop), len(stop)) for stop in self._stops]
    # A text ends at the stop that is complete first, whatever comes after it.
    ends = [(start + size, start) for start, size in found if start >= 0]
    if ends:
      text = text[: min(ends)[1]]
      # The tokens that spell this text, whole characters.
      spells = lambda num: decode(tokens[:num]).startswith(text)
      num_tokens = bisect.bisect_left(range(num_tokens), True, key=spells)
    if ends or num_tokens < len(tokens):
      return text, 'stop', num_tokens
    if is_done:
      return text, 'length', num_tokens
    # The end is withheld if it may become another character or a stop.
    text = text.rstrip('\ufffd')
    starts = [stop[:size] for stop in self._stops for size in range(len(stop))]
    held = max((len(x) for x in starts if text.endswith(x)), default=0)
    return text[: len(text) - held], None, num_tokens

  def have_ended(self, rows: Sequence[Row]) -> bool:
    """Whether every text has met its end or a stop."""
    return all(self._complete(i, row)[1] for i, row in enumerate(rows))

  def _echo(self, i: int) -> str:
    """The text before completion i."""
    prompt = self.prompts[i // self._num] if self._body.echo else ''
    if isinstance(prompt, str):
      return prompt
    return self._model.tokenizer.decode(np.array(prompt, np.int32))

  def _spell(self, i: int, row: Row, num_tokens: int) -> list[Part]:
    """The first tokens of completion i, whose texts are its text.

    None of them without log-probabilities; likewise of `_spell_echo`.
    """
    if self._num_top is None:
      return []
    places, is_blank = np.flatnonzero(~row.fixed), not row.fixed[:1].any()
    ids = row.canvas[places[:num_tokens]]
    texts = self._model.tokenizer.spell(ids, is_start=is_blank)
    if texts:
      texts[0] = texts[0].removeprefix(self._given(i))
    return _make_parts(places.tolist(), len(self._echo(i)), texts)

  def _spell_echo(self, i: int, row: Row) -> list[Part]:
    """The tokens before completion i."""
    if not self._echo(i) or self._num_top is None:
      return []
    tokenizer, ids = self._model.tokenizer, self.prompts[i // self._num]
    num = len(tokenizer.encode(ids) if isinstance(ids, str) else ids)
    num = int(np.argmin([*row.fixed[:num], False]))
    return _make_parts(range(num), 0, tokenizer.spell(row.tokens[:num]))

  def _logprobs(self, row: Row, parts: Sequence[Part]) -> dict[str, Any] | None:
    """OpenAI's `logprobs` of some tokens; None if they are not wanted."""
    if self._num_top is None:
      return None
    places = [part.place for part in parts]
    found = self._model.score_tokens(row, places, self._num_top)
    return self._describe(row, parts, found) | {'definition': 'reveal'}

  def _describe(
    self, row: Row, parts: Sequence[Part], found: Sequence[Any]
  ) -> dict[str, Any]:
    """Writes what `Service.score_tokens` found as OpenAI does."""
    alternatives = []
    for part, (own, top) in zip(parts, found):
      # The best of several tokens with the same text; the token itself always,
      # by the text that it is a part of.
      others = [x for x in top if x.token != row.canvas[part.place]]
      named = {x.text: x.logprob for x in reversed(others)}
      named |= {} if own is None else {part.text: own}
      best_first = sorted(named, key=lambda name: -named[name])
      alternatives.append({name: named[name] for name in best_first} or None)
    return {
      'tokens': [part.text for part in parts],
      'token_logprobs': [own for own, _ in found],
      'top_logprobs': alternatives,
      'text_offset': [part.start for part in parts],
    }

  def _usage(self, rows: Sequence[Row]) -> dict[str, int]:
    separator_id = self._model.tokenizer.separator_id
    # Separators after a suffix only fill the canvas.
    given = (row.canvas[row.fixed] for row in rows[:: self._num])
    sizes = [len(np.trim_zeros(ids - separator_id, 'b')) for ids in given]
    # But not those that the client sent.
    sent = [0 if isinstance(x, str) else len(x) for x in self.prompts]
    prompt = sum(map(max, sizes, sent))
    completion = sum(self._complete(i, row)[2] for i, row in enumerate(rows))
    return {
      'prompt_tokens': prompt,
      'completion_tokens': completion,
      'total_tokens': prompt + completion,
    }

  def respond(self, rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the response for rows that are done."""
    choices = []
    for i, row in enumerate(rows):
      text, reason, num_tokens = self._complete(i, row)
      parts = self._spell_echo(i, row) + self._spell(i, row, num_tokens)
      logprobs = self._logprobs(row, parts)
      choices.append(self._choice(i, self._echo(i) + text, reason, logprobs))
    return self._head | {'choices': choices, 'usage': self._usage(rows)}

  async def stream(self, submission: Submission) -> AsyncIterator[bytes]:
    """Yields the events of a streamed response."""

    def event(choices, usage=None):
      data = self._head | {'choices': choices, 'usage': usage}
      return service.make_event(None, data)

    rows = submission.rows
    sent, num_sent = [''] * len(rows), [0] * len(rows)
    reasons: list[str | None] = [None] * len(rows)
    for i, row in enumerate(rows):
      if echoed := self._echo(i):
        logprobs = self._logprobs(row, self._spell_echo(i, row))
        yield event([self._choice(i, echoed, None, logprobs)])
    async for has_changed in submission.changes(service.HEARTBEAT_SECS):
      if not has_changed:
        yield service.COMMENT
      for i, row in enumerate(rows):
        if reasons[i] or row.state == 'failed':
          continue
        text, reasons[i], num_tokens = self._complete(i, row)
        if text != sent[i] or reasons[i]:
          parts = self._spell(i, row, num_tokens)
          if not reasons[i]:  # A token is sent with the end of its text.
            end = len(self._echo(i) + text)
            parts = [x for x in parts if x.start + len(x.text) <= end]
          logprobs = self._logprobs(row, parts[num_sent[i] :])
          new = text[len(sent[i]) :]
          yield event([self._choice(i, new, reasons[i], logprobs)])
          sent[i], num_sent[i] = text, max(len(parts), num_sent[i])
      if all(reasons):
        break
    options = self._body.stream_options
    if options and options.include_usage:
      yield event([], self._usage(rows))
    yield b'data: [DONE]\n\n'

  def _choice(
    self, i: int, text: str, reason: str | None, logprobs: Any
  ) -> dict[str, Any]:
    return dict(index=i, text=text, logprobs=logprobs, finish_reason=reason)


class ChatCompletions(Completions):
  """The answers to one conversation."""

  kind, part_kind = 'chat.completion', 'chat.completion.chunk'
  id_prefix = 'chatcmpl'

  def _make_prompts(self) -> list[Any]:
    if self._body.top_logprobs is not None and not self._body.logprobs:
      raise InputError(
        f'top_logprobs={self._body.top_logprobs!r} needs logprobs=true'
      )
    return [[message.plain() for message in self._body.messages]]

  @property
  def _num_top(self) -> int | None:
    return self._body.top_logprobs or 0 if self._body.logprobs else None

  @property
  def _ends(self) -> tuple[int, ...]:
    return lms.answer_ends(self._model.run)

  def lay_out(self, prompt: Any) -> Canvas:
    wanted = [self._body.max_completion_tokens, self._body.max_tokens]
    size = next((x for x in wanted if x is not None), None)
    model = self._model
    return lms.lay_out_chat(model.run, prompt, model.engine.length, size)

  def _echo(self, i: int) -> str:
    return ''

  def _describe(
    self, row: Row, parts: Sequence[Part], found: Sequence[Any]
  ) -> dict[str, Any]:
    describe = lambda token, text, logprob: {
      'token': text,
      'logprob': logprob,
      'bytes': list(self._model.tokenizer.piece(int(token))),
    }
    content = [
      describe(row.canvas[part.place], part.text, own)
      | {'top_logprobs': [describe(x.token, x.text, x.logprob) for x in top]}
      for part, (own, top) in zip(parts, found)
    ]
    return {'content': content}

  def _choice(
    self, i: int, text: str, reason: str | None, logprobs: Any
  ) -> dict[str, Any]:
    said = {'role': chat.ASSISTANT, 'content': text}
    return {
      'index': i,
      'delta' if self._body.stream else 'message': said,
      'logprobs': logprobs,
      'finish_reason': reason,
    }


def _make_parts(
  places: Iterable[int], start: int, texts: Sequence[str]
) -> list[Part]:
  """Returns parts whose texts follow one another from `start`."""
  starts = itertools.accumulate(map(len, texts), initial=start)
  return [Part(*each) for each in zip(places, starts, texts)]

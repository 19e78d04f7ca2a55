"""/v1/chat/completions of OpenAI's API: answers to conversations."""

from collections.abc import Sequence
from typing import Any

import fastapi

from nanodlm import lm as lms
from nanodlm.data.tokenizers import chat
from nanodlm.serving import schemas
from nanodlm.serving.engine import Row
from nanodlm.serving.openai import check_name, Completions, Part
from nanodlm.serving.service import Canvas, Service
from nanodlm.types import InputError


def add_routes(app: fastapi.FastAPI, model: Service):
  """Adds the route of conversations to `app`."""

  @app.post('/v1/chat/completions', summary='Answer a conversation')
  async def answer(body: schemas.ChatRequest, request: fastapi.Request):
    """Answers messages, as OpenAI's API does.

    With `stream`, the text is sent in its order, as it becomes final.
    """
    check_name(model, body.model)
    return await ChatCompletions(model, body).run(request)


class ChatCompletions(Completions):
  """The answers to one request."""

  kind, part_kind = 'chat.completion', 'chat.completion.chunk'
  id_prefix = 'chatcmpl'

  def _make_prompts(self) -> list[Any]:
    if self._body.top_logprobs is not None and not self._body.logprobs:
      raise InputError(
        f'top_logprobs={self._body.top_logprobs!r} needs logprobs=true'
      )
    return [[message.plain() for message in self._body.messages]]

  @property
  def _has_logprobs(self) -> bool:
    return bool(self._body.logprobs)

  @property
  def _ends(self) -> tuple[int, ...]:
    return lms.answer_ends(self._model.run)

  def lay_out(self, prompt: Any) -> Canvas:
    wanted = [self._body.max_completion_tokens, self._body.max_tokens]
    size = next((x for x in wanted if x is not None), None)
    model = self._model
    return lms.lay_out_chat(model.run, prompt, model.engine.length, size)

  def _given(self, i: int) -> str:
    return ''

  def _echo(self, i: int) -> str:
    return ''

  def _logprobs(self, row: Row, parts: Sequence[Part]) -> dict[str, Any] | None:
    if not self._has_logprobs:
      return None
    found = self._model.score_tokens(
      row, [part.place for part in parts], self._body.top_logprobs or 0
    )
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
    return {'content': content, 'definition': 'reveal'}

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

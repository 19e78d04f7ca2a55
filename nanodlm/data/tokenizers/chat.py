"""Conversations as token ids, by Jinja templates as published models have them.

A template writes the control tokens, such as <|im_end|>; what people and models
say never becomes one. Of an assistant's turn, all that follows the template's
generation prompt is scored, up to and including the control token that ends it.
The text before and after is encoded apart, as it is when a model answers.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from nanodlm import workdir as workdirs
from nanodlm.data.tokenizers import sandbox
from nanodlm.data.tokenizers.base import Tokenizer, utf8
from nanodlm.types import InputError, reason

ASSISTANT = 'assistant'
ROLES = ('system', 'user', ASSISTANT)
# A message has the keys 'role' and 'content'.
Message = Mapping[str, Any]

_CHATML = (
  '{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n'
  '{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}'
)
_HEADERS = (
  '{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n'
  '{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}'
  '<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}'
)
# The values of config.tokenizer.chat_template that are not the path of a file.
TEMPLATES = {
  'chatml': _CHATML,
  'dream': '{% if messages[0].role != "system" %}<|im_start|>system\n'
  'You are a helpful assistant.<|im_end|>\n{% endif %}' + _CHATML,
  'llama3': '<|begin_of_text|>' + _HEADERS,
  'llada': '<|startoftext|>' + _HEADERS,
  # For tokenizers whose only control token ends a document.
  'plain': '{% for m in messages %}{{ eos_token }}{{ m.role | capitalize }}: '
  '{{ m.content | trim }}{% endfor %}{% if add_generation_prompt %}'
  '{{ eos_token }}Assistant: {% elif messages[-1].role == "assistant" %}'
  '{{ eos_token }}{% endif %}',
}
SHAREGPT = (
  'a file in the form of ShareGPT must be rewritten, for example by jq -c '
  '\'{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}'
  "[.from] // .from), content: .value}]}' OLD > NEW"
)
# Code points that are not characters, with which a text is marked.
_MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
_CONTROL = re.compile(r'<\|[^\s<>|]+\|>')
_TAG = re.compile(r'</?\w+>')


class Encoded(NamedTuple):
  """A conversation.

  Attributes:
    ids: [n] int32.
    scored: [n] bool, what the assistant said.
    ends: [n] bool, the last token of each turn of the assistant.
    num_bytes: [n] int64, the UTF-8 bytes of text of each token.
    num_lost: those of the characters that `decode` does not give back.
  """

  ids: np.ndarray
  scored: np.ndarray
  ends: np.ndarray
  num_bytes: np.ndarray
  num_lost: int

  def to_score(self) -> 'Encoded':
    """Returns it up to the end of the assistant's last turn.

    Raises:
      InputError: the assistant says nothing.
    """
    if not self.ends.any():
      raise InputError(f'no message has the role {ASSISTANT!r}')
    num = int(np.flatnonzero(self.ends)[-1]) + 1
    rows = [row[:num] for row in self[:-1]]
    return self._make([*rows, self.num_lost])


def check_messages(messages: Any) -> None:
  """Raises InputError unless it is a list of messages of known roles."""
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise InputError(
      f'messages={str(messages)[:40]!r} is not a list of messages such as '
      '{"role": "user", "content": "Hello"}'
    )
  if not messages:
    raise InputError('messages is empty; at least one message is needed')
  for i, message in enumerate(messages):
    is_message = isinstance(message, Mapping)
    role = message.get('role') if is_message else None
    if is_message and {'from', 'value'} <= message.keys():
      raise InputError(f'messages[{i}] has "from" and "value"; {SHAREGPT}')
    if role not in ROLES:
      raise InputError(
        f'messages[{i}] has the role {role!r}; it must be an object with '
        f'"role", one of {list(ROLES)}, and "content"'
      )
    content = message.get('content')
    if not isinstance(content, str):
      raise InputError(
        f'messages[{i}] of role {role!r} has the content '
        f'{str(content)[:40]!r}; it must be a text'
      )
    utf8(content, f'messages[{i}]')


def with_template(tokenizer: Tokenizer, value: str) -> Tokenizer:
  """Returns the tokenizer with config.tokenizer.chat_template, '' for its own.

  Raises:
    InputError: the template does not exist, or does not fit the tokenizer.
  """
  if not value:
    return tokenizer
  changed = dataclasses.replace(tokenizer, chat_template=find_template(value))
  try:
    make_format(changed)
  except InputError as error:
    raise InputError(f'tokenizer.chat_template={value!r}: {error}') from error
  return changed


def find_template(value: str) -> str:
  """Returns the template of config.tokenizer.chat_template, '' for ''."""
  if not value or value in TEMPLATES:
    return TEMPLATES.get(value, '')
  try:
    return pathlib.Path(value).read_text('utf-8')
  except (OSError, ValueError) as error:
    raise InputError(
      f'tokenizer.chat_template={value!r} is neither one of {list(TEMPLATES)} '
      f'nor a file that can be read ({reason(error)})'
    ) from error


def read_template(folder: pathlib.Path) -> str:
  """Returns the chat template next to a tokenizer.json, '' without one.

  The texts of its first and last tokens are set in its first lines.
  """
  described = read_described(folder)
  sets = [
    # Jinja drops the newline after the tag, and no other white space.
    f'{{% set {key} = {json.dumps(text)} %}}\n'
    for key in ('bos_token', 'eos_token')
    if (text := token_text(described, key))
  ]
  try:
    template: Any = described.get('chat_template') or ''
    if (path := folder / 'chat_template.jinja').is_file():
      template = path.read_text('utf-8')
    if isinstance(template, list):  # Of several, each with a name.
      named = {one['name']: one['template'] for one in template}
      template = named.get('default', '')
    return template and ''.join([*sets, template])
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(
      f'{folder}: the chat template cannot be read: {reason(error)}'
    ) from error


def to_publish(template: str, start: str, begins: bool) -> str:
  """Returns a template that writes what `template` does here.

  That is without `start`, if it begins with that, and its own bos_token is
  empty. If the text `begins` with it, the given bos_token comes first.
  """
  drop = start and f'.removeprefix({json.dumps(start)})'
  return (
    # Jinja takes what follows this newline for the start of a source, at whose
    # end it drops a newline.
    "{% set said %}{% set bos_token = '' %}\n"
    + template.replace('\r\n', '\n').removesuffix('\n')
    # White space before a tag would be dropped.
    + "{{ '' }}{% endset %}{{ "
    + begins * 'bos_token + '
    + f'said{drop} }}}}'
  )


def read_described(folder: pathlib.Path) -> dict[str, Any]:
  """Returns the tokenizer_config.json of a folder, {} without one."""
  path = folder / 'tokenizer_config.json'
  return workdirs.read_json(path) if path.is_file() else {}


def token_text(described: Mapping[str, Any], key: str) -> str:
  """Returns the text of a token that tokenizer_config.json names, or ''."""
  token = described.get(key) or ''
  token = token.get('content') if isinstance(token, dict) else token
  return token if isinstance(token, str) else ''


def make_format(tokenizer: Tokenizer) -> 'ChatFormat':
  """Returns the format of a tokenizer's conversations, by its template.

  Raises:
    InputError: it has none, or one that does not fit its control tokens.
  """
  if not tokenizer.chat_template:
    raise InputError(
      f'the {tokenizer.name} tokenizer lacks a chat template; choose one with '
      f'tokenizer.chat_template, of {list(TEMPLATES)} or a Jinja file'
    )
  controls = tuple(tokenizer.controls.items())
  return _make_format(tokenizer.chat_template, controls, tokenizer.separator_id)


class ChatFormat:
  """A template and the control tokens of a tokenizer.

  Attributes:
    end_id: the control token that ends a turn of the assistant.
  """

  def __init__(
    self,
    template: str,
    controls: tuple[tuple[str, int], ...],
    separator_id: int,
  ):
    self._template = template
    self._controls = dict(controls)
    self._eos = next(x for x, i in controls if i == separator_id)
    names = sorted(self._controls, key=len, reverse=True)
    self._names = '|'.join(map(re.escape, names))
    self._tails = tuple(
      {name[i:] for name in names for i in range(1, len(name))}
    )
    # A template may look for tags such as </think> in what is said.
    tags = sorted({*_TAG.findall(template)} - {*names})
    firsts = ''.join(sorted({name[0] for name in names}))
    self._firsts = re.compile(
      ''.join(f'(?!{tag})' for tag in tags) + f'[{re.escape(firsts)}]'
    )
    self._marks = [mark for mark in _MARKS if mark not in template]
    question = [{'role': 'user', 'content': 'x'}]
    before, after = (self._render(question, x) for x in (False, True))
    if unknown := sorted({*_CONTROL.findall(after)} - {*names}):
      raise InputError(
        f'the chat template writes {unknown}, which are not control tokens of '
        f'the tokenizer; it has {self._some()}'
      )
    self._prompt = after.removeprefix(before)
    if not after.startswith(before) or not re.search(self._names, self._prompt):
      raise InputError(
        'the chat template puts no control token of the tokenizer before an '
        f'answer if add_generation_prompt is set; it has {self._some()}'
      )
    answer = {'role': ASSISTANT, 'content': 'y'}
    parts = list(self._parts([*question, answer], False))
    ends = [i for _, i, is_scored in parts if is_scored]
    if not ends or ends[-1] < 0:
      raise InputError(
        'the chat template does not end an answer with a control token of the '
        f'tokenizer; it has {self._some()}'
      )
    self.end_id = ends[-1]

  def _some(self) -> str:
    shown = [*self._controls][:8]
    return f'{shown}' + ', ...' * (len(self._controls) > len(shown))

  def _render(self, messages: Sequence[Message], generation: bool) -> str:
    try:
      return sandbox.render(
        self._template,
        messages=messages,
        add_generation_prompt=generation,
        # Undefined, "tools is not none" would hold.
        tools=None,
        documents=None,
        eos_token=self._eos,
        bos_token='',
      )
    except sandbox.TemplateError as error:
      raise InputError(f'the chat template {error}') from error

  def _guard(self, text: str, guard: str, wall: str) -> str:
    """Marks what could be a part of a control token once it is written.

    A template may also drop a part of the text, or change its letters.
    """
    text = self._firsts.sub(rf'\g<0>{guard}', text)
    start = len(text) - len(text.lstrip())
    # A template may write the first part of a control token before the text.
    if text.startswith(self._tails, start):
      text = text[:start] + wall + text[start:]
    return text

  def _parts(self, messages: Sequence[Message], generation: bool):
    """Yields (text, id of a control token or -1, whether it is scored)."""
    said = ''.join(message['content'] for message in messages)
    marks = [mark for mark in self._marks if mark not in said]
    if len(marks) < 3:
      raise InputError(
        'messages hold nearly all code points from U+FDD0 to U+FDEF, which are '
        'not characters; leave them out'
      )
    guard, wall, end = marks[:3]
    guarded = []
    for message in messages:
      content = self._guard(message['content'], guard, wall)
      if message['role'] == ASSISTANT:
        size = len(content.rstrip())
        content = content[:size] + end + content[size:]
      guarded.append({'role': message['role'], 'content': content})
    text = self._render(guarded, generation)
    control = re.compile(f'(?:{self._names})(?!{guard})')
    borders, place = [], 0
    while (place := text.find(end, place)) >= 0:
      start = text.rfind(self._prompt, 0, place)
      if start < 0 or borders and start + len(self._prompt) < borders[-1]:
        raise InputError(
          'the chat template writes an answer without its generation prompt '
          f'{self._prompt!r} before it'
        )
      stop = control.search(text, place)
      place = stop.end() if stop else len(text)
      borders += [start + len(self._prompt), place]
    for i, (first, last) in enumerate(
      zip([0, *borders], [*borders, len(text)])
    ):
      part, done = text[first:last], 0
      for match in (*control.finditer(part), None):
        plain = part[done : match.start() if match else None]
        plain = re.sub(f'[{guard}{wall}{end}]', '', plain)
        if plain:
          yield plain, -1, i % 2 == 1
        if match:
          yield match.group(), self._controls[match.group()], i % 2 == 1
          done = match.end()

  def encode(
    self,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    generation: bool = False,
  ) -> Encoded:
    """Encodes a conversation, with what comes before an answer if `generation`.

    Raises:
      InputError: the template refuses the messages.
    """
    check_messages(messages)
    rows, sizes, scored, num_lost = [], [], [], 0
    parts = self._parts(messages, generation)
    for i, (text, control, is_scored) in enumerate(parts):
      if i == 0 and control == tokenizer.start_id >= 0:
        continue  # The network begins with it.
      if control >= 0:
        ids, size = np.array([control], np.int32), np.zeros([1], np.int64)
      else:
        is_start = i == 0
        encode = tokenizer.encode if is_start else tokenizer.encode_rest
        ids = encode(text)
        size = tokenizer.count_bytes(text, ids, is_start)
        num_lost += tokenizer.lost_bytes(text, ids, is_start)
      rows.append(ids)
      sizes.append(size)
      scored.append(np.full(len(ids), is_scored))
    join = lambda parts, kind: np.concatenate([np.zeros([0], kind), *parts])
    is_scored = join(scored, bool)
    return Encoded(
      join(rows, np.int32),
      is_scored,
      is_scored & ~np.append(is_scored[1:], False),
      join(sizes, np.int64),
      num_lost,
    )


_make_format = functools.lru_cache(maxsize=64)(ChatFormat)

"""Prompts: texts with gaps, and their canvases.

Each text is encoded as what follows the one before it. A space before a gap is
a part of the gap, unless the tokenizer never joins it with a word.
"""

from collections.abc import Sequence
import dataclasses
import json
import pathlib
import re

import numpy as np

from nanodlm.data.tokenizers import chat
from nanodlm.data.tokenizers.base import Tokenizer
from nanodlm.types import InputError, reason

# Doubled braces are literal; {} is a gap with an equal share of the remaining
# tokens, {12} a gap of 12 tokens, {*} one of any length.
_PARTS = re.compile(r'\{\{|\}\}|\{(\d*|\*)\}')
# {yes|no} is a slot for one of several texts.
_SLOTS = re.compile(r'\{\{|\}\}|\{([^{}|]*(?:\|[^{}|]*)+)\}')


@dataclasses.dataclass(frozen=True)
class Gap:
  """A gap of `size` tokens; None is a share of the remaining tokens.

  Of a gap of `any_length`, it is the number of tokens that there is room for.
  """

  size: int | None
  any_length: bool = False


def parse_prompt(prompt: str) -> list[str | Gap]:
  """Splits a prompt into texts and gaps.

  '{}' is a gap of automatic size, '{12}' a gap of 12 tokens, '{*}' one of any
  length; '{{', '}}' and all other braces are text. A prompt without a gap is
  continued to the end of the canvas.
  """
  parts, text, end = [], '', 0
  for match in _PARTS.finditer(prompt):
    text += prompt[end : match.start()]
    end = match.end()
    if match.group() in ('{{', '}}'):
      text += match.group()[0]
      continue
    if text:
      parts.append(text)
    # 18 digits exceed any canvas, and int() refuses very long numbers.
    size = int(match.group(1)[:18]) if match.group(1).isdigit() else None
    if size == 0:
      raise InputError(
        f'prompt={prompt!r} has a gap of 0 tokens; use at least 1, '
        'or {} for a share of the canvas'
      )
    parts.append(Gap(size, match.group(1) == '*'))
    text = ''
  text += prompt[end:]
  if text:
    parts.append(text)
  if not any(isinstance(part, Gap) for part in parts):
    parts.append(Gap(None))
  return parts


def literal_braces(prompt: str) -> list[str]:
  """Returns texts that resemble gaps: '{x}', or a single brace."""
  rest = _PARTS.sub('\0', prompt)
  return list(dict.fromkeys(re.findall(r'\{[^{}\0]*\}|[{}]', rest)))


def _find_slots(prompt: str) -> list[re.Match[str]]:
  return [match for match in _SLOTS.finditer(prompt) if match.group(1)]


def has_choices(prompt: str) -> bool:
  """Returns whether a prompt has a slot; see `split_choices`."""
  return bool(_find_slots(prompt))


def split_choices(prompt: str) -> tuple[str, list[str], str]:
  """Splits a prompt at its slot, such as '{yes|no|maybe}'.

  Returns:
    The prompt before the slot, the choices, and the prompt after it.

  Raises:
    InputError: there is not one slot, or its choices are not different texts.
  """
  slots = _find_slots(prompt)
  if len(slots) != 1:
    raise InputError(
      f'prompt={prompt!r} has {len(slots)} slots such as {{yes|no}}; it must '
      'have one'
    )
  choices = slots[0].group(1).split('|')
  if not all(choices) or len(set(choices)) < len(choices):
    raise InputError(
      f'prompt={prompt!r}: the choices {choices} must be different, and none '
      'of them empty'
    )
  return prompt[: slots[0].start()], choices, prompt[slots[0].end() :]


def choices_of(messages: Sequence[chat.Message]) -> str:
  """Returns the last of messages, which is the assistant's and has the slot."""
  chat.check_messages(messages)
  role = messages[-1]['role']
  if role != chat.ASSISTANT:
    raise InputError(
      f'messages[{len(messages) - 1}] is of the role {role!r}; the last one '
      f"must be the {chat.ASSISTANT}'s, with a slot such as {{yes|no}}"
    )
  return messages[-1]['content']


def plain_text(prompt: str) -> str:
  """Returns the text of a prompt without gaps; InputError if it has one."""
  for match in _PARTS.finditer(prompt):
    if match.group(1) is not None:
      raise InputError(
        f'prompt: the gap {match.group()!r} in {prompt!r} is not supported '
        'here, where whole texts are compared'
      )
  return _PARTS.sub(lambda match: match.group()[0], prompt)


def automatic_size(prompt: str, num_free: int) -> int:
  """Returns how many tokens each '{}' of a prompt has; 0 without one.

  `num_free` is the number of tokens of all gaps together. Some of several gaps
  may have one token more.
  """
  sizes = [m.group(1) for m in _PARTS.finditer(prompt)]
  if '' not in sizes:
    return 0
  num_free -= sum(int(size) for size in sizes if size and size != '*')
  return num_free // (sizes.count('') + sizes.count('*'))


def make_canvas(
  prompt: str,
  tokenizer: Tokenizer,
  length: int,
  sees_right: bool,
  fills_masks: bool = True,
  fills_room: bool = False,
  is_pairs: bool = False,
  any_length: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes a canvas of n <= `length` tokens; see `encode_parts`.

  `fills_masks` and `fills_room` are those of the `types.Sampler`. If it cannot
  do the former, '{}' is '{*}', too. Room in such gaps holds separators. With
  room, and for a network that takes separators for room, `any_length` of its
  `types.Objective`, a separator ends the canvas.

  Returns:
    tokens [n] int32 with mask_id in other gaps, and fixed [n] bool.

  Raises:
    InputError: the sampler does not fill such a gap, or see `encode_parts`.
  """
  if any(all(slot.group(1).split('|')) for slot in _find_slots(prompt)):
    raise InputError(
      f'prompt={prompt!r} has a slot for one of several texts, which is not '
      'filled here: compare them by lm.choose, /api/choose or --prompt of '
      '--mode=sample, or write {{ and }} for braces'
    )
  parts = parse_prompt(prompt)
  gaps = [part for part in parts if isinstance(part, Gap)]
  is_any = [x.any_length or not (fills_masks or x.size) for x in gaps]
  if any(is_any) and not fills_room:
    raise InputError(
      f'prompt={prompt!r} has a gap of any length, {{*}}, which this sampler '
      "does not fill: use {} or {12}, or sampler.name='insert' or 'expand' of "
      'a model that was trained for it, by configs/flex.py or flex.py:expand'
    )
  if not fills_masks and not all(is_any):
    raise InputError(
      f'prompt={prompt!r} has a gap of a given number of tokens, which this '
      'model chooses itself: use {*}'
    )
  num_ends = int(any(is_any) or any_length)
  rows = encode_parts(
    prompt, tokenizer, length - num_ends, sees_right, is_pairs
  )
  fixed = [np.full(len(row), isinstance(x, str)) for row, x in zip(rows, parts)]
  for row, is_room in zip(
    [r for r, f in zip(rows, fixed) if not all(f)], is_any
  ):
    if is_room:
      row[:] = tokenizer.separator_id
  ends = np.full(num_ends, tokenizer.separator_id, np.int32)
  return (
    np.concatenate([*rows, ends]),
    np.concatenate([*fixed, np.ones(num_ends, bool)]),
  )


def encode_parts(
  prompt: str,
  tokenizer: Tokenizer,
  length: int,
  sees_right: bool,
  is_pairs: bool = False,
) -> list[np.ndarray]:
  """Encodes the parts of a prompt, of at most `length` tokens in all.

  Args:
    prompt: see `parse_prompt`; '' is a blank canvas.
    tokenizer: the model's tokenizer.
    length: maximum number of tokens, used in full if a gap has automatic size.
    sees_right: whether gaps see the text after them. If not, the only gap must
      be at the end of the prompt.
    is_pairs: whether the model was trained on pairs, whose prompts were encoded
      alone.

  Returns:
    The ids of each of `parse_prompt`, int32, mask_id in a gap.

  Raises:
    InputError: the prompt is too long, or has text after a gap that the model
      does not see.
  """
  parts = parse_prompt(prompt)
  if not sees_right and any(isinstance(part, Gap) for part in parts[:-1]):
    raise InputError(
      f'prompt={prompt!r}: a model that reads from left to right (by tokens '
      'or blocks) only fills a gap at the end; for text after a gap, train a '
      "model that sees the whole text, such as objective.name='masked'"
    )
  # Ids, the size of a gap, or None for a share of the remaining tokens.
  rows = []
  for i, part in enumerate(parts):
    if isinstance(part, Gap):
      rows.append(part.size)
      continue
    text = part
    if i < len(parts) - 1:
      text = before_gap(part, tokenizer, is_pairs and i == len(parts) - 2)
    tokens = tokenizer.encode_rest(text) if i else tokenizer.encode(text)
    # Only control tokens and the unknown token have no bytes.
    if np.any(tokenizer.num_bytes[tokens] == 0):
      raise InputError(
        f'prompt={prompt!r}: {part!r} contains characters that the '
        f'{tokenizer.name} tokenizer does not support'
      )
    rows.append(tokens)
  used = sum(
    len(row) if isinstance(row, np.ndarray) else row or 0 for row in rows
  )
  automatic = sum(row is None for row in rows)
  if used + automatic > length:
    shown = prompt if len(prompt) < 60 else prompt[:60] + '...'
    raise InputError(
      f'prompt={shown!r} and its gaps need at least {used + automatic} tokens, '
      f'but the canvas has {length} tokens (sampler.length, by default '
      'data.length)'
    )
  # With cumulative rounding, shares differ by at most one token.
  borders = (length - used) * np.arange(automatic + 1) // max(automatic, 1)
  shares = iter(np.diff(borders))
  rows = [next(shares) if row is None else row for row in rows]
  return [
    row
    if isinstance(row, np.ndarray)
    else np.full([row], tokenizer.mask_id, np.int32)
    for row in rows
  ]


def make_chat_canvas(
  messages: Sequence[chat.Message],
  tokenizer: Tokenizer,
  length: int,
  size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Makes the canvas of a conversation, with a gap for the answer.

  Args:
    messages: dicts with 'role' and 'content'.
    tokenizer: the model's tokenizer, with a chat template.
    length: the maximum number of tokens.
    size: the tokens of the gap; None is all that is left.

  Returns:
    tokens [n] int32 with mask_id in the gap, and fixed [n] bool.

  Raises:
    InputError: messages or the template are missing or do not fit, or the last
      message is the assistant's.
  """
  chat.check_messages(messages)
  if messages[-1]['role'] == chat.ASSISTANT:
    raise InputError(
      f'messages[{len(messages) - 1}] is of the role {chat.ASSISTANT!r}, and '
      'nothing after it is to be answered; end with a message of the user'
    )
  chat_format = chat.make_format(tokenizer)
  ids, *_ = chat_format.encode(tokenizer, messages, generation=True)
  is_unknown = tokenizer.num_bytes[ids] == 0
  if np.any(is_unknown & ~np.isin(ids, [*tokenizer.controls.values()])):
    raise InputError(
      'messages, or the chat template, contain characters that the '
      f'{tokenizer.name} tokenizer does not support'
    )
  left = length - len(ids)
  if left < (size or 1):
    raise InputError(
      f'the conversation has {len(ids)} tokens and leaves {max(left, 0)} for '
      f'an answer{f" of {size}" if size else ""} on a canvas of {length}; '
      'shorten it, or begin a new one'
    )
  length = length if size is None else len(ids) + size
  fixed = np.arange(length) < len(ids)
  tokens = np.full([length], tokenizer.mask_id, np.int32)
  tokens[: len(ids)] = ids
  return tokens, fixed


def before_gap(text: str, tokenizer: Tokenizer, is_whole: bool = False) -> str:
  """Returns the part of a text before a gap that is fixed.

  If words and the space before them are one token, a single space is never
  followed by a word: the last space belongs to the gap, unless the text
  `is_whole`, like the prompt of a pair, which was encoded alone.
  """
  if is_whole or not tokenizer.joins_spaces:
    return text
  return text.removesuffix(' ')


def read_prompts(path: str) -> list[str]:
  """Returns the field 'prompt' of every line of a JSONL file.

  Raises:
    InputError: the file cannot be read or is empty, or the field of a line is
      not a non-empty string.
  """
  prompts = []
  try:
    lines = pathlib.Path(path).read_text(encoding='utf-8-sig').split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(
      f'--prompt_file={path!r} cannot be read: {reason(error)}'
    ) from error
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      prompt = json.loads(line)['prompt']
    except (ValueError, RecursionError, KeyError, TypeError):
      prompt = None
    if not isinstance(prompt, str) or not prompt:
      raise InputError(
        f'--prompt_file={path!r}: line {number} must be a JSON object with a '
        'non-empty string in its field \'prompt\', such as {"prompt": "def f("}'
      )
    prompts.append(prompt)
  if not prompts:
    raise InputError(
      f'--prompt_file={path!r} is empty; it needs one JSON object per line, '
      "with a string in its field 'prompt'"
    )
  return prompts


def find_end(
  tokens: np.ndarray, eos_ids: Sequence[int], is_blank: bool = False
) -> int:
  """Returns the index of the first EOS in tokens [n], or n.

  Where the text before is blank, an EOS at the start begins the text instead.
  """
  is_eos = np.isin(tokens, eos_ids)
  first = int(np.argmin(is_eos)) if is_blank and is_eos.size else 0
  ends = np.flatnonzero(is_eos[first:])
  return first + int(ends[0]) if ends.size else len(tokens)

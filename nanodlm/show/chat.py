r"""--mode=chat: a conversation with a model in the terminal.

    python launch.py --mode=chat --workdir=runs/instruct \
        --system='Answer in one sentence.'

The model needs a chat template: that of its imported checkpoint, or of the run
it was trained in, or --config.tokenizer.chat_template. In a terminal an answer
is shown while it is denoised (--nolive: not). /clear begins a new conversation,
and /quit or the end of the input ends the program. Each answer has what is left
of the canvas (sampler.length, at most data.length, the default).
"""

import re
import sys
import time

from absl import flags
import jax
import numpy as np

from nanodlm import lm as lms
from nanodlm.config import Start
from nanodlm.data.tokenizers import base, chat
from nanodlm.show import live, sampling, watch
from nanodlm.types import InputError

COMMANDS = {
  '/clear': 'begins a new conversation',
  '/help': 'lists these commands',
  '/quit': 'ends the program',
}
READS = (*sampling.READS, 'tokenizer.chat_template')
UNREAD = ('sampler.num_samples',)


def define_flags():
  """Defines the flags of --mode=chat."""
  flags.DEFINE_string('system', '', 'The first message, of the role system.')
  live.define_flag()
  flags.adopt_module_key_flags(live)


def main(start: Start) -> int:
  """Runs --mode=chat: answers lines of the standard input until they end."""
  settings = start.resolve_reading(READS, UNREAD)
  if jax.process_count() > 1:
    raise InputError(
      f'--mode=chat runs in one process; there are {jax.process_count()}'
    )
  system = flags.FLAGS.system
  before = [{'role': 'system', 'content': system}] if system else []
  lm = lms.load(start.workdir, settings=settings)
  length = lm.run.settings.sample_length
  lms.lay_out(lm.run, [*before, {'role': 'user', 'content': ''}], length)
  display = live.make_display()
  view = watch.View(display.watch, lm.tokenizer.mask_id) if display else None
  fill = lms.make_fill(lm.run, view=view)
  commands = ', '.join(f'{name} {what}' for name, what in COMMANDS.items())
  print(f'{start.workdir}, step {lm.step}; {commands}', flush=True)
  messages, num_answers = list(before), 0
  while True:
    try:
      said = input('you: ').strip()
      if not sys.stdin.isatty():  # A terminal shows what is typed.
        print(said)
    except EOFError:
      print()
      return 0
    if said == '/quit':
      return 0
    # Other lines that begin with a slash may well be said, such as paths.
    is_command = re.fullmatch('/[a-z]*', said)
    if said == '/clear':
      messages = list(before)
    elif is_command:
      unknown = f'{said!r} is not a command; ' * (said not in COMMANDS)
      print(f'{unknown}{commands}', flush=True)
    if not said or is_command:
      continue
    asked = [*messages, {'role': 'user', 'content': said}]
    try:
      tokens, fixed = (x[None] for x in lms.lay_out(lm.run, asked, length))
    except InputError as error:
      print(f'error: {error} ({commands})', flush=True)
      continue
    key = jax.random.key(lm.run.settings.sample.seed)
    key = jax.random.fold_in(key, num_answers)
    work = lambda: fill(lm.params, key, tokens, fixed)
    began = time.monotonic()
    if display:
      title = f'{lm.run.sampler_name}, step {lm.step}'
      filled, num_calls = display.run(work, lm.tokenizer, title, tokens, fixed)
    else:
      filled, num_calls = work()
    ids = lms.answer_tokens(lm.run, filled[0], fixed[0])
    answer = lm.tokenizer.decode(ids, is_start=False)
    secs = time.monotonic() - began
    print(f'{chat.ASSISTANT}: {base.escape_controls(answer)}')
    is_cut = len(ids) == np.sum(~fixed)
    print(
      f'--- {len(ids)} tokens in {int(num_calls)} network calls, {secs:.1f} s'
      + ' with compilation' * (num_answers == 0)
      + ', cut at the end of the canvas' * bool(is_cut),
      flush=True,
    )
    messages = [*asked, {'role': chat.ASSISTANT, 'content': answer}]
    num_answers += 1

"""Jinja templates of unknown origin, in Jinja's sandbox and with limits.

The sandbox keeps a template from Python's objects and from files, but not from
taking any amount of time or memory. Another process therefore renders it: this
file, run as a script. The system ends that process after MAX_SECS of processor
time, and gives it at most MAX_BYTES of memory (on Linux; macOS gives it more).
"""

from collections.abc import Callable
import contextlib
import functools
import json
import resource
import signal
import subprocess
import sys
import threading
from typing import Any

import jinja2
from jinja2 import sandbox

# A conversation of 20 messages takes less than a millisecond.
MAX_SECS = 5.0
MAX_BYTES = 512 << 20
MAX_WRITTEN = 10_000_000
_OUT_OF_MEMORY = 3  # An exit status.


class TemplateError(Exception):
  """What a template does wrong, as in 'refuses the conversation (...)'."""


_lock = threading.Lock()
_process: Any = None  # Renders one template after another.


def render(template: str, **values: Any) -> str:
  """Returns the text that a template writes, given values as in JSON.

  Raises:
    TemplateError: it is not a template, fails, or exceeds a limit.
  """
  global _process
  request = json.dumps([template, values, MAX_SECS]).encode() + b'\n'
  with _lock:
    if _process is None or _process.poll() is not None:
      _process = subprocess.Popen(
        # -P: the files in this folder are not the modules of their names.
        [sys.executable, '-P', __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process alone.
      )
    answer = b''
    with contextlib.suppress(BrokenPipeError):  # Somebody killed it.
      try:
        _process.stdin.write(request)
        _process.stdin.flush()
        answer = _process.stdout.readline()
      finally:
        # It has ended, or Ctrl-C leaves its answer unread.
        if not answer.endswith(b'\n'):
          with _process:
            _process.kill()
    status = _process.returncode
  if not answer.endswith(b'\n'):
    reasons = {
      -signal.SIGPROF: f'it takes more than {MAX_SECS:g} seconds',
      _OUT_OF_MEMORY: f'it takes more than {MAX_BYTES >> 20} MB of memory',
    }
    why = reasons.get(status, f'its process ended with status {status}')
    raise TemplateError(f'cannot write the conversation ({why})')
  is_written, text = json.loads(answer)
  if not is_written:
    raise TemplateError(text)
  return text


class _Refusal(Exception):
  """What a template raises with raise_exception()."""


def _refuse(message: str) -> None:
  raise _Refusal(message)


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: Any = None,
  sort_keys: bool = False,
) -> str:
  """Writes JSON as transformers does, without escapes for HTML."""
  return json.dumps(
    value,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


def _answer(
  compile_text: Callable[[str], jinja2.Template],
  text: str,
  values: dict[str, Any],
) -> tuple[bool, str]:
  """Returns whether the template `text` can be written, and the text or why."""
  # Compiling and rendering a template can fail in any way that Python can.
  try:
    template = compile_text(text)
  except MemoryError:
    raise
  except Exception as error:
    return False, f'is not a Jinja template: {error}'
  try:
    written = template.render(values)
  except _Refusal as error:
    return False, f'refuses the conversation ({error})'
  except MemoryError:
    raise
  except jinja2.TemplateError as error:
    why = str(error)
  except Exception as error:
    why = f'{type(error).__name__}: {error}'
  else:
    if len(written) <= MAX_WRITTEN:
      return True, written
    why = f'it writes more than {MAX_WRITTEN:,} characters'
  return False, f'cannot write the conversation ({why})'


def main():
  """Answers the requests of `render`, one a line, until it ends."""
  with contextlib.suppress(ValueError):  # macOS has no such limit.
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
  environment = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  environment.filters['tojson'] = _to_json
  environment.globals['raise_exception'] = _refuse
  # The process that started this one may ignore or block the timer's signal,
  # which ends a process that does not handle it.
  signal.signal(signal.SIGPROF, signal.SIG_DFL)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
  compile_text = functools.lru_cache(64)(environment.from_string)
  try:
    for line in sys.stdin.buffer:
      text, values, max_secs = json.loads(line)
      signal.setitimer(signal.ITIMER_PROF, max_secs)
      answer = json.dumps(_answer(compile_text, text, values))
      signal.setitimer(signal.ITIMER_PROF, 0)
      print(answer, flush=True)
  except MemoryError:  # What fills the memory may not be freed.
    sys.exit(_OUT_OF_MEMORY)


if __name__ == '__main__':
  main()

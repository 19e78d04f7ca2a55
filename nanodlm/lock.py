"""One training run at a time in a workdir."""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
from typing import Iterator

from nanodlm import multihost
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

LOCK_FILE = '.lock'


def check_free(workdir: str):
  """Raises InputError where a training run is going on in `workdir`.

  Before the slow part of a start; `hold` is what keeps others out.
  """
  if multihost.on_process_0((pathlib.Path(workdir) / LOCK_FILE).exists):
    with hold(workdir):
      pass


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Keeps other training runs out of a workdir, from all processes of this one.

  Process 0 holds a lock of the operating system on workdir/.lock, which ends with
  the process, however that ends. Evaluation and sampling need no lock. A file
  system without locks (some network ones) lets everyone in, with a warning.

  Raises:
    InputError: another run holds it.
  """
  with contextlib.ExitStack() as stack:
    multihost.on_process_0(lambda: _lock(workdir, stack))
    yield


def _lock(workdir: str, stack: contextlib.ExitStack) -> int:
  """Locks until `stack` is closed."""
  path = pathlib.Path(workdir) / LOCK_FILE
  # Not truncated: it says who holds it. It stays, since a file that is removed
  # could be locked by one run while another locks its successor.
  file = stack.enter_context(open(path, 'a+'))
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise InputError(
        f'--workdir={workdir!r} is in use by another training run '
        f'({file.read().strip() or "which just started"}); wait for its end, or '
        'give another workdir') from None
  except OSError as error:
    log.warning('%s cannot be locked (%s): nothing stops a second run from writing '
                'to the same workdir', path, error.strerror)
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()
  return 0

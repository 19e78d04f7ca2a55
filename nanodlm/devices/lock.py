"""One training run at a time in a workdir.

JAX is imported where a run takes the lock, not where somebody looks at it.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import socket
import time
from typing import Iterator

from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

LOCK_FILE = '.lock'
# `is_held` may have the lock for an instant.
_RETRY_SECS = 0.1


def is_held(workdir: str) -> bool | None:
  """Whether a training run is going on in `workdir`; None where none can say.

  Without JAX, and without being in the way of a run that starts meanwhile.
  """
  try:
    with open(pathlib.Path(workdir) / LOCK_FILE) as file:
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  except OSError:  # it may not be read, or the file system has no locks
    return None
  return False


def check_free(workdir: str):
  """Raises InputError where a training run is going on in `workdir`.

  Before the slow part of a start; `hold` is what keeps others out.
  """
  from nanodlm.devices import multihost  # pylint: disable=g-import-not-at-top

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
  from nanodlm.devices import multihost  # pylint: disable=g-import-not-at-top

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
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      time.sleep(_RETRY_SECS)
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    file.seek(0)
    raise InputError(
      f'--workdir={workdir!r} is in use by another training run '
      f'({file.read().strip() or "which just started"}); wait for its end, or '
      'give another workdir'
    ) from None
  except OSError as error:
    log.warning(
      '%s cannot be locked (%s): nothing stops a second run from writing '
      'to the same workdir',
      path,
      error.strerror,
    )
  file.truncate(0)
  file.write(f'process {os.getpid()} on {socket.gethostname()}\n')
  file.flush()
  return 0

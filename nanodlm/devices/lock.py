"""A lock that allows one training run at a time in a workdir.

JAX is imported by the functions that take the lock; `is_held` does without.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import logging
import os
import pathlib
import socket

import filelock

from nanodlm import workdir as workdirs
from nanodlm.types import InputError, reason

log = logging.getLogger('nanodlm')

# `is_held` locks the file for an instant, which a starting run waits out.
_TIMEOUT_SECS = 1.0
# Errors of flock on a file system without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def is_held(workdir: str) -> bool | None:
  """Returns whether a training run is active in `workdir`; None if unknown.

  Needs read access only, and does not disturb a run that starts meanwhile.
  """
  try:
    with open(pathlib.Path(workdir) / workdirs.LOCK) as file:
      # A shared lock, which `filelock` does not have.
      fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
  except FileNotFoundError:
    return False
  except BlockingIOError:
    return True
  except OSError:  # An unreadable file, or no support for locks.
    return None
  return False


@contextlib.contextmanager
def hold(workdir: str) -> Iterator[None]:
  """Keeps other training runs out of a workdir; all processes call it together.

  Process 0 holds an operating system lock on workdir/.lock, which the system
  frees when the process ends in any way. Evaluation and sampling need no lock.
  A file system without locks (some network ones) admits every run, with a
  warning.

  Raises:
    InputError: another run holds the lock.
  """
  from nanodlm.devices import multihost

  path = pathlib.Path(workdir) / workdirs.LOCK
  lock = filelock.FileLock(path, _TIMEOUT_SECS, fallback_to_soft=False)

  def acquire() -> int:
    try:
      lock.acquire()
    except filelock.Timeout:
      holder = path.read_text().strip() or 'which just started'
      raise InputError(
        f'--workdir={workdir!r} is in use by another training run ({holder}); '
        'wait until it ends, or give another workdir'
      ) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      log.warning(
        f'{path} cannot be locked ({reason(error)}): nothing prevents a '
        'second run from writing to the same workdir'
      )
    path.write_text(f'process {os.getpid()} on {socket.gethostname()}\n')
    return 0

  try:
    multihost.on_process_0(acquire)
    yield
  finally:
    lock.release()

"""Where prepared datasets are kept, and how a new one is written safely.

A dataset is written into a folder of its own and renamed when it is complete.
The processes of one machine wait for each other and resume what another left;
of several machines that share the disk, the first to finish wins.
"""

from collections.abc import Iterator
import contextlib
import errno
import logging
import math
import os
import pathlib
import shutil
import socket
import time

import filelock

from nanodlm import workdir as workdirs
from nanodlm.types import InputError, reason

_INCOMPLETE = '.incomplete-'
# Work in progress that nothing has touched for this long was abandoned.
_STALE_SECS = 7 * 24 * 3600
# How file systems say that they have no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_log = logging.getLogger('nanodlm')


class Interrupted(InputError):
  """An error after which the work done so far is kept."""


def find_root(data_dir: str) -> pathlib.Path:
  """Returns the absolute path of config.data.data_dir, which may not exist."""
  path = data_dir or os.environ.get('NANODLM_DATA_DIR') or '~/.cache/nanodlm'
  return pathlib.Path(path).expanduser().absolute()


@contextlib.contextmanager
def build(path: pathlib.Path) -> Iterator[pathlib.Path | None]:
  """Yields the folder in which to write the dataset `path`, then publishes it.

  Yields None if another process has finished it meanwhile. The folder may
  contain what an interrupted preparation left. It is removed after an
  InputError or if the disk is full, and kept after any other error.

  Raises:
    InputError: data_dir cannot be written, or its disk is full.
  """
  root, is_ready = path.parent, False
  workdirs.check_writable(str(root), 'data.data_dir')
  work = root / f'{path.name}{_INCOMPLETE}{socket.gethostname()}'
  with contextlib.ExitStack() as stack:
    try:
      root.mkdir(parents=True, exist_ok=True)
      stack.enter_context(_lock(root / f'.{path.name}.lock'))
      if path.exists():
        yield None
        return
      _remove_abandoned(root)
      work.mkdir(exist_ok=True)
      is_ready = True
      yield work
      _publish(work, path)
    except Interrupted:
      raise
    except InputError:
      shutil.rmtree(work, ignore_errors=True)
      raise
    except OSError as error:
      if error.errno in workdirs.FULL:
        shutil.rmtree(work, ignore_errors=True)
        raise disk_full(root) from error
      if is_ready:
        raise
      raise InputError(
        f'data.data_dir={str(root)!r} cannot be written ({reason(error)}); '
        'give another folder, or set NANODLM_DATA_DIR'
      ) from error


def disk_full(root: pathlib.Path, needed: int = 0) -> InputError:
  """Returns the error of a full disk; `needed` is in bytes of token ids."""
  amount = f', about {math.ceil(2.2 * needed / 1e6)} MB of it' if needed else ''
  return InputError(
    f'data.data_dir={str(root)!r}: the disk is full; free some '
    f'space{amount}, or give a folder on another disk'
  )


def _lock(path: pathlib.Path) -> filelock.AcquireReturnProxy:
  """Waits until no other process of this machine prepares the same dataset."""
  lock = filelock.FileLock(path)
  try:
    return lock.acquire(blocking=False)
  except filelock.Timeout:
    _log.info('waiting for another process that holds %s', path)
    return lock.acquire()
  except OSError as error:
    if error.errno not in _NO_LOCKS:
      raise
    return filelock.SoftFileLock(f'{path}.soft').acquire()


def _remove_abandoned(root: pathlib.Path) -> None:
  for work in root.glob(f'*{_INCOMPLETE}*'):
    with contextlib.suppress(FileNotFoundError):
      if time.time() - work.stat().st_mtime > _STALE_SECS:
        _log.info('removing what an interrupted preparation left: %s', work)
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: pathlib.Path, path: pathlib.Path) -> None:
  """Gives a complete dataset its name, in one step."""
  try:
    os.rename(work, path)
  except OSError as error:
    # Another machine was faster, and wrote the same rows.
    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
      raise
    shutil.rmtree(work, ignore_errors=True)

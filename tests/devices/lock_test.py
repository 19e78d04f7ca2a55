"""Tests of nanodlm.devices.lock: one training run per workdir."""

import fcntl
import multiprocessing
import os
import threading

from filelock import UnixFileLock
import pytest

from nanodlm import workdir as workdirs
from nanodlm.devices import lock
from nanodlm.types import InputError


def test_lock_names_its_holder_until_it_is_freed(tmp_path):
  assert lock.is_held(str(tmp_path)) is False
  assert not list(tmp_path.iterdir())  # The check has written nothing.
  with lock.hold(str(tmp_path)):
    assert lock.is_held(str(tmp_path))
    for _ in range(2):  # A refused run does not erase the holder's name.
      with pytest.raises(
        InputError, match=f'process {os.getpid()} on'
      ) as error:
        with lock.hold(str(tmp_path)):
          pass
      assert str(tmp_path) in str(error.value)
  assert lock.is_held(str(tmp_path)) is False
  with lock.hold(str(tmp_path)):
    pass


def _hold_until_killed(workdir, event):
  with lock.hold(workdir):
    event.set()
    threading.Event().wait()


def test_lock_is_freed_when_its_process_is_killed(tmp_path):
  context = multiprocessing.get_context('spawn')
  event = context.Event()
  args = (str(tmp_path), event)
  process = context.Process(target=_hold_until_killed, args=args)
  process.start()
  assert event.wait(60)
  with pytest.raises(InputError, match=f'process {process.pid} on'):
    with lock.hold(str(tmp_path)):
      pass
  process.kill()
  process.join()
  with lock.hold(str(tmp_path)):
    pass


def test_file_system_without_locks_admits_every_run(
  tmp_path, monkeypatch, caplog
):
  def acquire(*_):
    raise OSError(95, 'Operation not supported')

  monkeypatch.setattr(UnixFileLock, '_acquire', acquire)
  with lock.hold(str(tmp_path)), lock.hold(str(tmp_path)):
    assert 'nothing prevents a second run' in caplog.text


def test_unwritable_lock_is_an_error(tmp_path):
  (tmp_path / workdirs.LOCK).mkdir()
  with pytest.raises(OSError):
    with lock.hold(str(tmp_path)):
      pass


def test_looking_at_a_lock_keeps_no_run_out(tmp_path):
  with lock.hold(str(tmp_path)):
    pass
  with open(tmp_path / workdirs.LOCK) as file:
    fcntl.flock(file, fcntl.LOCK_SH)  # As `is_held` does, for an instant.
    timer = threading.Timer(0.2, lambda: fcntl.flock(file, fcntl.LOCK_UN))
    timer.start()
    with lock.hold(str(tmp_path)):
      assert lock.is_held(str(tmp_path))
    timer.join()

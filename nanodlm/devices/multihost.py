"""Several processes: what one of them decides, and what all do when one is lost."""

import os
import sys
from typing import Callable

import jax
import numpy as np

from nanodlm.types import InputError

# A process that sends no heartbeat for as long is taken for lost, and the others
# are ended: JAX's own 100 s less some idle time of costly machines. Heartbeats
# come from a thread of their own, so that compiling does not hold them up.
HEARTBEAT_TIMEOUT_SECS = 60
# How long a process that ends waits for the others to end too.
SHUTDOWN_TIMEOUT_SECS = 60


def on_process_0(function: Callable[[], int]) -> int:
  """Returns function() as process 0 computes it, on every process.

  For what only one may do (rename a file) or what might come out differently
  elsewhere (a look at a shared disk). All processes must call it together.

  Args:
    function: gives an int32.

  Raises:
    InputError: function() raised it or an OSError, on process 0; there it is that
      error.
  """
  error, value = None, 0
  if jax.process_index() == 0:
    try:
      value = function()
    except (InputError, OSError) as caught:  # or the others would wait for it
      error = caught
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils  # pylint: disable=g-import-not-at-top

    failed, value = multihost_utils.broadcast_one_to_all(
      np.array([error is not None, value], np.int32)
    ).tolist()
    if failed and error is None:
      error = InputError('process 0 found something wrong; see its output')
  if error is not None:
    raise error
  return value


def leave(status: int):
  """Ends this process at once, with threads that wait and computations that hang.

  JAX's own way would wait for all processes, although one of them is lost.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)

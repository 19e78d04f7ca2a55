"""Several processes: decisions made by one, and a prompt end if one is lost."""

from collections.abc import Callable
import logging
import os
import sys
from typing import Any

from absl import flags
import jax
import numpy as np

from nanodlm.types import InputError, reason

# A process without a heartbeat for this long counts as lost, and the others are
# ended. JAX's default is 100 s, during which costly machines would be idle.
# Heartbeats come from a thread of their own, so compiling does not delay them.
HEARTBEAT_TIMEOUT_SECS = 60
# How long a process that ends waits for the others to end.
SHUTDOWN_TIMEOUT_SECS = 60
_NUMBER = np.int32(0)


def on_process_0(function: Callable[[], Any], like: Any = _NUMBER) -> Any:
  """Calls function() on process 0 and returns its value on every process.

  The value has the shape and type of `like`: by default, it is an int32.

  Use it for actions that only one process may take (renaming a file) and for
  observations that may differ between processes (the state of a shared disk).
  All processes must call it together.

  Raises:
    InputError: function() raised InputError or OSError on process 0, which
      itself raises that error.
  """
  error, value = None, like
  if jax.process_index() == 0:
    try:
      value = function()
    except (InputError, OSError) as caught:
      error = caught  # The others wait for the broadcast.
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    failed, value = multihost_utils.broadcast_one_to_all(
      (np.int32(error is not None), np.asarray(value, like.dtype))
    )
    value = value if like.ndim else int(value)
    if failed and error is None:
      error = InputError('process 0 stopped with an error; see its output')
  if error is not None:
    raise error
  return value


def leave(status: int):
  """Ends this process at once, including blocked threads and computations.

  A normal exit of JAX waits for all processes, which one that is lost prevents.
  """
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


def define_flags():
  """Defines the flags that say how processes find each other."""
  flags.DEFINE_string(
    'coordinator_address',
    None,
    'host:port of process 0, if JAX cannot find the cluster without help; '
    'needs --num_processes and --process_id.',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Number of processes of the run.', lower_bound=1
  )
  flags.DEFINE_integer(
    'process_id', None, 'Number of this process, from 0.', lower_bound=0
  )
  flags.DEFINE_integer(
    'heartbeat_timeout_secs',
    HEARTBEAT_TIMEOUT_SECS,
    'With several processes: one that has been silent for this long is '
    'considered lost, and all others end.',
    lower_bound=5,
  )
  flags.DEFINE_bool(
    'distributed',
    None,
    'Whether to initialise jax.distributed from the cluster that JAX detects; '
    'by default if this is one of several tasks of SLURM or Open MPI, or one '
    'of several hosts of a TPU pod.',
  )


def init_distributed():
  """Joins the other processes, if there are any; only process 0 logs.

  Raises:
    InputError: the flags are incomplete, or the processes cannot connect.
  """
  options = flags.FLAGS
  names = 'coordinator_address', 'num_processes', 'process_id'
  explicit: Any = tuple(options[name].value for name in names)
  is_explicit = any(x is not None for x in explicit)
  if is_explicit and None in explicit:
    raise InputError(
      '--coordinator_address, --num_processes and --process_id go together; '
      f'got {explicit}'
    )
  wanted = options.distributed
  try:
    if is_explicit or (_is_cluster() if wanted is None else wanted):
      jax.distributed.initialize(
        *explicit,
        heartbeat_timeout_seconds=options.heartbeat_timeout_secs,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_SECS,
      )
  except (ValueError, RuntimeError) as error:
    raise InputError(
      f'jax.distributed cannot start: {reason(error)}'
    ) from error
  try:
    index = jax.process_index()
  except (AssertionError, RuntimeError) as error:
    raise InputError(
      f'JAX_PLATFORMS={os.environ.get("JAX_PLATFORMS", "")!r}: JAX finds no '
      "such device; unset it, or use 'cpu'"
    ) from error
  if index:
    logging.getLogger('nanodlm').setLevel(logging.WARNING)


def _is_cluster() -> bool:
  """Returns whether the environment describes several processes."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  tasks = [
    os.environ.get(name, '1')
    for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  ]
  return len(hosts) > 1 or any(n.isdigit() and int(n) > 1 for n in tasks)

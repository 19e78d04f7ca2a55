"""Signals that end a training run after a checkpoint."""

from collections.abc import Iterator
import contextlib
import logging
import signal

import jax

log = logging.getLogger('nanodlm')


class Caught:
  """The number of the signal that arrived; 0 until then."""

  number = 0

  def should_stop(self, step: int) -> bool:
    """Returns whether to stop before this step: on all processes the same."""
    if jax.process_count() == 1:
      return bool(self.number)
    from jax.experimental import multihost_utils

    stop = multihost_utils.reached_preemption_sync_point(step)
    if stop and not self.number:
      self.number = signal.SIGTERM
    return stop


@contextlib.contextmanager
def catch() -> Iterator[Caught]:
  """Turns the first SIGTERM or SIGINT into a flag; a second acts as usual."""
  caught = Caught()
  # With several processes JAX handles SIGTERM, which makes all of them stop at
  # the same step (see should_stop), and SIGINT is turned into one.
  is_one = jax.process_count() == 1
  handled = (signal.SIGTERM, signal.SIGINT) if is_one else (signal.SIGINT,)

  def handle(number, frame):
    del frame
    for other in handled:
      signal.signal(other, before[other])
    if is_one:
      caught.number = number
    else:
      signal.raise_signal(signal.SIGTERM)
    name = signal.Signals(number).name
    log.info('%s: saving a checkpoint, then exiting', name)

  before = {number: signal.signal(number, handle) for number in handled}
  try:
    yield caught
  finally:
    for number in handled:
      signal.signal(number, before[number])

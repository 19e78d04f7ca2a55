"""The metrics of steps between two reports, and the end of a diverging run."""

import collections
from collections.abc import Iterator
import contextlib
import datetime
import logging
import math
import time
from typing import Any

import jax

from nanodlm.training import metrics

log = logging.getLogger('nanodlm')


class TrainingDiverged(RuntimeError):
  """Several steps in a row had a loss or gradient that is not finite.

  Attributes:
    step: the last step before them.
  """

  def __init__(self, message: str, step: int):
    super().__init__(message)
    self.step = step


# Seconds between two lines of `Countdown`.
EVERY_SECS = 10.0


class Countdown:
  """Logs how far a long loop is, every EVERY_SECS.

  The time of the first iteration, which compiles, is left out of estimates.

  Args:
    what: what the loop does, such as 'evaluating'.
    total: number of its iterations.
  """

  def __init__(self, what: str, total: int):
    self._what, self._total, self._done = what, total, 0
    self._first = self._last = time.monotonic()

  def count(self):
    """Counts an iteration; logs the progress if it is time to."""
    self._done += 1
    now = time.monotonic()
    if self._done == 1:
      self._first = now
    if now - self._last >= EVERY_SECS and self._done < self._total:
      self._last, left = now, ''
      if num := self._done - 1:
        secs = (now - self._first) / num * (self._total - self._done)
        left = f', {describe_secs(secs)} left'
      log.info(f'{self._what}: {self._done} of {self._total} batches{left}')


def describe_secs(secs: float) -> str:
  """Formats a time, rounded up to seconds: '1 s', '0:01:00'."""
  secs = max(math.ceil(secs), 1)
  return f'{secs} s' if secs < 60 else str(datetime.timedelta(seconds=secs))


class Progress:
  """Gathers the metrics of steps, and reports those since the last report.

  Args:
    config: `config.train`.
    length: tokens per row.
    flops_per_token: FLOPs of a training step per token; 0: unknown.
    writer: receives the scalars.
  """

  def __init__(
    self, config: Any, length: int, flops_per_token: float, writer: Any
  ):
    self._train, self._writer = config, writer
    self._tokens_per_step = config.batch_size * length
    self._flops_per_token = flops_per_token
    self._in_flight = collections.deque()
    # Steps that were skipped, in this start and since the last one taken.
    self._skipped = self.num_skipped = 0
    self._sums, self._last, self._failure = [], {}, (0, '')
    self.restart_clock()

  def restart_clock(self):
    """Leaves out the time so far (compilation), not the sums."""
    self._start, self._num_steps = time.monotonic(), 0
    self._secs = {'wait': 0.0, 'pause': 0.0}

  @contextlib.contextmanager
  def timing(self, kind: str) -> Iterator[None]:
    """Measures a 'wait' for a batch, or a 'pause', which is not training."""
    start = time.monotonic()
    yield
    self._secs[kind] += time.monotonic() - start

  def add(self, step: int, values: Any, *, max_in_flight: int):
    """Takes the metrics of a step, and reads those of all but the last ones."""
    self._in_flight.append((step, values))
    self.finish(max_in_flight)

  def finish(self, max_in_flight: int = 0):
    """Reads the metrics of all but the last `max_in_flight` steps."""
    while len(self._in_flight) > max_in_flight:
      self._read(*self._in_flight.popleft())

  def _read(self, step, values):
    values = self._last = jax.device_get(values)
    self._num_steps += 1
    if not values['skipped']:
      self.num_skipped = 0
      self._sums.append(values)
      return
    self._skipped += 1
    self.num_skipped += 1
    loss = values['loss'] / max(values['weight'], 1)
    grad_norm = values['grad_norm']
    self._failure = step, f'loss {loss}, gradient norm {grad_norm}'
    log.warning('step %d skipped: %s', *self._failure)
    if self.num_skipped >= self._train.max_skipped_steps:
      scalars = {
        'train/loss': loss,
        'train/grad_norm': grad_norm,
        'train/skipped_steps': self._skipped,
      }
      self._writer.write_scalars(step, scalars)
      raise self.divergence()

  def divergence(self) -> TrainingDiverged:
    """Describes the steps that were skipped last."""
    step, text = self._failure
    return TrainingDiverged(
      f'{self.num_skipped} steps in a row, the last one step {step}, were not '
      f'finite ({text}); lower optim.learning_rate or look at the data',
      step - self.num_skipped,
    )

  def report(self, step: int):
    """Writes and logs what happened since the last report."""
    secs = time.monotonic() - self._start - self._secs['pause']
    # Without the first step of a start, which is compiled, there may be none.
    has_rate = self._num_steps > 0
    secs_per_step = secs / max(self._num_steps, 1)
    rate = self._num_steps * self._tokens_per_step / secs
    means = metrics.train_means(metrics.add(self._sums)) if self._sums else {}
    scalars = {**means, 'train/skipped_steps': self._skipped}
    if has_rate:
      scalars |= {
        'train/tokens_per_sec': rate,
        'train/secs_per_step': secs_per_step,
        # The process waits for a batch; the device may still be busy.
        'train/data_wait_share': self._secs['wait'] / secs,
      }
    for key in ('grad_norm', 'param_norm', 'learning_rate'):
      scalars[f'train/{key}'] = float(self._last[key])
    peak = metrics.peak_flops(jax.devices()[0].device_kind)
    if peak and has_rate and self._flops_per_token:
      peak *= jax.device_count()
      scalars['train/mfu'] = rate * self._flops_per_token / peak
    self._writer.write_scalars(step, scalars)
    self._writer.flush()
    if means:
      loss, text = means['train/loss'], ''
      nll = means.get('train/nll', loss)
      if not math.isclose(nll, loss, rel_tol=1e-4):
        text += f'bound {nll:.4f}  '
      if 'train/bits_per_byte' in means:
        text += f'{means["train/bits_per_byte"]:.4f} bits/byte  '
      if 'train/reward' in means:
        text += f'reward {means["train/reward"]:.4f}  '
      num_steps = self._train.num_steps
      speed = ''
      if has_rate:
        left = describe_secs((num_steps - step) * secs_per_step)
        speed = f'{rate:,.0f} tokens/s' + f'  {left} left' * (step < num_steps)
      log.info(
        f'step {step:{len(str(num_steps))}}/{num_steps}  '
        f'loss {loss:.4f} nats/token  {text}{speed}'.rstrip()
      )
    self._sums = []
    self.restart_clock()

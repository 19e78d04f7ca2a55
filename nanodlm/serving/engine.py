"""The worker behind --mode=serve: requests in, canvases out; no HTTP.

One thread owns the device and runs a batch of rows at a time, of any clients
whose requests share a compiled program; another thread compiles. What a row
becomes does not depend on what it is batched with (`step.make_rows_step`).
"""

import collections
import dataclasses
import logging
import threading
from typing import Any, Callable, Hashable, NamedTuple, Sequence

import jax
import numpy as np

from nanodlm import config as configs
from nanodlm import evaluate, samplers
from nanodlm.devices import mesh as meshes
from nanodlm.noise import categorical
from nanodlm.show import watch
from nanodlm.steps import train as steps
from nanodlm.types import InputError, Sampler

log = logging.getLogger('nanodlm')

# Rows of a batch are padded to one of these numbers.
BATCH_SIZES = (1, 4, 16)
# Canvases are padded to the longest one halved so many times, but not below.
MIN_LENGTH = 32

WAITING, COMPILING, RUNNING, DONE, FAILED = (
  'waiting',
  'compiling',
  'running',
  'done',
  'failed',
)


class FullError(Exception):
  """There is no room for a request; what may help is to come back later."""


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the worker takes on.

  Attributes:
    max_rows: rows that wait, of all clients together.
    max_client_rows: rows that wait, of one client.
    max_programs: compiled programs that are kept, the least used goes first.
  """

  max_rows: int = 256
  max_client_rows: int = 64
  max_programs: int = 24


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """One canvas to fill, and how.

  Attributes:
    tokens: [n] int32, mask_id in the gaps.
    fixed: [n] bool.
    choice: of `Engine.choose`.
    draw: temperature, top-k and top-p.
    seed: in [0, 2^31).
    index: the row's number among those of one seed: as `--mode=sample` with that
      seed draws it.
  """

  tokens: np.ndarray
  fixed: np.ndarray
  choice: 'Choice'
  draw: categorical.Draw
  seed: int
  index: int


@dataclasses.dataclass(frozen=True)
class Choice:
  """A sampler, as far as it is compiled in: without seed and draw.

  Attributes:
    name: in the config.
    num_steps: in the config.
    reads_steps: whether the sampler reads that.
    sampler: with a draw that is not used.
    is_final: whether tokens stay once they are revealed.
    pads: whether shorter canvases can be padded without changing their law.
  """

  name: str
  num_steps: int
  reads_steps: bool
  sampler: Sampler
  is_final: bool
  pads: bool


class _Group(NamedTuple):
  """What rows of one batch share."""

  sampler: Sampler
  length: int


class Row:
  """A task under way. Written by the worker, read by whoever waits for it.

  Attributes:
    task: what was asked for.
    state: WAITING, COMPILING, RUNNING, DONE or FAILED.
    canvas: [n] int32, as it stands; replaced, never changed in place.
    num_calls: of the network so far; of its batch, where others take longer.
    error: for the client, where it failed.
  """

  def __init__(self, task: Task, group: _Group, on_change: Callable[[], None]):
    self.task, self.group, self._on_change = task, group, on_change
    self.state, self.canvas, self.num_calls = WAITING, task.tokens, 0
    self.error = ''
    self.is_cancelled = False

  @property
  def is_over(self) -> bool:
    """Whether nothing more will come of it."""
    return self.state in (DONE, FAILED)

  def cancel(self):
    """Nobody waits for it any more."""
    self.is_cancelled = True

  def change(self, **values: Any):
    """Sets fields, and tells who waits for the row."""
    for name, value in values.items():
      setattr(self, name, value)
    if not self.is_cancelled:
      self._on_change()


class Engine:
  """Batches the requests of many clients on one device.

  Clients take turns: the client whose turn it is gives the first row of a batch,
  the others fill it up with rows of the same program, one each, then a second
  each, and so on. A program that is not there yet holds up only those who need
  it.

  Args:
    run: the network, and the sampler in its config.
    params: its parameters.
    limits: of the queue.
  """

  def __init__(self, run: evaluate.Run, params: Any, limits: Limits = Limits()):
    self.run, self.limits = run, limits
    self.length = run.settings.sample.length or run.settings.data.length
    self._params = params
    shards = meshes.num_batch_shards(run.mesh)
    self._sizes = sorted({-(-size // shards) * shards for size in BATCH_SIZES})
    self._choices = collections.OrderedDict()
    self._changed = threading.Condition()
    # All below are guarded by it.
    self._queues: dict[Hashable, collections.deque[Row]] = (
      collections.OrderedDict()
    )
    self._programs = collections.OrderedDict()  # of (group, size)
    # Programs to compile, in order, and whether also with nobody waiting.
    self._wanted = collections.OrderedDict()
    self._broken = {}  # (group, size): why it cannot be compiled
    self._current: list[Row] = []
    self._is_closing = False
    self._threads = [
      threading.Thread(target=target, daemon=True, name=name)
      for target, name in (
        (self._work, 'sampler'),
        (self._compile_all, 'compiler'),
      )
    ]

  def start(self, warm_up: bool = True):
    """Starts the threads; returns once the run's own sampler is compiled.

    Args:
      warm_up: whether to compile what the default settings need beforehand.
    """
    if warm_up:
      choice = self.choose()
      lengths = self._lengths(choice)
      groups = [_Group(choice.sampler, length) for length in lengths[::-1]]
      program = self._compile(groups[0], self._sizes[0])
      self._programs[groups[0], self._sizes[0]] = program
      # Once run, everything is in memory.
      blank = Task(
        np.full(self.length, self.run.tokenizer.mask_id, np.int32),
        np.zeros(self.length, bool),
        choice,
        categorical.Draw(self.run.tokenizer.mask_id),
        0,
        0,
      )
      self._current = [Row(blank, groups[0], lambda: None)]
      self._fill(self._current, program, self._sizes[0])
      # Shorter canvases have to wait for theirs; more rows need not.
      for group in groups[1:]:
        self._wanted[group, self._sizes[0]] = True
      for size in self._sizes[1:]:
        self._wanted[groups[0], size] = True
    for thread in self._threads:
      thread.start()

  def close(self, timeout_secs: float = 30.0) -> bool:
    """Ends what runs and fails what waits; whether the threads have ended."""
    with self._changed:
      self._is_closing = True
      rows = [row for queue in self._queues.values() for row in queue]
      self._queues.clear()
      self._wanted.clear()
      rows += self._current
      self._changed.notify_all()
    for row in rows:
      if not row.is_over:
        row.change(state=FAILED, error='the server is stopping')
    for thread in self._threads:
      if thread.is_alive():
        thread.join(timeout_secs)
    return not any(thread.is_alive() for thread in self._threads)

  def is_alive(self) -> bool:
    """Whether its threads run."""
    return all(thread.is_alive() for thread in self._threads)

  def num_waiting(self) -> int:
    """Rows that are queued."""
    with self._changed:
      return self._num_waiting()

  def choose(
    self, name: str | None = None, num_steps: int | None = None
  ) -> Choice:
    """The sampler of the run's config, with another name or number of calls.

    Raises:
      InputError: it does not fit the objective, or does not read num_steps.
    """
    key = name, num_steps
    if key in self._choices:
      return self._choices[key]
    # The draw is each row's own.
    changes = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
    if name is not None:
      changes['name'] = name
    if num_steps is not None:
      changes['num_steps'] = num_steps
    run = evaluate.with_sampler(self.run, changes)
    config = run.config
    if num_steps is not None:
      configs.validate(config, ['sampler.num_steps'])
    used = configs.sampler_name(config)
    sampler = configs.make_sampler(
      config, run.tokenizer.mask_id, run.tokenizer.separator_id
    )
    objective, network = run.objective, run.network.config
    is_one_way = bool(objective.causal or objective.block_size)
    last = config.sampler.inner if used in ('block', 'prefix_cache') else used
    choice = Choice(
      used,
      config.sampler.num_steps,
      configs.reads_steps(config),
      sampler,
      last in samplers.FINAL,
      # The time that a network is told depends on the canvas's length, and so
      # does what is cached without a mask for each row.
      pads=is_one_way
      or (not network.time_conditioning and used != 'prefix_cache'),
    )
    self._choices[key] = choice
    if len(self._choices) > 256:
      self._choices.popitem(last=False)
    return choice

  def submit(
    self, client: Hashable, tasks: Sequence[Task], on_change: Callable[[], None]
  ) -> list[Row]:
    """Queues rows.

    Args:
      client: whose turn it takes.
      tasks: a row each.
      on_change: called from another thread whenever one of the rows changed.

    Raises:
      FullError: the queue, or this client's part of it, has no room.
      InputError: there are more than it ever has room for.
    """
    most = min(self.limits.max_client_rows, self.limits.max_rows)
    if len(tasks) > most:
      raise InputError(
        f'{len(tasks)} texts in one request (num_samples, or n for '
        f'each prompt); at most {most} are allowed'
      )
    rows = [Row(task, self._group(task), on_change) for task in tasks]
    with self._changed:
      if self._is_closing:
        raise FullError('the server is stopping')
      queue = self._queues.get(client, ())
      mine = sum(not row.is_cancelled for row in queue)
      if mine + len(rows) > self.limits.max_client_rows:
        raise FullError(
          f'{mine} texts of yours are waiting; '
          f'{self.limits.max_client_rows} may'
        )
      if self._num_waiting() + len(rows) > self.limits.max_rows:
        raise FullError(
          f'{self.limits.max_rows} texts are waiting, no more are taken'
        )
      self._queues.setdefault(client, collections.deque()).extend(rows)
      self._changed.notify_all()
    return rows

  def _num_waiting(self, group: _Group | None = None) -> int:
    return sum(
      not row.is_cancelled and group in (None, row.group)
      for queue in self._queues.values()
      for row in queue
    )

  def _lengths(self, choice: Choice) -> list[int]:
    """The lengths that canvases are padded to, ascending."""
    if not choice.pads:
      return [self.length]
    unit = self.run.objective.block_size or 1
    lengths, length = {self.length}, self.length // 2
    while length >= MIN_LENGTH:
      lengths.add(min(-(-length // unit) * unit, self.length))
      length //= 2
    return sorted(lengths)

  def _group(self, task: Task) -> _Group:
    length = len(task.tokens)
    if task.choice.pads:
      length = next(
        padded for padded in self._lengths(task.choice) if padded >= length
      )
    return _Group(task.choice.sampler, length)

  def _work(self):
    """The thread that owns the device."""
    while True:
      with self._changed:
        while not self._is_closing and not (taken := self._take()):
          self._changed.wait()
        if self._is_closing:
          return
        rows, program, size = taken
        self._current = rows
      try:
        self._fill(rows, program, size)
      except Exception:  # pylint: disable=broad-except
        # Whatever it is, the next batch may do.
        log.exception('a batch failed')
        for row in rows:
          row.change(
            state=FAILED,
            error='the sampler failed; the log of the server has more',
          )
      with self._changed:
        self._current = []

  def _take(self):
    """The rows of the next batch, with their program and its size, or None."""
    for client in list(self._queues):
      queue = self._queues[client]
      while queue and queue[0].is_cancelled:
        queue.popleft()
      if not queue:
        del self._queues[client]
    for client, queue in self._queues.items():
      group = queue[0].group
      if (group, self._sizes[0]) in self._broken:
        queue.popleft().change(
          state=FAILED, error=self._broken[group, self._sizes[0]]
        )
        return self._take()
      sizes = [size for size in self._sizes if (group, size) in self._programs]
      waiting = self._num_waiting(group)
      self._want(group, waiting, sizes)
      if sizes:
        break
      for row in queue:
        if row.group == group and row.state == WAITING:
          row.change(state=COMPILING)
    else:
      return None
    size = _best_size(sizes, waiting)
    self._queues.move_to_end(client)
    rows = []
    order = [client, *(other for other in self._queues if other != client)]
    while len(rows) < size:
      before = len(rows)
      for other in order:
        row = next(
          (
            row
            for row in self._queues[other]
            if row.group == group and not row.is_cancelled
          ),
          None,
        )
        if row is not None and len(rows) < size:
          self._queues[other].remove(row)
          rows.append(row)
      if len(rows) == before:
        break
    self._programs.move_to_end((group, size))
    return rows, self._programs[group, size], size

  def _want(self, group: _Group, waiting: int, sizes: list[int]):
    """Has programs compiled that `waiting` rows could use."""
    best = _best_size(
      [size for size in self._sizes if (group, size) not in self._broken],
      waiting,
    )
    for size in ([] if sizes else [self._sizes[0]]) + [best]:
      if size not in sizes and (group, size) not in self._wanted:
        self._wanted[group, size] = False
        # What someone waits for comes before what would be faster.
        if not sizes and size == self._sizes[0]:
          self._wanted.move_to_end((group, size), last=False)
        self._changed.notify_all()

  def _compile_all(self):
    """The thread that compiles."""
    while True:
      with self._changed:
        while not self._wanted and not self._is_closing:
          self._changed.wait()
        if self._is_closing:
          return
        group, size = next(iter(self._wanted))
        if not (self._wanted[group, size] or self._num_waiting(group)):
          del self._wanted[group, size]  # who asked has left, or was served
          continue
      program, error = None, ''
      try:
        program = self._compile(group, size)
      except InputError as caught:
        error = str(caught)
      except Exception:  # pylint: disable=broad-except
        log.exception('a program does not compile')
        error = 'these settings do not compile; the log of the server has more'
      with self._changed:
        self._wanted.pop((group, size), None)
        if program is not None:
          self._programs[group, size] = program
          while len(self._programs) > self.limits.max_programs:
            self._programs.popitem(last=False)
        else:
          self._broken[group, size] = error
        self._changed.notify_all()

  def _compile(self, group: _Group, size: int):
    run = self.run
    step = steps.make_rows_step(
      run.network,
      run.objective,
      group.sampler,
      run.mesh,
      watch.View(self._watch, run.tokenizer.mask_id),
    )
    return step.lower(self._params, self._rows([], group, size)).compile()

  def _rows(self, rows: list[Row], group: _Group, size: int) -> steps.Rows:
    """The device's copy of rows, padded to `size` of them."""
    tokens = np.full((size, group.length), self.run.tokenizer.mask_id, np.int32)
    fixed = np.ones(tokens.shape, bool)
    length = np.full(size, group.length, np.int32)
    draws = [row.task.draw for row in rows]
    seeds = np.zeros([2, max(self._sizes)], np.int32)
    for i, row in enumerate(rows):
      task = row.task
      length[i] = len(task.tokens)
      tokens[i, : length[i]], fixed[i, : length[i]] = task.tokens, task.fixed
      seeds[:, i] = task.seed, task.index
    values = lambda name, dtype, default: np.array(
      [getattr(draw, name) for draw in draws] + [default] * (size - len(draws)),
      dtype,
    )
    return meshes.shard_whole_batch(
      self.run.mesh,
      steps.Rows(
        np.asarray(_row_key_data(*seeds))[:size],
        tokens,
        fixed,
        length,
        values('temperature', np.float32, 1),
        values('top_k', np.int32, 0),
        values('top_p', np.float32, 1),
      ),
    )

  def _fill(self, rows: list[Row], program: Any, size: int):
    with self._changed:
      if self._is_closing:  # `close` has failed them
        return
      for row in rows:
        row.state = RUNNING
    for row in rows:
      row.change()  # those who wait are not called under the lock
    tokens, num_calls = self._call(program, rows, rows[0].group, size)
    for row, canvas in zip(rows, tokens):
      if not self._is_closing:
        row.change(
          canvas=canvas[: len(row.task.tokens)], state=DONE, num_calls=num_calls
        )

  def _call(self, program, rows, group, size) -> tuple[np.ndarray, int]:
    samples = program(self._params, self._rows(rows, group, size))
    return jax.device_get(samples.tokens), int(samples.num_calls)

  def _watch(self, event: watch.Asked) -> bool:
    """Shows each row what the network is about to see; see `watch.Watch`."""
    rows = self._current[event.first_row : event.first_row + len(event.tokens)]
    for row, tokens in zip(rows, event.tokens):
      if row.is_cancelled:
        continue
      canvas = row.canvas
      if event.start < len(canvas):
        canvas = canvas.copy()
        watch.paste(canvas, tokens, event.start)
      row.change(canvas=canvas, num_calls=row.num_calls + 1)
    return not self._is_closing and not all(
      row.is_cancelled for row in self._current
    )


def _best_size(sizes: Sequence[int], num_rows: int) -> int:
  """The largest of ascending sizes that is at least two thirds full, or the least."""
  return max(
    (size for size in sizes if 2 * size <= 3 * num_rows), default=sizes[0]
  )


@jax.jit
def _row_key_data(seeds: jax.Array, index: jax.Array) -> jax.Array:
  """[B, 2] uint32; the keys that `sample.sample_workdir` gives the first prompt."""

  def key_data(seed, i):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), 0), 0)
    return jax.random.key_data(jax.random.fold_in(key, i))

  return jax.vmap(key_data)(seeds, index)

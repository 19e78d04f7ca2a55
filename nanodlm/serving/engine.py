"""Fills the canvases of many clients on one device; knows nothing of HTTP.

One thread samples a batch of rows at a time, taken from all clients whose rows
share a compiled program, while another thread compiles. A row's tokens do not
depend on the rest of its batch (`make_rows_step`). Between two batches the
device takes one step of what another thread computes (`Engine.call`).
"""

import collections
from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
import itertools
import logging
import threading
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from nanodlm.devices import mesh as meshes
from nanodlm.lm import LanguageModel
from nanodlm.noise import categorical
from nanodlm.run import Run
from nanodlm.show import watch
from nanodlm.steps import sample as steps
from nanodlm.types import InputError, Sampler

log = logging.getLogger('nanodlm')

# Batches are padded to one of these numbers of rows.
BATCH_SIZES = (1, 4, 16)
# Canvases are padded to the full length halved any number of times, but to no
# fewer tokens than this.
MIN_LENGTH = 32
# Waiting rows of all clients together, and of one client.
MAX_ROWS = 256
MAX_CLIENT_ROWS = 64
# Compiled programs kept; the least recently used is dropped.
MAX_PROGRAMS = 24

State = Literal['waiting', 'compiling', 'running', 'done', 'failed']


class FullError(Exception):
  """The queue cannot accept a request now; the client can retry later."""


class _Turns:
  """A lock that two threads take in turns."""

  def __init__(self):
    self._next, self._held = threading.Lock(), threading.Lock()

  def __enter__(self):
    with self._next:
      self._held.acquire()

  def __exit__(self, *_):
    self._held.release()


class _Group(NamedTuple):
  """What all rows of a batch have in common."""

  sampler: Sampler
  length: int
  reveals: bool  # See `watch.View`.


@dataclasses.dataclass(eq=False)
class Row:
  """A canvas to fill and its progress; the engine writes it, the client reads.

  Attributes:
    tokens: [n] int32, mask_id in the gaps.
    fixed: [n] bool, positions that the sampler may not change.
    run: the run with its sampler, from `Engine.choose`.
    draw: temperature, top-k and top-p.
    seed: seed in [0, 2^64).
    index: number among the samples of this seed. Seed and index give the same
      tokens as in `--mode=sample`, unless the sampler has more steps than the
      canvas has tokens: here, padding counts as tokens.
    num_asked: network calls that have begun.
    frame: the number of network calls that were made, and the canvas after
      them, [n] int32. Replaced as a whole, so that the two belong together. At
      the end, the number is that of the whole batch.
    error: why the row failed, for the client.
    logprobs: the log-probabilities of tokens in the gaps, before they are shown
      in a frame; None if the client does not need them.
    is_cancelled: set by a client that no longer waits for the row.
    on_change: called from another thread after each change.
    group: the rows it can share a batch with, set by the engine.
  """

  tokens: np.ndarray
  fixed: np.ndarray
  run: Run
  draw: categorical.Draw
  seed: int
  index: int
  state: State = 'waiting'
  num_asked: int = 0
  frame: tuple[int, np.ndarray] = (0, np.zeros(0, np.int32))
  error: str = ''
  logprobs: watch.Logprobs | None = None
  is_cancelled: bool = False
  on_change: Callable[[], Any] | None = None
  group: Any = None

  def __post_init__(self):
    self.frame = 0, self.tokens

  @property
  def num_calls(self) -> int:
    """The number of network calls that were made."""
    return self.frame[0]

  @property
  def canvas(self) -> np.ndarray:
    """The current tokens, [n] int32."""
    return self.frame[1]

  @property
  def is_over(self) -> bool:
    """Whether the row will not change any more."""
    return self.state in ('done', 'failed')

  def fail(self, error: str):
    """Ends the row; `error` says why."""
    self.change(error=error, state='failed')

  def change(self, **values: Any):
    """Sets attributes, in their order, and notifies the client."""
    for name, value in values.items():
      setattr(self, name, value)
    if self.on_change and not self.is_cancelled:
      self.on_change()


class Engine:
  """Batches the rows of many clients on one device.

  Clients take turns. The client whose turn it is gives the first row of a
  batch; the others fill it up with rows for the same program, one row each,
  then a second row each, and so on. Rows that need a program that is not
  compiled yet do not delay the others.

  Args:
    lm: the model; its sampler is the default.
  """

  def __init__(self, lm: LanguageModel):
    self.lm = lm
    self.length = lm.run.settings.sample_length
    self.is_closing = False
    shards = meshes.num_batch_shards(lm.run.mesh)
    self._sizes = sorted({-(-size // shards) * shards for size in BATCH_SIZES})
    self.choose = functools.lru_cache(maxsize=256)(self._choose)
    # Guards the attributes below.
    self._changed = threading.Condition()
    self._queues: dict[Hashable, list[Row]] = {}  # The next client is first.
    self._current: list[Row] = []
    # The keys are groups and batch sizes.
    self._programs = collections.OrderedDict[tuple[_Group, int], Any]()
    self._errors: dict[tuple[_Group, int], str] = {}
    self._warm_up: list[tuple[_Group, int]] = []
    self._device = _Turns()
    self._steps = collections.OrderedDict[Any, Any]()
    self._threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._sample_all, self._compile_all)
    ]

  def call(self, step: Any, *args: Any) -> Any:
    """Runs a jitted function between two batches; compiles it before.

    One thread at a time calls this.
    """
    leaves, tree = jax.tree.flatten(args)
    key = step, tree, *((x.shape, x.dtype) for x in leaves)
    if key not in self._steps:
      self._steps[key] = step.lower(*args).compile()
    self._steps.move_to_end(key)
    if len(self._steps) > MAX_PROGRAMS:
      self._steps.popitem(last=False)
    with self._device:
      return jax.device_get(self._steps[key](*args))

  def start(self, warm_up: bool = True):
    """Starts the threads.

    Args:
      warm_up: whether to compile and run the default sampler first, and to
        compile it for other batch sizes and lengths in the background.
    """
    if warm_up:
      run, (size, *larger) = self.choose(), self._sizes
      lengths = self._lengths(run)
      *shorter, group = [_Group(run.sampler, n, False) for n in lengths]
      program = self._programs[group, size] = self._compile(group, size)
      # The first call allocates the memory that later calls reuse.
      jax.block_until_ready(
        program(self.lm.params, self._rows([], group, size))
      )
      # A shorter canvas has to wait for its program, a larger batch does not.
      self._warm_up = [(group, size) for group in reversed(shorter)]
      self._warm_up += [(group, size) for size in larger]
    for thread in self._threads:
      thread.start()

  def close(self, timeout_secs: float = 30.0) -> bool:
    """Fails all rows that are not done and ends the threads.

    Returns:
      Whether the threads have ended; a compilation cannot be interrupted.
    """
    with self._changed:
      self.is_closing = True
      rows = [*itertools.chain(*self._queues.values()), *self._current]
      self._queues.clear()
      self._warm_up.clear()
      self._changed.notify_all()
    for row in rows:
      if not row.is_over:
        row.fail('the server is stopping')
    for thread in self._threads:
      if thread.is_alive():
        thread.join(timeout_secs)
    return not any(thread.is_alive() for thread in self._threads)

  def is_alive(self) -> bool:
    """Whether both threads run."""
    return all(thread.is_alive() for thread in self._threads)

  def num_waiting(self, group: _Group | None = None) -> int:
    """The number of queued rows, of one group or of all."""
    with self._changed:
      return sum(
        not row.is_cancelled and group in (None, row.group)
        for row in itertools.chain(*self._queues.values())
      )

  def _choose(
    self, name: str | None = None, num_steps: int | None = None
  ) -> Run:
    """Returns the run with another sampler or number of steps.

    Raises:
      InputError: the sampler does not fit the objective or ignores num_steps.
    """
    # Each row has its own draw.
    changes = {'temperature': 1.0, 'top_k': 0, 'top_p': 1.0}
    if name is not None:
      changes['name'] = name
    run = self.lm.run.with_sampler(changes)
    if num_steps is not None:
      run = run.with_sampler({'num_steps': num_steps}, is_given=True)
    return run

  def submit(
    self, client: Hashable, rows: Sequence[Row], on_change: Callable[[], Any]
  ):
    """Queues rows, to be sampled in the turns of `client`.

    `on_change` is called from another thread after each change of a row.

    Raises:
      FullError: the queue, or this client's share of it, is full.
      InputError: there are more rows than an empty queue accepts.
    """
    most = min(MAX_CLIENT_ROWS, MAX_ROWS)
    if len(rows) > most:
      raise InputError(
        f'the request asks for {len(rows)} texts (num_samples, or n for each '
        f'prompt); at most {most} are allowed'
      )
    for row in rows:
      row.on_change, row.group = on_change, self._group(row)
    with self._changed:
      if self.is_closing:
        raise FullError('the server is stopping')
      queue = self._queues.get(client, [])
      num_own = sum(not row.is_cancelled for row in queue)
      if num_own + len(rows) > MAX_CLIENT_ROWS:
        raise FullError(
          f'{num_own} of your texts are queued; at most {MAX_CLIENT_ROWS} are '
          'allowed, so wait until some of them are done'
        )
      if self.num_waiting() + len(rows) > MAX_ROWS:
        raise FullError(f'the queue of {MAX_ROWS} waiting texts is full')
      self._queues[client] = [*queue, *rows]
      self._changed.notify_all()

  def _lengths(self, run: Run) -> list[int]:
    """The lengths that canvases are padded to, ascending."""
    if not can_pad(run):
      return [self.length]
    unit = run.objective.block_size or 1
    lengths, length = {self.length}, self.length // 2
    while length >= MIN_LENGTH:
      lengths.add(min(-(-length // unit) * unit, self.length))
      length //= 2
    return sorted(lengths)

  def _group(self, row: Row) -> _Group:
    length = len(row.tokens)
    if can_pad(row.run):
      length = min(n for n in self._lengths(row.run) if n >= length)
    return _Group(row.run.sampler, length, row.logprobs is not None)

  def _sample_all(self):
    """Samples batches until the engine closes."""
    while True:
      with self._changed:
        while (batch := self._take()) is None:
          if self.is_closing:
            return
          self._changed.wait()
        self._current, program, size = batch
      try:
        with self._device:
          self._fill(self._current, program, size)
      except Exception:
        # The cause may be specific to this batch, so the thread continues.
        log.exception('sampling a batch failed')
        for row in self._current:
          row.fail('sampling failed; see the server log')
      with self._changed:
        self._current = []

  def _take(self) -> tuple[list[Row], Any, int] | None:
    """Removes the rows of the next batch from the queues.

    Returns them, their program and its batch size; None if none is compiled.
    """
    self._drop_rows()
    for client, queue in self._queues.items():
      group = queue[0].group
      sizes = [size for size in self._sizes if (group, size) in self._programs]
      if sizes:
        size = _best_size(sizes, self.num_waiting(group))
        self._programs.move_to_end((group, size))
        rows = self._take_turns(client, group, size)
        return rows, self._programs[group, size], size
      for row in queue:
        if row.state == 'waiting' and row.group == group:
          row.change(state='compiling')
    return None

  def _take_turns(self, client: Hashable, group: _Group, size: int):
    """Takes up to `size` rows of a group, beginning with one of `client`."""
    own = self._queues.pop(client)
    queues = [own, *self._queues.values()]
    self._queues[client] = own  # Now its turn is the last.
    fitting = [[row for row in queue if row.group == group] for queue in queues]
    turns = itertools.chain(*itertools.zip_longest(*fitting))
    rows = [row for row in turns if row is not None][:size]
    for queue in queues:
      queue[:] = [row for row in queue if row not in rows]
    for row in rows:
      row.state = 'running'
    return rows

  def _drop_rows(self):
    """Removes rows that are cancelled or whose program does not compile."""
    failed = set()
    for client, queue in list(self._queues.items()):
      for row in queue:
        if error := self._errors.get((row.group, self._sizes[0])):
          row.fail(error)
          failed.add(row.group)
      queue[:] = [row for row in queue if not (row.is_cancelled or row.is_over)]
      if not queue:
        del self._queues[client]
    # They are tried again for the next request: memory may be free by then.
    for key in [key for key in self._errors if key[0] in failed]:
      del self._errors[key]

  def _next_program(self) -> tuple[_Group, int] | None:
    """The group and batch size to compile next.

    Programs that rows wait for come first, then those that would sample the
    waiting rows faster, then those of the warm-up.
    """
    least = self._sizes[0]
    rows = itertools.chain(*self._queues.values())
    groups = dict.fromkeys(row.group for row in rows if not row.is_cancelled)
    groups = [g for g in groups if (g, least) not in self._errors]
    keys = [(group, least) for group in groups]
    for group in groups:
      sizes = [
        size for size in self._sizes if (group, size) not in self._errors
      ]
      keys.append((group, _best_size(sizes, self.num_waiting(group))))
    known = self._programs.keys() | self._errors.keys()
    return next((key for key in keys + self._warm_up if key not in known), None)

  def _compile_all(self):
    """Compiles the programs that are needed until the engine closes."""
    while True:
      with self._changed:
        while (key := self._next_program()) is None:
          if self.is_closing:
            return
          self._changed.wait()
      program, error = None, 'these settings do not compile; see the server log'
      try:
        program = self._compile(*key)
      except InputError as caught:
        error = str(caught)
      except Exception:
        log.exception('compiling a sampler failed')
      with self._changed:
        self._warm_up = [other for other in self._warm_up if other != key]
        if program is None:
          self._errors[key] = error
        else:
          self._programs[key] = program
        if len(self._programs) > MAX_PROGRAMS:
          self._programs.popitem(last=False)
        self._changed.notify_all()

  def _compile(self, group: _Group, size: int) -> Any:
    run = self.lm.run
    mask_id = run.tokenizer.mask_id
    view = watch.View(self._watch, mask_id, reveals=group.reveals)
    step = steps.make_rows_step(run.scorer, group.sampler, run.mesh, view)
    return step.lower(self.lm.params, self._rows([], group, size)).compile()

  def _rows(self, rows: list[Row], group: _Group, size: int) -> steps.Rows:
    """Puts rows on the device, padded to `size` of them."""
    mask_id = self.lm.tokenizer.mask_id
    tokens = np.full((size, group.length), mask_id, np.int32)
    fixed = np.ones(tokens.shape, bool)
    lengths = np.full(size, group.length, np.int32)
    # Always the largest batch, so that the keys are compiled once.
    seeds = np.zeros([3, self._sizes[-1]], np.uint32)
    temperature, top_p = np.ones((2, size), np.float32)
    top_k = np.zeros(size, np.int32)
    for i, row in enumerate(rows):
      lengths[i] = n = len(row.tokens)
      tokens[i, :n], fixed[i, :n] = row.tokens, row.fixed
      seeds[:, i] = *divmod(row.seed, 1 << 32), row.index
      temperature[i], top_p[i] = row.draw.temperature, row.draw.top_p
      top_k[i] = row.draw.top_k
    keys = np.asarray(_row_key_data(seeds[:2].T, seeds[2]))[:size]
    batch = steps.Rows(keys, tokens, fixed, lengths, temperature, top_k, top_p)
    return meshes.shard_whole_batch(self.lm.run.mesh, batch)

  def _fill(self, rows: list[Row], program: Any, size: int):
    """Samples one batch and stores its canvases."""
    for row in rows:
      row.change()  # Its state; clients are not notified under the lock.
    group = rows[0].group
    samples = program(self.lm.params, self._rows(rows, group, size))
    num_calls = int(samples.num_calls)
    for row, tokens in zip(rows, jax.device_get(samples.tokens)):
      if not self.is_closing:  # Then `close` has failed the row.
        canvas = tokens[: len(row.tokens)]
        row.change(frame=(num_calls, canvas), state='done')

  def _watch(self, event: Any) -> bool:
    """Shows each row its part of an event; see `watch.Watch`."""
    rows = self._current
    if isinstance(event, watch.Revealed):
      # All rows of a program that reveals have them.
      kept = [row.logprobs for row in rows if row.logprobs]
      return watch.Logprobs.keep(kept, event)
    shown = zip(rows[event.first_row :], event.tokens, event.start)
    for row, tokens, start in shown:
      if row.is_cancelled:
        continue
      canvas = row.canvas
      if start < len(canvas):
        canvas = canvas.copy()
        watch.paste(canvas, tokens, start)
      num_made, row.num_asked = row.num_asked, row.num_asked + event.num_calls
      row.change(frame=(num_made, canvas))
    is_unwanted = bool(rows) and all(row.is_cancelled for row in rows)
    return not (self.is_closing or is_unwanted)


def can_pad(run: Run) -> bool:
  """Whether padding a canvas leaves the law of its tokens unchanged."""
  # The time given to a network depends on the canvas's length. Padding is not
  # masked in a cache, and changes where a canvas has room; one-way networks do
  # not see it in any case.
  is_one_way = run.objective.causal or run.objective.block_size
  return bool(is_one_way) or not (
    run.network.knows_time
    or run.sampler.needs_cache
    or run.objective.any_length
  )


def _best_size(sizes: Sequence[int], num_rows: int) -> int:
  """The largest of ascending sizes that is two thirds full, else the least."""
  return max((x for x in sizes if 2 * x <= 3 * num_rows), default=sizes[0])


@jax.jit
def _row_key_data(seeds: jax.Array, index: jax.Array) -> jax.Array:
  """Returns [B, 2] uint32, the keys of the first prompt in `sample_prompts`."""

  def key_data(seed, i):
    key = jax.random.fold_in(jax.random.fold_in(seed, 0), 0)
    return jax.random.key_data(jax.random.fold_in(key, i))

  return jax.vmap(key_data)(jax.random.wrap_key_data(seeds), index)

"""The engine: batches, turns between clients, compiled programs."""

import dataclasses
import threading

import jax
import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm.noise.categorical import Draw
from nanodlm.serving import engine as engines
from tests.serving.servers import finish, NEVER, row, wait_for


def ignore():
  """Takes no notice of a change."""


def test_a_row_does_not_depend_on_its_batch(running):
  engine = running[0].engine
  draw = Draw(engine.lm.tokenizer.mask_id, 0.5, 3, 0.7)
  others = [row(engine, 'ab{3}c{}', i, seed=i, draw=draw) for i in range(11)]
  make = lambda i: row(engine, 'q{}z', i)
  alone = [finish(engine, make(i))[0] for i in range(2)]
  together = finish(engine, *others[:5], make(1), *others[5:], make(0))
  assert [together[-1], together[5]] == alone
  assert alone[0] != alone[1]


def test_a_seed_gives_the_tokens_of_mode_sample(opened, running):
  engine = running[0].engine
  # Here, temperature, top-k and top-p are not compiled in.
  run = opened.run.with_sampler({'temperature': 0.8, 'top_k': 40, 'top_p': 0.9})
  key = jax.random.fold_in(jax.random.key(3), 0)
  tokens, fixed = lms.lay_out(run, 'a{}b', engine.length)
  canvas = np.tile(tokens, (3, 1)), np.tile(fixed, (3, 1))
  expected, _ = lms.make_fill(run)(opened.params, key, *canvas)
  draw = Draw(run.tokenizer.mask_id, 0.8, 40, 0.9)
  actual = finish(engine, *(row(engine, 'a{}b', i, 3, draw) for i in range(3)))
  np.testing.assert_array_equal(actual, expected)


def test_each_row_shows_its_own_canvas(running):
  engine = running[0].engine
  frames = []
  rows = [row(engine, 'a{}'), row(engine, 'b{4}c')]
  engine.submit('me', rows, lambda: frames.append([x.canvas for x in rows]))
  wait_for(lambda: all(x.is_over for x in rows))
  mask_id = engine.lm.tokenizer.mask_id
  assert [len(x.canvas) for x in rows] == [16, 6]
  for i, x in enumerate(rows):
    for frame in frames:
      np.testing.assert_array_equal(frame[i][x.fixed], x.tokens[x.fixed])
      is_drawn = frame[i] != mask_id
      np.testing.assert_array_equal(frame[i][is_drawn], x.canvas[is_drawn])
    assert not np.any(x.canvas == mask_id)
  num_hidden = {int(np.sum(frame[0] == mask_id)) for frame in frames}
  assert len(num_hidden) > 2  # One call after the other.


def test_clients_take_turns(opened, monkeypatch):
  monkeypatch.setattr(engines, 'MAX_CLIENT_ROWS', 40)
  monkeypatch.setattr(engines, 'MAX_ROWS', 60)
  engine = engines.Engine(opened)
  make = lambda: [row(engine, 'a{}', i) for i in range(30)]
  rows = make()
  engine.submit('greedy', rows, ignore)
  for name in ('one', 'two'):
    engine.submit(name, [row(engine, name, seed=len(name))], ignore)
  other = row(engine, 'a{}', num_steps=3)
  engine.submit('other settings', [other], ignore)

  def take():
    with engine._changed:
      return engine._take()

  assert take() is None  # No program is compiled.
  engine._programs[rows[0].group, 8] = 'first'
  taken, program, size = take()
  assert (program, size, len(taken)) == ('first', 8, 8)
  assert sum(x in rows for x in taken) == 6
  # The turn of the other settings comes although the greedy client has more.
  engine._programs[other.group, 8] = 'second'
  assert [take()[1] for _ in range(2)] == ['second', 'first']
  with pytest.raises(engines.FullError, match='16 of your.*at most 40'):
    engine.submit('greedy', make(), ignore)
  engine.submit('third', make(), ignore)
  with pytest.raises(engines.FullError, match='60 waiting'):
    engine.submit('fourth', make(), ignore)


def test_cancelled_rows_stop_the_network(opened):
  engine = engines.Engine(opened)
  watch, returned = engine._watch, []

  def recording(event):
    returned.append(watch(event))
    return returned[-1]

  engine._watch = recording
  engine.start()
  del returned[:]
  mine = row(engine, 'a{}')

  def cancel_after_two():
    if mine.num_calls == 2:
      mine.is_cancelled = True

  engine.submit('me', [mine], cancel_after_two)
  wait_for(lambda: not engine._current and not engine.num_waiting())
  num_devices = jax.device_count()  # Each device asks for its own rows.
  assert returned[0] and not returned[-1]
  assert sum(returned) <= 2 * num_devices
  waiting = row(engine, 'a{}')
  engine.submit('me', [waiting], ignore)
  waiting.is_cancelled = True
  assert engine.num_waiting() == 0
  assert finish(engine, row(engine, 'b{}'))
  assert engine.close()
  assert not engine.is_alive()
  with pytest.raises(engines.FullError, match='stopping'):
    engine.submit('me', [row(engine, 'a{}')], ignore)


@pytest.mark.parametrize('num_calls', [0, 2])
def test_rows_fail_when_the_engine_closes(opened, num_calls):
  engine = engines.Engine(opened)
  states, mine = [], row(engine, 'a{}')

  def close_in_time():
    states.append(mine.state)
    if mine.state == 'running' and mine.num_calls == num_calls:
      threading.Thread(target=engine.close, args=(0,)).start()
      wait_for(lambda: mine.state == 'failed')

  engine.submit('me', [mine], close_in_time)
  engine.start(warm_up=False)
  wait_for(lambda: mine.is_over)
  assert engine.close()
  assert mine.state == 'failed' and mine.error == 'the server is stopping'
  assert 'running' in states and 'done' not in states


def test_programs_are_compiled_for_rows_that_wait(opened):
  engine = engines.Engine(opened)
  compile_one = engine._compile
  holds, proceed = threading.Event(), threading.Event()
  compiled = []

  def compile_held(group, size):
    compiled.append((group.sampler.num_steps, size))
    holds.set()
    proceed.wait(NEVER)
    return compile_one(group, size)

  engine._compile = compile_held
  engine.start(warm_up=False)
  rows = [row(engine, 'a{}', num_steps=n) for n in (2, 3, 4)]
  for client, x in enumerate(rows):
    engine.submit(client, [x], ignore)
    assert holds.wait(NEVER)
  rows[1].is_cancelled = True
  proceed.set()
  wait_for(lambda: rows[0].is_over and rows[2].is_over)
  assert [num_steps for num_steps, _ in compiled] == [2, 4]
  assert engine.close()


def test_a_size_that_does_not_compile_is_tried_once(opened):
  engine = engines.Engine(opened)
  compile_one, tried = engine._compile, []

  def compile_small(group, size):
    tried.append(size)
    if size > engine._sizes[0]:
      raise RuntimeError('out of memory')
    return compile_one(group, size)

  engine._compile = compile_small
  engine.start(warm_up=False)
  for _ in range(2):
    rows = [row(engine, 'a{}', i) for i in range(4 * engine._sizes[0])]
    finish(engine, *rows)
  assert len(tried) == len(set(tried)) > 1
  assert engine.close()


def test_rows_fail_if_their_program_does_not_compile(opened):
  engine = engines.Engine(opened)
  compile_one = engine._compile

  def fail(group, size):
    raise RuntimeError('out of memory')

  engine._compile = fail
  engine.start(warm_up=False)
  for _ in range(2):
    mine = row(engine, 'a{}')
    engine.submit('me', [mine], ignore)
    wait_for(lambda: mine.is_over)
    assert mine.state == 'failed' and 'do not compile' in mine.error
  assert engine.is_alive()
  engine._compile = compile_one
  finish(engine, row(engine, 'a{}'))
  assert engine.close()


def test_the_least_recently_used_program_is_dropped(opened, monkeypatch):
  monkeypatch.setattr(engines, 'MAX_PROGRAMS', 2)
  engine = engines.Engine(opened)
  compile_one, compiled = engine._compile, []

  def recording(group, size):
    compiled.append(group.sampler.num_steps)
    return compile_one(group, size)

  engine._compile = recording
  engine.start(warm_up=False)
  for num_steps in (2, 3, 2, 4, 2, 3):
    finish(engine, row(engine, 'a{}', num_steps=num_steps))
  assert compiled == [2, 3, 4, 3]
  assert engine.close()


def test_padding_does_not_change_tokens(opened, monkeypatch):
  greedy = Draw(opened.tokenizer.mask_id, 0.0)
  choice = {'name': 'confidence', 'num_steps': 8}  # Deterministic.
  filled = []
  for min_length in (8, 16):
    monkeypatch.setattr(engines, 'MIN_LENGTH', min_length)
    engine = engines.Engine(opened)
    engine.start(warm_up=False)
    one = row(engine, 'ab{4}c', draw=greedy, **choice)
    filled += finish(engine, one)
    assert one.group.length == min_length
    assert engine.close()
  assert filled[0] == filled[1] and len(filled[0]) == 7


def test_canvases_are_padded_where_that_keeps_their_law(opened):
  engine = engines.Engine(opened)
  assert engines.can_pad(engine.choose('fixed_count'))
  assert not engines.can_pad(engine.choose('prefix_cache'))
  network = opened.run.network
  timed = dataclasses.replace(network.config, time_conditioning=True)
  run = dataclasses.replace(
    opened.run, network=dataclasses.replace(network, config=timed)
  )
  engine = engines.Engine(dataclasses.replace(opened, run=run))
  assert not engines.can_pad(engine.choose('fixed_count'))
  # Padding changes where a canvas has room.
  expands = dataclasses.replace(opened.run.objective, expand=True)
  assert not engines.can_pad(dataclasses.replace(opened.run, objective=expands))

"""Speed and memory of a config's training step and samplers, on random tokens.

    python -m nanodlm.benchmark --config=configs/chars_small.py --vocab_size=67

Imports no TensorFlow and reads no data. Times are wall-clock, synchronised after
every step.
"""

import json
import resource
import statistics
import sys
import time

from nanodlm import hugepages

if __name__ == '__main__':
  hugepages.restart_with_huge_pages()

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app
from absl import flags
from absl import logging
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np

from nanodlm import config as configs
from nanodlm import mesh as meshes
from nanodlm import model
from nanodlm import optim
from nanodlm import state as states
from nanodlm import step as steps
from nanodlm import tokenizers
from nanodlm.types import Canvas
from nanodlm.types import InputError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The settings.')
_VOCAB_SIZE = flags.DEFINE_integer(
    'vocab_size', 0, 'Number of ids, the mask included; 0 asks the tokenizer.',
    lower_bound=0)
_NUM_WARMUP = flags.DEFINE_integer('num_warmup', 3, 'Steps not timed.',
                                   lower_bound=1)
_NUM_TIMED = flags.DEFINE_integer('num_timed', 10, 'Training steps timed.',
                                  lower_bound=1)
_NUM_SAMPLES = flags.DEFINE_integer('num_samples', 4, 'Samples drawn at once.',
                                    lower_bound=1)
_SAMPLERS = flags.DEFINE_list(
    'samplers', None, 'Samplers timed; all that fit the objective by default, '
    '"none" for none.')
_JSON = flags.DEFINE_bool('json', False, 'One JSON object instead of a table.')

MATMUL_SIZE = 2048


def matmul_flops(dtype: str) -> float:
  """FLOP/s of a [2048, 2048] matrix product through XLA here, best of ten."""
  x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
  multiply = jax.jit(jnp.dot)
  secs = _time(lambda: multiply(x, x), 3, 10)
  return 2 * MATMUL_SIZE**3 / min(secs)


def _time(run, num_warmup: int, num_timed: int) -> list[float]:
  """Seconds of each timed call, after the warm-up."""
  secs = []
  for i in range(num_warmup + num_timed):
    start = time.perf_counter()
    jax.block_until_ready(run())
    if i >= num_warmup:
      secs.append(time.perf_counter() - start)
  return secs


def _peak_bytes() -> int:
  """The device's peak where it keeps count, else the process's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _build(config, settings, vocab_size: int):
  """The mesh, the objective and the network of a config."""
  mesh = meshes.make_mesh(settings.mesh)
  network = steps.Network(configs.make_model(config, vocab_size),
                          settings.train.chunk_size, meshes.shards(mesh))
  return mesh, configs.make_objective(config, vocab_size - 1), network


def benchmark_train(config, settings, vocab_size: int) -> dict[str, float]:
  """Times the training step; see the keys."""
  mesh, objective, network = _build(config, settings, vocab_size)
  num_steps = settings.train.num_steps
  optimizer = optim.make_optimizer(settings.optim, num_steps)
  train_step = steps.make_train_step(
      network, objective, optimizer, optim.make_schedule(settings.optim, num_steps),
      mesh, batch_size=settings.train.batch_size,
      num_microbatches=settings.train.num_microbatches,
      ema_decay=settings.optim.ema_decay)
  init = lambda: states.init_state(network.config, optimizer, settings.seed,
                                   settings.optim.ema_decay > 0, network.shards)
  state = jax.jit(init, out_shardings=meshes.shardings(
      mesh, jax.eval_shape(init)))()
  num_parameters = model.num_params(state.params)
  shape = (settings.train.batch_size, settings.data.length)
  generator = np.random.default_rng(0)

  def step():
    nonlocal state
    tokens = generator.integers(0, vocab_size - 1, shape, dtype=np.int32)
    rows = meshes.local_rows(mesh, shape[0])
    batch = {'tokens': tokens[rows], 'weight': np.ones(shape, np.float32)[rows],
             'num_bytes': np.full(shape[0], shape[1], np.int32)[rows]}
    state, values = train_step(state, meshes.shard_batch(mesh, batch))
    return state, values

  start = time.perf_counter()
  jax.block_until_ready(step())
  compile_secs = time.perf_counter() - start
  secs = _time(step, _NUM_WARMUP.value - 1, _NUM_TIMED.value)
  median = statistics.median(secs)
  num_tokens = shape[0] * shape[1]
  flops = model.train_flops_per_token(network.config, shape[1]) * num_tokens
  return {'num_params': num_parameters, 'compile_secs': compile_secs,
          'median_secs': median, 'min_secs': min(secs), 'max_secs': max(secs),
          'tokens_per_sec': num_tokens / median, 'flops_per_sec': flops / median,
          'peak_bytes': _peak_bytes()}


def benchmark_sampler(config, settings, vocab_size: int, name: str
                      ) -> dict[str, float]:
  """Times one sampler with random weights; see the keys."""
  config = config.copy_and_resolve_references()
  config.sampler.name = name
  mesh, objective, network = _build(config, settings, vocab_size)
  sample_step = steps.make_sample_step(
      network, objective, configs.make_sampler(config, vocab_size - 1), mesh)
  init = lambda: network.init_params(jax.random.key(0))
  params = jax.jit(init, out_shardings=meshes.shardings(
      mesh, jax.eval_shape(init)))()
  length = settings.sample.length or settings.data.length
  shape = (_NUM_SAMPLES.value, length)
  canvas = jax.device_put(Canvas(jnp.zeros(shape, jnp.int32),
                                 jnp.zeros(shape, bool)),
                          meshes.batch_sharding(mesh))
  samples = jax.block_until_ready(sample_step(params, jax.random.key(0), canvas))
  secs = _time(lambda: sample_step(params, jax.random.key(1), canvas), 0, 3)
  median = statistics.median(secs)
  return {'num_calls': int(samples.num_calls), 'median_secs': median,
          'min_secs': min(secs), 'max_secs': max(secs),
          'tokens_per_sec': shape[0] * length / median}


def main(argv):
  # JAX tells on the terminal which devices it did not find.
  logging.set_verbosity(logging.ERROR)
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments: {argv[1:]}')
  if _CONFIG.value is None:
    raise app.UsageError('--config is needed')
  try:
    _main(_CONFIG.value)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  return 0


def _main(config):
  settings = configs.validate(config)
  vocab_size = _VOCAB_SIZE.value or tokenizers.make_tokenizer(
      settings.tokenizer).vocab_size
  fitting = configs.fitting_samplers(config.objective.name)
  chosen = _SAMPLERS.value if _SAMPLERS.value is not None else fitting
  chosen = [] if chosen == ['none'] else chosen
  if unknown := sorted(set(chosen) - set(fitting)):
    raise InputError(f'--samplers={unknown} do not fit objective.name='
                     f'{config.objective.name!r}; these do: {fitting}')
  rate = matmul_flops(config.model.dtype)
  results = {'device': jax.devices()[0].device_kind,
             'num_devices': jax.device_count(), 'dtype': config.model.dtype,
             'matmul_flops_per_sec': rate,
             'train': benchmark_train(config, settings, vocab_size)}
  for name in chosen:
    results[f'sample/{name}'] = benchmark_sampler(config, settings, vocab_size,
                                                  name)
  if _JSON.value:
    print(json.dumps(results))
    return
  train = results['train']
  print(f'{results["num_devices"]} x {results["device"]}, {results["dtype"]}, '
        f'matrix product {rate / 1e9:,.0f} GFLOP/s')
  print(f'{train["num_params"]:,} parameters, batch {settings.train.batch_size} x '
        f'{settings.data.length} tokens, {config.objective.name} objective, first '
        f'step {train["compile_secs"]:.1f} s')
  print(f'{"":22}{"calls":>6}{"secs":>9}{"min":>9}{"max":>9}{"tokens/s":>12}'
        f'{"GFLOP/s":>10}{"share":>7}{"peak MB":>9}')
  for name, row in results.items():
    if not isinstance(row, dict):
      continue
    flops = row.get('flops_per_sec')
    print(f'{name:22}{row.get("num_calls", ""):>6}{row["median_secs"]:9.3f}'
          f'{row["min_secs"]:9.3f}{row["max_secs"]:9.3f}'
          f'{row["tokens_per_sec"]:12,.0f}'
          + (f'{flops / 1e9:10,.0f}{flops / rate:7.0%}' if flops else ' ' * 17)
          + (f'{row["peak_bytes"] / 1e6:9,.0f}' if 'peak_bytes' in row else ''))
  print('GFLOP/s: model FLOPs, 6 x matrix parameters + attention for every token, '
        'whatever the code saves; share: of the matrix product above.')


if __name__ == '__main__':
  app.run(main)

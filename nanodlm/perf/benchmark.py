"""Speed and memory of a config's training, evaluation and samplers; random tokens.

    python -m nanodlm.perf.benchmark --config=configs/chars_small.py --vocab_size=67
    python -m nanodlm.perf.benchmark --config=configs/tiny.py --scaling=1,2,4,8

Times are wall-clock, synchronised after every call. Each is held against two
things: a plain masked language model of the same size, written here (dense
logits, Optax's cross entropy, XLA's attention), and the roofline of this device,

    max(FLOPs / rate of a matrix product, bytes / rate of a copy),

with the FLOPs of the compiled training step, loops multiplied out, or of the
forward passes that an evaluation or a sampler cannot do without, and the bytes of
the parameters (in training: of the state, read and written) for each of them.

--scaling times nothing: it compiles the training step for so many devices, with
config.train.batch_size examples for each, and counts FLOPs and collectives. On a
CPU the devices are virtual.

Imports no TensorFlow and reads no data.
"""

import importlib.util
import json
import pathlib
import resource
import statistics
import sys
import time
from typing import Any

from nanodlm.devices import hugepages

if __name__ == '__main__':
  hugepages.restart_with_huge_pages()

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app, flags, logging
import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import config_flags
import numpy as np
import optax

from nanodlm import config as configs
from nanodlm.devices import mesh as meshes
from nanodlm.model.config import ModelConfig, train_flops_per_token
from nanodlm.perf import compile as ahead
from nanodlm.perf import hlo
from nanodlm.samplers import prefix_cache
from nanodlm.steps import train as steps
from nanodlm.training import optim
from nanodlm.types import Canvas, InputError

_CONFIG = config_flags.DEFINE_config_file('config', None, 'The settings.')
_VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size',
  0,
  'Number of ids, the mask included; 0 asks the tokenizer.',
  lower_bound=0,
)
_NUM_WARMUP = flags.DEFINE_integer(
  'num_warmup', 3, 'Steps not timed.', lower_bound=1
)
_NUM_TIMED = flags.DEFINE_integer(
  'num_timed', 10, 'Training steps timed.', lower_bound=1
)
_NUM_SAMPLES = flags.DEFINE_integer(
  'num_samples', 4, 'Samples drawn at once.', lower_bound=1
)
_SAMPLERS = flags.DEFINE_list(
  'samplers',
  None,
  'Samplers timed; all that fit the objective by default, "none" for none.',
)
_REFERENCE = flags.DEFINE_bool(
  'reference', True, 'Whether to time the plain model too (on one device).'
)
_SCALING = flags.DEFINE_list(
  'scaling', [], 'Numbers of devices, as 1,2,4,8: counts instead of times.'
)
_JSON = flags.DEFINE_bool('json', False, 'One JSON object instead of a table.')
_PLOT = flags.DEFINE_string('plot', '', 'A PNG file to draw the results to.')

MATMUL_SIZE = 2048
COPY_BYTES = 1 << 28


def matmul_flops(dtype: str) -> float:
  """FLOP/s of a [2048, 2048] matrix product through XLA here, best of ten."""
  x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
  multiply = jax.jit(jnp.dot)
  secs = _time(lambda: multiply(x, x), 3, 10)
  return 2 * MATMUL_SIZE**3 / min(secs)


def copy_bytes() -> float:
  """Bytes/s read and written by adding 1 to 256 MB here, best of ten."""
  x = jnp.zeros(COPY_BYTES // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def run():
    nonlocal x
    x = add(x)
    return x

  return 2 * COPY_BYTES / min(_time(run, 3, 10))


def _time(run, num_warmup: int, num_timed: int) -> list[float]:
  """Seconds of each timed call, after the warm-up."""
  secs = []
  for i in range(num_warmup + num_timed):
    start = time.perf_counter()
    jax.block_until_ready(run())
    if i >= num_warmup:
      secs.append(time.perf_counter() - start)
  return secs


def _row(secs: list[float], num_tokens: int) -> dict[str, float]:
  """What is said of every timed thing."""
  median = statistics.median(secs)
  return {
    'median_secs': median,
    'min_secs': min(secs),
    'max_secs': max(secs),
    'tokens_per_sec': num_tokens / median,
  }


def _peak_bytes() -> int:
  """The device's peak where it keeps count, else the process's."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _build(config, settings, vocab_size: int, devices=None):
  """The mesh, the objective and the network of a config."""
  mesh = meshes.make_mesh(settings.mesh, devices)
  network = steps.Network(
    configs.make_model(config, vocab_size),
    settings.train.chunk_size,
    meshes.shards(mesh),
  )
  return mesh, configs.make_objective(config, vocab_size - 1), network


def _forward_flops(config: ModelConfig, length: int) -> float:
  """Of one token, without the output projection."""
  head = 6 * config.embed_dim * config.vocab_size
  return (train_flops_per_token(config, length) - head) / 3


def _random_batch(
  generator, settings, vocab_size: int, batch_size: int = 0
) -> dict[str, np.ndarray]:
  shape = (batch_size or settings.train.batch_size, settings.data.length)
  tokens = generator.integers(0, vocab_size - 1, shape, dtype=np.int32)
  return {
    'tokens': tokens,
    'weight': np.ones(shape, np.float32),
    'num_bytes': np.full(shape[0], shape[1], np.int32),
  }


def benchmark_train(config, settings, vocab_size: int) -> dict[str, float]:
  """Times the training step; see the keys."""
  start = time.perf_counter()
  mesh, objective, network = _build(config, settings, vocab_size)
  training = steps.make_training(settings, network, objective, mesh)
  state = meshes.init_sharded(mesh, training.init_state)
  state_bytes = meshes.bytes_per_device(state)
  generator = np.random.default_rng(0)
  put = lambda batch: meshes.shard_whole_batch(mesh, batch)
  train_step = training.step.lower(
    state, put(_random_batch(generator, settings, vocab_size))
  ).compile()
  hugepages.release_free_memory()

  def step():
    nonlocal state
    state, values = train_step(
      state, put(_random_batch(generator, settings, vocab_size))
    )
    return state, values

  jax.block_until_ready(step())
  compile_secs = time.perf_counter() - start
  secs = _time(step, _NUM_WARMUP.value - 1, _NUM_TIMED.value)
  length = settings.data.length
  num_tokens = settings.train.batch_size * length
  flops = train_flops_per_token(network.config, length) * num_tokens
  counted = hlo.cost(hlo.parse(train_step.as_text())).flops  # of one device
  return {
    'num_params': network.num_params(objective),
    'compile_secs': compile_secs,
    **_row(secs, num_tokens),
    'least_flops': counted,
    'least_bytes': 2 * state_bytes,
    'flops_per_sec': flops / statistics.median(secs),
    'peak_bytes': _peak_bytes(),
  }


def benchmark_eval(config, settings, vocab_size: int) -> dict[str, float]:
  """Times the evaluation step, all draws of a batch; see the keys."""
  mesh, objective, network = _build(config, settings, vocab_size)
  num_draws = 1 if objective.exact else settings.eval.num_draws
  steps.check_batch_size(
    settings.eval.batch_size, mesh, 1, 1, 'eval.batch_size'
  )
  eval_step = steps.make_eval_step(
    network, objective, mesh, num_draws=num_draws, seed=0
  )
  params = _init_params(network, objective, mesh)
  size, length = settings.eval.batch_size, settings.data.length
  batch = _random_batch(np.random.default_rng(0), settings, vocab_size, size)
  batch = meshes.shard_whole_batch(
    mesh, {**batch, 'index': np.arange(size, dtype=np.int32)}
  )
  secs = _time(
    lambda: eval_step(params, batch), 1, max(_NUM_TIMED.value // num_draws, 3)
  )
  # At least a position of each draw is projected; half of them on average.
  flops = num_draws * size * length * _forward_flops(network.config, length)
  return {
    'num_calls': num_draws,
    **_row(secs, num_draws * size * length),
    'least_flops': flops / jax.device_count(),
    'least_bytes': num_draws * meshes.bytes_per_device(params),
  }


def _init_params(network: steps.Network, objective, mesh):
  return meshes.init_sharded(
    mesh, lambda: network.init_params(objective, jax.random.key(0))
  )


def _tokens_per_call(sampler: Any, length: int) -> int:
  """Positions of a row that a call of the network takes at least."""
  if not getattr(
    sampler, 'cache', isinstance(sampler, prefix_cache.PrefixCache)
  ):
    return length
  if hasattr(sampler, 'inner'):
    return min(sampler.block_size or prefix_cache.DEFAULT_BLOCK_SIZE, length)
  return 1


def benchmark_sampler(
  config, settings, vocab_size: int, name: str
) -> dict[str, float]:
  """Times one sampler with random weights; see the keys."""
  config = config.copy_and_resolve_references()
  config.sampler.name = name
  mesh, objective, network = _build(config, settings, vocab_size)
  sampler = configs.make_sampler(config, vocab_size - 1)
  sample_step = steps.make_sample_step(network, objective, sampler, mesh)
  params = _init_params(network, objective, mesh)
  length = settings.sample.length or settings.data.length
  shards = meshes.num_batch_shards(mesh)
  shape = (-(-_NUM_SAMPLES.value // shards) * shards, length)
  canvas = jax.device_put(
    Canvas(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool)),
    meshes.batch_sharding(mesh),
  )
  samples = jax.block_until_ready(
    sample_step(params, jax.random.key(0), canvas)
  )
  secs = _time(lambda: sample_step(params, jax.random.key(1), canvas), 0, 3)
  num_calls, num_tokens = int(samples.num_calls), shape[0] * length
  rows = _tokens_per_call(sampler, length) * shape[0]
  flops = (
    num_calls * rows * _forward_flops(network.config, length)
    + 2 * num_tokens * network.config.embed_dim * vocab_size
  )
  return {
    'num_calls': num_calls,
    **_row(secs, num_tokens),
    'least_flops': flops / jax.device_count(),
    'least_bytes': num_calls * meshes.bytes_per_device(params),
  }


class PlainBlock(nn.Module):
  """A block as one writes it first."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.config
    dense = lambda size: nn.Dense(size, use_bias=False, dtype=cfg.dtype)
    heads = (*x.shape[:2], cfg.num_heads, cfg.head_dim)
    h = nn.RMSNorm(dtype=cfg.dtype)(x)
    q, k, v = (dense(cfg.embed_dim)(h).reshape(heads) for _ in range(3))
    h = jax.nn.dot_product_attention(q, k, v, implementation='xla')
    x = x + dense(cfg.embed_dim)(h.reshape(x.shape))
    h = nn.RMSNorm(dtype=cfg.dtype)(x)
    up = dense(cfg.mlp_width)(h)
    up = nn.silu(dense(cfg.mlp_width)(h)) * up if cfg.is_gated else nn.gelu(up)
    return x + dense(cfg.embed_dim)(up)


class PlainModel(nn.Module):
  """tokens [B, L] -> logits [B, L, V] float32, the embedding tied or not."""

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens):
    cfg = self.config
    embed = nn.Embed(cfg.vocab_size, cfg.embed_dim, dtype=cfg.dtype)
    x = embed(tokens) + self.param(
      'positions',
      nn.initializers.normal(0.02),
      (1, tokens.shape[1], cfg.embed_dim),
    ).astype(cfg.dtype)
    for _ in range(cfg.num_layers):
      x = PlainBlock(cfg)(x)
    x = nn.RMSNorm(dtype=cfg.dtype)(x)
    if cfg.tie_embeddings:
      return embed.attend(x).astype(jnp.float32)
    return nn.Dense(cfg.vocab_size, use_bias=False, dtype=cfg.dtype)(x).astype(
      jnp.float32
    )


def benchmark_reference(config, settings, vocab_size: int) -> dict[str, float]:
  """Times a training step of a plain masked model of the same size."""
  network = PlainModel(configs.make_model(config, vocab_size))
  optimizer = optim.make_optimizer(settings.optim, settings.train.num_steps)
  shape = (settings.train.batch_size, settings.data.length)
  num_microbatches = settings.train.num_microbatches

  def loss(params, key, tokens):
    time_key, mask_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (tokens.shape[0], 1), minval=1e-3)
    masked = jax.random.uniform(mask_key, tokens.shape) < t
    logits = network.apply(params, jnp.where(masked, vocab_size - 1, tokens))
    ce = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return jnp.mean(jnp.where(masked, ce / t, 0.0))

  def step(params, opt_state, key, tokens):
    def add(total, micro):
      gradient = jax.grad(loss)(params, *micro)
      return jax.tree.map(jnp.add, total, gradient), None

    if num_microbatches == 1:
      gradient = jax.grad(loss)(params, key, tokens)
    else:
      micro = (
        jax.random.split(key, num_microbatches),
        tokens.reshape(num_microbatches, -1, shape[1]),
      )
      gradient, _ = jax.lax.scan(
        add, jax.tree.map(jnp.zeros_like, params), micro
      )
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  params = jax.jit(network.init)(jax.random.key(0), jnp.zeros(shape, jnp.int32))
  state = params, jax.jit(optimizer.init)(params)
  step = jax.jit(step, donate_argnums=(0, 1))
  generator = np.random.default_rng(0)

  def run():
    nonlocal state
    tokens = generator.integers(0, vocab_size - 1, shape, dtype=np.int32)
    state = step(*state, jax.random.key(generator.integers(1 << 30)), tokens)
    return state

  secs = _time(run, _NUM_WARMUP.value, _NUM_TIMED.value)
  return _row(secs, shape[0] * shape[1])


def count_scaling(config, vocab_size: int, num_devices: int) -> dict[str, Any]:
  """Counts a training step on the first of the devices; see the keys."""
  config = config.copy_and_resolve_references()
  config.train.batch_size *= num_devices
  settings = configs.validate(config)
  mesh, objective, network = _build(
    config, settings, vocab_size, jax.devices()[:num_devices]
  )
  training = steps.make_training(settings, network, objective, mesh)
  state = meshes.shapes_sharded(mesh, training.init_state)
  batch = meshes.place(
    meshes.batch_sharding(mesh),
    _random_batch(np.random.default_rng(0), settings, vocab_size),
  )
  compiled = training.step.lower(state, batch).compile()
  cost, memory = (
    hlo.cost(hlo.parse(compiled.as_text())),
    compiled.memory_analysis(),
  )
  return {
    'mesh': dict(mesh.shape),
    'batch_size': config.train.batch_size,
    'flops_per_device': cost.flops,
    'state_bytes_per_device': memory.argument_size_in_bytes,
    'temporary_bytes_per_device': memory.temp_size_in_bytes,
    'collectives': {
      kind: {'number': n, 'bytes': size}
      for kind, (n, size) in sorted(cost.collectives.items())
    },
  }


def main(argv):
  """Benchmarks the config of the command line; 2 for a mistake in it."""
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
  plot = pathlib.Path(_PLOT.value)
  if _PLOT.value and not (plot.suffix == '.png' and plot.parent.is_dir()):
    raise InputError(
      f'--plot={_PLOT.value!r} must be a .png file in a folder that exists'
    )
  if _PLOT.value and importlib.util.find_spec('matplotlib') is None:
    raise InputError(
      f"--plot={_PLOT.value!r} needs matplotlib: pip install -e '.[plots]'"
    )
  sizes = _parse_scaling()
  if sizes:
    jax.config.update('jax_num_cpu_devices', max(sizes))
  settings = configs.validate(config)
  vocab_size = ahead.find_vocab_size(settings, _VOCAB_SIZE.value)
  if sizes:
    if len(jax.devices()) < max(sizes):
      raise InputError(
        f'--scaling={_SCALING.value}: there are {len(jax.devices())} devices'
      )
    results = {str(n): count_scaling(config, vocab_size, n) for n in sizes}
  else:
    results = run_benchmarks(config, settings, vocab_size)
  if _JSON.value:
    print(json.dumps(results))
  else:
    print(format_scaling(results) if sizes else format_table(results, config))
  if _PLOT.value:
    draw = plot_scaling if sizes else plot_shares
    draw(results, plot)


def _parse_scaling() -> list[int]:
  try:
    sizes = [int(text) for text in _SCALING.value]
  except ValueError:
    sizes = [0]
  if sizes and min(sizes) < 1:
    raise InputError(
      f'--scaling={",".join(_SCALING.value)} must be whole numbers '
      '>= 1, as 1,2,4,8'
    )
  return sizes


def run_benchmarks(config, settings, vocab_size: int) -> dict[str, Any]:
  """Everything that is timed, by name, and what it is measured against."""
  fitting = configs.fitting_samplers(config.objective.name)
  chosen = _SAMPLERS.value if _SAMPLERS.value is not None else fitting
  chosen = [] if chosen == ['none'] else chosen
  if unknown := sorted(set(chosen) - set(fitting)):
    raise InputError(
      f'--samplers={unknown} do not fit objective.name='
      f'{config.objective.name!r}; these do: {fitting}'
    )
  # First, since the peak of the memory is the process's.
  rows = {'train': benchmark_train(config, settings, vocab_size)}
  if _REFERENCE.value and jax.device_count() == 1:
    rows['reference'] = benchmark_reference(config, settings, vocab_size)
  rows['eval'] = benchmark_eval(config, settings, vocab_size)
  for name in chosen:
    rows[f'sample/{name}'] = benchmark_sampler(
      config, settings, vocab_size, name
    )
  flops_rate, copy_rate = matmul_flops(config.model.dtype), copy_bytes()
  for row in rows.values():
    if 'least_flops' in row:
      row['roofline_secs'] = max(
        row['least_flops'] / flops_rate, row['least_bytes'] / copy_rate
      )
      row['roofline_share'] = row['roofline_secs'] / row['median_secs']
  return {
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    'dtype': config.model.dtype,
    'matmul_flops_per_sec': flops_rate,
    'copy_bytes_per_sec': copy_rate,
    **rows,
  }


def format_table(results: dict[str, Any], config) -> str:
  """The times for people."""
  train, rate = results['train'], results['matmul_flops_per_sec']
  lines = [
    f'{results["num_devices"]} x {results["device"]}, {results["dtype"]}, matrix '
    f'product {rate / 1e9:,.0f} GFLOP/s, copy '
    f'{results["copy_bytes_per_sec"] / 1e9:,.1f} GB/s',
    f'{train["num_params"]:,} parameters, batch {config.train.batch_size} x '
    f'{config.data.length} tokens, {config.objective.name} objective, first '
    f'step {train["compile_secs"]:.1f} s',
    f'{"":22}{"calls":>6}{"secs":>9}{"min":>9}{"max":>9}{"tokens/s":>12}'
    f'{"GFLOP/s":>10}{"share":>7}{"roofline":>10}{"peak MB":>9}',
  ]
  for name, row in results.items():
    if not isinstance(row, dict):
      continue
    flops = row.get('flops_per_sec')
    roofline = row.get('roofline_share')
    lines.append(
      f'{name:22}{row.get("num_calls", ""):>6}{row["median_secs"]:9.3f}'
      f'{row["min_secs"]:9.3f}{row["max_secs"]:9.3f}'
      f'{row["tokens_per_sec"]:12,.0f}'
      + (f'{flops / 1e9:10,.0f}{flops / rate:7.0%}' if flops else ' ' * 17)
      + (f'{roofline:10.0%}' if roofline else ' ' * 10)
      + (f'{row["peak_bytes"] / 1e6:9,.0f}' if 'peak_bytes' in row else '')
    )
  lines.append(
    'GFLOP/s: model FLOPs, 6 x matrix parameters + attention for every token, '
    'whatever the code saves; share: of the matrix product above. roofline: '
    'share of the time that the work done cannot do without.'
  )
  if 'reference' in results:
    ratio = train['tokens_per_sec'] / results['reference']['tokens_per_sec']
    lines.append(f'{ratio:.2f} x the tokens/s of the plain reference')
  return '\n'.join(lines)


def format_scaling(results: dict[str, Any]) -> str:
  """The counts for people."""
  lines = [
    f'{"devices":>7}  {"data x fsdp x tensor":22}{"batch":>6}'
    f'{"GFLOP/device":>14}{"state MB":>10}{"temp. MB":>10}'
    '  collectives of a step, per device'
  ]
  for n, row in results.items():
    collectives = (
      ', '.join(
        f'{kind} {said["number"]:g} x, {said["bytes"] / 1e6:.2f} MB'
        for kind, said in row['collectives'].items()
      )
      or 'none'
    )
    lines.append(
      f'{n:>7}  {" x ".join(map(str, row["mesh"].values())):22}'
      f'{row["batch_size"]:6}{row["flops_per_device"] / 1e9:14.3f}'
      f'{row["state_bytes_per_device"] / 1e6:10.2f}'
      f'{row["temporary_bytes_per_device"] / 1e6:10.2f}  {collectives}'
    )
  return '\n'.join(lines)


def plot_shares(results: dict[str, Any], path: pathlib.Path):
  """How near each thing timed is to its roofline, as bars from 0; seconds beside.

  The plain reference, whose own work is not counted, has no bar.
  """
  from matplotlib import figure

  rows = {
    name: row
    for name, row in results.items()
    if isinstance(row, dict) and 'roofline_share' in row
  }
  fig = figure.Figure(figsize=(8, 1 + 0.4 * len(rows)), layout='constrained')
  axes = fig.subplots()
  bars = axes.barh(
    list(rows), [100 * row['roofline_share'] for row in rows.values()]
  )
  axes.bar_label(
    bars,
    [
      f'{row["median_secs"]:.3g} s, {row["tokens_per_sec"]:,.0f} tokens/s'
      for row in rows.values()
    ],
    padding=4,
  )
  axes.axvline(100, linestyle=':', color='gray')
  # Room for the labels.
  axes.set(
    xlim=(0, max(100, *axes.get_xlim()) * 1.4),
    xlabel='% of the speed that the roofline allows',
    title=f'{results["device"]}, {results["dtype"]}',
  )
  axes.invert_yaxis()
  fig.savefig(path, dpi=150)


def plot_scaling(results: dict[str, Any], path: pathlib.Path):
  """What a device computes, holds and sends, against the number of devices."""
  from matplotlib import figure

  fig = figure.Figure(figsize=(8, 4), layout='constrained')
  axes = fig.subplots()
  sizes = [int(n) for n in results]
  rows = list(results.values())
  for label, values in {
    'FLOPs': [row['flops_per_device'] for row in rows],
    'bytes of state': [row['state_bytes_per_device'] for row in rows],
    'bytes of collectives': [
      sum(said['bytes'] for said in row['collectives'].values()) for row in rows
    ],
  }.items():
    axes.plot(sizes, values, marker='o', label=f'{label} per device')
  axes.set(
    xscale='log', yscale='log', xlabel='devices, as many times the batch'
  )
  axes.set_xticks([], minor=True)
  axes.set_xticks(sizes, map(str, sizes))
  axes.grid(alpha=0.3)
  axes.legend()
  fig.savefig(path, dpi=150)


if __name__ == '__main__':
  app.run(main)

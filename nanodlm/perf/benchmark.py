r"""--mode=benchmark: speed and memory of training, evaluation and samplers.

    python launch.py --mode=benchmark --config=configs/chars_small.py \
        --vocab_size=67
    python launch.py --mode=benchmark --config=configs/tiny.py --scaling=1,2,4,8

Tokens are random; no data is read and TensorFlow is not imported. Times are
wall-clock times of calls that wait for their results. They are compared with
the rate of a matrix product, and with a plain masked language model of the same
size, defined here: dense logits, Optax's cross entropy, XLA's attention.

--scaling times nothing: it compiles the training step for each number of
devices, with config.train.batch_size examples per device, and counts FLOPs and
collectives. CPU devices are virtual.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import resource
import statistics
import sys
import time
from typing import Any, cast

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from nanodlm import run as runs
from nanodlm.config import Settings, Start
from nanodlm.devices import hugepages
from nanodlm.devices import mesh as meshes
from nanodlm.model.config import ModelConfig
from nanodlm.model.network import TransformerNetwork
from nanodlm.perf import compile as ahead
from nanodlm.run import Run
from nanodlm.steps import sample as sample_steps
from nanodlm.training import metrics, optim
from nanodlm.types import InputError

MATMUL_SIZE = 2048
NUM_WARMUP = 3


def define_flags():
  """Defines the flags of --mode=benchmark."""
  integer = functools.partial(flags.DEFINE_integer, lower_bound=1)
  integer('vocab_size', 0, 'Ids; 0 for those of the tokenizer.', lower_bound=0)
  integer('num_timed', 10, 'Training steps timed.')
  integer('num_samples', 4, 'Samples drawn at once.')
  flags.DEFINE_list(
    'samplers', None, 'Samplers to time; by default all that fit the objective.'
  )
  flags.DEFINE_list(
    'scaling', [], 'Numbers of devices, such as 1,2,4,8: counts, not times.'
  )
  flags.DEFINE_bool('json', False, 'Print one JSON object instead of a table.')


def main(start: Start) -> int:
  """Runs --mode=benchmark, which prints a table, or a JSON object."""
  options = flags.FLAGS
  if not start.is_given:
    raise InputError('--mode=benchmark needs --config')
  sizes = [int(text) if text.isdigit() else 0 for text in options.scaling]
  if 0 in sizes:
    raise InputError(
      f'--scaling={",".join(options.scaling)} must be whole numbers >= 1, '
      'such as 1,2,4,8'
    )
  if sizes:
    jax.config.update('jax_num_cpu_devices', max(sizes))
  # Programs that were kept would hide the time that they take to compile.
  jax.config.update('jax_enable_compilation_cache', False)
  settings, _ = start.resolve()
  vocab_size = ahead.find_vocab_size(settings, options.vocab_size)
  if len(jax.devices()) < max(sizes, default=0):
    raise InputError(
      f'--scaling={",".join(options.scaling)} must be at most the number of '
      f'devices, {len(jax.devices())}'
    )
  if sizes:
    results = {str(n): count_scaling(settings, vocab_size, n) for n in sizes}
    text = format_scaling(results)
  else:
    run = runs.make_run(settings).with_vocabulary(vocab_size)
    results = time_programs(run, options)
    text = format_times(results, settings)
  print(json.dumps(results) if options.json else text)
  return 0


def time_programs(run: Run, options: flags.FlagValues) -> dict[str, Any]:
  """Times training, evaluation and samplers; returns rows of figures by name.

  Besides rows the results hold what they are measured against.
  """
  runs.check_training(run)
  fitting = runs.fitting_samplers(run.objective)
  chosen = fitting if options.samplers is None else options.samplers
  if unknown := sorted(set(chosen) - set(fitting)):
    raise InputError(
      f'--samplers={unknown} do not fit objective.name='
      f'{run.settings.objective["name"]!r}; allowed are {fitting}'
    )
  changed = {}
  for name in chosen:
    try:
      changed[name] = run.with_sampler({**run.settings.sampler, 'name': name})
    except InputError:
      if options.samplers is not None:  # Otherwise it needs another network.
        raise
  # Training comes first because the peak of memory may be the process's.
  rows = {'train': time_train(run, options.num_timed)}
  if jax.device_count() == 1 and isinstance(run.network, TransformerNetwork):
    config = run.network.config
    rows['reference'] = time_reference(run, config, options.num_timed)
  rows['eval'] = time_eval(run, options.num_timed)
  for name, with_sampler in changed.items():
    rows[f'sample/{name}'] = time_sampler(with_sampler, options.num_samples)
  dtype = run.settings.model['dtype']
  return {
    'device': jax.devices()[0].device_kind,
    'num_devices': jax.device_count(),
    'dtype': dtype,
    'matmul_flops_per_sec': matmul_flops(dtype),
    **rows,
  }


def matmul_flops(dtype: str) -> float:
  """Measures the FLOP/s of a [2048, 2048] matrix product, best of ten."""
  x = jnp.ones((MATMUL_SIZE, MATMUL_SIZE), dtype)
  multiply = jax.jit(jnp.dot)
  return 2 * MATMUL_SIZE**3 / min(_time(lambda: multiply(x, x), 10))


def _time(
  run: Callable[[], Any], num_timed: int, num_warmup: int = NUM_WARMUP
) -> list[float]:
  """Returns the seconds of each call after the warm-up."""
  secs = []
  for _ in range(num_warmup + num_timed):
    start = time.perf_counter()
    jax.block_until_ready(run())
    secs.append(time.perf_counter() - start)
  return secs[num_warmup:]


def _row(secs: list[float], num_tokens: int, **more: float) -> dict[str, float]:
  median = statistics.median(secs)
  return {
    'median_secs': median,
    'min_secs': min(secs),
    'max_secs': max(secs),
    'tokens_per_sec': num_tokens / median,
    **more,
  }


def _peak_bytes() -> int:
  """Returns the device's peak memory, or the process's if it is not counted."""
  stats = jax.local_devices()[0].memory_stats() or {}
  if 'peak_bytes_in_use' in stats:
    return stats['peak_bytes_in_use']
  # Linux counts in KiB, macOS in bytes.
  unit = 1 if sys.platform == 'darwin' else 1024
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _init_params(run: Run) -> Any:
  init = run.scorer.init_params
  return meshes.init_sharded(run.mesh, lambda: init(jax.random.key(0)))


def time_train(run: Run, num_timed: int) -> dict[str, float]:
  """Times the training step, with the transfer of its batch."""
  settings, training = run.settings, runs.make_training(run)
  start = time.perf_counter()
  state = meshes.init_sharded(run.mesh, training.init_state)
  batch = ahead.train_batch(run)
  put = lambda: meshes.shard_whole_batch(run.mesh, batch)
  compiled = cast(Any, training.step).lower(state, put()).compile()
  hugepages.release_free_memory()  # As training does.

  def step():
    nonlocal state
    state, values = compiled(state, put())
    return state, values

  jax.block_until_ready(step())
  compile_secs = time.perf_counter() - start
  secs = _time(step, num_timed, NUM_WARMUP - 1)
  num_tokens = settings.train.batch_size * settings.data.length
  flops = num_tokens * run.flops_per_token()
  known = {'flops_per_sec': flops / statistics.median(secs)} if flops else {}
  return _row(
    secs,
    num_tokens,
    num_params=run.num_params(),
    compile_secs=compile_secs,
    peak_bytes=_peak_bytes(),
    **known,
  )


def time_eval(run: Run, num_timed: int) -> dict[str, float]:
  """Times the evaluation step: all noise draws of a batch."""
  options = run.settings.eval
  num_draws = 1 if run.objective.exact else options.num_draws
  params, step = _init_params(run), ahead.make_eval_step(run)
  batch = ahead.random_batch(run, options.batch_size)
  batch = meshes.shard_whole_batch(run.mesh, batch)
  secs = _time(lambda: step(params, batch), max(num_timed // num_draws, 3), 1)
  num_tokens = num_draws * options.batch_size * run.settings.data.length
  num_calls = num_draws * (2 if run.network.self_conditions else 1)
  return _row(secs, num_tokens, num_calls=num_calls)


def time_sampler(run: Run, num_samples: int) -> dict[str, float]:
  """Times the run's sampler with initial parameters, on empty canvases."""
  params = _init_params(run)
  step = sample_steps.make_sample_step(run.scorer, run.sampler, run.mesh)
  canvas = ahead.blank_canvas(run, num_samples)
  canvas = meshes.shard_whole_batch(run.mesh, canvas)
  key = jax.random.key(1)
  sample = lambda: step(params, jax.random.clone(key), canvas)
  num_calls = int(sample().num_calls)
  return _row(_time(sample, 3, 0), canvas.tokens.size, num_calls=num_calls)


class PlainModel(nn.Module):
  """The model as first written down: tokens [B, L] -> logits [B, L, V].

  Convolutions are left out.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, tokens):
    cfg, heads = self.config, (*tokens.shape, self.config.num_heads, -1)
    dense = lambda size: nn.Dense(size, use_bias=False, dtype=cfg.dtype)
    norm = lambda x: nn.RMSNorm(dtype=cfg.dtype)(x)
    embed = nn.Embed(cfg.vocab_size, cfg.embed_dim, dtype=cfg.dtype)
    shape = (1, tokens.shape[1], cfg.embed_dim)
    positions = self.param('positions', nn.initializers.normal(0.02), shape)
    x = embed(tokens) + positions.astype(cfg.dtype)
    for _ in range(cfg.num_layers):
      h = norm(x)
      q, k, v = (dense(cfg.embed_dim)(h).reshape(heads) for _ in range(3))
      h = jax.nn.dot_product_attention(q, k, v, implementation='xla')
      x = x + dense(cfg.embed_dim)(h.reshape(x.shape))
      h = norm(x)
      up = dense(cfg.mlp_width)(h)
      h = nn.silu(dense(cfg.mlp_width)(h)) * up if cfg.is_gated else nn.gelu(up)
      x = x + dense(cfg.embed_dim)(h)
    x = norm(x)
    logits = embed.attend if cfg.tie_embeddings else dense(cfg.vocab_size)
    return logits(x).astype(jnp.float32)


def time_reference(
  run: Run, config: ModelConfig, num_timed: int
) -> dict[str, float]:
  """Times a training step of a plain masked model of the same size."""
  settings, network = run.settings, PlainModel(config)
  optimizer = optim.make_optimizer(settings.optim, settings.train.num_steps)
  num_micro = settings.train.num_microbatches

  def loss(params, key, tokens):
    time_key, mask_key = jax.random.split(key)
    t = jax.random.uniform(time_key, (tokens.shape[0], 1), minval=1e-3)
    masked = jax.random.uniform(mask_key, tokens.shape) < t
    logits = network.apply(
      params, jnp.where(masked, run.objective.mask_id, tokens)
    )
    ce = optax.softmax_cross_entropy_with_integer_labels(
      cast(jax.Array, logits), tokens
    )
    return jnp.mean(jnp.where(masked, ce / t, 0.0))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state, tokens):
    params, opt_state, key = state
    key, *keys = jax.random.split(key, num_micro + 1)

    def add(total, micro):
      return jax.tree.map(jnp.add, total, jax.grad(loss)(params, *micro)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(add, zeros, (jnp.stack(keys), tokens))
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, key

  tokens = ahead.train_batch(run).tokens
  tokens = tokens.reshape(num_micro, -1, settings.data.length)
  params = jax.jit(network.init)(jax.random.key(0), tokens[0])
  state = params, jax.jit(optimizer.init)(params), jax.random.key(1)

  def update():
    nonlocal state
    state = step(state, tokens)
    return state

  return _row(_time(update, num_timed), tokens.size)


def count_scaling(
  settings: Settings, vocab_size: int, num_devices: int
) -> dict[str, Any]:
  """Counts the work of a training step on the first `num_devices` devices."""
  batch_size = num_devices * settings.train.batch_size
  train = dataclasses.replace(settings.train, batch_size=batch_size)
  run = runs.make_run(
    dataclasses.replace(settings, train=train),
    devices=jax.devices()[:num_devices],
  )
  step, arguments = ahead.abstract_training(run.with_vocabulary(vocab_size))
  report = ahead.report_program(step.lower(*arguments), None, None)
  return {
    'mesh': dict(run.mesh.shape),
    'batch_size': batch_size,
    'flops_per_device': report['flops'],
    'state_bytes_per_device': report['argument_bytes'],
    'temporary_bytes_per_device': report['temporary_bytes'],
    'collectives': report['collectives'],
  }


_TIMES = (
  ('', 'name', ''),
  ('calls', 'num_calls', '.0f'),
  ('secs', 'median_secs', '.3f'),
  ('min', 'min_secs', '.3f'),
  ('max', 'max_secs', '.3f'),
  ('tokens/s', 'tokens_per_sec', ',.0f'),
  ('GFLOP/s', 'flops_per_sec', ',.0f', 1e9),
  ('share', 'matmul_share', '.0%'),
  ('peak MB', 'peak_bytes', ',.0f', 1e6),
)


def format_times(results: dict[str, Any], settings: Settings) -> str:
  """Formats the results of `time_programs` as a table."""
  rows = [
    {'name': name, **row}
    for name, row in results.items()
    if isinstance(row, dict)
  ]
  rate, train = results['matmul_flops_per_sec'], rows[0]
  if 'flops_per_sec' in train:
    train['matmul_share'] = train['flops_per_sec'] / (
      rate * results['num_devices']
    )
  lines = [
    f'{results["num_devices"]} x {results["device"]}, {results["dtype"]}, '
    f'matrix product {rate / 1e9:,.0f} GFLOP/s',
    f'{train["num_params"]:,} parameters, batch {settings.train.batch_size} x '
    f'{settings.data.length} tokens, {settings.objective["name"]} objective, '
    f'first step {train["compile_secs"]:.1f} s',
    *metrics.format_table(_TIMES, rows),
    'GFLOP/s: model FLOPs, even if the code saves some; usually, for each '
    'token, 6 x matrix parameters + attention. share: of the speed of the '
    'matrix product.',
  ]
  if 'reference' in results:
    plain = results['reference']['tokens_per_sec']
    ratio = train['tokens_per_sec'] / plain
    lines += [f'{ratio:.2f} x the tokens/s of the plain reference']
  return '\n'.join(lines)


_COUNTS = (
  ('devices', 'name', ''),
  ('batch', 'batch_size', '.0f'),
  ('GFLOP/device', 'flops_per_device', '.3f', 1e9),
  ('state MB', 'state_bytes_per_device', '.2f', 1e6),
  ('temp MB', 'temporary_bytes_per_device', '.2f', 1e6),
)


def format_scaling(results: dict[str, Any]) -> str:
  """Formats the results of `count_scaling` as a table."""
  rows = [
    {'name': f'{n} ({ahead.format_mesh(row["mesh"])})', **row}
    for n, row in results.items()
  ]
  lines = metrics.format_table(_COUNTS, rows)
  for row in rows:
    lines += [f'{row["name"]}, collectives per device and step:']
    lines += ahead.format_collectives(row)
  return '\n'.join(lines)

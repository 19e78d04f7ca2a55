"""The transformer: tokens (and t) -> hidden; hidden -> logits are two calls.

Pre-norm blocks with rotary positions, scanned over all layers but the last. The
last block is on its own because it can be told which positions are wanted: its
keys and values need every position, its output projection and MLP only those
that are scored (in training, half of them) or revealed (in sampling, a few).
"""

import dataclasses
import functools
from typing import Any
from typing import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from nanodlm import attention
from nanodlm import pallas_attention
from nanodlm import sharding
from nanodlm.sharding import Shards
from nanodlm.types import InputError

# Standard deviation of the initial weights, as in GPT-2.
INIT_STD = 0.02
# Epsilon of RMSNorm: keeps the all-zero vector finite; no effect on the bound.
NORM_EPS = 1e-6
TIME_FEATURES = 256
# The network sees 1000 t, so that the sinusoids below resolve t in [0, 1].
TIME_SCALE = 1000.0


@jax.custom_jvp
def relu2(x: jax.Array) -> jax.Array:
  """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
  return jnp.square(jnp.maximum(x, 0))


@relu2.defjvp
def _relu2_jvp(primals, tangents):
  # Keeps one array for the backward pass, where JAX's own rule keeps two.
  positive = jnp.maximum(primals[0], 0)
  return jnp.square(positive), 2 * positive * tangents[0]


# By this name 'dots' keeps the attention's output, a product of its own kernels.
ATTENTION_OUT = 'attention_out'
MLPS = {
    'gelu': functools.partial(nn.gelu, approximate=False),
    'relu2': relu2,
    'geglu': functools.partial(nn.gelu, approximate=False),
    'swiglu': nn.silu,
}
GATED = ('geglu', 'swiglu')
REMATS = {
    'none': None,
    'full': jax.checkpoint_policies.nothing_saveable,
    'dots': jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT)),
}
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network's shape; each field is a key of `config.model`.

  Attributes:
    vocab_size: ids, mask_id included (from the tokenizer).
    num_layers: blocks.
    embed_dim: width D.
    num_heads: attention heads; divides embed_dim into an even head size.
    mlp_dim: hidden width of the MLP; 0 is 4 D (or 8/3 D where it is gated,
      rounded up to a multiple of 64, for the same number of parameters).
    mlp: 'gelu' (erf), 'relu2' (squared ReLU), 'geglu' or 'swiglu'.
    qk_norm: RMSNorm on queries and keys of each head.
    tie_embeddings: the output projection is the embedding's transpose.
    dropout: rate on each block's two outputs, in [0, 1).
    time_conditioning: adaLN-zero on t (DiT, arXiv 2212.09748).
    causal: from the objective.
    block_size: from the objective; S > 0 is a network of block diffusion, which
      sees a noisy and a clean copy of its text.
    rope_theta: base of the rotary frequencies.
    dtype: of the matrix products; parameters are float32.
    remat: 'none', 'dots' (keeps matrix products) or 'full'.
    unroll: apply the layers one after another instead of in a scan: the same
      parameters and results, about 15% faster on a CPU (a scan first fills its
      stacked activations with zeros and copies each layer's in and out), slower
      to compile with many layers.
    attention: 'auto', 'xla', 'cudnn' or 'pallas'.
    platform: that programs are compiled for, 'cpu', 'gpu' or 'tpu'; '' is this
      machine's. (Ahead of time for a TPU it is not.)
  """

  vocab_size: int
  num_layers: int
  embed_dim: int
  num_heads: int
  mlp_dim: int
  mlp: str
  qk_norm: bool
  tie_embeddings: bool
  dropout: float
  time_conditioning: bool
  causal: bool
  block_size: int
  rope_theta: float
  dtype: str
  remat: str
  unroll: bool
  attention: str
  platform: str = ''

  def __post_init__(self):
    for key in ('num_layers', 'embed_dim', 'num_heads'):
      if getattr(self, key) < 1:
        raise InputError(f'model.{key}={getattr(self, key)!r} must be >= 1')
    if self.embed_dim % self.num_heads or self.head_dim % 2:
      raise InputError(
          f'model.num_heads={self.num_heads!r} must divide model.embed_dim='
          f'{self.embed_dim!r} into heads of an even size (rotary positions)')
    if self.mlp_dim < 0:
      raise InputError(f'model.mlp_dim={self.mlp_dim!r} must be >= 0 (0: chosen)')
    for key, allowed in (('mlp', MLPS), ('remat', REMATS), ('dtype', DTYPES)):
      if getattr(self, key) not in allowed:
        raise InputError(f'model.{key}={getattr(self, key)!r} is not one of '
                         f'{sorted(allowed)}')
    if not self.rope_theta > 0:
      raise InputError(f'model.rope_theta={self.rope_theta!r} must be > 0')
    if not 0 <= self.dropout < 1:
      raise InputError(f'model.dropout={self.dropout!r} must be in [0, 1)')
    attention.check_backend(self.attention,
                            self.platform or jax.default_backend())
    if self.block_size and self.time_conditioning:
      raise InputError('model.time_conditioning=True does not go with block '
                       'diffusion, whose blocks have times of their own; it must '
                       'be False')
    if self.block_size and self.attention == 'cudnn':
      raise InputError("model.attention='cudnn' does not know the pattern of "
                       "block diffusion; 'auto', 'xla' or 'pallas' are allowed")

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.embed_dim // self.num_heads

  @property
  def is_gated(self) -> bool:
    """Whether the MLP has a second input matrix, its gate."""
    return self.mlp in GATED

  @property
  def mlp_width(self) -> int:
    """Hidden width of the MLP, `mlp_dim` or its default."""
    if self.mlp_dim:
      return self.mlp_dim
    if self.is_gated:
      return -(-8 * self.embed_dim // (3 * 64)) * 64
    return 4 * self.embed_dim


class Cache(NamedTuple):
  """Keys and values of the positions that a sampler is done with.

  Attributes:
    layers: (keys, values), [num_layers - 1, B, C, H, Dh] each, or None.
    last: (keys, values) of the last layer, [B, C, H, Dh] each.
  """

  layers: Any
  last: Any


def rotary_table(positions: jax.Array, head_dim: int, theta: float) -> jax.Array:
  """cos and sin of the rotary angles at [L] positions, [2, L, 1, Dh / 2].

  Source: RoFormer, arXiv 2104.09864, equation 34.
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  angle = positions[:, None] * frequency[None]
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)])[:, :, None, :]


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
  """Applies rotary positions to x [B, L, H, Dh] (halves form the pairs)."""
  # In float32: bfloat16 angles would differ by 0.4% at every distance.
  cos, sin = table[:, None]
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([first * cos - second * sin,
                          second * cos + first * sin], axis=-1).astype(x.dtype)


def dropout_mask(keys: jax.Array, rate: float, shape: tuple[int, int]
                 ) -> jax.Array:
  """Factors 0 or 1 / (1 - rate), [B, L, D], each example's from its own key.

  So the mask does not depend on the device or micro-batch an example lands on.
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, shape)
  return jax.vmap(draw)(keys) / (1 - rate)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """x [T, D] times kernel [D, F] -> [T, F], with a backward pass for CPUs.

  JAX's own rule asks for the kernel's gradient as (dy^T x)^T, for which XLA's
  CPU backend makes a transposed copy of dy and fuses into it, element by element
  in the wrong order, whatever produced dy: at width 256 that copy alone took
  a third of the MLP's backward pass. Asking for x^T dy of a finished dy costs
  none.
  """
  return x @ kernel


def _linear_forward(x, kernel):
  return x @ kernel, (x, kernel)


def _linear_backward(residuals, dy):
  x, kernel = residuals
  # What is compiled ahead of time for a TPU is not for this machine's backend.
  dy = jax.lax.platform_dependent(
      dy, cpu=jax.lax.optimization_barrier, default=lambda dy: dy)
  return dy @ kernel.T, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


linear.defvjp(_linear_forward, _linear_backward)


class Linear(nn.Module):
  """A dense layer without bias, [..., D] -> [..., features].

  Attributes:
    features: size of the output.
    dtype: of the product.
    std: standard deviation of the initial kernel.
  """

  features: int
  dtype: Any
  std: float = INIT_STD

  @nn.compact
  def __call__(self, x):
    kernel = self.param('kernel', nn.initializers.normal(self.std),
                        (x.shape[-1], self.features))
    y = linear(x.reshape(-1, x.shape[-1]), kernel.astype(self.dtype))
    return y.reshape(*x.shape[:-1], self.features)


class RMSNorm(nn.Module):
  """x / rms(x), times a learned scale; computed in float32."""

  dtype: Any
  use_scale: bool = True
  platform: str = ''

  @nn.compact
  def __call__(self, x):
    scale = None
    if self.use_scale:
      scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    return _keeps_inputs(functools.partial(normalize, dtype=self.dtype),
                         self.platform)(x, scale)


def _keeps_inputs(f: Callable[..., Any], platform: str) -> Callable[..., Any]:
  """f, of which a backward pass keeps the arguments and nothing between.

  Not on a CPU, where working it out again costs what is saved.
  """
  if (platform or jax.default_backend()) == 'cpu':
    return f
  return jax.checkpoint(f, prevent_cse=False)


def normalize(x: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
  """x / rms(x) over the last axis, times the scale [D]; computed in float32."""
  x = x.astype(jnp.float32)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + NORM_EPS)
  if scale is not None:
    x = x * jnp.expand_dims(scale, range(x.ndim - 1))
  return x.astype(dtype)


class Heads(nn.Module):
  """Queries or keys [B, L, H, Dh]: QK-norm where configured, then rotated."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, rotary):
    cfg, scale = self.config, None
    if cfg.qk_norm:
      scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    if attention.has_kernels(cfg.attention, cfg.platform, x):
      return pallas_attention.rotate(x, scale, rotary, NORM_EPS)
    if scale is not None:
      x = normalize(x, scale, jnp.dtype(cfg.dtype))
    return rotate(x, rotary)


class Block(nn.Module):
  """Attention and MLP, each pre-normed and added to the residual stream.

  With time conditioning each branch is shifted, scaled and gated by the time
  (adaLN-zero): the gates start at 0, the norms have no scale of their own.
  """

  config: ModelConfig
  shards: Shards = Shards()

  @nn.compact
  def __call__(self, x, layer, cached, time, rotary, segment_ids, dropout_keys,
               visible, positions=None):
    """Applies the block.

    Args:
      x: [B, L, D]; B is even with `config.block_size`, noisy rows and clean ones.
      layer: [] int32, the block's index.
      cached: (keys, values) of other positions, [B, C, H, Dh] each, or None.
      time: [B, D] embedded time, or None.
      rotary: `rotary_table(L)`.
      segment_ids: [B, L] int32 or None.
      dropout_keys: [B] or None.
      visible: [C] bool, which of the cached positions are seen, or None.
      positions: [N] int32 indices into B * L of the rows wanted; None is all.

    Returns:
      [B, L, D], or [N, D] with `positions`; and the tokens' own (keys, values)
      where some are cached, else None.
    """
    cfg, shards = self.config, self.shards
    batch, length, width = x.shape
    dtype = jnp.dtype(cfg.dtype)
    # This device's: a part of the heads and of the MLP.
    num_heads = cfg.num_heads // shards.tensor
    inner, mlp_width = num_heads * cfg.head_dim, cfg.mlp_width // shards.tensor
    norm = functools.partial(RMSNorm, dtype, not cfg.time_conditioning,
                             cfg.platform)

    def pick(y):  # [B, L, D] -> the wanted rows
      return y if positions is None else y.reshape(-1, y.shape[-1])[positions]

    def pick_time(y):  # [B, D] -> broadcastable to the wanted rows
      return y[:, None] if positions is None else y[positions // length]

    def branch(y, gate, salt):
      if gate is not None:
        y = y * pick_time(gate)
      if dropout_keys is not None and cfg.dropout:
        keys = jax.vmap(lambda key: jax.random.fold_in(
            jax.random.fold_in(key, layer), salt))(dropout_keys)
        y = y * pick(dropout_mask(keys, cfg.dropout, (length, width))
                     ).astype(y.dtype)
      return y

    gate1 = gate2 = None
    if cfg.time_conditioning:
      modulation = nn.Dense(6 * width // shards.tensor, dtype=dtype,
                            name='modulation',
                            kernel_init=nn.initializers.zeros)(nn.silu(time))
      modulation = sharding.concatenate(modulation, shards)
      shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
          modulation, 6, axis=-1)

    h = norm(name='attention_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + scale1[:, None]) + shift1[:, None]
    h = sharding.split(h, shards)
    q, k, v = (
        Linear(inner, dtype, name=name)(h).reshape(batch, length, num_heads,
                                                   cfg.head_dim)
        for name in ('query', 'key', 'value'))
    q, k = Heads(cfg, name='q_norm')(q, rotary), Heads(cfg, name='k_norm')(k, rotary)
    own = None
    if cached is not None:
      own = (k, v)
      h = attention.cached_attention(q, k, v, *cached, visible,
                                     causal=cfg.causal)
    elif cfg.block_size:
      if positions is not None:  # of the noisy rows, the last layer's output
        q = q[:batch // 2]
      h = attention.block_attention(
          q, k, v, block_size=cfg.block_size, segment_ids=segment_ids,
          backend=cfg.attention, platform=cfg.platform)
    else:
      h = attention.attention(q, k, v, causal=cfg.causal,
                              segment_ids=segment_ids, backend=cfg.attention,
                              platform=cfg.platform)
    h = pick(ad_checkpoint.checkpoint_name(h, ATTENTION_OUT).reshape(
        -1, length, inner))
    out_std = INIT_STD / (2 * cfg.num_layers) ** 0.5
    out = Linear(width, dtype, out_std, name='attention_out')(h)
    x = pick(x) + branch(sharding.join(out, shards), gate1, 0)

    h = norm(name='mlp_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + pick_time(scale2)) + pick_time(shift2)
    h = sharding.split(h, shards)
    up = Linear(mlp_width, dtype, name='mlp_in')(h)
    if cfg.is_gated:
      gate = Linear(mlp_width, dtype, name='mlp_gate')(h)
      up = _keeps_inputs(lambda gate, up: MLPS[cfg.mlp](gate) * up,
                         cfg.platform)(gate, up)
    else:
      up = MLPS[cfg.mlp](up)
    out = Linear(width, dtype, out_std, name='mlp_out')(up)
    return x + branch(sharding.join(out, shards), gate2, 1), own


class TimeEmbedding(nn.Module):
  """t -> [B, D]: sinusoids and a two-layer MLP (as in DiT)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, t):
    cfg = self.config
    half = TIME_FEATURES // 2
    frequency = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half) / half)
    angle = TIME_SCALE * t.astype(jnp.float32)[:, None] * frequency[None]
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    dense = functools.partial(nn.Dense, cfg.embed_dim, dtype=jnp.dtype(cfg.dtype),
                              kernel_init=nn.initializers.normal(INIT_STD))
    return dense(name='out')(nn.silu(dense(name='in')(features)))


class Transformer(nn.Module):
  """Tokens -> hidden; `output_logits` makes logits of them.

  Attributes:
    config: the network's shape.
    shards: over how many devices its parameters are split. The blocks gather
      theirs over fsdp when they run; `gather_ends` does it for the others.
  """

  config: ModelConfig
  shards: Shards = Shards()

  def setup(self):
    cfg = self.config
    shape = (sharding.padded(cfg.vocab_size, self.shards) // self.shards.tensor,
             cfg.embed_dim)
    self.embedding = self.param('embedding', nn.initializers.normal(INIT_STD),
                                shape)
    if not cfg.tie_embeddings:
      self.output = self.param('output', nn.initializers.normal(INIT_STD), shape)
    if cfg.time_conditioning:
      self.time_embedding = TimeEmbedding(cfg)
    if cfg.num_layers > 1:
      self.layers = Block(cfg)
    self.last_layer = Block(cfg)
    self.final_norm = RMSNorm(jnp.dtype(cfg.dtype), platform=cfg.platform)

  def __call__(self, tokens: jax.Array, t: jax.Array | None = None, *,
               clean: jax.Array | None = None,
               segment_ids: jax.Array | None = None,
               dropout_keys: jax.Array | None = None,
               positions: jax.Array | None = None) -> jax.Array:
    """The network up to, not including, the output projection.

    Args:
      tokens: [B, L] int32.
      t: [B] float32 in [0, 1]; read with time conditioning only.
      clean: [B, L] int32, the clean text, with `config.block_size` only.
      segment_ids: [B, L] int32; a position attends within its segment.
      dropout_keys: [B], one per example; None turns dropout off.
      positions: [N] int32 indices into B * L of the rows wanted, None for all.
        The last block computes its output for those only.

    Returns:
      hidden [B, L, D], or [N, D] with `positions`, in the compute dtype.
    """
    shape = tokens.shape
    if self.config.block_size:
      twice = lambda x: None if x is None else jnp.concatenate([x, x])
      tokens, t = jnp.concatenate([tokens, clean]), twice(t)
      segment_ids = twice(segment_ids)
      if dropout_keys is not None:  # the copies' masks are independent
        dropout_keys = jnp.concatenate(
            [jax.vmap(lambda key: jax.random.fold_in(key, copy))(dropout_keys)
             for copy in range(2)])
    wanted = positions
    if self.config.block_size and positions is None:
      wanted = jnp.arange(shape[0] * shape[1])
    hidden, _ = self._layers(tokens, t, jnp.arange(shape[1]), Cache(None, None),
                             segment_ids, dropout_keys, None, wanted)
    if positions is None:
      hidden = hidden.reshape(*shape, -1)
    return hidden

  def advance(self, tokens: jax.Array, t: jax.Array | None, start: jax.Array,
              cache: Cache, visible: jax.Array,
              positions: jax.Array | None = None) -> tuple[jax.Array, Cache]:
    """The network on S consecutive tokens, the rest coming from a cache.

    Args:
      tokens: [B, S] int32.
      t: [B] float32; read with time conditioning only.
      start: [] int32, the position of the first of them.
      cache: of C positions, with start + S <= C.
      visible: [C] bool, the cached positions that the tokens see.
      positions: [N] int32 indices into B * S of the rows wanted, None for all.

    Returns:
      hidden [B, S, D] or [N, D], and the cache with the tokens' own keys and
      values at start .. start + S - 1.
    """
    where = start + jnp.arange(tokens.shape[1])
    hidden, own = self._layers(tokens, t, where, cache, None, None, visible,
                               positions)

    def write(old, new):
      return jax.lax.dynamic_update_slice_in_dim(
          old, new.astype(old.dtype), start, axis=old.ndim - 3)
    return hidden, jax.tree.map(write, cache, own)

  def _layers(self, tokens, t, where, cache, segment_ids, dropout_keys, visible,
              positions):
    """Hidden states of tokens at `where` [L], and their own keys and values."""
    cfg = self.config
    last_layer = cfg.num_layers - 1
    x = self._embed(tokens)
    time = self.time_embedding(t) if cfg.time_conditioning else None
    rotary = rotary_table(where, cfg.head_dim, cfg.rope_theta)
    args = (time, rotary, segment_ids, dropout_keys, visible)
    if self.is_initializing():
      self._init_layers(x, args)
    own = None
    if cfg.num_layers > 1:
      # In a scan XLA does not undo the recomputation; elsewhere it would.
      apply = self._make_apply(prevent_cse=cfg.unroll)

      def body(x, layer):
        params, index, cached = layer
        return apply(params, x, index, cached, *args)
      layers = (self.layers.variables['params'], jnp.arange(last_layer),
                cache.layers)
      x, own = (_unrolled_scan if cfg.unroll else jax.lax.scan)(body, x, layers)
    x, last = self._make_apply(prevent_cse=True)(
        self.last_layer.variables['params'], x, last_layer, cache.last, *args,
        positions)
    return self.final_norm(x), Cache(own, last)

  def _embed(self, tokens):
    """[B, L] -> [B, L, D]."""
    # Rows first, then the cast: the gradients of a row, the mask's above all,
    # are summed in float32.
    dtype = jnp.dtype(self.config.dtype)
    if self.shards.tensor == 1:
      return self.embedding[tokens].astype(dtype)
    size = self.embedding.shape[0]
    tokens = tokens - jax.lax.axis_index(sharding.TENSOR) * size
    is_here = (tokens >= 0) & (tokens < size)
    rows = self.embedding[jnp.where(is_here, tokens, 0)]
    rows = jnp.where(is_here[..., None], rows, 0.0)
    return sharding.join(rows, self.shards).astype(dtype)

  def _make_apply(self, prevent_cse):
    """apply(params, x, layer, cached, *args) of a block, with remat."""
    cfg, shards = self.config, self.shards

    def apply(params, x, *args):
      params = sharding.gather(params, shards, jnp.dtype(cfg.dtype))
      return Block(cfg, shards, parent=None).apply({'params': params}, x, *args)
    policy = REMATS[cfg.remat]
    if cfg.remat == 'none':
      if shards.fsdp == 1:
        return apply
      policy = sharding.save_all_but_gathered
    return jax.checkpoint(apply, policy=policy, prevent_cse=prevent_cse)

  def _init_layers(self, x, args):
    """Draws the parameters of all blocks, those of the scan stacked."""
    num_layers = self.config.num_layers
    if num_layers > 1:
      nn.scan(lambda block, x, layer: block(x, layer, None, *args),
              variable_axes={'params': 0}, split_rngs={'params': True},
              length=num_layers - 1)(self.layers, x, jnp.arange(num_layers - 1))
    self.last_layer(x, num_layers - 1, None, *args)


def _unrolled_scan(body, carry, xs):
  """jax.lax.scan, one step written after another."""
  # unstack and not indexing: its transpose stacks, where n index operations
  # would each pad their gradient to the full stack.
  leaves, tree = jax.tree.flatten(xs)
  outs = []
  for x in zip(*map(jnp.unstack, leaves)):
    carry, out = body(carry, jax.tree.unflatten(tree, x))
    outs.append(out)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def init_cache(config: ModelConfig, batch_size: int, length: int,
               shards: Shards = Shards()) -> Cache:
  """An empty cache of `length` positions, in the compute dtype."""
  shape = (batch_size, length, config.num_heads // shards.tensor,
           config.head_dim)
  zeros = lambda *lead: (jnp.zeros(lead + shape, config.dtype),) * 2
  layers = zeros(config.num_layers - 1) if config.num_layers > 1 else None
  return Cache(layers, zeros())


def output_kernel(params) -> jax.Array:
  """The output projection's kernel [D, V] (float32), tied or not."""
  return params.get('output', params['embedding']).T


def output_logits(kernel: jax.Array, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] times kernel [D, V] -> [..., V] float32."""
  return jnp.dot(hidden, kernel.astype(hidden.dtype),
                 preferred_element_type=jnp.float32)


def init_params(config: ModelConfig, key: jax.Array, shards: Shards = Shards()):
  """Draws the initial parameters, a nested dict of float32 arrays, whole.

  The same numbers for any `shards`; only the vocabulary is padded for them, by
  rows of zeros, which stay zeros.
  """
  # Neither changes a shape; kernels do not take two tokens.
  config = dataclasses.replace(config, block_size=0, attention='xla')
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = Transformer(config).init(key, tokens, jnp.zeros((1,)))['params']
  padding = sharding.padded(config.vocab_size, shards) - config.vocab_size
  for name in {'embedding', 'output'} & set(params):
    params[name] = jnp.pad(params[name], ((0, padding), (0, 0)))
  return params


def check_shards(config: ModelConfig, shards: Shards, length: int = 0):
  """Raises InputError where the network cannot be split so.

  Args:
    config: the network.
    shards: over how many devices.
    length: of the texts, for what kernels ask of a device's part; 0: not checked.
  """
  for axis, keys in (('fsdp', ('embed_dim',)),
                     ('tensor', ('num_heads', 'mlp_width'))):
    size = getattr(shards, axis)
    for key in keys:
      if getattr(config, key) % size:
        name = 'mlp_dim' if key == 'mlp_width' else key
        chosen = ' (chosen, for 0)' if key == 'mlp_width' and not config.mlp_dim else ''
        raise InputError(
            f'mesh.{axis}={size!r} does not divide model.{name}='
            f'{getattr(config, key)!r}{chosen}; it must, as its parts lie on so '
            'many devices')
  if length:
    copies = 2 if config.block_size else 1
    attention.check_sizes(
        config.attention, config.num_heads // shards.tensor, config.head_dim, length,
        copies * length, jnp.dtype(config.dtype).itemsize)


def gather_ends(params, shards: Shards):
  """The parameters with all that belongs to no block gathered over fsdp."""
  blocks = ('layers', 'last_layer')
  ends = {name: tree for name, tree in params.items() if name not in blocks}
  return {**params, **sharding.gather(ends, shards)}


def num_params(params) -> int:
  """Number of scalars in a tree of arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))


def train_flops_per_token(config: ModelConfig, length: int) -> float:
  """Model FLOPs of one token's forward and backward pass.

  6 x (matrix parameters) + 12 x layers x length x width for the attention; a
  multiply-add is 2. Unreduced: counted as if every position went through every
  layer and the output projection; of block diffusion both copies' layers count.
  """
  width = config.embed_dim
  mlp = (3 if config.is_gated else 2) * width * config.mlp_width
  layers = config.num_layers * (4 * width**2 + mlp)
  copies = 2 if config.block_size else 1
  return (copies * (6 * layers + 12 * config.num_layers * length * width)
          + 6 * width * config.vocab_size)

"""The transformer: tokens (and t) -> hidden; hidden -> logits are two calls.

Pre-norm blocks, with rotary positions by default, scanned over all layers but
the last. That one is on its own because it can be told which positions are
wanted: its keys and values need every position, its output projection and MLP
only those that are scored (in training, half of them) or revealed (in sampling,
a few).
"""

import dataclasses
import functools
from typing import Any, Callable, NamedTuple

import flax.linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import attention, pallas_attention
from nanodlm.types import InputError

# Standard deviation of the initial weights, as in GPT-2.
INIT_STD = 0.02
TIME_FEATURES = 256
# The network sees 1000 t, so that the sinusoids below resolve t in [0, 1].
TIME_SCALE = 1000.0
# Their longest wave is about 2 pi times it.
TIME_PERIOD = 10_000.0
# The least share of kept tokens that 'sigma' tells of, as in SEDD and MDLM, whose
# schedules end there: behind it -log alpha is infinite.
MIN_TIME_ALPHA = 1e-3


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
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'relu2': relu2,
  'geglu': functools.partial(nn.gelu, approximate=False),
  'geglu_tanh': functools.partial(nn.gelu, approximate=True),
  'swiglu': nn.silu,
  'glu': nn.sigmoid,
}
GATED = ('geglu', 'geglu_tanh', 'swiglu', 'glu')
NORMS = ('rms', 'layer')
ATTENTION_BIASES = ('none', 'qkv', 'all')
REMATS = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
  ),
}
DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class TimeForm:
  """How a network is told the time, as one of the published ones is.

  Attributes:
    clock: t [B] in [0, 1] -> what the sinusoids are of.
    scales: modulated norms keep scales of their own.
    final: the final norm is modulated too.
    is_md4: sinusoids of DDPM's periods (the longest is the period itself), as
      many as the embedded time is wide; an MLP four times as wide inside; and the
      embedded time goes through the MLPs' own activation, not SiLU, to the norms.
  """

  clock: Callable[[jax.Array], jax.Array]
  scales: bool = False
  final: bool = False
  is_md4: bool = False


def _sigma(t):
  return -jnp.log1p(-jnp.minimum(t, 1 - MIN_TIME_ALPHA))


# 'dit': 1000 t, DiT's. | 'sigma': -log alpha where t = 1 - alpha, as on the linear
# schedule: SEDD, MDLM, Duo. | 'unit': t itself: GIDD. | 'constant': always 0, so
# that the network does not know the time: MDLM and BD3-LM, mostly. | 'md4': MD4's.
TIME_FORMS = {
  'dit': TimeForm(lambda t: TIME_SCALE * t),
  'sigma': TimeForm(_sigma, scales=True, final=True),
  'unit': TimeForm(lambda t: t, scales=True, final=True),
  'constant': TimeForm(jnp.zeros_like, scales=True, final=True),
  'md4': TimeForm(lambda t: TIME_SCALE * t, final=True, is_md4=True),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network's shape; each field is a key of `config.model`.

  Attributes:
    vocab_size: ids, mask_id included (from the tokenizer).
    num_layers: blocks.
    embed_dim: width D.
    num_heads: attention heads; divides embed_dim into an even head size.
    num_kv_heads: of keys and values, each shared by num_heads / num_kv_heads
      neighbouring queries (GQA, arXiv 2305.13245); 0: num_heads.
    head_size: 0 is embed_dim / num_heads.
    mlp_dim: hidden width of the MLP; 0 is 4 D (or 8/3 D where it is gated,
      rounded up to a multiple of 64, for the same number of parameters).
    mlp: 'gelu' (erf), 'gelu_tanh' (GPT-2's approximation), 'relu2' (squared
      ReLU); or gated: 'geglu', 'geglu_tanh', 'swiglu' or 'glu' (sigmoid).
    qk_norm: RMSNorm on queries and keys of each head.
    tie_embeddings: the output projection is the embedding's transpose.
    dropout: rate on each block's two outputs, in [0, 1).
    time_conditioning: adaLN-zero on t (DiT, arXiv 2212.09748).
    time_form: in which form, of TIME_FORMS.
    time_dim: width of the embedded time; 0 is embed_dim.
    output_bias: the output projection has a bias.
    embedding_dim: width of the embedding, from which a dense layer leads to
      embed_dim; 0 is embed_dim itself, without that layer.
    causal: from the objective.
    block_size: from the objective; S > 0 is a network of block diffusion, which
      sees a noisy and a clean copy of its text.
    rope_theta: base of the rotary frequencies.
    num_positions: 0, or so many learned positions that are added to the tokens'
      embeddings instead of the rotary ones: the longest text.
    norm: 'rms' (RMSNorm) or 'layer' (LayerNorm), before each branch and at the end.
    norm_eps: added to the mean square, or the variance; QK-norm's too. It keeps
      the all-zero vector finite.
    norm_bias: of LayerNorm.
    attention_bias: which of the attention's projections have one: 'none', 'qkv'
      (queries, keys and values) or 'all' (the output too).
    mlp_bias: whether the MLP's projections have one.
    shift_outputs: the output at position i is read from position i - 1 (at 0 from
      0), where a network that was once autoregressive predicts its token
      (DiffuLLaMA, arXiv 2410.17891; Dream, 2508.15487).
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
  num_kv_heads: int
  head_size: int
  mlp_dim: int
  mlp: str
  qk_norm: bool
  tie_embeddings: bool
  dropout: float
  time_conditioning: bool
  time_form: str
  time_dim: int
  output_bias: bool
  embedding_dim: int
  causal: bool
  block_size: int
  rope_theta: float
  num_positions: int
  norm: str
  norm_eps: float
  norm_bias: bool
  attention_bias: str
  mlp_bias: bool
  shift_outputs: bool
  dtype: str
  remat: str
  unroll: bool
  attention: str
  platform: str = ''

  def __post_init__(self):
    for key in ('num_layers', 'embed_dim', 'num_heads'):
      if getattr(self, key) < 1:
        raise InputError(f'model.{key}={getattr(self, key)!r} must be >= 1')
    for key in ('num_kv_heads', 'head_size', 'mlp_dim', 'num_positions'):
      if getattr(self, key) < 0:
        raise InputError(
          f'model.{key}={getattr(self, key)!r} must be >= 0 '
          f'(0: {"none" if key == "num_positions" else "chosen"})'
        )
    if (
      not self.head_size
      and self.embed_dim % self.num_heads
      or (not self.num_positions and self.head_dim % 2)
    ):
      raise InputError(
        f'model.num_heads={self.num_heads!r} must divide model.embed_dim='
        f'{self.embed_dim!r} into heads of an even size (rotary positions)'
        + (f'; model.head_size={self.head_size!r}' if self.head_size else '')
      )
    if self.num_heads % self.kv_heads:
      raise InputError(
        f'model.num_kv_heads={self.num_kv_heads!r} must divide '
        f'model.num_heads={self.num_heads!r}'
      )
    for key in ('time_dim', 'embedding_dim'):
      if getattr(self, key) < 0:
        raise InputError(
          f'model.{key}={getattr(self, key)!r} must be >= 0 (0: embed_dim)'
        )
    for key, allowed in (
      ('mlp', MLPS),
      ('remat', REMATS),
      ('dtype', DTYPES),
      ('norm', NORMS),
      ('attention_bias', ATTENTION_BIASES),
      ('time_form', TIME_FORMS),
    ):
      if getattr(self, key) not in allowed:
        raise InputError(
          f'model.{key}={getattr(self, key)!r} is not one of {sorted(allowed)}'
        )
    for key in ('rope_theta', 'norm_eps'):
      if not getattr(self, key) > 0:
        raise InputError(f'model.{key}={getattr(self, key)!r} must be > 0')
    if self.norm_bias and self.norm != 'layer':
      raise InputError(
        f'model.norm_bias=True has no effect with model.norm='
        f"{self.norm!r}, only with 'layer'"
      )
    if self.shift_outputs and (self.causal or self.block_size):
      raise InputError(
        'model.shift_outputs=True is for objectives that see a whole noisy text '
        "('masked', ...); 'ar' shifts its input, and 'block' sees blocks: it must "
        'be False with them'
      )
    if not 0 <= self.dropout < 1:
      raise InputError(f'model.dropout={self.dropout!r} must be in [0, 1)')
    attention.check_backend(
      self.attention, self.platform or jax.default_backend()
    )
    if not self.time_conditioning and (
      self.time_form != 'dit' or self.time_dim
    ):
      raise InputError(
        f'model.time_form={self.time_form!r} and model.time_dim='
        f'{self.time_dim!r} have no effect with model.time_conditioning=False; '
        "they must be 'dit' and 0"
      )
    if self.time_dim % 2:
      raise InputError(f'model.time_dim={self.time_dim!r} must be even')
    if self.embedding_dim and self.tie_embeddings:
      raise InputError(
        f'model.embedding_dim={self.embedding_dim!r} does not go with '
        'model.tie_embeddings=True: the output projection is not as wide'
      )
    if self.block_size and self.knows_time:
      raise InputError(
        'model.time_conditioning=True does not go with block '
        'diffusion, whose blocks have times of their own; it must '
        "be False, or model.time_form be 'constant'"
      )
    if self.block_size and self.attention == 'cudnn':
      raise InputError(
        "model.attention='cudnn' does not know the pattern of "
        "block diffusion; 'auto', 'xla' or 'pallas' are allowed"
      )

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.head_size or self.embed_dim // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def knows_time(self) -> bool:
    """Whether its output depends on the time."""
    return self.time_conditioning and self.time_form != 'constant'

  @property
  def time_width(self) -> int:
    """Width of the embedded time."""
    return self.time_dim or self.embed_dim

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
    layers: (keys, values), [num_layers - 1, B, C, K, Dh] each, or None.
    last: (keys, values) of the last layer, [B, C, K, Dh] each.
  """

  layers: Any
  last: Any


def rotary_table(
  positions: jax.Array, head_dim: int, theta: float
) -> jax.Array:
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
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)


def dropout_mask(
  keys: jax.Array, rate: float, shape: tuple[int, int]
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
    dy, cpu=jax.lax.optimization_barrier, default=lambda dy: dy
  )
  return dy @ kernel.T, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


linear.defvjp(_linear_forward, _linear_backward)


class Linear(nn.Module):
  """A dense layer, [..., D] -> [..., features].

  Attributes:
    features: size of the output.
    dtype: of the product.
    use_bias: whether it has one, zero at the start.
    std: standard deviation of the initial kernel.
    join: over whose tensor groups the products are summed, before the bias is
      added once: the kernel is split by its rows. By default nothing is.
  """

  features: int
  dtype: Any
  use_bias: bool = False
  std: float = INIT_STD
  join: Shards = Shards()

  @nn.compact
  def __call__(self, x):
    kernel = self.param(
      'kernel', nn.initializers.normal(self.std), (x.shape[-1], self.features)
    )
    y = linear(x.reshape(-1, x.shape[-1]), kernel.astype(self.dtype))
    y = sharding.join(y, self.join)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None]
    return y.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
  """RMSNorm or LayerNorm, with a learned scale; computed in float32."""

  config: ModelConfig
  use_scale: bool = True

  @nn.compact
  def __call__(self, x):
    cfg, scale, bias = self.config, None, None
    if self.use_scale:
      scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
      if cfg.norm_bias:
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    norm = functools.partial(
      normalize,
      dtype=jnp.dtype(cfg.dtype),
      eps=cfg.norm_eps,
      is_centred=cfg.norm == 'layer',
    )
    return _keeps_inputs(norm, cfg.platform)(x, scale, bias=bias)


def _keeps_inputs(f: Callable[..., Any], platform: str) -> Callable[..., Any]:
  """f, of which a backward pass keeps the arguments and nothing between.

  Not on a CPU, where working it out again costs what is saved.
  """
  if (platform or jax.default_backend()) == 'cpu':
    return f
  return jax.checkpoint(f, prevent_cse=False)


def normalize(
  x: jax.Array,
  scale: jax.Array | None,
  dtype: Any,
  eps: float,
  is_centred: bool = False,
  bias: jax.Array | None = None,
) -> jax.Array:
  """x / rms(x) over the last axis, times the scale [D]; computed in float32.

  With `is_centred` of x without its mean: LayerNorm.
  """
  x = x.astype(jnp.float32)
  if is_centred:
    x = x - jnp.mean(x, -1, keepdims=True)
  x = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + eps)
  if scale is not None:
    x = x * jnp.expand_dims(scale, range(x.ndim - 1))
  if bias is not None:
    x = x + jnp.expand_dims(bias, range(x.ndim - 1))
  return x.astype(dtype)


class Heads(nn.Module):
  """Queries or keys [B, L, H, Dh]: QK-norm and rotated, where configured."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, rotary):
    cfg, scale = self.config, None
    if cfg.qk_norm:
      scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
    if rotary is not None and attention.has_kernels(
      cfg.attention, cfg.platform, x
    ):
      return pallas_attention.rotate(x, scale, rotary, cfg.norm_eps)
    if scale is not None:
      x = normalize(x, scale, jnp.dtype(cfg.dtype), cfg.norm_eps)
    return x if rotary is None else rotate(x, rotary)


class Block(nn.Module):
  """Attention and MLP, each pre-normed and added to the residual stream.

  With time conditioning each branch is shifted, scaled and gated by the time
  (adaLN-zero): the gates start at 0, the norms have no scale of their own.
  """

  config: ModelConfig
  shards: Shards = Shards()

  @nn.compact
  def __call__(
    self,
    x,
    layer,
    cached,
    time,
    rotary,
    segment_ids,
    dropout_keys,
    visible,
    seen,
    positions=None,
  ):
    """Applies the block.

    Args:
      x: [B, L, D]; B is even with `config.block_size`, noisy rows and clean ones.
      layer: [] int32, the block's index.
      cached: (keys, values) of other positions, [B, C, K, Dh] each, or None.
      time: [B, D] embedded time, or None.
      rotary: `rotary_table(L)`, or None where positions are learned.
      segment_ids: [B, L] int32 or None.
      dropout_keys: [B] or None.
      visible: [C] bool, which of the cached positions are seen, or None.
      seen: [B, L, L] bool, which positions each one sees; None is the config's.
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
    kv_heads = cfg.kv_heads // shards.tensor
    inner, mlp_width = num_heads * cfg.head_dim, cfg.mlp_width // shards.tensor
    norm = functools.partial(
      Norm, cfg, not cfg.time_conditioning or TIME_FORMS[cfg.time_form].scales
    )

    def pick(y):  # [B, L, D] -> the wanted rows
      return y if positions is None else y.reshape(-1, y.shape[-1])[positions]

    def pick_time(y):  # [B, D] -> broadcastable to the wanted rows
      return y[:, None] if positions is None else y[positions // length]

    def branch(y, gate, salt):
      if gate is not None:
        y = y * pick_time(gate)
      if dropout_keys is not None and cfg.dropout:
        keys = jax.vmap(
          lambda key: jax.random.fold_in(jax.random.fold_in(key, layer), salt)
        )(dropout_keys)
        y = y * pick(dropout_mask(keys, cfg.dropout, (length, width))).astype(
          y.dtype
        )
      return y

    gate1 = gate2 = None
    if cfg.time_conditioning:
      modulation = nn.Dense(
        6 * width // shards.tensor,
        dtype=dtype,
        name='modulation',
        kernel_init=nn.initializers.zeros,
      )(_activate_time(cfg, time))
      modulation = sharding.concatenate(modulation, shards)
      shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
        modulation, 6, axis=-1
      )

    h = norm(name='attention_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + scale1[:, None]) + shift1[:, None]
    h = sharding.split(h, shards)
    q, k, v = (
      Linear(
        heads * cfg.head_dim, dtype, cfg.attention_bias != 'none', name=name
      )(h).reshape(batch, length, heads, cfg.head_dim)
      for name, heads in (
        ('query', num_heads),
        ('key', kv_heads),
        ('value', kv_heads),
      )
    )
    q, k = (
      Heads(cfg, name='q_norm')(q, rotary),
      Heads(cfg, name='k_norm')(k, rotary),
    )
    own = None
    if cached is not None:
      own = (k, v)
      h = attention.cached_attention(
        q, k, v, *cached, visible, causal=cfg.causal
      )
    elif cfg.block_size:
      if positions is not None:  # of the noisy rows, the last layer's output
        q = q[: batch // 2]
      h = attention.block_attention(
        q,
        k,
        v,
        block_size=cfg.block_size,
        segment_ids=segment_ids,
        backend=cfg.attention,
        platform=cfg.platform,
      )
    else:
      h = attention.attention(
        q,
        k,
        v,
        causal=cfg.causal,
        seen=seen,
        segment_ids=segment_ids,
        backend=cfg.attention,
        platform=cfg.platform,
      )
    h = pick(
      ad_checkpoint.checkpoint_name(h, ATTENTION_OUT).reshape(-1, length, inner)
    )
    out_std = INIT_STD / (2 * cfg.num_layers) ** 0.5
    out = Linear(
      width,
      dtype,
      cfg.attention_bias == 'all',
      out_std,
      shards,
      name='attention_out',
    )(h)
    x = pick(x) + branch(out, gate1, 0)

    h = norm(name='mlp_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + pick_time(scale2)) + pick_time(shift2)
    h = sharding.split(h, shards)
    up = Linear(mlp_width, dtype, cfg.mlp_bias, name='mlp_in')(h)
    if cfg.is_gated:
      gate = Linear(mlp_width, dtype, cfg.mlp_bias, name='mlp_gate')(h)
      up = _keeps_inputs(
        lambda gate, up: MLPS[cfg.mlp](gate) * up, cfg.platform
      )(gate, up)
    else:
      up = MLPS[cfg.mlp](up)
    out = Linear(width, dtype, cfg.mlp_bias, out_std, shards, name='mlp_out')(
      up
    )
    return x + branch(out, gate2, 1), own


def _activate_time(config: ModelConfig, time: jax.Array) -> jax.Array:
  """What the layers that make shifts, scales and gates of the time see."""
  is_md4 = TIME_FORMS[config.time_form].is_md4
  return MLPS[config.mlp](time) if is_md4 else nn.silu(time)


class TimeEmbedding(nn.Module):
  """t -> [B, time_width]: sinusoids and a two-layer MLP (as in DiT)."""

  config: ModelConfig

  @nn.compact
  def __call__(self, t):
    cfg, form = self.config, TIME_FORMS[self.config.time_form]
    half = (cfg.time_width if form.is_md4 else TIME_FEATURES) // 2
    last = half - 1 if form.is_md4 else half
    frequency = jnp.exp(-jnp.log(TIME_PERIOD) * jnp.arange(half) / last)
    angle = form.clock(t.astype(jnp.float32))[:, None] * frequency[None]
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    dense = functools.partial(
      nn.Dense,
      dtype=jnp.dtype(cfg.dtype),
      kernel_init=nn.initializers.normal(INIT_STD),
    )
    inner = 4 * cfg.time_width if form.is_md4 else cfg.time_width
    return dense(cfg.time_width, name='out')(
      nn.silu(dense(inner, name='in')(features))
    )


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
    dtype = jnp.dtype(cfg.dtype)
    num_ids = sharding.padded(cfg.vocab_size, self.shards) // self.shards.tensor
    normal = nn.initializers.normal(INIT_STD)
    self.embedding = self.param(
      'embedding', normal, (num_ids, cfg.embedding_dim or cfg.embed_dim)
    )
    if cfg.embedding_dim:
      self.embedding_in = nn.Dense(
        cfg.embed_dim, dtype=dtype, kernel_init=normal
      )
    if not cfg.tie_embeddings:
      self.output = self.param('output', normal, (num_ids, cfg.embed_dim))
    if cfg.output_bias:
      self.output_bias = self.param(
        'output_bias', nn.initializers.zeros, (num_ids,)
      )
    if cfg.num_positions:
      self.position_embedding = self.param(
        'position_embedding', normal, (cfg.num_positions, cfg.embed_dim)
      )
    form = TIME_FORMS[cfg.time_form]
    is_final = cfg.time_conditioning and form.final
    if cfg.time_conditioning:
      self.time_embedding = TimeEmbedding(cfg)
    if is_final:
      self.final_modulation = nn.Dense(
        2 * cfg.embed_dim, dtype=dtype, kernel_init=nn.initializers.zeros
      )
    if cfg.num_layers > 1:
      self.layers = Block(cfg)
    self.last_layer = Block(cfg)
    self.final_norm = Norm(cfg, not is_final or form.scales)

  def __call__(
    self,
    tokens: jax.Array,
    t: jax.Array | None = None,
    *,
    clean: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    seen: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """The network up to, not including, the output projection.

    Args:
      tokens: [B, L] int32.
      t: [B] float32 in [0, 1]; read with time conditioning only.
      clean: [B, L] int32, the clean text, with `config.block_size` only.
      segment_ids: [B, L] int32; a position attends within its segment.
      dropout_keys: [B], one per example; None turns dropout off.
      seen: [B, L, L] bool, which positions each one sees, as `opening_mask`;
        None: as the config says.
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
          [
            jax.vmap(lambda key: jax.random.fold_in(key, copy))(dropout_keys)
            for copy in range(2)
          ]
        )
    wanted = positions
    if (self.config.block_size or self.config.shift_outputs) and wanted is None:
      wanted = jnp.arange(shape[0] * shape[1])
    if self.config.shift_outputs:
      wanted = jnp.where(wanted % shape[1] == 0, wanted, wanted - 1)
    hidden, _ = self._layers(
      tokens,
      t,
      jnp.arange(shape[1]),
      Cache(None, None),
      segment_ids,
      dropout_keys,
      None,
      seen,
      wanted,
    )
    if positions is None:
      hidden = hidden.reshape(*shape, -1)
    return hidden

  def advance(
    self,
    tokens: jax.Array,
    t: jax.Array | None,
    start: jax.Array,
    cache: Cache,
    visible: jax.Array,
    positions: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
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
    if self.config.shift_outputs:
      raise InputError(
        'model.shift_outputs=True reads outputs from before a block, '
        'which a cache of keys and values does not have'
      )
    where = start + jnp.arange(tokens.shape[1])
    hidden, own = self._layers(
      tokens, t, where, cache, None, None, visible, None, positions
    )

    def write(old, new):
      return jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), start, axis=old.ndim - 3
      )

    return hidden, jax.tree.map(write, cache, own)

  def _layers(
    self,
    tokens,
    t,
    where,
    cache,
    segment_ids,
    dropout_keys,
    visible,
    seen,
    positions,
  ):
    """Hidden states of tokens at `where` [L], and their own keys and values."""
    cfg = self.config
    last_layer = cfg.num_layers - 1
    x = self._embed(tokens, where)
    time = None
    if cfg.time_conditioning:
      time = self.time_embedding(
        t if cfg.knows_time else jnp.zeros(tokens.shape[:1])
      )
    rotary = (
      None
      if cfg.num_positions
      else rotary_table(where, cfg.head_dim, cfg.rope_theta)
    )
    args = (time, rotary, segment_ids, dropout_keys, visible, seen)
    if self.is_initializing():
      self._init_layers(x, args)
    own = None
    if cfg.num_layers > 1:
      # In a scan XLA does not undo the recomputation; elsewhere it would.
      apply = self._make_apply(prevent_cse=cfg.unroll)

      def body(x, layer):
        params, index, cached = layer
        return apply(params, x, index, cached, *args)

      layers = (
        self.layers.variables['params'],
        jnp.arange(last_layer),
        cache.layers,
      )
      x, own = (_unrolled_scan if cfg.unroll else jax.lax.scan)(body, x, layers)
    x, last = self._make_apply(prevent_cse=True)(
      self.last_layer.variables['params'],
      x,
      last_layer,
      cache.last,
      *args,
      positions,
    )
    x = self.final_norm(x)
    if cfg.time_conditioning and TIME_FORMS[cfg.time_form].final:
      shift, scale = jnp.split(
        self.final_modulation(_activate_time(cfg, time)), 2, axis=-1
      )
      wanted = (
        (lambda y: y[:, None])
        if positions is None
        else (lambda y: y[positions // tokens.shape[1]])
      )
      x = x * (1 + wanted(scale)) + wanted(shift)
    return x, Cache(own, last)

  def _embed(self, tokens, where):
    """[B, L] at positions [L] -> [B, L, D]."""
    # Rows first, then the cast: the gradients of a row, the mask's above all,
    # are summed in float32.
    dtype = jnp.dtype(self.config.dtype)
    if self.shards.tensor == 1:
      rows = self.embedding[tokens]
    else:
      size = self.embedding.shape[0]
      tokens = tokens - jax.lax.axis_index(sharding.TENSOR) * size
      is_here = (tokens >= 0) & (tokens < size)
      rows = self.embedding[jnp.where(is_here, tokens, 0)]
      rows = jnp.where(is_here[..., None], rows, 0.0)
      rows = sharding.join(rows, self.shards)
    if self.config.embedding_dim:
      rows = self.embedding_in(rows.astype(dtype))
    if self.config.num_positions:
      rows = rows + self.position_embedding[where][None]
    return rows.astype(dtype)

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
      nn.scan(
        lambda block, x, layer: block(x, layer, None, *args),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=num_layers - 1,
      )(self.layers, x, jnp.arange(num_layers - 1))
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


def opening_mask(keys: jax.Array, share: jax.Array, length: int) -> jax.Array:
  """Attention between causal and full: attention mask annealing.

  Source: DiffuLLaMA, arXiv 2410.17891, section 3.2, by which an autoregressive
  network becomes a diffusion model.
  Differs from the paper: each example has a mask of its own, not each batch.

  Args:
    keys: [B], one per example.
    share: [] in [0, 1], probability that a position sees one to its right.
    length: L.

  Returns:
    [B, L, L] bool, which positions (last axis) each position sees; a position
    always sees itself and those to its left.
  """
  draw = lambda key: jax.random.bernoulli(key, share, (length, length))
  return jax.vmap(draw)(keys) | jnp.tril(jnp.ones((length, length), bool))[None]


def init_cache(
  config: ModelConfig, batch_size: int, length: int, shards: Shards = Shards()
) -> Cache:
  """An empty cache of `length` positions, in the compute dtype."""
  shape = (
    batch_size,
    length,
    config.kv_heads // shards.tensor,
    config.head_dim,
  )
  zeros = lambda *lead: (jnp.zeros(lead + shape, config.dtype),) * 2
  layers = zeros(config.num_layers - 1) if config.num_layers > 1 else None
  return Cache(layers, zeros())


class Affine(NamedTuple):
  """An output projection with a bias.

  Attributes:
    kernel: [V, D].
    bias: [V].
  """

  kernel: jax.Array
  bias: jax.Array


def output_kernel(params) -> jax.Array | Affine:
  """The output projection's kernel [V, D] (float32), tied or not, and its bias."""
  kernel = params.get('output', params['embedding'])
  if 'output_bias' in params:
    return Affine(kernel, params['output_bias'])
  return kernel


def output_logits(kernel: jax.Array | Affine, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] times kernel [V, D], transposed, -> [..., V] float32."""
  if isinstance(kernel, Affine):
    bias = jnp.expand_dims(kernel.bias, range(hidden.ndim - 1))
    return output_logits(kernel.kernel, hidden) + bias
  # Not a transposed kernel: where the product is in a loop XLA would make one.
  last = ((hidden.ndim - 1,), (1,))
  return jax.lax.dot_general(
    hidden,
    kernel.astype(hidden.dtype),
    (last, ((), ())),
    preferred_element_type=jnp.float32,
  )


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
  for name in sharding.BY_VOCABULARY & set(params):
    x = params[name]
    params[name] = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
  return params


def check_shards(config: ModelConfig, shards: Shards, length: int = 0):
  """Raises InputError where the network cannot be split so.

  Args:
    config: the network.
    shards: over how many devices.
    length: of the texts, for what kernels ask of a device's part; 0: not checked.
  """
  for axis, keys in (
    ('fsdp', ('embed_dim', 'embedding_dim', 'time_width')),
    ('tensor', ('num_heads', 'kv_heads', 'mlp_width')),
  ):
    size = getattr(shards, axis)
    for key in keys:
      if getattr(config, key) % size:
        name = {
          'mlp_width': 'mlp_dim',
          'kv_heads': 'num_kv_heads',
          'time_width': 'time_dim',
        }.get(key, key)
        chosen = '' if getattr(config, name) else ' (chosen, for 0)'
        raise InputError(
          f'mesh.{axis}={size!r} does not divide model.{name}='
          f'{getattr(config, key)!r}{chosen}; it must, as its parts lie on so '
          'many devices'
        )
  if length:
    copies = 2 if config.block_size else 1
    attention.check_sizes(
      config.attention,
      config.num_heads // shards.tensor,
      config.head_dim,
      length,
      copies * length,
      jnp.dtype(config.dtype).itemsize,
    )


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

  6 x (matrix parameters) + 12 x layers x length x heads' width for the attention; a
  multiply-add is 2. Unreduced: counted as if every position went through every
  layer and the output projection; of block diffusion both copies' layers count.
  """
  width, inner = config.embed_dim, config.num_heads * config.head_dim
  mlp = (3 if config.is_gated else 2) * width * config.mlp_width
  heads = 2 * width * (inner + config.kv_heads * config.head_dim)
  layers = config.num_layers * (heads + mlp)
  copies = 2 if config.block_size else 1
  return (
    copies * (6 * layers + 12 * config.num_layers * length * inner)
    + 6 * width * config.vocab_size
  )

"""The layers of the transformer: dense layers, norms, heads and the time."""

from collections.abc import Callable
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import attention, lora, pallas_attention
from nanodlm.model.config import MLPS, ModelConfig, TIME_FORMS
from nanodlm.model.lora import LoraConfig

# Standard deviation of the initial weights, as in GPT-2.
INIT_STD = 0.02
# Number of sinusoids of the time, and the longest wave's length over 2 pi.
TIME_FEATURES = 256
TIME_PERIOD = 10_000.0


def rotary_table(
  positions: jax.Array,
  head_dim: int,
  theta: float,
  factor: float = 1.0,
  scaling: str = 'llama3',
  length: int = 8192,
) -> jax.Array:
  """Tabulates cos and sin of the angles at positions, [2, 1, L, 1, Dh / 2].

  The positions are [L], or [B, L] for a table [2, B, L, 1, Dh / 2].

  Source: RoFormer, arXiv 2104.09864, equation 34. Waves that turn rarely within
  `length` tokens are stretched by the factor, those that turn often are kept,
  and those in between are mixtures: by the number of turns, 1 to 4, with
  'llama3' (arXiv 2407.21783, as in its published code), and by the index of the
  wave, from that of 32 turns to that of one, with 'yarn' (arXiv 2309.00071, as
  in its published code, without its temperature).
  """
  frequency = theta ** (-jnp.arange(0, head_dim, 2) / head_dim)
  if factor != 1:
    if scaling == 'llama3':
      kept = jnp.clip((length * frequency / (2 * jnp.pi) - 1) / 3, 0, 1)
    else:
      longest = length / (2 * math.pi)
      once, often = (
        math.log(longest / n) / math.log(theta) * head_dim / 2 for n in (1, 32)
      )
      first = max(math.floor(often), 0)
      last = min(math.ceil(once), head_dim - 1)
      place = jnp.arange(head_dim // 2) - first
      kept = 1 - jnp.clip(place / max(last - first, 1e-3), 0, 1)
    frequency *= kept + (1 - kept) / factor
  angle = jnp.atleast_2d(positions)[..., None] * frequency[None, None]
  return jnp.stack([jnp.cos(angle), jnp.sin(angle)])[..., None, :]


def rotate(x: jax.Array, table: jax.Array) -> jax.Array:
  """Rotates x [B, L, H, Dh], whose two halves form the pairs, by position."""
  # In float32, since bfloat16 angles would be off by 0.4% at every distance.
  cos, sin = table
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  ).astype(x.dtype)


def dropout_mask(
  keys: jax.Array, rate: float, shape: tuple[int, int]
) -> jax.Array:
  """Draws factors 0 or 1 / (1 - rate), [B, L, D], for each example by its key.

  The mask thus does not depend on the example's device or micro-batch.
  """
  draw = lambda key: jax.random.bernoulli(key, 1 - rate, shape)
  return jax.vmap(draw)(keys) / (1 - rate)


@jax.custom_vjp
def linear(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Multiplies x [T, D] with kernel [D, F].

  The kernel's gradient is x^T dy, where JAX's own rule takes (dy^T x)^T. On a
  CPU these round differently in bfloat16.
  """
  return x @ kernel


def _linear_backward(residuals, dy):
  x, kernel = residuals
  return dy @ kernel.T, jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))


linear.defvjp(
  lambda x, kernel: (linear(x, kernel), (x, kernel)), _linear_backward
)


class Linear(nn.Module):
  """A dense layer, [..., D] -> [..., features].

  Attributes:
    features: size of the output.
    dtype: dtype of the product.
    use_bias: whether there is a bias, initially zero.
    std: standard deviation of the initial kernel.
    join: tensor groups over which products are summed before the bias is added,
      if the kernel is split by rows; none by default.
    adapter: the low-rank matrices that are added to the kernel, if any.
  """

  features: int
  dtype: Any
  use_bias: bool = False
  std: float = INIT_STD
  join: Shards = Shards()
  adapter: LoraConfig | None = None

  @nn.compact
  def __call__(self, x, dropout=None):
    """Applies the layer.

    Args:
      x: [..., D].
      dropout: [..., D], factors of the adapter's input; None: 1.
    """
    width = x.shape[-1]
    kernel = self.param(
      'kernel', nn.initializers.normal(self.std), (width, self.features)
    )
    flat = x.reshape(-1, width)
    y = linear(flat, kernel.astype(self.dtype))
    if self.adapter is not None:
      rank, limit = self.adapter.rank, width**-0.5
      draw = lambda *args: limit * jax.random.uniform(*args, minval=-1.0)
      a = self.param(lora.A, draw, (width, rank))
      b = self.param(lora.B, nn.initializers.zeros, (rank, self.features))
      if dropout is not None:
        flat = (flat * dropout.reshape(-1, width)).astype(flat.dtype)
      low = flat @ a.astype(self.dtype)
      y += self.adapter.scale * (low @ b.astype(self.dtype))
    y = sharding.join(y, self.join)
    if self.use_bias:
      bias = self.param('bias', nn.initializers.zeros, (self.features,))
      y = y + bias.astype(self.dtype)[None]
    return y.reshape(*x.shape[:-1], self.features)


class Norm(nn.Module):
  """RMSNorm or LayerNorm with a learned scale, computed in float32."""

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
    return keeps_inputs(norm, cfg.platform)(x, scale, bias=bias)


def convolve(
  x: jax.Array, weights: jax.Array, segment_ids: jax.Array | None = None
) -> jax.Array:
  """Applies a depthwise convolution, centred on each token, in float32.

      y_i = sum_k w_k x_(i + k - (K - 1) / 2), over tokens of i's segment

  Source: Canon layers, arXiv 2512.17351. Differs from the paper, whose
  convolutions see the token and three to its left, at up to four places of a
  block.

  Args:
    x: [B, L, D].
    weights: [K, D], K odd.
    segment_ids: [B, L] int32; None: a row is one segment.

  Returns:
    [B, L, D], in the dtype of x.
  """
  length, side = x.shape[1], len(weights) // 2
  pad = lambda y, fill: jnp.pad(
    y, ((0, 0), (side, side)) + ((0, 0),) * (y.ndim - 2), constant_values=fill
  )
  padded = pad(x.astype(jnp.float32), 0)
  sums = jnp.zeros(x.shape, jnp.float32)
  segments = None if segment_ids is None else pad(segment_ids, -1)
  for k, weight in enumerate(weights[:, None, None]):
    seen = padded[:, k : k + length]
    if segments is not None:
      is_own = segments[:, k : k + length] == segment_ids
      seen = jnp.where(is_own[..., None], seen, 0)
    sums += weight * seen
  return sums.astype(x.dtype)


def keeps_inputs(f: Callable[..., Any], platform: str) -> Callable[..., Any]:
  """Makes the backward pass of f store its arguments and nothing else.

  Except on a CPU, where computing f again takes longer than memory traffic.
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
  """Divides x by its root mean square over the last axis, in float32.

  A scale [D] and a bias [D] are applied after. With `is_centred` the mean is
  subtracted first: LayerNorm.
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
  """Applies QK-norm and rotary positions, if configured, to [B, L, H, Dh]."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x, rotary):
    cfg, scale = self.config, None
    if cfg.qk_norm:
      shape = x.shape[-2:] if cfg.joint_qk_norm else x.shape[-1:]
      scale = self.param('scale', nn.initializers.ones, (math.prod(shape),))
    if cfg.joint_qk_norm:
      flat = x.reshape(*x.shape[:-2], -1)
      norm = normalize(flat, scale, jnp.dtype(cfg.dtype), cfg.norm_eps)
      x, scale = norm.reshape(x.shape), None
    if (
      rotary is not None
      and rotary.shape[1] == 1
      and attention.has_kernels(cfg.attention, cfg.platform, x)
    ):
      return pallas_attention.rotate(x, scale, rotary, cfg.norm_eps)
    if scale is not None:
      x = normalize(x, scale, jnp.dtype(cfg.dtype), cfg.norm_eps)
    return x if rotary is None else rotate(x, rotary)


class TimeEmbedding(nn.Module):
  """Maps t [...] to [..., time_width]: sinusoids and an MLP, as in DiT."""

  config: ModelConfig

  @nn.compact
  def __call__(self, t):
    cfg, form = self.config, TIME_FORMS[self.config.time_form]
    half = (cfg.time_width if form.is_md4 else TIME_FEATURES) // 2
    last = half - 1 if form.is_md4 else half
    frequency = jnp.exp(-jnp.log(TIME_PERIOD) * jnp.arange(half) / last)
    frequency = jnp.expand_dims(frequency, range(t.ndim))
    angle = form.clock(t.astype(jnp.float32))[..., None] * frequency
    features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    dense = functools.partial(
      nn.Dense,
      dtype=jnp.dtype(cfg.dtype),
      kernel_init=nn.initializers.normal(INIT_STD),
    )
    inner = 4 * cfg.time_width if form.is_md4 else cfg.time_width
    inside = nn.silu(dense(inner, name='in')(features))
    return dense(cfg.time_width, name='out')(inside)


def activate_time(config: ModelConfig, time: jax.Array) -> jax.Array:
  """Activates the embedded time for the layers that make shifts and scales."""
  is_md4 = TIME_FORMS[config.time_form].is_md4
  return MLPS[config.mlp](time) if is_md4 else nn.silu(time)

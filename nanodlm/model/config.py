"""The network's settings, the tables of their choices, and the costs."""

from collections.abc import Callable
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nanodlm.model import attention
from nanodlm.model.lora import LAYERS, LoraConfig
from nanodlm.types import check_at_least, InputError

# Scales t in [0, 1] to the range for which the sinusoids of a time were chosen.
TIME_SCALE = 1000.0
# The smallest alpha that time_form='sigma' represents, at which the schedules
# of SEDD and MDLM end: -log alpha is infinite at 0.
MIN_TIME_ALPHA = 1e-3


@jax.custom_jvp
def relu2(x: jax.Array) -> jax.Array:
  """max(x, 0)^2. Source: Primer, arXiv 2109.08668."""
  return jnp.square(jnp.maximum(x, 0))


@relu2.defjvp
def _relu2_jvp(primals, tangents):
  # Stores one array for the backward pass; JAX's own rule stores two.
  positive = jnp.maximum(primals[0], 0)
  return jnp.square(positive), 2 * positive * tangents[0]


@jax.custom_jvp
def exact_gelu(x: jax.Array) -> jax.Array:
  """Returns x P(z <= x) of a standard normal z."""
  return nn.gelu(x, approximate=False)


@exact_gelu.defjvp
def _exact_gelu_jvp(primals, tangents):
  # JAX 0.12 cannot derive the error function in float32 under shard_map.
  x = primals[0].astype(jnp.float32)
  # The function itself has the same erfc, which is computed once.
  cdf = 0.5 * jax.lax.erfc(-x * np.sqrt(0.5).astype(x.dtype))
  slope = cdf + x * jax.scipy.stats.norm.pdf(x)
  return exact_gelu(primals[0]), slope.astype(primals[0].dtype) * tangents[0]


# Names the attention's output, so that remat='dots' stores it although it is
# not the result of a matrix product of XLA.
ATTENTION_OUT = 'attention_out'
_GELU_TANH = functools.partial(nn.gelu, approximate=True)
MLPS = {
  'gelu': exact_gelu,
  'gelu_tanh': _GELU_TANH,
  'relu2': relu2,
  'geglu': exact_gelu,
  'geglu_tanh': _GELU_TANH,
  'swiglu': nn.silu,
  'glu': nn.sigmoid,
}
GATED = ('geglu', 'geglu_tanh', 'swiglu', 'glu')
REMATS = {
  'none': None,
  'full': jax.checkpoint_policies.nothing_saveable,
  'dots': jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(ATTENTION_OUT),
  ),
}


@dataclasses.dataclass(frozen=True)
class TimeForm:
  """The form in which a network receives the time; one per published network.

  Attributes:
    clock: maps t [B] in [0, 1] to the argument of the sinusoids.
    scales: whether modulated norms have scales of their own.
    final: whether the final norm is modulated, too.
    is_md4: MD4's: the longest sinusoid has DDPM's period, their number is the
      width of the embedded time, the inner MLP is four times as wide, and the
      embedded time passes the activation of the MLPs, not SiLU, to the norms.
  """

  clock: Callable[[jax.Array], jax.Array]
  scales: bool = False
  final: bool = False
  is_md4: bool = False


def _sigma(t):
  return -jnp.log1p(-jnp.minimum(t, 1 - MIN_TIME_ALPHA))


TIME_FORMS = {
  # 1000 t: DiT.
  'dit': TimeForm(lambda t: TIME_SCALE * t),
  # -log alpha of the linear schedule: SEDD, MDLM, Duo.
  'sigma': TimeForm(_sigma, scales=True, final=True),
  # t: GIDD.
  'unit': TimeForm(lambda t: t, scales=True, final=True),
  # 0, a network that does not know the time: most MDLM and BD3-LM checkpoints.
  'constant': TimeForm(jnp.zeros_like, scales=True, final=True),
  'md4': TimeForm(lambda t: TIME_SCALE * t, final=True, is_md4=True),
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The network's settings: keys of `config.model` (configs/base.py) and more.

  Attributes:
    vocab_size: number of ids, mask_id included; from the tokenizer.
    num_kv_heads: each is shared by num_heads / num_kv_heads neighbouring
      queries (GQA, arXiv 2305.13245).
    mlp_dim: hidden width of the MLP; 0: 4 D, or 8/3 D rounded up to a multiple
      of 64 if it is gated, for the same number of parameters.
    time_conditioning: adaLN-zero on t (DiT, arXiv 2212.09748).
    causal: whether a position sees earlier ones only; from the objective. With
      a block_size, this is true of the clean copy, which is then delayed by one
      token (`Objective.clean_input`).
    block_size: S, from the objective; S > 0 for block diffusion, whose network
      takes a noisy and a clean copy of the text.
    keep_rotary: whether learned positions add to rotary ones.
    conv_size: K, odd, the width in tokens of two depthwise convolutions in
      each block, which add to what they read: the normed input of the
      attention, and the residual stream next to it. Their weights are 0
      initially. 0: none.
    norm_eps: keeps the norm of a zero vector finite; QK-norms use it, too.
    shift_outputs: the output at position i is read at i - 1 (at 0 for 0), where
      a formerly autoregressive network predicts its token (DiffuLLaMA, arXiv
      2410.17891; Dream, arXiv 2508.15487). With blocks (Fast-dLLM v2, arXiv
      2509.26328), the first token of each is read in the clean copy: noisy
      position i - 1 belongs to the block before and does not see its clean
      text.
    self_conditioning: whether the network reads its own prediction: the input
      is E_z + W norm(c), where c is the mean embedding of the prediction of a
      call before, and W is 0 initially. Source: Analog Bits, arXiv 2208.04202,
      in the form of DiffusionGemma (google-deepmind/gemma, `diffusion`), whose
      W is an MLP and whose sum is normalised.
    start_token: id of the token that begins the clean copy of a causal network,
      in place of the mask, if it is >= 0. As the first token of a text it has
      position 0, so that token i, noisy or clean, has i + 1; otherwise a noisy
      token has the position i of its place in the row.
    unroll: applies the layers without a scan, which copies each layer's
      activations: 13% less CPU time a step, but slower to compile.
    platform: 'cpu', 'gpu' or 'tpu', for which programs are compiled; '': this
      machine's. From the caller.
    lora: the adapters of the dense layers, which alone are trained; None:
      every parameter is trained. From `config.lora`.
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
  joint_qk_norm: bool
  tie_embeddings: bool
  dropout: float
  time_conditioning: bool
  time_form: str
  time_dim: int
  output_bias: bool
  embedding_dim: int
  embedding_std: float
  self_conditioning: bool
  causal: bool
  block_size: int
  rope_theta: float
  rope_factor: float
  rope_scaling: str
  rope_length: int
  num_positions: int
  keep_rotary: bool
  conv_size: int
  attention_cap: float
  attention_sink: bool
  norm: str
  norm_eps: float
  norm_bias: bool
  attention_bias: str
  mlp_bias: bool
  shift_outputs: bool
  start_token: int
  dtype: str
  remat: str
  unroll: bool
  attention: str
  platform: str = ''
  lora: LoraConfig | None = None

  def __post_init__(self):
    def require(is_valid, key, rule):
      if not is_valid:
        raise InputError(f'model.{key}={getattr(self, key)!r} {rule}')

    check_at_least(1, self, 'model', 'num_layers', 'embed_dim', 'num_heads')
    for key, default in (
      ('num_kv_heads', 'num_heads'),
      ('head_size', 'embed_dim / num_heads'),
      ('mlp_dim', 'chosen by mlp'),
      ('num_positions', 'none'),
      ('time_dim', 'embed_dim'),
      ('embedding_dim', 'embed_dim'),
      ('attention_cap', 'none'),
    ):
      require(getattr(self, key) >= 0, key, f'must be >= 0 (0: {default})')
    require(
      self.head_size or self.embed_dim % self.num_heads == 0,
      'num_heads',
      f'must divide model.embed_dim={self.embed_dim!r}',
    )
    require(
      self.conv_size == 0 or self.conv_size > 0 and self.conv_size % 2,
      'conv_size',
      'must be odd, or 0 (no convolution)',
    )
    require(
      not self.conv_size or not (self.causal or self.block_size),
      'conv_size',
      "must be 0 with a causal network or blocks (objective.name='ar' or "
      "'block...'): it sees tokens on both sides",
    )
    require(
      not self.has_rotary or self.head_dim % 2 == 0,
      'head_size' if self.head_size else 'num_heads',
      f'makes heads of {self.head_dim}; rotary positions need an even size',
    )
    require(
      self.num_heads % self.kv_heads == 0,
      'num_kv_heads',
      f'must divide model.num_heads={self.num_heads!r}',
    )
    for key, allowed in (
      ('mlp', MLPS),
      ('remat', REMATS),
      ('dtype', ('float32', 'bfloat16')),
      ('norm', ('rms', 'layer')),
      ('attention_bias', ('none', 'qkv', 'all')),
      ('time_form', TIME_FORMS),
      ('rope_scaling', ('llama3', 'yarn')),
    ):
      rule = f'is not one of {sorted(allowed)}'
      require(getattr(self, key) in allowed, key, rule)
    for key in (
      *('rope_theta', 'rope_factor', 'rope_length'),
      *('norm_eps', 'embedding_std'),
    ):
      require(getattr(self, key) > 0, key, 'must be > 0')
    require(
      self.rope_scaling != 'yarn' or self.rope_theta > 1,
      'rope_theta',
      "must be > 1 with model.rope_scaling='yarn'",
    )
    require(
      self.has_rotary or self.rope_factor == 1,
      'rope_factor',
      'is ignored by learned positions; it must be 1.0',
    )
    require(0 <= self.dropout < 1, 'dropout', 'must be in [0, 1)')
    require(self.time_dim % 2 == 0, 'time_dim', 'must be even')
    require(
      not self.shift_outputs or self.block_size or not self.causal,
      'shift_outputs',
      'must be False with objectives that shift their input',
    )
    for key, unset, reader, default in (
      ('time_form', 'dit', 'time_conditioning', False),
      ('time_dim', 0, 'time_conditioning', False),
      ('joint_qk_norm', False, 'qk_norm', False),
      ('rope_scaling', 'llama3', 'rope_factor', 1.0),
      ('rope_length', 8192, 'rope_factor', 1.0),
      ('keep_rotary', False, 'num_positions', 0),
      ('norm_bias', False, 'norm', 'rms'),
    ):
      require(
        getattr(self, reader) != default or getattr(self, key) == unset,
        key,
        f'is ignored by model.{reader}={default!r}; it must be {unset!r}',
      )
    require(
      not self.embedding_dim or not self.tie_embeddings,
      'embedding_dim',
      'must be 0 with model.tie_embeddings=True, which needs one width',
    )
    require(
      not self.self_conditioning or self.block_size or not self.causal,
      'self_conditioning',
      'must be False with a network that is causal: it predicts each token in '
      'one call',
    )
    has_start = self.causal and not self.num_positions
    require(
      -1 <= self.start_token and (has_start or self.start_token < 0),
      'start_token',
      "must be -1, or an id with rotary positions and objective.name='ar' or "
      'objective.ar_weight > 0',
    )
    if self.lora is not None:
      layers = [x for x in LAYERS if self.is_gated or x != 'mlp_gate']
      self.lora.check_targets(layers)
    attention.check_backend(
      self.attention, self.platform or jax.default_backend()
    )
    for key in ('attention_cap', 'attention_sink'):
      require(
        not getattr(self, key) or self.attention in ('auto', 'xla'),
        key,
        f"needs model.attention='auto' or 'xla', not {self.attention!r}",
      )
    require(
      not self.block_size or self.attention != 'cudnn',
      'attention',
      "does not support block diffusion; use 'auto', 'xla' or 'pallas'",
    )

  def adapter(self, layer: str) -> LoraConfig | None:
    """Returns the adapter of a dense layer of a block, if it has one."""
    return self.lora if self.lora and self.lora.fits(layer) else None

  @property
  def has_cache(self) -> bool:
    """Whether a cache serves all that reads other tokens: attention alone."""
    is_in_place = self.block_size > 0 or not self.shift_outputs
    return is_in_place and not self.conv_size

  @property
  def has_rotary(self) -> bool:
    """Whether positions rotate queries and keys."""
    return self.keep_rotary or not self.num_positions

  @property
  def head_dim(self) -> int:
    """Width of a head."""
    return self.head_size or self.embed_dim // self.num_heads

  @property
  def kv_heads(self) -> int:
    """Number of heads of keys and values."""
    return self.num_kv_heads or self.num_heads

  @property
  def knows_time(self) -> bool:
    """Whether the output depends on the time."""
    return self.time_conditioning and self.time_form != 'constant'

  @property
  def time_width(self) -> int:
    """Width of the embedded time."""
    return self.time_dim or self.embed_dim

  @property
  def is_gated(self) -> bool:
    """Whether the MLP has a second input matrix, the gate."""
    return self.mlp in GATED

  @property
  def mlp_width(self) -> int:
    """Hidden width of the MLP."""
    if self.is_gated and not self.mlp_dim:
      return -(-8 * self.embed_dim // (3 * 64)) * 64
    return self.mlp_dim or 4 * self.embed_dim

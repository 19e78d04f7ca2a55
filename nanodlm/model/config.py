"""The network's configuration, its tables of choices, and its costs."""

import dataclasses
import functools
from typing import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from nanodlm.model import attention
from nanodlm.types import InputError

# The network sees 1000 t, so that the sinusoids below resolve t in [0, 1].
TIME_SCALE = 1000.0
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

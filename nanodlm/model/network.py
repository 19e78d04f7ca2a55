"""The transformer as a `types.Network`."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import attention, lora, transformer
from nanodlm.model.config import ModelConfig
from nanodlm.model.lora import LoraConfig
from nanodlm.types import Hidden, InputError, Network, Objective


@dataclasses.dataclass(frozen=True)
class TransformerNetwork(Network):
  """A transformer, its parameters split over devices.

  Attributes:
    config: its shape.
    shards: over how many devices its parameters are split.
  """

  config: ModelConfig
  shards: Shards = Shards()

  def __post_init__(self):
    for axis, key, value in (
      ('fsdp', 'embed_dim', self.config.embed_dim),
      ('fsdp', 'embedding_dim', self.config.embedding_dim),
      ('fsdp', 'time_dim', self.config.time_width),
      ('tensor', 'num_heads', self.config.num_heads),
      ('tensor', 'num_kv_heads', self.config.kv_heads),
      ('tensor', 'mlp_dim', self.config.mlp_width),
    ):
      size = getattr(self.shards, axis)
      if value % size:
        chosen = '' if getattr(self.config, key) else ' (chosen for 0)'
        raise InputError(
          f'mesh.{axis}={size!r} must divide model.{key}={value!r}{chosen}, '
          'which is split over that many devices'
        )
    if self.config.joint_qk_norm and self.shards.tensor > 1:
      raise InputError(
        f'mesh.tensor={self.shards.tensor!r} must be 1 with '
        'model.joint_qk_norm=True, which needs all heads on one device'
      )

  @classmethod
  def make(
    cls,
    section: Mapping[str, Any],
    *,
    vocab_size: int,
    objective: Objective,
    shards: Shards,
    platform: str = '',
    lora: Mapping[str, Any] | None = None,
  ) -> 'TransformerNetwork':
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    config = ModelConfig(
      **{key: value for key, value in section.items() if key in names},
      vocab_size=vocab_size,
      causal=objective.autoregressive is not None,
      block_size=objective.block_size,
      platform=platform,
      lora=LoraConfig(**lora) if lora else None,
    )
    return cls(config, shards)

  @property
  def vocab_size(self) -> int:  # pyright: ignore
    return self.config.vocab_size

  @property
  def has_dropout(self) -> bool:  # pyright: ignore
    lora = self.config.lora
    return self.config.dropout > 0 or lora is not None and lora.dropout > 0

  @property
  def knows_time(self) -> bool:  # pyright: ignore
    return self.config.knows_time

  @property
  def num_positions(self) -> int:  # pyright: ignore
    return self.config.num_positions

  @property
  def has_cache(self) -> bool:  # pyright: ignore
    return self.config.has_cache

  @property
  def reads_soft(self) -> bool:  # pyright: ignore
    return not self.config.block_size

  @property
  def self_conditions(self) -> bool:  # pyright: ignore
    return self.config.self_conditioning

  @property
  def module(self) -> transformer.Transformer:
    """The Linen module, without its parameters."""
    return transformer.Transformer(self.config, self.shards)

  def check(self, length: int):
    num_heads = self.config.num_heads // self.shards.tensor
    shape = (1, length, num_heads, self.config.head_dim)
    q = jax.ShapeDtypeStruct(shape, jnp.dtype(self.config.dtype))
    num_keys = (2 if self.config.block_size else 1) * length
    attention.check_sizes(self.config.attention, q, num_keys)

  def init_params(self, key: jax.Array) -> Any:
    size, start_token = self.config.vocab_size, self.config.start_token
    if start_token >= size:
      raise InputError(
        f'model.start_token={start_token!r} must be an id of the vocabulary, '
        f'below {size}'
      )
    # These settings change no shape, and kernels do not support two tokens.
    config = dataclasses.replace(
      self.config, block_size=0, causal=False, start_token=-1, attention='xla'
    )
    tokens, time = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1,))
    # The numbers do not depend on `shards`, for which rows of zeros are added.
    whole = transformer.Transformer(config)
    params: Any = whole.init(key, tokens, time)['params']
    padding = sharding.padded(size, self.shards) - size
    for name in sharding.BY_VOCABULARY & set(params):
      x = params[name]
      params[name] = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
    return params

  def split(self, params: Any) -> tuple[Any, Any]:
    if self.config.lora is None:
      return params, None
    return lora.split(params, self.config.dtype)

  def merge(self, params: Any) -> Any:
    if self.config.lora is None:
      return params
    merge = functools.partial(lora.merge, config=self.config.lora)
    return jax.jit(merge)(params)

  def gather(self, params: Any) -> Any:
    blocks = ('layers', 'last_layer')
    ends = {name: tree for name, tree in params.items() if name not in blocks}
    return {**params, **sharding.gather(ends, self.shards)}

  def hidden(self, params, tokens, t, **options) -> Hidden:
    states: Any = self.module.apply({'params': params}, tokens, t, **options)
    return Hidden(states)

  def autoregressive(self) -> 'TransformerNetwork':
    config = dataclasses.replace(
      self.config, block_size=0, self_conditioning=False, shift_outputs=False
    )
    return dataclasses.replace(self, config=config)

  def kernel(self, params: Any) -> Any:
    return transformer.output_kernel(params)

  def logits(self, kernel: Any, states: jax.Array) -> jax.Array:
    return transformer.output_logits(kernel, states)

  def mix(self, params: Any, p: jax.Array) -> jax.Array:
    dtype = jnp.dtype(self.config.dtype)
    rows = p.astype(dtype) @ params['embedding'].astype(dtype)
    return sharding.join(rows, self.shards)

  def init_cache(self, batch_size: int, length: int) -> transformer.Cache:
    cfg, size = self.config, (batch_size, length)
    shape = *size, cfg.kv_heads // self.shards.tensor, cfg.head_dim
    zeros = lambda *lead: (jnp.zeros(lead + shape, cfg.dtype),) * 2
    layers = zeros(cfg.num_layers - 1) if cfg.num_layers > 1 else None
    states = None
    if cfg.shift_outputs:
      states = jnp.zeros((*size, 1, cfg.embed_dim), cfg.dtype)
    return transformer.Cache(layers, zeros(), states)

  def advance(self, params, *args, **options) -> Any:
    module = self.module
    return module.apply({'params': params}, *args, **options, method='advance')

  def flops_per_token(self, length: int) -> float:
    """Counts the model FLOPs of one token's forward and backward pass.

    6 x (matrix parameters) + 12 x layers x length x heads' width for the
    attention, as if every position passed every layer and the output
    projection, and those of an autoregressive clean copy, too. A multiply-add
    counts as 2; convolutions are left out. Both copies of block diffusion
    count, as does the forward pass that self-conditioning adds. With adapters,
    which are small, the gradients of frozen matrices are left out: 4 instead of
    6 per matrix parameter.
    """
    cfg = self.config
    width, inner = cfg.embed_dim, cfg.num_heads * cfg.head_dim
    mlp = (3 if cfg.is_gated else 2) * width * cfg.mlp_width
    heads = 2 * width * (inner + cfg.kv_heads * cfg.head_dim)
    layers = cfg.num_layers * (heads + mlp)
    copies = 2 if cfg.block_size else 1
    # An autoregressive clean copy is projected, too.
    num_projected = copies if cfg.causal else 1
    matrices = copies * layers + num_projected * width * cfg.vocab_size
    keys = length + cfg.attention_sink
    attention = 12 * copies * cfg.num_layers * keys * inner
    passes = 4 if cfg.lora else 6
    if cfg.self_conditioning:
      passes, attention = passes + 2, attention * 4 / 3
    return passes * matrices + attention

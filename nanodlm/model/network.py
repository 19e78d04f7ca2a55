"""The transformer as a `types.Network`."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax

from nanodlm.devices.sharding import Shards
from nanodlm.model import transformer
from nanodlm.model.config import ModelConfig, train_flops_per_token
from nanodlm.types import Hidden, Network, Objective


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
    transformer.check_shards(self.config, self.shards)

  @classmethod
  def make(
    cls,
    section: Mapping[str, Any],
    *,
    vocab_size: int,
    objective: Objective,
    shards: Shards,
    platform: str = '',
  ) -> 'TransformerNetwork':
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    config = ModelConfig(
      **{key: value for key, value in section.items() if key in names},
      vocab_size=vocab_size,
      causal=objective.causal,
      block_size=objective.block_size,
      platform=platform,
    )
    return cls(config, shards)

  @property
  def vocab_size(self) -> int:  # pyright: ignore
    return self.config.vocab_size

  @property
  def has_dropout(self) -> bool:  # pyright: ignore
    return self.config.dropout > 0

  @property
  def knows_time(self) -> bool:  # pyright: ignore
    return self.config.knows_time

  @property
  def num_positions(self) -> int:  # pyright: ignore
    return self.config.num_positions

  @property
  def has_cache(self) -> bool:  # pyright: ignore
    return not self.config.shift_outputs

  @property
  def module(self) -> transformer.Transformer:
    """The Linen module, without its parameters."""
    return transformer.Transformer(self.config, self.shards)

  def check(self, length: int):
    transformer.check_shards(self.config, self.shards, length)

  def init_params(self, key: jax.Array) -> Any:
    return transformer.init_params(self.config, key, self.shards)

  def gather(self, params: Any) -> Any:
    return transformer.gather_ends(params, self.shards)

  def hidden(self, params, tokens, t, **options) -> Hidden:
    states: Any = self.module.apply({'params': params}, tokens, t, **options)
    return Hidden(states)

  def kernel(self, params: Any) -> Any:
    return transformer.output_kernel(params)

  def logits(self, kernel: Any, states: jax.Array) -> jax.Array:
    return transformer.output_logits(kernel, states)

  def init_cache(self, batch_size: int, length: int) -> transformer.Cache:
    return transformer.init_cache(self.config, batch_size, length, self.shards)

  def advance(self, params, tokens, t, start, cache, visible, positions=None):
    return self.module.apply(
      {'params': params},
      tokens,
      t,
      start,
      cache,
      visible,
      positions,
      method='advance',
    )

  def flops_per_token(self, length: int) -> float:
    return train_flops_per_token(self.config, length)

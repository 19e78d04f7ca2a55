"""Base classes of samplers."""

import dataclasses
from typing import Any

from nanodlm.types import Objective, Sampler


class MaskedSampler(Sampler):
  """A sampler of masked models, which can also fill a block of one."""

  fills_blocks = True
  can_be_guided = True
  is_final = True
  reads_masks = True
  remembers = True

  @classmethod
  def fits(cls, objective: Objective) -> bool:
    return objective.predicts_masked


class OuterSampler(Sampler):
  """A sampler that runs another one, its field `inner`."""

  inner: Sampler

  @property
  def is_final(self) -> bool:  # pyright: ignore
    return self.inner.is_final

  def with_rule(self, rule: Any) -> Sampler:
    return self._with_inner(self.inner.with_rule(rule.of_block))

  def with_draw(self, draw: Any) -> Sampler:
    return self._with_inner(self.inner.with_draw(draw))

  def _with_inner(self, inner: Sampler) -> Sampler:
    return dataclasses.replace(self, inner=inner)  # pyright: ignore

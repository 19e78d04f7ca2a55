"""Objectives by name. To add one, write a file and list its class here."""

from collections.abc import Mapping

from nanodlm.objectives import (
  ar,
  block,
  d3pm,
  distill,
  flex,
  genmd4,
  masked,
  mixture,
  policy,
  preference,
  sedd,
  uniform,
)
from nanodlm.types import Objective

OBJECTIVES: dict[str, type[Objective]] = {
  'ar': ar.Autoregressive,
  'block': block.Block,
  'block_hybrid': block.BlockHybrid,
  'block_uniform': block.BlockUniform,
  'd3pm': d3pm.D3PM,
  'flex': flex.Flex,
  'genmd4': genmd4.GenMD4,
  'hybrid': mixture.Hybrid,
  'masked': masked.Masked,
  'sedd': sedd.ScoreEntropy,
  'uniform': uniform.Uniform,
}

# How a network of one of them is distilled, by config.distill.name.
DISTILLATIONS: dict[str, type[distill.Distillation]] = {
  'dcd': distill.DiscreteConsistency,
  'sdtt': distill.SelfDistillation,
}

# How it is tuned by rewards or preferences, by config.policy.name.
POLICIES: dict[str, type[policy.Tuning]] = {
  'coupled': policy.Coupled,
  'dpo': preference.Preference,
  'one_step': policy.OneStep,
  'sequence': policy.Sequence,
}

# The sections of the config that train a network by another objective.
METHODS: Mapping[str, Mapping[str, type[Objective]]] = {
  'distill': DISTILLATIONS,
  'policy': POLICIES,
}

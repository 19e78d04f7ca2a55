"""Objectives by name. To add one, write a file and list its class here."""

from nanodlm.objectives import (
  ar,
  block,
  d3pm,
  distill,
  genmd4,
  masked,
  mixture,
  sedd,
)
from nanodlm.types import Objective

OBJECTIVES: dict[str, type[Objective]] = {
  'ar': ar.Autoregressive,
  'block': block.Block,
  'd3pm': d3pm.D3PM,
  'genmd4': genmd4.GenMD4,
  'hybrid': mixture.Hybrid,
  'masked': masked.Masked,
  'sedd': sedd.ScoreEntropy,
  'uniform': mixture.Uniform,
}

# How a network of one of them is distilled, by config.distill.name.
DISTILLATIONS: dict[str, type[distill.Distillation]] = {
  'dcd': distill.DiscreteConsistency,
  'sdtt': distill.SelfDistillation,
}

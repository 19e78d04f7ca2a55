"""Objectives by name: one file each, one line here."""

from nanodlm.objectives import ar, block, d3pm, genmd4, masked, mixture, sedd

OBJECTIVES = {
  'ar': ar.Autoregressive,
  'block': block.Block,
  'd3pm': d3pm.D3PM,
  'genmd4': genmd4.GenMD4,
  'hybrid': mixture.Hybrid,
  'masked': masked.Masked,
  'sedd': sedd.ScoreEntropy,
  'uniform': mixture.Uniform,
}

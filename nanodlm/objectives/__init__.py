"""Objectives by name: one file each, one line here."""

from nanodlm.objectives import ar
from nanodlm.objectives import block
from nanodlm.objectives import d3pm
from nanodlm.objectives import genmd4
from nanodlm.objectives import masked
from nanodlm.objectives import mixture
from nanodlm.objectives import sedd

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

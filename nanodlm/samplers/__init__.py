"""Samplers by name: one file each, one line here."""

from nanodlm.samplers import (
  ancestral,
  ar,
  block,
  confidence,
  first_hitting,
  fixed_count,
  posterior,
  prefix_cache,
  remask,
)

SAMPLERS = {
  'ancestral': ancestral.Ancestral,
  'ar': ar.LeftToRight,
  'block': block.Block,
  'confidence': confidence.Confidence,
  'first_hitting': first_hitting.FirstHitting,
  'fixed_count': fixed_count.FixedCount,
  'posterior': posterior.Posterior,
  'prefix_cache': prefix_cache.PrefixCache,
  'remask': remask.Remask,
}

# What sampler.name='auto' stands for, by objective.
DEFAULTS = {
  'ar': 'ar',
  'block': 'block',
  'd3pm': 'posterior',
  'genmd4': 'posterior',
  'hybrid': 'posterior',
  'masked': 'fixed_count',
  'sedd': 'posterior',
  'uniform': 'posterior',
}

# What may fill a block, under 'block' and 'prefix_cache'.
INNER = ('ancestral', 'confidence', 'first_hitting', 'fixed_count', 'remask')

# Objectives whose networks predict the masked tokens. Normalised over the real
# tokens, d3pm's and sedd's are masked models too, with a bound that is at most
# their own, so that the samplers of masked noise are right for them.
_MASKED = ('masked', 'd3pm', 'sedd')

# The objectives whose networks a sampler can be used with.
FITS = {
  'ancestral': _MASKED,
  'ar': ('ar',),
  'block': ('block',),
  'confidence': _MASKED,
  'first_hitting': _MASKED,
  'fixed_count': _MASKED,
  'posterior': (*_MASKED, 'genmd4', 'hybrid', 'uniform'),
  'prefix_cache': _MASKED,
  'remask': _MASKED,
}

# Where sampler.guidance may be > 0: the network knows masks, in prompts too.
GUIDED = frozenset(
  {'ancestral', 'confidence', 'first_hitting', 'fixed_count', 'remask'}
)

# Samplers whose tokens are final once they are revealed.
FINAL = frozenset(
  {'ancestral', 'ar', 'confidence', 'first_hitting', 'fixed_count'}
)

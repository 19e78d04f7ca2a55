"""Samplers by name. To add one, write a file and list its class here.

first_hitting   Exact; one call per token.
fixed_count     Exact with one call per token; the tokens of one call are
                drawn independently.
ancestral       Exact as num_steps grows.
confidence      margin, entropy, random: exact with one position per call.
                max_prob prefers probable texts, at temperature 1 so much
                that a weak network repeats a few words.
remask          cap, rescale, constant: exact as num_steps grows. conf, loop:
                approximate.
edit            Approximate.
expand          Approximate; it also changes the length.
posterior       Exact as num_steps grows, for any noise.
psi             As remask, for any noise.
renoise         Approximate.
block           As the inner sampler; finished blocks are cached exactly.
prefix_cache    Approximate: keys and values outside the block are stale.
insert          Exact as num_steps grows; it also draws the length.
ar              Exact, left to right, cached.
speculate       As ar, exactly, for block models that are also autoregressive.
"""

from nanodlm.samplers import (
  ancestral,
  ar,
  block,
  confidence,
  edit,
  expand,
  first_hitting,
  fixed_count,
  insert,
  posterior,
  prefix_cache,
  psi,
  remask,
  renoise,
  speculate,
)
from nanodlm.types import Sampler

SAMPLERS: dict[str, type[Sampler]] = {
  'ancestral': ancestral.Ancestral,
  'ar': ar.LeftToRight,
  'block': block.Block,
  'confidence': confidence.Confidence,
  'edit': edit.Edit,
  'expand': expand.Expand,
  'first_hitting': first_hitting.FirstHitting,
  'fixed_count': fixed_count.FixedCount,
  'insert': insert.Insert,
  'posterior': posterior.Posterior,
  'prefix_cache': prefix_cache.PrefixCache,
  'psi': psi.Psi,
  'remask': remask.Remask,
  'renoise': renoise.Renoise,
  'speculate': speculate.Speculate,
}

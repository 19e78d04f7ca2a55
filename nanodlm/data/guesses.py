"""The cost of guesses without a network, as a baseline for a bound."""

from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from nanodlm.data import pipeline
from nanodlm.data.config import DataConfig
from nanodlm.data.packed import PackedData

# About how many tokens of each split are looked at.
NUM_TOKENS = 2**19


def measure(packed: PackedData, data_config: DataConfig) -> dict[str, float]:
  """Scores held-out tokens by two guesses that ignore their surroundings.

  A document ends at its first separator; those that fill its row are certain.

  Returns:
    Nats per token of a uniform guess, 'uniform_nll', and of the frequencies of
    the tokens of the training split, each counted once more so that none is 0,
    'unigram_nll' (absent without such a split); bits_per_token / bits_per_byte,
    'bytes_per_token'; and 'num_tokens', those that were scored.
  """
  # The mask is never a token of the text.
  num_ids = packed.tokenizer.vocab_size - 1

  def count(rows):
    size = min(max(NUM_TOKENS // packed.length, 1), len(rows))
    split = dataclasses.replace(packed, validation=rows)
    (batch,) = pipeline.make_eval_batches(
      split, data_config, batch_size=size, max_examples=size
    )
    number = np.cumsum(batch.eligible, axis=1)  # Of the tokens to score.
    is_counted = batch.eligible & (number <= batch.num_tokens[:, None])
    return batch, np.bincount(batch.tokens[is_counted], minlength=num_ids)

  held_out, counts = count(packed.validation)
  num_tokens = int(held_out.num_tokens.sum())
  guesses = {'uniform_nll': np.full(num_ids, math.log(num_ids))}
  parts: Sequence[Any] = [packed.train]
  if len(packed.weights) > 1:  # Each has its share of the examples.
    pairs = itertools.pairwise(packed.train_borders)
    parts = [packed.train[start:stop] for start, stop in pairs]
  if any(map(len, parts)):
    found = [(w, *count(x)) for w, x in zip(packed.weights, parts) if len(x)]
    rates = [weight * n / len(batch.tokens) for weight, batch, n in found]
    seen = np.sum(rates, axis=0)
    seen = seen * sum(n.sum() for *_, n in found) / seen.sum() + 1
    guesses['unigram_nll'] = math.log(seen.sum()) - np.log(seen)
  return {
    **{key: float(counts @ nll) / num_tokens for key, nll in guesses.items()},
    'bytes_per_token': float(held_out.num_bytes.sum()) / num_tokens,
    'num_tokens': num_tokens,
  }


def describe(values: dict[str, float]) -> str:
  """Describes what `measure` returns in one line."""
  kinds = {
    'uniform_nll': 'a uniform guess has',
    'unigram_nll': 'the frequencies of tokens have',
  }
  bits = math.log(2) * values['bytes_per_token']
  parts = [
    f'{kind} {values[key]:.4f} nats/token, {values[key] / bits:.4f} bits/byte'
    for key, kind in kinds.items()
    if key in values
  ]
  return (
    f'to compare, lower is better: {"; ".join(parts)} '
    f'({values["num_tokens"]:,} tokens)'
  )

"""Enumerable texts, and networks that are tables or compile quickly.

A table replaces a network: its row for each canvas (tokens and masks) contains
the logits of all positions, so that expectations are sums over all cases.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from nanodlm.model.config import ModelConfig
from nanodlm.model.network import TransformerNetwork

# Tokens 0, 1, 2 and the mask; texts of three tokens.
VOCAB = 3
LENGTH = 3
MASK = 3
TEXTS = np.array(list(itertools.product(range(VOCAB), repeat=LENGTH)), np.int32)
CANVASES = np.array(
  list(itertools.product(range(VOCAB + 1), repeat=LENGTH)), np.int32
)


def canvas_index(tokens):
  """The rows [...] of canvases [..., L] in CANVASES."""
  return tokens @ (VOCAB + 1) ** np.arange(LENGTH)[::-1]


def text_index(tokens):
  """The rows [...] of texts [..., L] in TEXTS."""
  return np.asarray(tokens) @ VOCAB ** np.arange(LENGTH)[::-1]


def random_joint(seed):
  """A p(x) over TEXTS, [27] float64, far from a product."""
  p = np.exp(1.2 * np.random.default_rng(seed).normal(size=len(TEXTS)))
  return p / p.sum()


def random_table(seed):
  """Logits of an arbitrary denoiser, [64, L, V + 1]; the mask's are large."""
  table = np.random.default_rng(seed).normal(size=(len(CANVASES), LENGTH, 4))
  table[..., MASK] += 3
  return table.astype(np.float32)


def posterior_table(joint):
  """Logits of p(x_i | unmasked tokens) under a joint, [64, L, V + 1]."""
  table = np.full((len(CANVASES), LENGTH, VOCAB + 1), 3.0)
  for row, canvas in enumerate(CANVASES):
    p = joint * np.all((canvas == MASK) | (canvas == TEXTS), axis=1)
    for i, v in itertools.product(range(LENGTH), range(VOCAB)):
      with np.errstate(divide='ignore'):
        log_p = np.log(p[TEXTS[:, i] == v].sum() / p.sum())
      table[row, i, v] = max(log_p, -100.0)
  return table.astype(np.float32)


def mixture_law(alpha, mask, uniform):
  """q(z | x0) of noise with these shares, [..., x0, z]."""
  law = np.zeros((*np.shape(alpha), VOCAB, VOCAB + 1))
  law += np.eye(VOCAB, VOCAB + 1) * np.asarray(alpha)[..., None, None]
  law[..., :MASK] += np.asarray(uniform)[..., None, None] / VOCAB
  law[..., MASK] += np.asarray(mask)[..., None]
  return law


def noise_laws(law, fixed=(False,) * LENGTH):
  """q(canvas | text) of independent noise, by position: [64, 27, L].

  Args:
    law: [x0, z], of a position that is not fixed.
    fixed: [L], positions that are never noised.
  """
  z, x0 = CANVASES[:, None], TEXTS[None]
  return np.where(np.array(fixed)[None, None], z == x0, law[x0, z])


def leave_one_out_table(joint, law, fixed=(False,) * LENGTH):
  """Logits of p(x_i | the other positions' noisy tokens), [64, L, V + 1]."""
  by_position = noise_laws(law, fixed)
  table = np.full((len(CANVASES), LENGTH, VOCAB + 1), 3.0)
  for i in range(LENGTH):
    p = joint * np.prod(np.delete(by_position, i, axis=2), axis=2)
    p = np.stack([p[:, TEXTS[:, i] == v].sum(1) for v in range(VOCAB)], axis=1)
    p = np.maximum(p, 1e-300)  # canvases that cannot be
    table[:, i, :MASK] = np.log(p / p.sum(1, keepdims=True))
  return np.maximum(table, -100.0).astype(np.float32)


def token_law(masked):
  """q(z | x0), [x0, z], where token v is masked with probability masked[v]."""
  law = np.diag(1 - np.asarray(masked, np.float64))
  return np.concatenate([law, np.asarray(masked)[:, None]], axis=1)


def whole_posterior_table(joint, law, fixed=(False,) * LENGTH):
  """Logits of p(x_i | all noisy tokens, the i-th too), [64, L, V + 1]."""
  p = joint * np.prod(noise_laws(law, fixed), axis=2)  # [64, 27]
  p = p @ np.eye(VOCAB)[TEXTS].reshape(len(TEXTS), -1)
  p = np.maximum(p.reshape(-1, LENGTH, VOCAB), 1e-300)
  log_p = np.log(p / p.sum(-1, keepdims=True))
  log_p = np.pad(log_p, ((0, 0), (0, 0), (0, 1)), constant_values=3.0)
  return np.maximum(log_p, -100.0).astype(np.float32)


def log_softmax(logits):
  """Over the clean tokens only, float64."""
  logits = np.asarray(logits, np.float64)[..., :MASK]
  logits = logits - logits.max(-1, keepdims=True)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def order_nll(table, x0, order):
  """-log p of x0[order] given the rest, one token at a time; nats."""
  log_p = log_softmax(table)
  canvas, nll = np.array(x0), 0.0
  canvas[list(order)] = MASK
  for i in order:
    nll -= log_p[canvas_index(canvas), i, x0[i]]
    canvas[i] = x0[i]
  return nll


def any_order_nll(table, x0, eligible=range(LENGTH)):
  """Mean over all orders of the eligible positions, nats."""
  orders = list(itertools.permutations(eligible))
  return np.mean([order_nll(table, x0, order) for order in orders])


class CachedTable:
  """A `types.CachedDenoise` that looks its logits up; a cache is a canvas.

  Attributes:
    table: [64, L, V + 1].
    block_size: of a block-diffusion model; 0: masked.
    causal: an autoregressive model, whose input is the text shifted by one.
  """

  def __init__(self, table, block_size=0, causal=False):
    self.table = jnp.asarray(table)
    self.block_size, self.causal = block_size, causal

  def of(self, table):
    return CachedTable(table, self.block_size, self.causal)

  def __call__(self, tokens, level, positions):
    del level
    if self.block_size:  # later blocks are not seen
      last = positions[:1, :1] // self.block_size
      where = jnp.arange(tokens.shape[1])[None] // self.block_size
      tokens = jnp.where(where <= last, tokens, MASK)
    return self._look_up(tokens, positions)

  def _look_up(self, canvas, positions):
    rows = canvas_index(canvas[:, :LENGTH])[:, None]
    return self.table[rows, jnp.minimum(positions, LENGTH - 1)]

  @property
  def autoregressive(self):
    return self

  def init_cache(self, tokens):
    return jnp.full_like(tokens, MASK)

  def advance(self, cache, tokens, start, visible, level=None):
    del visible, level
    return jax.lax.dynamic_update_slice_in_dim(cache, tokens, start, axis=1)

  def within(self, cache, tokens, start, level, positions, visible):
    del level
    canvas = jnp.where(visible[None], cache, MASK)
    canvas = jax.lax.dynamic_update_slice_in_dim(canvas, tokens, start, axis=1)
    if self.causal:
      canvas = jnp.where(
        jnp.arange(canvas.shape[1])[None] < start,
        jnp.roll(canvas, -1, axis=1),
        MASK,
      )
    logits = self._look_up(canvas, start + positions)
    return logits, self.advance(cache, tokens, start, visible)


class DraftingTable(CachedTable):
  """A block model that is also autoregressive, by two tables.

  Its cache is the input of the autoregressive model, and rows can have their
  own places in it.

  Attributes:
    table: of the autoregressive law.
    drafts: of the block model.
    is_draft: whether calls are of the block model.
  """

  def __init__(self, table, drafts, is_draft=True):
    super().__init__(table)
    self.drafts, self.is_draft = jnp.asarray(drafts), is_draft

  def of(self, table):
    return DraftingTable(table, self.drafts)

  @property
  def autoregressive(self):
    return DraftingTable(self.table, self.drafts, is_draft=False)

  def init_cache(self, tokens):
    return jnp.pad(super().init_cache(tokens), ((0, 0), (0, 1)))

  def _write(self, canvas, tokens, start):
    start = jnp.full(len(tokens), start)
    write = lambda row, x, i: jax.lax.dynamic_update_slice_in_dim(row, x, i, 0)
    return jax.vmap(write)(canvas, tokens, start)

  def advance(self, cache, tokens, start, visible, level=None):
    del visible, level
    return self._write(cache, tokens, start)

  def within(self, cache, tokens, start, level, positions, visible):
    del level
    positions = jnp.full(len(tokens), start)[:, None] + positions
    if self.is_draft:
      canvas = jnp.where(visible, cache[:, 1:], MASK)
      canvas = self._write(canvas, tokens, start)[:, None, :LENGTH]
      table = self.drafts
    else:
      cache = self._write(cache, tokens, start)
      seen = jnp.arange(LENGTH)[None, None] < positions[..., None]
      canvas = jnp.where(seen, cache[:, None, 1 : LENGTH + 1], MASK)
      table = self.table
    logits = table[canvas_index(canvas), jnp.minimum(positions, LENGTH - 1)]
    return logits, cache


def chi_square(counts, expected):
  """The p-value of observed counts under expected probabilities."""
  counts, expected = np.ravel(counts), np.ravel(expected)
  possible = expected > 0
  if counts[~possible].any():
    return 0.0
  if possible.sum() == 1:
    return 1.0
  counts, expected = counts[possible], expected[possible]
  expected = expected / expected.sum() * counts.sum()
  return stats.chisquare(counts, expected).pvalue


def model_config(**changes):
  """A network of 3 layers and width 16 over 12 ids."""
  fields = dict(
    vocab_size=12,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    num_kv_heads=0,
    head_size=0,
    num_positions=0,
    keep_rotary=False,
    conv_size=0,
    norm='rms',
    norm_eps=1e-6,
    norm_bias=False,
    attention_bias='none',
    mlp_bias=False,
    shift_outputs=False,
    mlp_dim=32,
    mlp='relu2',
    qk_norm=False,
    joint_qk_norm=False,
    attention_cap=0.0,
    attention_sink=False,
    tie_embeddings=True,
    dropout=0.0,
    time_conditioning=False,
    time_form='dit',
    time_dim=0,
    output_bias=False,
    embedding_dim=0,
    embedding_std=0.02,
    self_conditioning=False,
    causal=False,
    block_size=0,
    rope_theta=1e4,
    rope_factor=1.0,
    rope_scaling='llama3',
    rope_length=8192,
    start_token=-1,
    dtype='float32',
    remat='none',
    unroll=False,
    attention='auto',
  )
  return ModelConfig(**{**fields, **changes})


@functools.cache
def large_params(config, scale=3):
  """Parameters on the host, so large that each part of a network matters.

  Their dicts are shared by all callers.
  """
  params = jax.jit(TransformerNetwork(config).init_params)(jax.random.key(0))
  return jax.tree.map(lambda x: scale * np.array(x), params)

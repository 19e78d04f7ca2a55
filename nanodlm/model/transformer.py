"""The transformer: tokens (and t) -> hidden; hidden -> logits are two calls.

Pre-norm blocks, with rotary positions by default, scanned over all layers but
the last. That one is on its own because it can be told which positions are
wanted: its keys and values need every position, its output projection and MLP
only those that are scored (in training, half of them) or revealed (in sampling,
a few).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import attention
from nanodlm.model.config import (
  ATTENTION_OUT,
  MLPS,
  ModelConfig,
  REMATS,
  TIME_FORMS,
)
from nanodlm.model.layers import (
  activate_time,
  dropout_mask,
  Heads,
  INIT_STD,
  keeps_inputs,
  Linear,
  Norm,
  rotary_table,
  TimeEmbedding,
)
from nanodlm.types import InputError


class Cache(NamedTuple):
  """Keys and values of the positions that a sampler is done with.

  Attributes:
    layers: (keys, values), [num_layers - 1, B, C, K, Dh] each, or None.
    last: (keys, values) of the last layer, [B, C, K, Dh] each.
  """

  layers: Any
  last: Any


class Block(nn.Module):
  """Attention and MLP, each pre-normed and added to the residual stream.

  With time conditioning each branch is shifted, scaled and gated by the time
  (adaLN-zero): the gates start at 0, the norms have no scale of their own.
  """

  config: ModelConfig
  shards: Shards = Shards()

  @nn.compact
  def __call__(
    self,
    x,
    layer,
    cached,
    time,
    rotary,
    segment_ids,
    dropout_keys,
    visible,
    seen,
    positions=None,
  ):
    """Applies the block.

    Args:
      x: [B, L, D]; B is even with `config.block_size`, noisy rows and clean ones.
      layer: [] int32, the block's index.
      cached: (keys, values) of other positions, [B, C, K, Dh] each, or None.
      time: [B, D] embedded time, or None.
      rotary: `rotary_table(L)`, or None where positions are learned.
      segment_ids: [B, L] int32 or None.
      dropout_keys: [B] or None.
      visible: [C] bool, which of the cached positions are seen, or None.
      seen: [B, L, L] bool, which positions each one sees; None is the config's.
      positions: [N] int32 indices into B * L of the rows wanted; None is all.

    Returns:
      [B, L, D], or [N, D] with `positions`; and the tokens' own (keys, values)
      where some are cached, else None.
    """
    cfg, shards = self.config, self.shards
    batch, length, width = x.shape
    dtype = jnp.dtype(cfg.dtype)
    # This device's: a part of the heads and of the MLP.
    num_heads = cfg.num_heads // shards.tensor
    kv_heads = cfg.kv_heads // shards.tensor
    inner, mlp_width = num_heads * cfg.head_dim, cfg.mlp_width // shards.tensor
    norm = functools.partial(
      Norm, cfg, not cfg.time_conditioning or TIME_FORMS[cfg.time_form].scales
    )

    def pick(y):  # [B, L, D] -> the wanted rows
      return y if positions is None else y.reshape(-1, y.shape[-1])[positions]

    def pick_time(y):  # [B, D] -> broadcastable to the wanted rows
      return y[:, None] if positions is None else y[positions // length]

    def branch(y, gate, salt):
      if gate is not None:
        y = y * pick_time(gate)
      if dropout_keys is not None and cfg.dropout:
        keys = jax.vmap(
          lambda key: jax.random.fold_in(jax.random.fold_in(key, layer), salt)
        )(dropout_keys)
        y = y * pick(dropout_mask(keys, cfg.dropout, (length, width))).astype(
          y.dtype
        )
      return y

    gate1 = gate2 = None
    if cfg.time_conditioning:
      modulation = nn.Dense(
        6 * width // shards.tensor,
        dtype=dtype,
        name='modulation',
        kernel_init=nn.initializers.zeros,
      )(activate_time(cfg, time))
      modulation = sharding.concatenate(modulation, shards)
      shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
        modulation, 6, axis=-1
      )

    h = norm(name='attention_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + scale1[:, None]) + shift1[:, None]
    h = sharding.split(h, shards)
    q, k, v = (
      Linear(
        heads * cfg.head_dim, dtype, cfg.attention_bias != 'none', name=name
      )(h).reshape(batch, length, heads, cfg.head_dim)
      for name, heads in (
        ('query', num_heads),
        ('key', kv_heads),
        ('value', kv_heads),
      )
    )
    q, k = (
      Heads(cfg, name='q_norm')(q, rotary),
      Heads(cfg, name='k_norm')(k, rotary),
    )
    own = None
    if cached is not None:
      own = (k, v)
      h = attention.cached_attention(
        q, k, v, *cached, visible, causal=cfg.causal
      )
    elif cfg.block_size:
      if positions is not None:  # of the noisy rows, the last layer's output
        q = q[: batch // 2]
      h = attention.block_attention(
        q,
        k,
        v,
        block_size=cfg.block_size,
        segment_ids=segment_ids,
        backend=cfg.attention,
        platform=cfg.platform,
      )
    else:
      h = attention.attention(
        q,
        k,
        v,
        causal=cfg.causal,
        seen=seen,
        segment_ids=segment_ids,
        backend=cfg.attention,
        platform=cfg.platform,
      )
    h = pick(
      ad_checkpoint.checkpoint_name(h, ATTENTION_OUT).reshape(-1, length, inner)
    )
    out_std = INIT_STD / (2 * cfg.num_layers) ** 0.5
    out = Linear(
      width,
      dtype,
      cfg.attention_bias == 'all',
      out_std,
      shards,
      name='attention_out',
    )(h)
    x = pick(x) + branch(out, gate1, 0)

    h = norm(name='mlp_norm')(x)
    if cfg.time_conditioning:
      h = h * (1 + pick_time(scale2)) + pick_time(shift2)
    h = sharding.split(h, shards)
    up = Linear(mlp_width, dtype, cfg.mlp_bias, name='mlp_in')(h)
    if cfg.is_gated:
      gate = Linear(mlp_width, dtype, cfg.mlp_bias, name='mlp_gate')(h)
      up = keeps_inputs(
        lambda gate, up: MLPS[cfg.mlp](gate) * up, cfg.platform
      )(gate, up)
    else:
      up = MLPS[cfg.mlp](up)
    out = Linear(width, dtype, cfg.mlp_bias, out_std, shards, name='mlp_out')(
      up
    )
    return x + branch(out, gate2, 1), own


class Transformer(nn.Module):
  """Tokens -> hidden; `output_logits` makes logits of them.

  Attributes:
    config: the network's shape.
    shards: over how many devices its parameters are split. The blocks gather
      theirs over fsdp when they run; `gather_ends` does it for the others.
  """

  config: ModelConfig
  shards: Shards = Shards()

  def setup(self):
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    num_ids = sharding.padded(cfg.vocab_size, self.shards) // self.shards.tensor
    normal = nn.initializers.normal(INIT_STD)
    self.embedding = self.param(
      'embedding', normal, (num_ids, cfg.embedding_dim or cfg.embed_dim)
    )
    if cfg.embedding_dim:
      self.embedding_in = nn.Dense(
        cfg.embed_dim, dtype=dtype, kernel_init=normal
      )
    if not cfg.tie_embeddings:
      self.output = self.param('output', normal, (num_ids, cfg.embed_dim))
    if cfg.output_bias:
      self.output_bias = self.param(
        'output_bias', nn.initializers.zeros, (num_ids,)
      )
    if cfg.num_positions:
      self.position_embedding = self.param(
        'position_embedding', normal, (cfg.num_positions, cfg.embed_dim)
      )
    form = TIME_FORMS[cfg.time_form]
    is_final = cfg.time_conditioning and form.final
    if cfg.time_conditioning:
      self.time_embedding = TimeEmbedding(cfg)
    if is_final:
      self.final_modulation = nn.Dense(
        2 * cfg.embed_dim, dtype=dtype, kernel_init=nn.initializers.zeros
      )
    if cfg.num_layers > 1:
      self.layers = Block(cfg)
    self.last_layer = Block(cfg)
    self.final_norm = Norm(cfg, not is_final or form.scales)

  def __call__(
    self,
    tokens: jax.Array,
    t: jax.Array | None = None,
    *,
    clean: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    seen: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """The network up to, not including, the output projection.

    Args:
      tokens: [B, L] int32.
      t: [B] float32 in [0, 1]; read with time conditioning only.
      clean: [B, L] int32, the clean text, with `config.block_size` only.
      segment_ids: [B, L] int32; a position attends within its segment.
      dropout_keys: [B], one per example; None turns dropout off.
      seen: [B, L, L] bool, which positions each one sees, as `opening_mask`;
        None: as the config says.
      positions: [N] int32 indices into B * L of the rows wanted, None for all.
        The last block computes its output for those only.

    Returns:
      hidden [B, L, D], or [N, D] with `positions`, in the compute dtype.
    """
    shape = tokens.shape
    if self.config.block_size:
      twice = lambda x: None if x is None else jnp.concatenate([x, x])
      tokens, t = jnp.concatenate([tokens, clean]), twice(t)
      segment_ids = twice(segment_ids)
      if dropout_keys is not None:  # the copies' masks are independent
        dropout_keys = jnp.concatenate(
          [
            jax.vmap(lambda key: jax.random.fold_in(key, copy))(dropout_keys)
            for copy in range(2)
          ]
        )
    wanted = positions
    if (self.config.block_size or self.config.shift_outputs) and wanted is None:
      wanted = jnp.arange(shape[0] * shape[1])
    if self.config.shift_outputs:
      wanted = jnp.where(wanted % shape[1] == 0, wanted, wanted - 1)
    hidden, _ = self._layers(
      tokens,
      t,
      jnp.arange(shape[1]),
      Cache(None, None),
      segment_ids,
      dropout_keys,
      None,
      seen,
      wanted,
    )
    if positions is None:
      hidden = hidden.reshape(*shape, -1)
    return hidden

  def advance(
    self,
    tokens: jax.Array,
    t: jax.Array | None,
    start: jax.Array,
    cache: Cache,
    visible: jax.Array,
    positions: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """The network on S consecutive tokens, the rest coming from a cache.

    Args:
      tokens: [B, S] int32.
      t: [B] float32; read with time conditioning only.
      start: [] int32, the position of the first of them.
      cache: of C positions, with start + S <= C.
      visible: [C] bool, the cached positions that the tokens see.
      positions: [N] int32 indices into B * S of the rows wanted, None for all.

    Returns:
      hidden [B, S, D] or [N, D], and the cache with the tokens' own keys and
      values at start .. start + S - 1.
    """
    if self.config.shift_outputs:
      raise InputError(
        'model.shift_outputs=True reads outputs from before a block, '
        'which a cache of keys and values does not have'
      )
    where = start + jnp.arange(tokens.shape[1])
    hidden, own = self._layers(
      tokens, t, where, cache, None, None, visible, None, positions
    )

    def write(old, new):
      return jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), start, axis=old.ndim - 3
      )

    return hidden, jax.tree.map(write, cache, own)

  def _layers(
    self,
    tokens,
    t,
    where,
    cache,
    segment_ids,
    dropout_keys,
    visible,
    seen,
    positions,
  ):
    """Hidden states of tokens at `where` [L], and their own keys and values."""
    cfg = self.config
    last_layer = cfg.num_layers - 1
    x = self._embed(tokens, where)
    time = None
    if cfg.time_conditioning:
      time = self.time_embedding(
        t if cfg.knows_time else jnp.zeros(tokens.shape[:1])
      )
    rotary = (
      None
      if cfg.num_positions
      else rotary_table(where, cfg.head_dim, cfg.rope_theta)
    )
    args = (time, rotary, segment_ids, dropout_keys, visible, seen)
    if self.is_initializing():
      self._init_layers(x, args)
    own = None
    if cfg.num_layers > 1:
      # In a scan XLA does not undo the recomputation; elsewhere it would.
      apply = self._make_apply(prevent_cse=cfg.unroll)

      def body(x, layer):
        params, index, cached = layer
        return apply(params, x, index, cached, *args)

      layers = (
        self.layers.variables['params'],
        jnp.arange(last_layer),
        cache.layers,
      )
      x, own = (_unrolled_scan if cfg.unroll else jax.lax.scan)(body, x, layers)
    x, last = self._make_apply(prevent_cse=True)(
      self.last_layer.variables['params'],
      x,
      last_layer,
      cache.last,
      *args,
      positions,
    )
    x = self.final_norm(x)
    if cfg.time_conditioning and TIME_FORMS[cfg.time_form].final:
      shift, scale = jnp.split(
        self.final_modulation(activate_time(cfg, time)), 2, axis=-1
      )
      wanted = (
        (lambda y: y[:, None])
        if positions is None
        else (lambda y: y[positions // tokens.shape[1]])
      )
      x = x * (1 + wanted(scale)) + wanted(shift)
    return x, Cache(own, last)

  def _embed(self, tokens, where):
    """[B, L] at positions [L] -> [B, L, D]."""
    # Rows first, then the cast: the gradients of a row, the mask's above all,
    # are summed in float32.
    dtype = jnp.dtype(self.config.dtype)
    if self.shards.tensor == 1:
      rows = self.embedding[tokens]
    else:
      size = self.embedding.shape[0]
      tokens = tokens - jax.lax.axis_index(sharding.TENSOR) * size
      is_here = (tokens >= 0) & (tokens < size)
      rows = self.embedding[jnp.where(is_here, tokens, 0)]
      rows = jnp.where(is_here[..., None], rows, 0.0)
      rows = sharding.join(rows, self.shards)
    if self.config.embedding_dim:
      rows = self.embedding_in(rows.astype(dtype))
    if self.config.num_positions:
      rows = rows + self.position_embedding[where][None]
    return rows.astype(dtype)

  def _make_apply(self, prevent_cse):
    """apply(params, x, layer, cached, *args) of a block, with remat."""
    cfg, shards = self.config, self.shards

    def apply(params, x, *args):
      params = sharding.gather(params, shards, jnp.dtype(cfg.dtype))
      return Block(cfg, shards, parent=None).apply({'params': params}, x, *args)

    policy = REMATS[cfg.remat]
    if cfg.remat == 'none':
      if shards.fsdp == 1:
        return apply
      policy = sharding.save_all_but_gathered
    return jax.checkpoint(apply, policy=policy, prevent_cse=prevent_cse)

  def _init_layers(self, x, args):
    """Draws the parameters of all blocks, those of the scan stacked."""
    num_layers = self.config.num_layers
    if num_layers > 1:
      nn.scan(
        lambda block, x, layer: block(x, layer, None, *args),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=num_layers - 1,
      )(self.layers, x, jnp.arange(num_layers - 1))
    self.last_layer(x, num_layers - 1, None, *args)


def _unrolled_scan(body, carry, xs):
  """jax.lax.scan, one step written after another."""
  # unstack and not indexing: its transpose stacks, where n index operations
  # would each pad their gradient to the full stack.
  leaves, tree = jax.tree.flatten(xs)
  outs = []
  for x in zip(*map(jnp.unstack, leaves)):
    carry, out = body(carry, jax.tree.unflatten(tree, x))
    outs.append(out)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def opening_mask(keys: jax.Array, share: jax.Array, length: int) -> jax.Array:
  """Attention between causal and full: attention mask annealing.

  Source: DiffuLLaMA, arXiv 2410.17891, section 3.2, by which an autoregressive
  network becomes a diffusion model.
  Differs from the paper: each example has a mask of its own, not each batch.

  Args:
    keys: [B], one per example.
    share: [] in [0, 1], probability that a position sees one to its right.
    length: L.

  Returns:
    [B, L, L] bool, which positions (last axis) each position sees; a position
    always sees itself and those to its left.
  """
  draw = lambda key: jax.random.bernoulli(key, share, (length, length))
  return jax.vmap(draw)(keys) | jnp.tril(jnp.ones((length, length), bool))[None]


def init_cache(
  config: ModelConfig, batch_size: int, length: int, shards: Shards = Shards()
) -> Cache:
  """An empty cache of `length` positions, in the compute dtype."""
  shape = (
    batch_size,
    length,
    config.kv_heads // shards.tensor,
    config.head_dim,
  )
  zeros = lambda *lead: (jnp.zeros(lead + shape, config.dtype),) * 2
  layers = zeros(config.num_layers - 1) if config.num_layers > 1 else None
  return Cache(layers, zeros())


class Affine(NamedTuple):
  """An output projection with a bias.

  Attributes:
    kernel: [V, D].
    bias: [V].
  """

  kernel: jax.Array
  bias: jax.Array


def output_kernel(params) -> jax.Array | Affine:
  """The output projection's kernel [V, D] (float32), tied or not, and its bias."""
  kernel = params.get('output', params['embedding'])
  if 'output_bias' in params:
    return Affine(kernel, params['output_bias'])
  return kernel


def output_logits(kernel: jax.Array | Affine, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] times kernel [V, D], transposed, -> [..., V] float32."""
  if isinstance(kernel, Affine):
    bias = jnp.expand_dims(kernel.bias, range(hidden.ndim - 1))
    return output_logits(kernel.kernel, hidden) + bias
  # Not a transposed kernel: where the product is in a loop XLA would make one.
  last = ((hidden.ndim - 1,), (1,))
  return jax.lax.dot_general(
    hidden,
    kernel.astype(hidden.dtype),
    (last, ((), ())),
    preferred_element_type=jnp.float32,
  )


def init_params(config: ModelConfig, key: jax.Array, shards: Shards = Shards()):
  """Draws the initial parameters, a nested dict of float32 arrays, whole.

  The same numbers for any `shards`; only the vocabulary is padded for them, by
  rows of zeros, which stay zeros.
  """
  # Neither changes a shape; kernels do not take two tokens.
  config = dataclasses.replace(config, block_size=0, attention='xla')
  tokens = jnp.zeros((1, 2), jnp.int32)
  params = Transformer(config).init(key, tokens, jnp.zeros((1,)))['params']
  padding = sharding.padded(config.vocab_size, shards) - config.vocab_size
  for name in sharding.BY_VOCABULARY & set(params):
    x = params[name]
    params[name] = jnp.pad(x, ((0, padding),) + ((0, 0),) * (x.ndim - 1))
  return params


def check_shards(config: ModelConfig, shards: Shards, length: int = 0):
  """Raises InputError where the network cannot be split so.

  Args:
    config: the network.
    shards: over how many devices.
    length: of the texts, for what kernels ask of a device's part; 0: not checked.
  """
  for axis, keys in (
    ('fsdp', ('embed_dim', 'embedding_dim', 'time_width')),
    ('tensor', ('num_heads', 'kv_heads', 'mlp_width')),
  ):
    size = getattr(shards, axis)
    for key in keys:
      if getattr(config, key) % size:
        name = {
          'mlp_width': 'mlp_dim',
          'kv_heads': 'num_kv_heads',
          'time_width': 'time_dim',
        }.get(key, key)
        chosen = '' if getattr(config, name) else ' (chosen, for 0)'
        raise InputError(
          f'mesh.{axis}={size!r} does not divide model.{name}='
          f'{getattr(config, key)!r}{chosen}; it must, as its parts lie on so '
          'many devices'
        )
  if length:
    copies = 2 if config.block_size else 1
    attention.check_sizes(
      config.attention,
      config.num_heads // shards.tensor,
      config.head_dim,
      length,
      copies * length,
      jnp.dtype(config.dtype).itemsize,
    )


def gather_ends(params, shards: Shards):
  """The parameters with all that belongs to no block gathered over fsdp."""
  blocks = ('layers', 'last_layer')
  ends = {name: tree for name, tree in params.items() if name not in blocks}
  return {**params, **sharding.gather(ends, shards)}

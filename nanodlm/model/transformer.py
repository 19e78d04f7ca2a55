"""The transformer, with one call for hidden states and one for their logits.

Blocks are pre-normed, with rotary positions by default, and scanned over all
layers but the last. The last one is separate because its caller can choose the
positions wanted: its keys and values need every position, its output projection
and MLP only those that are scored (half of them in training) or revealed (a few
in sampling).
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from jax import ad_checkpoint
import jax.numpy as jnp

from nanodlm.devices import sharding
from nanodlm.devices.sharding import Shards
from nanodlm.model import attention, lora
from nanodlm.model.config import (
  ATTENTION_OUT,
  MLPS,
  ModelConfig,
  REMATS,
  TIME_FORMS,
)
from nanodlm.model.layers import (
  activate_time,
  convolve,
  dropout_mask,
  Heads,
  INIT_STD,
  keeps_inputs,
  Linear,
  Norm,
  rotary_table,
  TimeEmbedding,
)
from nanodlm.types import InputError, SoftTokens


class Cache(NamedTuple):
  """Keys and values of positions that a sampler has finished.

  Attributes:
    layers: (keys, values), [num_layers - 1, B, C, K, Dh] each, or None.
    last: (keys, values) of the last layer, [B, C, K, Dh] each.
    states: [B, C, 1, D], outputs of the network, with shifted outputs; the
      first token of a block is read from them.
  """

  layers: Any
  last: Any
  states: Any = None


class Context(NamedTuple):
  """Inputs that all blocks share; None for those that do not apply.

  Attributes:
    time: [B, n, time_width], the embedded times of n equal parts of each row.
    rotary: the result of `rotary_table`; None if positions are learned.
    segment_ids: [B, L] int32; a position attends within its segment.
    dropout_keys: [B], one per example.
    visible: [C] or [B, C] bool, the cached positions that are seen.
    seen: [B, L, L] bool, the positions that each one sees, instead of those
      that the config says.
  """

  time: Any = None
  rotary: Any = None
  segment_ids: Any = None
  dropout_keys: Any = None
  visible: Any = None
  seen: Any = None


def of_tokens(
  y: jax.Array, length: int, positions: jax.Array | None = None
) -> jax.Array:
  """Spreads values of equal parts of rows, [B, n, D], over their tokens.

  Returns:
    [N, D] for `positions` [N], indices into B * length; otherwise [B, length,
    D], or [B, 1, D] if n = 1.
  """
  size = length // y.shape[1]
  if positions is not None:
    return y.reshape(-1, y.shape[-1])[positions // size]
  return y if y.shape[1] == 1 else jnp.repeat(y, size, axis=1)


class Block(nn.Module):
  """Attention and MLP, each pre-normed and added to the residual stream.

  With time conditioning the time shifts, scales and gates each branch
  (adaLN-zero): the gates are 0 initially, the norms have no scales of their
  own.
  """

  config: ModelConfig
  shards: Shards = Shards()

  @nn.compact
  def __call__(self, x, layer, cached, context, positions=None):
    """Applies the block.

    Args:
      x: [B, L, D]; with `config.block_size` the noisy rows, then the clean
        ones.
      layer: [] int32, the block's index.
      cached: (keys, values) of other positions, [B, C, K, Dh] each, or None.
      context: a Context.
      positions: [N] int32 indices into B * L of the rows wanted; None: all.

    Returns:
      [B, L, D], or [N, D] with `positions`; and the tokens' own (keys, values)
      if there is a cache, else None.
    """
    cfg, shards = self.config, self.shards
    batch, length, width = x.shape
    dtype = jnp.dtype(cfg.dtype)
    # This device has a part of the heads and of the MLP.
    num_heads = cfg.num_heads // shards.tensor
    kv_heads = cfg.kv_heads // shards.tensor
    has_scales = not cfg.time_conditioning or TIME_FORMS[cfg.time_form].scales

    def pick(y):  # [B, L, D] -> the wanted rows
      return y if positions is None else y.reshape(-1, y.shape[-1])[positions]

    def mixed(name, y):  # Adds a convolution over neighbouring tokens.
      if not cfg.conv_size:
        return y
      shape, zeros = (cfg.conv_size, width), nn.initializers.zeros
      weights = self.param(name, zeros, shape)
      convolved = keeps_inputs(convolve, cfg.platform)
      return y + convolved(y, weights, context.segment_ids)

    def normed(name, y, shift, scale):
      y = Norm(cfg, has_scales, name=name)(y)
      return y if shift is None else y * (1 + scale) + shift

    def salted(salt):  # The keys of one of the block's dropout masks.
      fold_in = jax.random.fold_in
      return jax.vmap(lambda key: fold_in(fold_in(key, layer), salt))(
        context.dropout_keys
      )

    def branch(y, gate, salt):
      if gate is not None:
        y = y * gate
      if context.dropout_keys is not None and cfg.dropout:
        keys = salted(salt)
        mask = pick(dropout_mask(keys, cfg.dropout, (length, width)))
        y = (y * mask).astype(y.dtype)
      return y

    def drop(name, y, num_parts):
      """Draws the dropout of the input y of an adapter; None without one."""
      adapter = cfg.adapter(name)
      if not adapter or not adapter.dropout or context.dropout_keys is None:
        return None
      # 0 and 1 are those of the branches.
      keys = salted(2 + lora.LAYERS.index(name))
      # All columns, of which this device has a part.
      size = y.shape[-1]
      mask = dropout_mask(keys, adapter.dropout, (length, size * num_parts))
      if num_parts > 1:
        start = jax.lax.axis_index(sharding.TENSOR) * size
        mask = jax.lax.dynamic_slice_in_dim(mask, start, size, axis=2)
      return mask if y.ndim == 3 else pick(mask)

    def dense(name, y, size, has_bias, num_parts=1, **options):
      """Applies a dense layer to y, of whose `num_parts` parts this is one."""
      options |= {'adapter': cfg.adapter(name), 'name': name}
      layer = Linear(size, dtype, has_bias, **options)
      return layer(y, drop(name, y, num_parts))

    leave = functools.partial(
      dense,
      size=width,
      num_parts=shards.tensor,
      std=INIT_STD / (2 * cfg.num_layers) ** 0.5,
      join=shards,
    )

    shift1 = scale1 = gate1 = shift2 = scale2 = gate2 = None
    if cfg.time_conditioning:
      modulation = nn.Dense(
        6 * width // shards.tensor,
        dtype=dtype,
        name='modulation',
        kernel_init=nn.initializers.zeros,
      )(activate_time(cfg, context.time))
      modulation = sharding.concatenate(modulation, shards)
      parts = jnp.split(modulation, 6, axis=-1)
      shift1, scale1, gate1, shift2, scale2, gate2 = parts
      shift1, scale1 = (of_tokens(y, length) for y in (shift1, scale1))
      shift2, scale2, gate1, gate2 = (
        of_tokens(y, length, positions) for y in (shift2, scale2, gate1, gate2)
      )

    h = mixed('attention_conv', normed('attention_norm', x, shift1, scale1))
    h = sharding.split(h, shards)

    def project(name, heads):
      y = dense(name, h, heads * cfg.head_dim, cfg.attention_bias != 'none')
      return y.reshape(batch, length, heads, cfg.head_dim)

    q, k = project('query', num_heads), project('key', kv_heads)
    v = project('value', kv_heads)
    q = Heads(cfg, name='q_norm')(q, context.rotary)
    k = Heads(cfg, name='k_norm')(k, context.rotary)
    own = sink = None
    if cfg.attention_sink:
      shape, zeros = (kv_heads, cfg.head_dim), nn.initializers.zeros
      weight = lambda name: self.param(name, zeros, shape).astype(dtype)
      sink = weight('sink_key')[None, None], weight('sink_value')[None, None]
    scoring = attention.Scoring(cfg.attention_cap, sink)
    kernel = {
      'segment_ids': context.segment_ids,
      'scoring': scoring,
      'backend': cfg.attention,
      'platform': cfg.platform,
    }
    if cached is not None:
      own, causal = (k, v), cfg.causal and not cfg.block_size
      seen = context.visible
      h = attention.cached_attention(
        q, k, v, *cached, visible=seen, causal=causal, scoring=scoring
      )
    elif cfg.block_size:
      if positions is not None and not (cfg.causal or cfg.shift_outputs):
        q = q[: batch // 2]  # Only noisy rows of the last layer are wanted.
      h = attention.block_attention(
        q, k, v, block_size=cfg.block_size, causal=cfg.causal, **kernel
      )
    else:
      h = attention.attention(
        q, k, v, causal=cfg.causal, seen=context.seen, **kernel
      )
    h = ad_checkpoint.checkpoint_name(h, ATTENTION_OUT)
    h = pick(h.reshape(-1, length, num_heads * cfg.head_dim))
    out = leave('attention_out', h, has_bias=cfg.attention_bias == 'all')
    x = mixed('residual_conv', x)
    x = pick(x) + branch(out, gate1, 0)

    h = sharding.split(normed('mlp_norm', x, shift2, scale2), shards)
    mlp_width = cfg.mlp_width // shards.tensor
    up = dense('mlp_in', h, mlp_width, cfg.mlp_bias)
    if cfg.is_gated:
      gate = dense('mlp_gate', h, mlp_width, cfg.mlp_bias)
      product = lambda gate, up: MLPS[cfg.mlp](gate) * up
      up = keeps_inputs(product, cfg.platform)(gate, up)
    else:
      up = MLPS[cfg.mlp](up)
    out = leave('mlp_out', up, has_bias=cfg.mlp_bias)
    return x + branch(out, gate2, 1), own


class Transformer(nn.Module):
  """Maps tokens to hidden states, which `output_logits` maps to logits.

  Attributes:
    config: the network's settings.
    shards: numbers of devices that split the parameters. Blocks gather theirs
      over fsdp when they run; `Network.gather` gathers the others.
  """

  config: ModelConfig
  shards: Shards = Shards()

  def setup(self):
    cfg = self.config
    dtype = jnp.dtype(cfg.dtype)
    num_ids = sharding.padded(cfg.vocab_size, self.shards) // self.shards.tensor
    normal = nn.initializers.normal(INIT_STD)
    embedded = nn.initializers.normal(cfg.embedding_std)
    self.embedding = self.param(
      'embedding', embedded, (num_ids, cfg.embedding_dim or cfg.embed_dim)
    )
    if cfg.embedding_dim:
      self.embedding_in = nn.Dense(
        cfg.embed_dim, dtype=dtype, kernel_init=normal
      )
    if cfg.self_conditioning:
      self.self_conditioning = nn.Dense(
        self.embedding.shape[1],
        use_bias=False,
        dtype=dtype,
        kernel_init=nn.initializers.zeros,
      )
    if not cfg.tie_embeddings:
      self.output = self.param('output', normal, (num_ids, cfg.embed_dim))
    if cfg.output_bias:
      self.output_bias = self.param(
        'output_bias', nn.initializers.zeros, (num_ids,)
      )
    if cfg.num_positions:
      self.position_embedding = self.param(
        'position_embedding', embedded, (cfg.num_positions, cfg.embed_dim)
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
    soft: SoftTokens | None = None,
    condition: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    seen: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Applies the network up to, not including, the output projection.

    The arguments are those of `types.Network.hidden`. `t` is required with time
    conditioning, `clean` with blocks, whose clean copy reads no `condition`.
    The last block computes its output for the wanted `positions` only.

    Returns:
      hidden [B, L, D], or [N, D] with `positions`, in the compute dtype.
    """
    (batch, length), segments = tokens.shape, segment_ids
    where, has_start = jnp.arange(length), self.config.start_token >= 0
    if not self.config.block_size:
      tokens = self._started(tokens)
    else:
      twice = lambda x: None if x is None else jnp.concatenate([x, x])
      tokens = jnp.concatenate([tokens, self._started(jnp.asarray(clean))])
      if has_start:
        is_noisy = jnp.arange(2 * batch) < batch
        where = where[None] + is_noisy[:, None]
      t = None if t is None else jnp.concatenate([t, jnp.zeros_like(t)])
      segment_ids = twice(segment_ids)
      if condition is not None:
        condition = jnp.concatenate([condition, jnp.zeros_like(condition)])
      if dropout_keys is not None:  # The masks of the copies are independent.
        fold = jax.vmap(jax.random.fold_in, (0, None))
        dropout_keys = jnp.concatenate(
          [fold(dropout_keys, copy) for copy in range(2)]
        )
    wanted = positions
    if positions is None and (
      self.config.block_size or self.config.shift_outputs
    ):
      wanted = jnp.arange(batch * length)
    if self.config.shift_outputs and wanted is not None:
      wanted = self._shifted(wanted, batch, length, segments)
    context = Context(
      segment_ids=segment_ids, dropout_keys=dropout_keys, seen=seen
    )
    hidden, _ = self._layers(
      tokens, t, where, Cache(None, None), context, wanted, condition, soft
    )
    return (
      hidden if positions is not None else hidden.reshape(batch, length, -1)
    )

  def advance(
    self,
    tokens: jax.Array,
    t: jax.Array | None,
    start: jax.Array,
    cache: Cache,
    visible: jax.Array,
    positions: jax.Array | None = None,
    condition: jax.Array | None = None,
  ) -> tuple[jax.Array, Cache]:
    """Applies the network to S consecutive tokens, with a cache for the rest.

    The arguments and results are those of `types.Network.advance`.
    """
    if not self.config.has_cache:
      key = 'conv_size' if self.config.conv_size else 'shift_outputs'
      raise InputError(
        f'model.{key}={getattr(self.config, key)!r} does not support a cache '
        'here: outputs next to a part of the text change with it'
      )
    start = jnp.asarray(start)
    offset = jnp.expand_dims(jnp.arange(tokens.shape[1]), range(start.ndim))
    where = start[..., None] + offset
    if self.config.block_size:  # The tokens are noisy if there is a start.
      where += self.config.start_token >= 0
    else:
      tokens = self._started(tokens)
    context = Context(visible=visible)
    has_states = cache.states is not None
    wanted = None if has_states else positions
    hidden, own = self._layers(
      tokens, t, where, cache, context, wanted, condition
    )
    if has_states:
      own = own._replace(states=hidden[:, :, None])
      if self.config.shift_outputs:
        hidden = self._shifted_in_cache(hidden, start, cache.states)
      if positions is not None:
        hidden = hidden.reshape(-1, hidden.shape[-1])[positions]

    def write(old, new, start):
      return jax.lax.dynamic_update_slice_in_dim(
        old, new.astype(old.dtype), start, axis=old.ndim - 3
      )

    def write_all(old, new):
      row = old.ndim - 4
      each = jax.vmap(write, (row, row, 0), row) if start.ndim else write
      return each(old, new, start)

    return hidden, jax.tree.map(write_all, cache, own)

  def _started(self, tokens):
    """Replaces the mask, the start symbol, by `config.start_token`, if any."""
    cfg = self.config
    if cfg.start_token < 0:
      return tokens
    return jnp.where(tokens == cfg.vocab_size - 1, cfg.start_token, tokens)

  def _shifted(self, wanted, batch, length, segments):
    """Returns the rows of the output that predict the wanted tokens [N].

    The first token of a block is predicted by the clean copy, since the noisy
    position before it belongs to another block. The first of a row or segment
    is predicted at its own place.
    """
    size = self.config.block_size or length
    before = wanted - 1
    is_own = jnp.zeros(batch * length, bool)
    if segments is not None:
      is_own = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0
    is_own = jnp.pad(is_own.reshape(-1), (0, batch * length))
    if self.config.causal:  # The start symbol moved the clean copy by one.
      first = wanted + batch * length
      is_own = is_own[wanted] | (wanted >= batch * length)
    else:
      first = before + batch * length
      is_own = is_own[wanted] | (wanted % length == 0)
    moved = jnp.where(wanted % size == 0, first, before)
    return jnp.where(is_own, wanted, moved)

  def _shifted_in_cache(self, hidden, start, states):
    """Returns `hidden` [B, S, D] one place later, after cached `states`."""
    before = start if self.config.causal else start - 1
    index = jnp.broadcast_to(jnp.maximum(before, 0), hidden.shape[:1])
    first = states[jnp.arange(len(hidden)), index].astype(hidden.dtype)
    # Caches are marked as split over the tensor group, as keys and values are.
    first = sharding.same(first, self.shards)
    is_first = jnp.broadcast_to(before < 0, index.shape)[:, None, None]
    first = jnp.where(is_first, hidden[:, :1], first)
    return jnp.concatenate([first, hidden[:, :-1]], axis=1)

  def _layers(
    self, tokens, t, where, cache, context, positions, condition=None, soft=None
  ):
    """Returns hidden states of tokens at `where`, and their own Cache.

    `where` is [L], or [B, L].
    """
    cfg = self.config
    num_scanned = cfg.num_layers - 1
    x = self._embed(tokens, where, condition, soft)
    if cfg.time_conditioning:
      t = t if cfg.knows_time else jnp.zeros(tokens.shape[:1])
      t = t[:, None] if t.ndim == 1 else t
      context = context._replace(time=self.time_embedding(t))
    if cfg.has_rotary:
      scaling = cfg.rope_factor, cfg.rope_scaling, cfg.rope_length
      table = rotary_table(where, cfg.head_dim, cfg.rope_theta, *scaling)
      context = context._replace(rotary=table)
    if self.is_initializing():
      self._init_layers(x, context)
    own = None
    if num_scanned:
      # A scan already keeps XLA from merging the recomputation with the
      # original.
      apply = self._make_apply(prevent_cse=cfg.unroll)

      def body(x, layer):
        params, index, cached = layer
        return apply(params, x, index, cached, context)

      params = self.layers.variables['params']
      layers = params, jnp.arange(num_scanned), cache.layers
      x, own = (_unrolled_scan if cfg.unroll else jax.lax.scan)(body, x, layers)
    params = self.last_layer.variables['params']
    apply = self._make_apply(prevent_cse=True)
    x, last = apply(params, x, num_scanned, cache.last, context, positions)
    x = self.final_norm(x)
    if cfg.time_conditioning and TIME_FORMS[cfg.time_form].final:
      y = self.final_modulation(activate_time(cfg, context.time))
      y = of_tokens(y, tokens.shape[1], positions)
      shift, scale = jnp.split(y, 2, axis=-1)
      x = x * (1 + scale) + shift
    return x, Cache(own, last)

  def _embed(self, tokens, where, condition, soft):
    """Embeds tokens [B, L] at positions [L] or [B, L], [B, L, D]."""
    if soft is not None:
      tokens = soft.ids
    # Rows are cast after the lookup, so that the gradients of a row, above all
    # of the mask's, are summed in float32.
    dtype = jnp.dtype(self.config.dtype)
    if self.shards.tensor == 1:
      rows = self.embedding[tokens]
    else:
      size = self.embedding.shape[0]
      tokens = tokens - jax.lax.axis_index(sharding.TENSOR) * size
      is_here = (tokens >= 0) & (tokens < size)
      rows = self.embedding[jnp.where(is_here, tokens, 0)]
      rows = jnp.where(is_here[..., None], rows, 0.0)
    if soft is not None:
      rows = jnp.einsum('blk,blkd->bld', soft.weights, rows)
    rows = sharding.join(rows, self.shards)
    if self.config.self_conditioning and self.is_initializing():
      condition = jnp.zeros_like(rows)
    if condition is not None:
      square = jnp.square(condition.astype(jnp.float32))
      size = jnp.mean(square, axis=-1, keepdims=True) + self.config.norm_eps
      rows += self.self_conditioning(condition * jax.lax.rsqrt(size))
    if self.config.embedding_dim:
      rows = self.embedding_in(rows.astype(dtype))
    if self.config.num_positions:
      rows = rows + self.position_embedding[jnp.atleast_2d(where)]
    return rows.astype(dtype)

  def _make_apply(self, prevent_cse):
    """Returns apply(params, x, layer, cached, context), a block with remat."""
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

  def _init_layers(self, x, context):
    """Draws the parameters of all blocks, stacked for those of the scan."""
    num_scanned = self.config.num_layers - 1
    if num_scanned:
      nn.scan(
        lambda block, x, layer: block(x, layer, None, context),
        variable_axes={'params': 0},
        split_rngs={'params': True},
        length=num_scanned,
      )(self.layers, x, jnp.arange(num_scanned))
    self.last_layer(x, num_scanned, None, context)


def _unrolled_scan(body, carry, xs):
  """jax.lax.scan as a Python loop."""
  # The transpose of unstack is one stack. Indexing would pad the gradient of
  # each step to the full stack.
  leaves, tree = jax.tree.flatten(xs)
  outs = []
  for x in zip(*map(jnp.unstack, leaves)):
    carry, out = body(carry, jax.tree.unflatten(tree, x))
    outs.append(out)
  return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outs)


def opening_mask(keys: jax.Array, share: jax.Array, length: int) -> jax.Array:
  """Draws attention between causal and full: attention mask annealing.

  Source: DiffuLLaMA, arXiv 2410.17891, section 3.2, which turns an
  autoregressive network into a diffusion model. Differs from the paper: each
  example, not each batch, has its own mask.

  Args:
    keys: [B], one per example.
    share: [] in [0, 1], probability that a position sees one to its right.
    length: L.

  Returns:
    [B, L, L] bool, the positions (last axis) that each position sees; always
    itself and those to its left.
  """
  draw = lambda key: jax.random.bernoulli(key, share, (length, length))
  return jax.vmap(draw)(keys) | jnp.tril(jnp.ones((length, length), bool))[None]


def output_kernel(params) -> tuple[jax.Array, ...]:
  """Returns the output projection [V, D], tied or not, and its bias, if any."""
  names = 'output' if 'output' in params else 'embedding', 'output_bias'
  return tuple(params[name] for name in names if name in params)


def output_logits(kernel: Any, hidden: jax.Array) -> jax.Array:
  """Projects hidden [..., D] with `output_kernel` to [..., V] float32."""
  matrix, *bias = kernel
  # A transposed matrix would be materialised by XLA if the product is in a
  # loop.
  last = ((hidden.ndim - 1,), (1,))
  logits = jax.lax.dot_general(
    hidden,
    matrix.astype(hidden.dtype),
    (last, ((), ())),
    preferred_element_type=jnp.float32,
  )
  for row in bias:
    logits += jnp.expand_dims(row, range(hidden.ndim - 1))
  return logits

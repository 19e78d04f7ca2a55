"""The networks of other projects, restated in NumPy from their equations.

Float64, one loop over the layers, none of nanodlm's code: what imported
checkpoints are compared with. A network is a dict of the tensors that its own
checkpoints hold, by the names that they have there.
"""

import math

import numpy as np

LAYER_NORM_EPS = 1e-5


def silu(x):
  return x / (1 + np.exp(-x))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def gelu_tanh(x):
  return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / np.sqrt(variance + LAYER_NORM_EPS)


def rms_norm(x):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + LAYER_NORM_EPS)


def softmax(x):
  x = np.exp(x - x.max(-1, keepdims=True))
  return x / x.sum(-1, keepdims=True)


def angles(length, head_dim):
  """[L, 1, Dh / 2], base 10000."""
  frequency = 10_000.0 ** (-np.arange(0, head_dim, 2) / head_dim)
  return (np.arange(length)[:, None] * frequency)[:, None]


def rotate_halves(x):
  """Pairs are (i, i + Dh / 2); x [B, L, H, Dh]."""
  angle = angles(x.shape[1], x.shape[-1])
  a, b = np.split(x, 2, axis=-1)
  return np.concatenate(
    [
      a * np.cos(angle) - b * np.sin(angle),
      b * np.cos(angle) + a * np.sin(angle),
    ],
    axis=-1,
  )


def rotate_neighbours(x):
  """Pairs are (2 i, 2 i + 1)."""
  angle = angles(x.shape[1], x.shape[-1])
  a, b = x[..., ::2], x[..., 1::2]
  out = np.empty_like(x)
  out[..., ::2] = a * np.cos(angle) - b * np.sin(angle)
  out[..., 1::2] = a * np.sin(angle) + b * np.cos(angle)
  return out


def attend(q, k, v, mask=None):
  """[B, L, H, Dh] each; mask [L, L]. -> [B, L, H * Dh]."""
  scores = np.einsum('bqhd,bkhd->bhqk', q, k) / math.sqrt(q.shape[-1])
  if mask is not None:
    scores = np.where(mask, scores, -np.inf)
  out = np.einsum('bhqk,bkhd->bqhd', softmax(scores), v)
  return out.reshape(*out.shape[:2], -1)


def ddit_embedded_time(tensors, sigma):
  """silu of the embedded time, [B, C]."""
  half = tensors['sigma_map.mlp.0.weight'].shape[1] // 2
  frequency = np.exp(-math.log(10_000) * np.arange(half) / half)
  angle = np.asarray(sigma, np.float64)[:, None] * frequency
  x = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
  x = silu(
    x @ tensors['sigma_map.mlp.0.weight'].T + tensors['sigma_map.mlp.0.bias']
  )
  x = x @ tensors['sigma_map.mlp.2.weight'].T + tensors['sigma_map.mlp.2.bias']
  return silu(x)


def ddit_logits(tensors, tokens, sigma, num_heads, clean=None, block_size=0):
  """The DiT of SEDD, MDLM, BD3-LM, Duo and GIDD up to its last layer.

  Args:
    tensors: as in their state_dict.
    tokens: [B, L].
    sigma: [B], what the time embedding is given.
    num_heads: attention heads.
    clean: [B, L], block diffusion's other half of the input.
    block_size: of block diffusion.

  Returns:
    [B, L, V].
  """
  tensors = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
  length = tokens.shape[1]
  mask = None
  if clean is not None:
    block = np.arange(length) // block_size
    earlier = block[:, None] > block[None]
    same = block[:, None] == block[None]
    mask = np.block([[same, earlier], [np.zeros_like(same), earlier | same]])
    tokens = np.concatenate([tokens, clean], axis=1)
  x = tensors['vocab_embed.embedding'][tokens]
  c = ddit_embedded_time(tensors, sigma)
  num_blocks = 1 + max(
    int(name.split('.')[1]) for name in tensors if name.startswith('blocks.')
  )

  def rotate(x):  # the two halves of block diffusion are at the same places
    parts = np.split(x, x.shape[1] // length, axis=1)
    return np.concatenate([rotate_halves(part) for part in parts], axis=1)

  for i in range(num_blocks):
    get = lambda name: tensors[f'blocks.{i}.{name}']
    modulation = (
      c @ get('adaLN_modulation.weight').T + get('adaLN_modulation.bias')
    )[:, None]
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(modulation, 6, -1)
    h = layer_norm(x) * get('norm1.weight') * (1 + scale1) + shift1
    qkv = h @ get('attn_qkv.weight').T
    q, k, v = np.moveaxis(qkv.reshape(*qkv.shape[:2], 3, num_heads, -1), 2, 0)
    h = attend(rotate(q), rotate(k), v, mask)
    x = x + gate1 * (h @ get('attn_out.weight').T)
    h = layer_norm(x) * get('norm2.weight') * (1 + scale2) + shift2
    h = gelu_tanh(h @ get('mlp.0.weight').T + get('mlp.0.bias'))
    x = x + gate2 * (h @ get('mlp.2.weight').T + get('mlp.2.bias'))

  x = x[:, :length]
  modulation = (
    c @ tensors['output_layer.adaLN_modulation.weight'].T
    + tensors['output_layer.adaLN_modulation.bias']
  )[:, None]
  shift, scale = np.split(modulation, 2, -1)
  x = layer_norm(x) * tensors['output_layer.norm_final.weight'] * (1 + scale)
  return (x + shift) @ tensors['output_layer.linear.weight'].T + tensors[
    'output_layer.linear.bias'
  ]


def sedd_log_score(raw, tokens, sigma):
  """SEDD's last step, of an absorbing graph: raw outputs -> log ratios."""
  sigma = np.asarray(sigma, np.float64)[:, None, None]
  log_score = raw - np.log(np.expm1(sigma)) - math.log(raw.shape[-1] - 1)
  return np.where(np.arange(raw.shape[-1]) == tokens[..., None], 0, log_score)


def random_ddit(seed, *, vocab_size, width, cond_dim, num_layers, features=256):
  """Tensors of a DiT of random weights, none of them zero; float32."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape, scale=0.3: (rng.normal(size=shape) * scale).astype(
    np.float32
  )
  dense = lambda name, out, size: {
    f'{name}.weight': draw(out, size, scale=size**-0.5),
    f'{name}.bias': draw(out),
  }
  tensors = {
    'vocab_embed.embedding': draw(vocab_size, width, scale=1),
    **dense('sigma_map.mlp.0', cond_dim, features),
    **dense('sigma_map.mlp.2', cond_dim, cond_dim),
  }
  for i in range(num_layers):
    name = f'blocks.{i}'
    tensors |= {
      f'{name}.norm1.weight': 1 + draw(width),
      f'{name}.attn_qkv.weight': draw(3 * width, width, scale=width**-0.5),
      f'{name}.attn_out.weight': draw(width, width, scale=width**-0.5),
      f'{name}.norm2.weight': 1 + draw(width),
      **dense(f'{name}.mlp.0', 4 * width, width),
      **dense(f'{name}.mlp.2', width, 4 * width),
      **dense(f'{name}.adaLN_modulation', 6 * width, cond_dim),
    }
  return tensors | {
    'output_layer.norm_final.weight': 1 + draw(width),
    **dense('output_layer.linear', vocab_size, width),
    **dense('output_layer.adaLN_modulation', 2 * width, cond_dim),
  }


MD4_ACTIVATIONS = {'glu': sigmoid, 'swiglu': silu, 'geglu': gelu_tanh}


def md4_logits(params, tokens, t, mlp, head_dim):
  """MD4's text classifier.

  Args:
    params: its flax tree below 'classifier'.
    tokens: [B, L].
    t: [B] in [0, 1], or None for a network without time.
    mlp: 'glu', 'swiglu' or 'geglu'.
    head_dim: width of a head.

  Returns:
    [B, L, V]; without a column for the mask, id V.
  """
  activation = MD4_ACTIVATIONS[mlp]
  dense = lambda p, x: (
    x @ np.asarray(p['kernel'], np.float64)
    + (np.asarray(p['bias'], np.float64) if 'bias' in p else 0)
  )
  net = params['Transformer_0']
  denses = [f'Dense_{i}' for i in range(3) if f'Dense_{i}' in net]
  if 'Embed_0' in params:
    x = np.asarray(params['Embed_0']['embedding'], np.float64)[tokens]
    x = dense(net[denses.pop(0)], x)
  else:
    x = np.asarray(net['Embed_0']['embedding'], np.float64)[tokens]
  c = None
  if t is not None:
    p = params['CondEmbedding_0']
    features = p['dense0']['kernel'].shape[0]
    half = features // 2
    frequency = np.exp(-math.log(10_000) / (half - 1) * np.arange(half))
    angle = 1000 * np.asarray(t, np.float64)[:, None] * frequency
    c = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    c = activation(dense(p['Dense_0'], silu(dense(p['dense0'], c))))
  num_layers = sum(name.startswith('TransformerBlock') for name in net)
  for i in range(num_layers):
    p = net[f'TransformerBlock_{i}']
    if c is None:
      shift1 = shift2 = scale1 = scale2 = 0
      gate1 = gate2 = 1
      norm1 = lambda x: rms_norm(x) * p['RMSNorm_0']['scale']
      norm2 = lambda x: rms_norm(x) * p['RMSNorm_1']['scale']
    else:
      shift1, scale1, gate1, shift2, scale2, gate2 = np.split(
        dense(p['Dense_0'], c)[:, None], 6, -1
      )
      norm1 = norm2 = layer_norm
    h = norm1(x) * (1 + scale1) + shift1
    heads = lambda name: dense(p['attention'][name], h).reshape(
      *h.shape[:2], -1, head_dim
    )
    h = attend(
      rotate_neighbours(heads('wq')),
      rotate_neighbours(heads('wk')),
      heads('wv'),
    )
    x = x + gate1 * dense(p['attention']['wo'], h)
    h = norm2(x) * (1 + scale2) + shift2
    ffn = p['feed_forward']
    h = dense(ffn['w2'], activation(dense(ffn['w1'], h)) * dense(ffn['w3'], h))
    x = x + gate2 * h
  if c is None:
    return dense(net[denses[0]], rms_norm(x) * net['RMSNorm_0']['scale'])
  shift, scale = np.split(dense(net[denses[0]], c)[:, None], 2, -1)
  return dense(net[denses[1]], layer_norm(x) * (1 + scale) + shift)

"""Decoders of published checkpoints in NumPy, with the original tensor names.

They follow the papers and the names of the published code, and are independent
of nanodlm. They compute one head and one query at a time, in float64.
"""

import numpy as np


def rms(x, scale, eps):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
  x = x - x.mean(-1, keepdims=True)
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale + bias


def silu(x):
  return x / (1 + np.exp(-x))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def llama3(frequency, i, factor, length, **_):
  """Returns Llama 3.1's frequency, with its constants 1 and 4."""
  del i
  wave = 2 * np.pi / frequency
  if wave < length / 4:
    return frequency
  if wave > length:
    return frequency / factor
  smooth = (length / wave - 1) / (4 - 1)
  return (1 - smooth) * frequency / factor + smooth * frequency


def yarn(frequency, i, factor, length, theta, dim):
  """Returns YaRN's frequency of wave i, with its constants 32 and 1."""
  # The index at which a wave turns n times within the length.
  index = lambda n: dim * np.log(length / (n * 2 * np.pi)) / (2 * np.log(theta))
  first, last = max(np.floor(index(32)), 0), np.ceil(index(1))
  ramp = min(max((i - first) / (last - first), 0), 1)
  return ramp * frequency / factor + (1 - ramp) * frequency


def turn(x, theta, scaling=None):
  """Rotates [L, Dh]: features i and i + Dh / 2 form a complex number."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-np.arange(half) / half)
  if scaling:
    rule = {'llama3': llama3, 'yarn': yarn}[scaling['rope_type']]
    length = scaling['original_max_position_embeddings']
    frequencies = np.array(
      [
        rule(x, i, scaling['factor'], length, theta=theta, dim=2 * half)
        for i, x in enumerate(frequencies)
      ]
    )
  angle = np.arange(len(x))[:, None] * frequencies
  z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


def attend(
  q,
  k,
  v,
  num_heads,
  num_kv_heads,
  block_size,
  prepare=lambda x, name: x,
  cap=0,
  sink=None,
  context=None,
):
  """q [L, H Dh] on k, v [L, K Dh] -> [L, H Dh].

  Scores are capped by cap * tanh(s / cap). The sink is (key, value), [H, Dh]
  each, of a place that all see. With a context, its places see those before,
  and the others see all.
  """
  head_dim = q.shape[-1] // num_heads
  part = lambda x, i: x[:, i * head_dim : (i + 1) * head_dim]
  out = []
  for head in range(num_heads):
    shared = head // (num_heads // num_kv_heads)
    one_q = prepare(part(q, head), 'q_norm')
    one_k, one_v = prepare(part(k, shared), 'k_norm'), part(v, shared)
    rows = []
    for i, query in enumerate(one_q):
      last = len(one_k)
      if block_size:
        last = (i // block_size + 1) * block_size
      elif context is not None and i < context:
        last = i + 1
      seen_k, seen_v = one_k[:last], one_v[:last]
      if sink is not None:
        seen_k = np.concatenate([sink[0][head : head + 1], seen_k])
        seen_v = np.concatenate([sink[1][head : head + 1], seen_v])
      scores = seen_k @ query / np.sqrt(head_dim)
      scores = cap * np.tanh(scores / cap) if cap else scores
      p = np.exp(scores - scores.max())
      rows.append(p / p.sum() @ seen_v)
    out.append(np.stack(rows))
  return np.concatenate(out, -1)


def linear(tensors, name, x):
  y = x @ tensors[f'{name}.weight'].T
  return y + tensors[f'{name}.bias'] if f'{name}.bias' in tensors else y


def llama(
  tensors,
  ids,
  *,
  num_heads,
  num_kv_heads,
  eps,
  theta,
  block_size,
  scaling=None,
  activation=silu,
  names=None,
  context=None,
):
  """Logits [L, V], unshifted, of Llama, LLaDA and those with Llama's names.

  Args:
    tensors: {name: array}.
    ids: [L].
    num_heads: of queries.
    num_kv_heads: of keys and values.
    eps: of the norms.
    theta: rotary base.
    block_size: each position sees its block and those before: 1 for a causal
      network, 0 if it sees all.
    scaling: config.json's rope_scaling.
    activation: of the MLP.
    names: {part: name}; by default transformers'.
    context: number of first positions that see those before only, with
      block_size 0.
  """
  names = {
    'embed': 'model.embed_tokens',
    'layers': 'model.layers',
    'norm1': 'input_layernorm',
    'norm2': 'post_attention_layernorm',
    'q': 'self_attn.q_proj',
    'k': 'self_attn.k_proj',
    'v': 'self_attn.v_proj',
    'o': 'self_attn.o_proj',
    'gate': 'mlp.gate_proj',
    'up': 'mlp.up_proj',
    'down': 'mlp.down_proj',
    'norm': 'model.norm',
    'head': 'lm_head',
    **(names or {}),
  }
  tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
  x = tensors[f'{names["embed"]}.weight'][ids]
  layer = 0
  while f'{names["layers"]}.{layer}.{names["norm1"]}.weight' in tensors:
    at = lambda part: f'{names["layers"]}.{layer}.{names[part]}'

    def prepare(y, norm):
      key = f'{names["layers"]}.{layer}.self_attn.{norm}.weight'
      y = rms(y, tensors[key], eps) if key in tensors else y
      return turn(y, theta, scaling)

    h = rms(x, tensors[f'{at("norm1")}.weight'], eps)
    q, k, v = (linear(tensors, at(part), h) for part in 'qkv')
    h = attend(
      *(q, k, v, num_heads, num_kv_heads, block_size, prepare), context=context
    )
    x = x + linear(tensors, at('o'), h)
    h = rms(x, tensors[f'{at("norm2")}.weight'], eps)
    gate = activation(linear(tensors, at('gate'), h))
    x = x + linear(tensors, at('down'), gate * linear(tensors, at('up'), h))
    layer += 1
  x = rms(x, tensors[f'{names["norm"]}.weight'], eps)
  head = f'{names["head"]}.weight'
  return x @ tensors.get(head, tensors[f'{names["embed"]}.weight']).T


NEMOTRON = {
  'embed': 'encoder.embed_tokens',
  'layers': 'encoder.layers',
  'norm': 'encoder.norm',
  'head': 'diffusion_head',
}
LLADA = {
  'embed': 'model.transformer.wte',
  'layers': 'model.transformer.blocks',
  'norm1': 'attn_norm',
  'norm2': 'ff_norm',
  'q': 'q_proj',
  'k': 'k_proj',
  'v': 'v_proj',
  'o': 'attn_out',
  'gate': 'ff_proj',
  'up': 'up_proj',
  'down': 'ff_out',
  'norm': 'model.transformer.ln_f',
  'head': 'model.transformer.ff_out',
}


def gpt2(tensors, ids, *, num_heads, eps):
  """Logits [L, V] of GPT-2, whose kernels are [in, out]."""
  tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
  conv = lambda name, x: x @ tensors[f'{name}.weight'] + tensors[f'{name}.bias']
  norm = lambda name, x: layer_norm(
    x, tensors[f'{name}.weight'], tensors[f'{name}.bias'], eps
  )
  x = tensors['wte.weight'][ids] + tensors['wpe.weight'][: len(ids)]
  layer = 0
  while f'h.{layer}.ln_1.weight' in tensors:
    at = f'h.{layer}.'
    q, k, v = np.split(conv(f'{at}attn.c_attn', norm(f'{at}ln_1', x)), 3, -1)
    h = attend(q, k, v, num_heads, num_heads, 1)
    x = x + conv(f'{at}attn.c_proj', h)
    h = gelu_tanh(conv(f'{at}mlp.c_fc', norm(f'{at}ln_2', x)))
    x = x + conv(f'{at}mlp.c_proj', h)
    layer += 1
  return norm('ln_f', x) @ tensors['wte.weight'].T


def gidd(tensors, ids, config):
  """Logits [L, V] of GIDD's decoder, by its config.json."""
  tensors = {name: x.astype(np.float64) for name, x in tensors.items()}
  eps, heads = config['rms_norm_eps'], config['num_attention_heads']
  layers = config['num_hidden_layers']
  branch = config['resid_scale'] / layers
  norm = lambda x, name: rms(x, 1 + tensors[f'{name}.weight'], eps)

  def scaled(x, name, how=config['weight_scaling']):
    weight = tensors[f'{name}.weight']
    fans = {'fan_in': weight.shape[1] ** -0.5, 'fan_out': len(weight) ** -0.5}
    bias = tensors.get(f'{name}.bias', 0)
    return x @ weight.T * fans.get(how, how) + bias

  x = tensors['model.embed_tokens.weight'][ids]
  for layer in range(layers):
    at = f'model.layers.{layer}.self_attn'
    h = norm(x, f'model.layers.{layer}.attn_layernorm')
    q, k, v = (scaled(h, f'{at}.{part}_proj') for part in 'qkv')
    if config['use_qk_norm']:  # Over all heads at once.
      q, k = norm(q, f'{at}.q_norm'), norm(k, f'{at}.k_norm')
    sink = None
    if config['attention_bias']:
      sink = tensors[f'{at}.k_bias'], tensors[f'{at}.v_bias']
    h = attend(
      *(q, k, v, heads, heads, 0),
      lambda y, _: turn(y, config['rope_theta']),
      config['attn_soft_cap'],
      sink,
    )
    x = x + branch * scaled(h, f'{at}.o_proj')
    h = norm(x, f'model.layers.{layer}.mlp_layernorm')
    h = np.maximum(scaled(h, f'model.layers.{layer}.mlp.up_proj'), 0) ** 2
    x = x + branch * scaled(h, f'model.layers.{layer}.mlp.down_proj')
  x = norm(x, 'model.norm')
  if config['tie_word_embeddings']:
    return x @ tensors['model.embed_tokens.weight'].T
  return scaled(x, 'lm_head', config['head_scaling'])

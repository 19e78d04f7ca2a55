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


def stretched(frequency, factor):
  """Returns Llama 3.1's frequency, with its constants 1, 4 and 8192."""
  wave = 2 * np.pi / frequency
  if wave < 8192 / 4:
    return frequency
  if wave > 8192:
    return frequency / factor
  smooth = (8192 / wave - 1) / (4 - 1)
  return (1 - smooth) * frequency / factor + smooth * frequency


def turn(x, theta, factor=1):
  """Rotates [L, Dh]: features i and i + Dh / 2 form a complex number."""
  half = x.shape[-1] // 2
  frequencies = theta ** (-np.arange(half) / half)
  frequencies = np.array([stretched(x, factor) for x in frequencies])
  angle = np.arange(len(x))[:, None] * frequencies
  z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
  return np.concatenate([z.real, z.imag], -1)


def attend(
  q, k, v, num_heads, num_kv_heads, block_size, prepare=lambda x, name: x
):
  """q [L, H Dh] on k, v [L, K Dh] -> [L, H Dh]."""
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
      scores = one_k[:last] @ query / np.sqrt(head_dim)
      p = np.exp(scores - scores.max())
      rows.append(p / p.sum() @ one_v[:last])
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
  factor=1,
  activation=silu,
  names=None,
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
    factor: by which long rotary waves are stretched.
    activation: of the MLP.
    names: {part: name}; by default transformers'.
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
      return turn(y, theta, factor)

    h = rms(x, tensors[f'{at("norm1")}.weight'], eps)
    q, k, v = (linear(tensors, at(part), h) for part in 'qkv')
    h = attend(q, k, v, num_heads, num_kv_heads, block_size, prepare)
    x = x + linear(tensors, at('o'), h)
    h = rms(x, tensors[f'{at("norm2")}.weight'], eps)
    gate = activation(linear(tensors, at('gate'), h))
    x = x + linear(tensors, at('down'), gate * linear(tensors, at('up'), h))
    layer += 1
  x = rms(x, tensors[f'{names["norm"]}.weight'], eps)
  head = f'{names["head"]}.weight'
  return x @ tensors.get(head, tensors[f'{names["embed"]}.weight']).T


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

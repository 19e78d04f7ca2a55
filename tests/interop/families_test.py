"""Tests of imports and exports, with the families of decoders."""

import dataclasses
import functools
import json
import pathlib
import pickle
import shutil
import tempfile
from typing import Any
from unittest import mock

from absl.testing import absltest, parameterized
import jax
import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import run as runs
from nanodlm import train
from nanodlm import workdir as workdir_files
from nanodlm.data import network, tokenizers
from nanodlm.data.config import TokenizerConfig
from nanodlm.data.tokenizers.bytes import BytesTokenizer
from nanodlm.data.tokenizers.huggingface import byte_alphabet, load_hugging_face
from nanodlm.data.tokenizers.saved import load_tokenizer, save_tokenizer
from nanodlm.data.tokenizers.sentencepiece import SentencePieceTokenizer
from nanodlm.interop import convert, export, tokenizer_json
from nanodlm.interop import tensors as tensor_files
from nanodlm.interop.families import FAMILIES, md4
from nanodlm.interop.families import layout as layouts
from nanodlm.model import layers, transformer
from nanodlm.training import checkpoint
from nanodlm.types import InputError
from tests import decoder_reference, workdirs

safetensors = pytest.importorskip('safetensors.numpy')
library = pytest.importorskip('tokenizers')

D, F, V, LAYERS, LENGTH = 16, 24, 257, 3, 8
# PLACE is a mask inside the vocabulary.
START, END, PLACE = 4, 9, 200
BYTES = {'tokenizer.name': 'bytes'}
CACHE = pathlib.Path(__file__).parents[3] / 'shared' / 'data' / 'tiktoken_cache'
LLAMA = dict(
  vocab_size=V,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=LAYERS,
  num_attention_heads=4,
  num_key_value_heads=2,
  rms_norm_eps=1e-5,
  rope_theta=500.0,
  hidden_act='silu',
  bos_token_id=START,
  eos_token_id=END,
  max_position_embeddings=64,
  tie_word_embeddings=False,
)
MASKED = {**LLAMA, 'vocab_size': V + 1, 'mask_token_id': PLACE}
GIDD = dict(
  model_type='gidd',
  vocab_size=V + 1,
  hidden_size=D,
  intermediate_size=F,
  num_hidden_layers=LAYERS,
  num_attention_heads=4,
  attn_soft_cap=2.0,
  resid_scale=4.0,
  rms_norm_eps=1e-5,
  rope_theta=500.0,
  mask_token_id=PLACE,
  eos_token_id=END,
  max_position_embeddings=64,
)
CONFIGS = {
  'gpt2': dict(
    model_type='gpt2',
    vocab_size=V,
    n_positions=16,
    n_embd=D,
    n_layer=LAYERS,
    n_head=2,
    bos_token_id=START,
    eos_token_id=END,
  ),
  'llama': dict(model_type='llama', **LLAMA),
  # Its waves are of 6, 167, 4443 and 118,120 tokens.
  'llama3': dict(
    model_type='llama',
    **{**LLAMA, 'rope_theta': 5e5},
    head_dim=8,
    rope_scaling={
      'rope_type': 'llama3',
      'factor': 8.0,
      'low_freq_factor': 1.0,
      'high_freq_factor': 4.0,
      'original_max_position_embeddings': 8192,
    },
  ),
  # Its waves turn 10, 2.2, 0.5 and 0.1 times within 64 tokens.
  'yarn': dict(
    model_type='llama',
    **LLAMA,
    head_dim=8,
    rope_scaling={
      'rope_type': 'yarn',
      'factor': 4.0,
      'original_max_position_embeddings': 64,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
    },
  ),
  # No longer text is tested.
  'mistral': dict(model_type='mistral', **LLAMA, sliding_window=LENGTH + 1),
  'tied': dict(
    model_type='llama',
    **{**LLAMA, 'tie_word_embeddings': True, 'hidden_act': 'gelu_pytorch_tanh'},
    head_dim=6,
    attention_bias=True,
    mlp_bias=True,
  ),
  'qwen2': dict(model_type='qwen2', **LLAMA),
  'qwen3': dict(model_type='qwen3', **LLAMA, head_dim=8),
  'dream': dict(model_type='Dream', **MASKED),
  'a2d-qwen3': dict(model_type='a2d-qwen3', **MASKED, head_dim=8),
  'a2d-qwen2': dict(model_type='a2d-qwen2', **MASKED),
  'a2d-llama': dict(model_type='a2d-llama', **MASKED),
  'illada': dict(model_type='illada', **MASKED),
  'sdar': dict(model_type='sdar', **MASKED, head_dim=8, block_size=4),
  'fast-dllm': dict(model_type='Fast_dLLM_Qwen', **MASKED, bd_size=4),
  'nemotron': dict(
    model_type='nemotron_labs_diffusion',
    **MASKED,
    head_dim=8,
    block_size=4,
    dlm_loss_weight=0.5,
    rope_parameters={
      'rope_type': 'yarn',
      'rope_theta': 500.0,
      'factor': 4.0,
      'original_max_position_embeddings': 64,
      'beta_fast': 32.0,
      'beta_slow': 1.0,
      'mscale': 1.0,
      'mscale_all_dim': 1.0,
      'llama_4_scaling_beta': 0.1,
    },
  ),
  'llada': dict(
    model_type='llada',
    vocab_size=V + 1,
    embedding_size=V + 1,
    d_model=D,
    n_layers=LAYERS,
    n_heads=4,
    n_kv_heads=4,
    mlp_hidden_size=F,
    rope_theta=500.0,
    rms_norm_eps=1e-5,
    weight_tying=False,
    block_type='llama',
    layer_norm_type='rms',
    rope=True,
    mask_token_id=PLACE,
    eos_token_id=END,
    max_sequence_length=64,
  ),
  'gidd-uniform': dict(
    **GIDD,
    attention_bias=True,
    mlp_bias=True,
    noise_type=1000.0,
    weight_scaling='fan_in',
    head_scaling=0.5,
    tie_word_embeddings=False,
    use_qk_norm=True,
  ),
  'gidd-masked': dict(
    **GIDD,
    attention_bias=False,
    mlp_bias=False,
    noise_type=-1000.0,
    weight_scaling=0.3,
    tie_word_embeddings=True,
    use_qk_norm=False,
  ),
}
CAUSAL = (
  'gpt2',
  'llama',
  'llama3',
  'yarn',
  'mistral',
  'tied',
  'qwen2',
  'qwen3',
)
ALIASES = {
  **dict.fromkeys(('tied', 'llama3', 'yarn'), 'llama'),
  **dict.fromkeys(('gidd-uniform', 'gidd-masked'), 'scaled-gidd'),
}
SHIFTED = ('dream', 'fast-dllm')
BIASED = ('qwen2', 'a2d-qwen2', 'tied', *SHIFTED)
# {family: tokens in a block}
BLOCKS = {'sdar': 4, 'fast-dllm': 4, 'nemotron': 4}


def tensors_of(name):
  """Returns random tensors with the names of a family."""
  rng, config, out = np.random.default_rng(0), CONFIGS[name], {}

  def put(key, *shape):
    is_norm = 'norm' in key or 'ln_' in key
    out[key] = (
      0.3 * rng.normal(size=shape) + (is_norm and key.endswith('weight'))
    ).astype(np.float32)

  def linear(key, rows, columns, bias=False):
    put(f'{key}.weight', rows, columns)
    if bias:
      put(f'{key}.bias', rows)

  if name == 'gpt2':
    put('wte.weight', V, D), put('wpe.weight', 16, D)
    for i in range(LAYERS):
      for key, rows, columns in (
        ('attn.c_attn', D, 3 * D),
        ('attn.c_proj', D, D),
        ('mlp.c_fc', D, 4 * D),
        ('mlp.c_proj', 4 * D, D),
      ):
        put(f'h.{i}.{key}.weight', rows, columns)
        put(f'h.{i}.{key}.bias', columns)
      for key in ('ln_1', 'ln_2'):
        put(f'h.{i}.{key}.weight', D), put(f'h.{i}.{key}.bias', D)
      out[f'h.{i}.attn.bias'] = np.ones((1, 1, 16, 16), np.float32)  # A buffer.
    put('ln_f.weight', D), put('ln_f.bias', D)
    return out
  if name == 'llada':
    top, vocab = 'model.transformer.', V + 1
    put(f'{top}wte.weight', vocab, D), put(f'{top}ff_out.weight', vocab, D)
    put(f'{top}ln_f.weight', D)
    for i in range(LAYERS):
      at = f'{top}blocks.{i}.'
      put(f'{at}attn_norm.weight', D), put(f'{at}ff_norm.weight', D)
      for key in ('q_proj', 'k_proj', 'v_proj', 'attn_out'):
        linear(f'{at}{key}', D, D)
      linear(f'{at}ff_proj', F, D), linear(f'{at}up_proj', F, D)
      linear(f'{at}ff_out', D, F)
    return out
  vocab = config['vocab_size']
  put('model.embed_tokens.weight', vocab, D), put('model.norm.weight', D)
  if config['model_type'] == 'gidd':
    if not config['tie_word_embeddings']:
      put('lm_head.weight', vocab, D)
    for i in range(LAYERS):
      at, has_bias = f'model.layers.{i}.', config['mlp_bias']
      put(f'{at}attn_layernorm.weight', D), put(f'{at}mlp_layernorm.weight', D)
      for key in 'qkvo':
        linear(f'{at}self_attn.{key}_proj', D, D)
      if config['attention_bias']:
        put(f'{at}self_attn.k_bias', 4, D // 4)
        put(f'{at}self_attn.v_bias', 4, D // 4)
      if config['use_qk_norm']:
        put(f'{at}self_attn.q_norm.weight', D)
        put(f'{at}self_attn.k_norm.weight', D)
      linear(f'{at}mlp.up_proj', F, D, has_bias)
      linear(f'{at}mlp.down_proj', D, F, has_bias)
    # Weights are multiplied by small constants, and norms by one more.
    return {
      key: x - ('norm' in key) if x.ndim < 2 or 'embed' in key else 3 * x
      for key, x in out.items()
    }
  if not config['tie_word_embeddings']:
    put('lm_head.weight', vocab, D)
  else:
    out['lm_head.weight'] = out['model.embed_tokens.weight']
  head, qkv = config.get('head_dim', D // 4), name in BIASED
  for i in range(LAYERS):
    at = f'model.layers.{i}.'
    put(f'{at}input_layernorm.weight', D)
    put(f'{at}post_attention_layernorm.weight', D)
    linear(f'{at}self_attn.q_proj', 4 * head, D, qkv)
    linear(f'{at}self_attn.k_proj', 2 * head, D, qkv)
    linear(f'{at}self_attn.v_proj', 2 * head, D, qkv)
    linear(f'{at}self_attn.o_proj', D, 4 * head, name == 'tied')
    for key, rows, columns in (('gate', F, D), ('up', F, D), ('down', D, F)):
      linear(f'{at}mlp.{key}_proj', rows, columns, name == 'tied')
    if name in ('qwen3', 'a2d-qwen3', 'sdar'):
      put(f'{at}self_attn.q_norm.weight', head)
      put(f'{at}self_attn.k_norm.weight', head)
  if name == 'nemotron':
    out = {
      key.replace('model.', 'encoder.', 1).replace(
        'lm_head', 'diffusion_head'
      ): x
      for key, x in out.items()
    }
  return out


def reference_logits(name, ids):
  """Returns the logits [L, V] of the family's own forward pass."""
  if name == 'gpt2':
    return decoder_reference.gpt2(tensors_of(name), ids, num_heads=2, eps=1e-5)
  size = 1 if name in CAUSAL else BLOCKS.get(name, 0)
  config = CONFIGS[name]
  if config['model_type'] == 'gidd':
    return decoder_reference.gidd(tensors_of(name), ids, config)
  is_tanh = config.get('hidden_act') == 'gelu_pytorch_tanh'
  kwargs: Any = dict(
    num_heads=4,
    eps=1e-5,
    theta=config['rope_theta'],
    scaling=config.get('rope_scaling'),
    activation=decoder_reference.gelu_tanh
    if is_tanh
    else decoder_reference.silu,
    block_size=size,
  )
  if name == 'llada':
    return decoder_reference.llama(
      tensors_of(name),
      ids,
      num_kv_heads=4,
      names=decoder_reference.LLADA,
      **kwargs,
    )
  if name == 'nemotron':  # The last block is noisy, the rest clean and causal.
    kwargs |= dict(
      scaling=config['rope_parameters'],
      names=decoder_reference.NEMOTRON,
      context=len(ids) - size,
      block_size=0,
    )
  return decoder_reference.llama(
    tensors_of(name), ids, num_kv_heads=2, **kwargs
  )


def sampler_logits(name, ids, clean):
  """Returns the logits [L, V] that the family's own sampler uses.

  Args:
    name: of the family.
    ids: [L], some of them masks.
    clean: [L], the text in the blocks before the one that is sampled.
  """
  size, rows = BLOCKS.get(name, len(ids)), []
  for i in range(0, len(ids), size):
    start = [START] if name == 'nemotron' else []
    seen = np.concatenate([start, clean[:i], ids[i : i + size]]).astype(int)
    logits = reference_logits(name, seen)[len(start) :]
    if name in SHIFTED:
      logits = np.concatenate([logits[:1], logits[:-1]])
    rows.append(logits[i:])
  return np.concatenate(rows)


def write(folder, name, tensors=None, files=1, **changes):
  """Writes a checkpoint into a new folder, and returns the folder."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True)
  (folder / 'config.json').write_text(json.dumps({**CONFIGS[name], **changes}))
  tensors = tensors_of(name) if tensors is None else tensors
  for i in range(files):
    part = dict(sorted(tensors.items())[i::files])
    of = f'-{i + 1:05d}-of-{files:05d}' if files > 1 else ''
    safetensors.save_file(part, folder / f'model{of}.safetensors')
  return str(folder)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, tokens, clean=None):
  network = transformer.Transformer(config)
  hidden = network.apply({'params': params}, tokens, clean=clean)
  return transformer.output_logits(transformer.output_kernel(params), hidden)


class FolderTest(parameterized.TestCase):
  def folder(self):
    folder = tempfile.TemporaryDirectory()
    self.addCleanup(folder.cleanup)
    return pathlib.Path(folder.name)


# Families that transformers has, and its names of them.
STOCK = (
  ('gpt2', 'GPT2'),
  ('llama', 'Llama'),
  ('tied', 'Llama'),
  ('llama3', 'Llama'),
  ('yarn', 'Llama'),
  ('mistral', 'Mistral'),
  ('qwen2', 'Qwen2'),
  ('qwen3', 'Qwen3'),
)


def network_of_transformers(name, kind, **changes):
  """The network of a kind in transformers with the config of a family."""
  transformers = pytest.importorskip('transformers')
  config = {**CONFIGS[name], 'model_type': kind.lower(), **changes}
  config = getattr(transformers, f'{kind}Config')(**config)
  cls = 'GPT2LMHeadModel' if kind == 'GPT2' else f'{kind}ForCausalLM'
  return getattr(transformers, cls)(config).eval()


class ParityTest(FolderTest):
  @parameterized.parameters(*CONFIGS)
  def test_logits(self, name):
    folder = self.folder()
    source = pathlib.Path(write(folder / 'theirs', name, files=2))
    foreign = workdir_files.read_json(source / 'config.json')
    family = convert.detect(foreign, tensor_files.open_tensors(source, False))
    self.assertEqual(family, ALIASES.get(name, name))
    workdir = str(folder / 'ours')
    convert.import_checkpoint(str(source), workdir, changes=BYTES)
    lm = lms.load(workdir)
    network, params = lm.run.network.config, lm.params
    ids = np.random.default_rng(1).integers(0, V, LENGTH)
    if name in CAUSAL:  # After the row that begins a text.
      theirs = reference_logits(name, np.concatenate([[START], ids]))
      ours = logits_of(network, params, np.concatenate([[V], ids])[None])[0]
      ours = ours[:, :V]
    else:  # PLACE is the mask; ours is the last id.
      own = lambda ids: np.where(ids == PLACE, V, ids)[None]
      clean = np.random.default_rng(2).integers(0, PLACE, LENGTH)
      ids[::2] = PLACE
      theirs = sampler_logits(name, ids, clean)
      theirs[:, [PLACE, V]] = theirs[:, [V, PLACE]]
      if lm.run.objective.autoregressive:  # It delays the clean copy.
        clean = np.concatenate([[PLACE], clean[:-1]])
      clean = own(clean) if name in BLOCKS else None
      ours = logits_of(network, params, own(ids), clean)[0]
    self.assertGreater(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)

  @parameterized.parameters(
    *STOCK,
    ('a2d-qwen3', 'Qwen3'),
    ('a2d-qwen2', 'Qwen2'),
    ('a2d-llama', 'Llama'),
    ('illada', 'Llama'),
    ('dream', 'Qwen2'),
    ('sdar', 'Qwen3'),
    ('fast-dllm', 'Qwen2'),
    ('nemotron', 'Ministral3'),
  )
  def test_the_reference_is_what_transformers_computes(self, name, kind):
    torch = pytest.importorskip('torch')
    network = network_of_transformers(name, kind)
    prefix = 'transformer.' if name == 'gpt2' else ''
    state = {
      prefix + key.replace('encoder', 'model').replace('diffusion_h', 'lm_h'): (
        torch.tensor(x)
      )
      for key, x in tensors_of(name).items()
      if not key.endswith('.attn.bias')
    }
    if name == 'gpt2':
      state['lm_head.weight'] = state['transformer.wte.weight']
    network.load_state_dict(state)
    ids = np.random.default_rng(1).integers(0, V, LENGTH)
    mask = None
    if name not in CAUSAL:  # [1, 1, L, L], what each position sees.
      block = torch.arange(LENGTH) // BLOCKS.get(name, LENGTH)
      mask = (block[:, None] >= block)[None, None]
    if name == 'nemotron':
      place = torch.arange(LENGTH)
      mask = mask & ((place[:, None] >= place) | (block[:, None] == 1))
    with torch.no_grad():
      theirs = network(torch.tensor(ids)[None], attention_mask=mask).logits[0]
    np.testing.assert_allclose(theirs, reference_logits(name, ids), atol=1e-4)

  @parameterized.parameters(*STOCK)
  def test_what_transformers_writes(self, name, kind):
    torch = pytest.importorskip('torch')
    torch.manual_seed(0)
    theirs = network_of_transformers(name, kind, initializer_range=0.3)
    folder = self.folder()
    theirs.save_pretrained(folder / 'theirs', max_shard_size='9KB')
    self.assertTrue(
      (folder / 'theirs' / 'model.safetensors.index.json').exists()
    )
    workdir = str(folder / 'ours')
    convert.import_checkpoint(str(folder / 'theirs'), workdir, changes=BYTES)
    lm = lms.load(workdir)
    ids = np.random.default_rng(1).integers(0, V, LENGTH)
    with torch.no_grad():
      expected = theirs(torch.tensor([START, *ids])[None]).logits[0].numpy()
    self.assertGreater(np.abs(expected).max(), 1)
    logits = logits_of(lm.run.network.config, lm.params, np.array([[V, *ids]]))
    np.testing.assert_allclose(logits[0, :, :V], expected, atol=1e-4)

  @pytest.mark.slow
  def test_the_samplers_of_nemotron(self):
    # The most probable tokens by its own forward pass: from left to right, and
    # block by block, with one call each.
    folder, size = self.folder(), BLOCKS['nemotron']
    source = write(folder / 'theirs', 'nemotron')
    convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    lm = lms.load(str(folder / 'ours'))
    self.assertEqual(lm.run.settings.objective['ar_weight'], 2.0)

    def likeliest(ids, num, context):
      logits = decoder_reference.llama(
        tensors_of('nemotron'),
        np.array(ids),
        num_heads=4,
        num_kv_heads=2,
        eps=1e-5,
        theta=500.0,
        scaling=CONFIGS['nemotron']['rope_parameters'],
        names=decoder_reference.NEMOTRON,
        context=context,
        block_size=0,
      )[-num:]
      logits[:, PLACE] = -np.inf
      return logits.argmax(-1).tolist()

    causal, blocks = [START], [START]
    for _ in range(LENGTH):
      causal += likeliest(causal, 1, len(causal))
    for _ in range(LENGTH // size):
      blocks += likeliest(blocks + size * [PLACE], size, len(blocks))
    for expected, settings in (
      (causal, dict(sampler='speculate')),
      (causal, dict(sampler='ar')),
      (causal, dict(sampler='ar', cache=False)),
      (blocks, dict(sampler='block', num_steps=1)),
      (blocks, dict(sampler='block', num_steps=1, cache=False)),
    ):
      (sample,) = lm.sample(
        length=LENGTH,
        temperature=0,
        stop_at_eos=False,
        details=True,
        **settings,
      )
      expected = [PLACE if i == V else i for i in expected[1:]]
      self.assertEqual(sample.tokens.tolist(), expected, settings)

  def test_pairs_become_halves(self):
    # The scores of neighbouring rotary features are those of the halves.
    how = md4.halves_from_pairs(2, 6)
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 12))  # [D, H Dh]
    x = rng.normal(size=(4, 5))

    def theirs(kernel):  # Features 2i and 2i + 1 make a complex number.
      y = (x @ kernel).reshape(4, 2, 3, 2)
      angle = np.arange(4)[:, None, None] * 100 ** (-np.arange(3) / 3)
      return (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angle)

    def ours(kernel):
      table = layers.rotary_table(np.arange(4), 6, 100.0)
      y = (x @ how(kernel)).reshape(1, 4, 2, 6).astype(np.float32)
      return np.asarray(layers.rotate(y, table))[0]

    expected = np.einsum('ihd,jhd->hij', theirs(q), theirs(k).conj()).real
    scores = np.einsum('ihd,jhd->hij', ours(q), ours(k))
    np.testing.assert_allclose(scores, expected, atol=1e-4)


class ImportTest(FolderTest):
  def test_a_workdir_like_any_other(self):
    folder = self.folder()
    source = write(folder / 'theirs', 'llama')
    workdir = str(folder / 'ours')
    changes = {**BYTES, 'mesh.fsdp': 2}
    convert.import_checkpoint(source, workdir, changes=changes)
    lm = lms.load(workdir)
    run, params = lm.run, lm.params
    self.assertEqual((lm.step, run.settings.objective['name']), (0, 'ar'))
    self.assertEqual(run.settings.data.length, 64)
    self.assertEqual(run.mesh.shape['fsdp'], 2)
    self.assertTrue(checkpoint.holds_weights_alone(workdir))
    ids = np.arange(LENGTH)
    theirs = reference_logits('llama', np.concatenate([[START], ids[:-1]]))
    ours = logits_of(
      run.network.config,
      params,
      run.objective.network_input(ids[None].astype(np.int32)),
    )
    np.testing.assert_allclose(ours[0, :, :V], theirs, atol=1e-4)
    with self.assertRaisesRegex(InputError, 'holds imported weights'):
      train.train(run.settings, workdir, run.settings.to_dict(), 0.0)
    # Another run can use its tokenizer.
    config = TokenizerConfig('run', workdir, 0)
    self.assertEqual(tokenizers.make_tokenizer(config).fingerprint, 'bytes')
    before = sorted(pathlib.Path(workdir).rglob('*'))
    with self.assertRaisesRegex(InputError, 'is not empty'):
      convert.import_checkpoint(source, workdir, changes=BYTES)
    self.assertEqual(sorted(pathlib.Path(workdir).rglob('*')), before)

  def test_another_tokenizer_file(self):
    # A byte-level tokenizer.json with the mask inside the vocabulary.
    folder = self.folder()
    source = write(folder / 'theirs', 'llada', mask_token_id=100)
    content = tokenizer_json.bytes_tokenizer()
    vocab = content['model']['vocab']
    for text in [text for text, i in vocab.items() if i >= 100]:
      vocab[text] += 1
    content['added_tokens'] = [
      tokenizer_json.added_token(i, text)
      for i, text in ((100, '<mask>'), (V, '<end>'))
    ]
    path = pathlib.Path(source) / 'tokenizer.json'
    path.write_text(json.dumps(content))
    tokenizer = load_hugging_face(str(path), V + 1, 100, 100)
    text = 'a\u00e9 <mask> <end>\n'
    ids = tokenizer.encode(text)
    expected = [byte + (byte >= 100) for byte in text.encode()]
    np.testing.assert_array_equal(ids, expected)
    self.assertEqual(tokenizer.decode(ids), text)
    published = np.array([V, 100, 98])
    np.testing.assert_array_equal(tokenizer.swap_mask(published), [100, V, 98])
    np.testing.assert_array_equal(tokenizer.swap_mask(ids), expected)
    self.assertEqual((tokenizer.mask_id, tokenizer.num_bytes[100]), (V, 0))
    self.assertEqual(tokenizer.decode([V, 100, 98]), '_\n\nb')
    again = self.folder()
    save_tokenizer(tokenizer, again)
    self.assertEqual(
      load_tokenizer(again).to_json()['fingerprint'], tokenizer.fingerprint
    )
    with self.assertRaisesRegex(
      InputError, f'has ids up to {V}, but the network has only {V}'
    ):
      load_hugging_face(str(path), V, V - 1, 1)
    path.write_text('{}')
    with self.assertRaisesRegex(InputError, 'is not a tokenizer.json'):
      load_hugging_face(str(path), V + 1, 100, 1)

  def test_dreams_vocabulary_and_merges(self):
    folder = self.folder()
    source = pathlib.Path(
      write(folder / 'theirs', 'dream', vocab_size=300, mask_token_id=290)
    )
    alphabet = list(byte_alphabet())
    # '11' is never used, since numbers are cut into digits.
    vocab = {
      text: i for i, text in enumerate([*alphabet, 'he', 'll', 'hell', '11'])
    }
    (source / 'vocab.json').write_text(json.dumps(vocab))
    (source / 'merges.txt').write_text('#version: 0.2\nh e\nl l\nhe ll\n1 1\n')
    (source / 'tokenizer_config.json').write_text(
      json.dumps(
        {
          'added_tokens_decoder': {
            '290': {'content': '<mask>', 'special': True}
          }
        }
      )
    )
    described = layouts.Description(300, 290, 289, 289, 64)
    tokenizer = convert.find_tokenizer('dream', described, source, folder)
    ids = tokenizer.encode('hello 11<mask>')
    texts = {i: text for text, i in vocab.items()}
    self.assertEqual(
      [texts[i] for i in ids.tolist()], ['hell', 'o', 'Ġ', '1', '1', *'<mask>']
    )
    self.assertEqual(tokenizer.decode(ids), 'hello 11<mask>')
    self.assertEqual(tokenizer.decode([299]), '_')
    (source / 'tokenizer_config.json').unlink()
    (folder / 'tokenizer.json').unlink(missing_ok=True)
    with self.assertRaisesRegex(
      InputError, 'no tokenizer.json .*vocab.json, merges.txt.* 300 ids'
    ):
      convert.find_tokenizer('llama', described, source, folder)
    # Not OpenAI's tokenizer, either.
    (source / 'vocab.json').rename(source / 'vocab.bpe')
    described = dataclasses.replace(described, tokenizer='gpt2')
    with self.assertRaisesRegex(InputError, 'merges.txt, vocab.bpe'):
      convert.find_tokenizer('mdlm', described, source, folder)

  def test_gpt2s_vocabulary_and_merges(self):
    folder = self.folder()
    texts = [*byte_alphabet(), 'he', 'll', 'oĠ', '<|endoftext|>']
    vocab = {text: i for i, text in enumerate(texts)}
    size = len(vocab)
    (folder / 'vocab.json').write_text(json.dumps(vocab))
    # The last merge crosses pieces.
    (folder / 'merges.txt').write_text('#version: 0.2\nh e\nl l\no Ġ\n')
    (folder / 'added_tokens.json').write_text(json.dumps({'<pad>': size}))
    described = layouts.Description(
      size + 1, None, size - 1, size - 1, 64, tokenizer='gpt2'
    )
    for family in 'gpt2', 'sedd':
      tokenizer = convert.find_tokenizer(
        family, described, folder, self.folder()
      )
    ids = tokenizer.encode('hello ll')
    self.assertEqual([texts[i] for i in ids], ['he', 'll', 'o', 'Ġ', 'll'])
    self.assertEqual(tokenizer.decode(ids), 'hello ll')
    config = {'add_prefix_space': True}
    (folder / 'tokenizer_config.json').write_text(json.dumps(config))
    with self.assertRaisesRegex(InputError, 'add_prefix_space=True'):
      convert.find_tokenizer('gpt2', described, folder, folder)

  @parameterized.parameters(
    (
      dict(model_type='bert'),
      {},
      r"no known family: model_type='bert'.*known are "
      r"\[.*'dream', .*'gpt2', .*'llada', 'llama'",
    ),
    (
      dict(model_type='llada_moe', num_experts=64),
      {},
      r"model_type='llada_moe'.*experts are not supported.*'num_experts': 64",
    ),
    (dict(rope_scaling={'rope_type': 'yarn'}), {}, "rope_scaling=.*'yarn'"),
    (
      dict(sliding_window=16),
      {'data.length': 17},
      'sliding_window=16 .*data.length=17',
    ),
    (dict(hidden_act='relu'), {}, "hidden_act='relu' is not supported"),
    (dict(vocab_size=None), {}, r"config.json has no \['vocab_size'\]"),
    (
      dict(num_hidden_layers=2),
      {},
      r"surplus: \['model.layers.2.input_layernorm",
    ),
    (
      dict(num_hidden_layers=4),
      {},
      r"missing: \['model.layers.3.input_layernorm",
    ),
    (
      dict(intermediate_size=25),
      {},
      r'mlp.*_proj.weight of shape \(24, 16\) does not fit',
    ),
    (dict(vocab_size=256), {}, 'bytes.* has 258 ids .*the checkpoint has 257'),
    (dict(eos_token_id=500), {}, r'separator_id=500, .* in \[0, 257\)'),
    (dict(bos_token_id=500), {}, r'start_id=500, .* in \[0, 257\)'),
    (dict(bos_token_id=-1), {}, r'start_id=-1, .* in \[0, 257\)'),
    (dict(vocab_size='257'), {}, "vocab_size='257', which must be an integer"),
    (
      dict(num_hidden_layers='3'),
      {},
      "model.num_layers='3' is not of type int",
    ),
    (dict(rope_theta='x'), {}, "cannot be read as one of family 'llama'"),
    (dict(rms_norm_eps=10**400), {}, "cannot be read as one of family 'llama'"),
    (
      dict(attention_bias=True),
      {},
      r"missing: \['model.layers.0.self_attn.k_proj.b",
    ),
    (dict(tie_word_embeddings=True), {}, 'lm_head.weight must be the same as'),
    ({}, {'tokenizer.name': 'words'}, "tokenizer.name='words' is not one of"),
    ({}, {'model.num_heads': 3}, 'model.num_heads=3 must divide'),
  )
  def test_refusals_leave_nothing(self, theirs, changes, message):
    folder = self.folder()
    source = write(folder / 'theirs', 'llama', **theirs)
    with self.assertRaisesRegex(InputError, message):
      convert.import_checkpoint(
        source, str(folder / 'ours'), changes={**BYTES, **changes}
      )
    self.assertEqual([path.name for path in folder.iterdir()], ['theirs'])

  @parameterized.parameters(
    (V + 1, r'in \[0, 258\)'), (-1, r'in \[0, 258\)'), (END, 'id of its own')
  )
  def test_a_mask_outside_the_ids_or_equal_to_another(self, mask_id, message):
    folder = self.folder()
    source = write(folder / 'theirs', 'dream', mask_token_id=mask_id)
    with self.assertRaisesRegex(InputError, f'gives .*{mask_id}.*{message}'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)

  def test_integers_are_not_weights(self):
    folder = self.folder()
    tensors = tensors_of('llama')
    name = 'model.layers.0.mlp.up_proj.weight'
    tensors[name] = (100 * tensors[name]).astype(np.int8)
    source = write(folder / 'theirs', 'llama', tensors)
    with self.assertRaisesRegex(InputError, f'{name} holds I8 .*quantised'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    self.assertFalse((folder / 'ours').exists())

  def test_a_tensor_must_be_equal_parts_of_our_shape(self):
    folder = self.folder()
    tensors = tensors_of('gpt2')
    name = 'h.1.attn.c_attn.weight'
    tensors[name] = np.concatenate([tensors[name], tensors[name][:, :D]], 1)
    source = write(folder / 'theirs', 'gpt2', tensors)
    with self.assertRaisesRegex(InputError, rf'{name} of shape \(16, 64\)'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)

  @parameterized.parameters(
    ('llada', dict(block_type='sequential'), "block_type='sequential'"),
    ('llada', dict(scale_logits=True), 'scale_logits=True'),
    ('llada', dict(bias_for_layer_norm=True), 'bias_for_layer_norm=True'),
    ('llada', dict(clip_qkv=8.0), 'clip_qkv=8.0'),
    (
      'gpt2',
      dict(scale_attn_by_inverse_layer_idx=True),
      'inverse_layer_idx=True',
    ),
    ('gpt2', dict(activation_function='relu'), "activation_function='relu'"),
    ('gidd-uniform', dict(noise_type=0.5), 'noise_type=0.5'),
    ('gidd-uniform', dict(is_causal=True), 'is_causal=True'),
    ('gidd-uniform', dict(head_dim=8), 'head_dim=8'),
  )
  def test_unsupported_settings(self, name, changes, message):
    with self.assertRaisesRegex(InputError, message):
      FAMILIES[ALIASES.get(name, name)].describe(
        {**CONFIGS[name], **changes}, {}
      )

  def test_sources(self):
    folder = self.folder()
    with self.assertRaisesRegex(InputError, 'neither a folder or file'):
      convert.find_source('no/where/here', False)
    (folder / 'model.safetensors').touch()
    with (
      mock.patch.object(network, 'is_reachable', return_value=True),
      mock.patch('huggingface_hub.snapshot_download') as download,
    ):
      download.return_value = str(folder)
      self.assertEqual(convert.find_source('gpt2', False), folder)
    self.assertEqual(download.call_args.args, ('gpt2',))
    (folder / 'model.safetensors').unlink()
    with self.assertRaisesRegex(InputError, 'does not hold weights'):
      convert.import_checkpoint(str(folder), str(folder / 'ours'))
    (folder / 'model.safetensors').write_bytes(b'\x10' + bytes(40))
    with self.assertRaisesRegex(InputError, 'not a whole safetensors file'):
      convert.import_checkpoint(str(folder), str(folder / 'ours'))
    (folder / 'config.json').write_text('[' * 100_000)
    with self.assertRaisesRegex(InputError, 'config.json cannot be read'):
      convert.import_checkpoint(str(folder), str(folder / 'ours'))
    (folder / 'config.json').unlink()
    (folder / 'origin.json').write_text('{"family": ["gpt2"]}')
    (folder / 'config.json').write_text('{}')
    with self.assertRaisesRegex(InputError, "family=.'gpt2'. is not one of"):
      convert.read_own(folder)
    with self.assertRaisesRegex(InputError, "--family='gpt5' is not one of"):
      convert.import_checkpoint(
        str(folder), str(folder / 'ours'), family='gpt5'
      )

  def test_pickles_are_not_read_without_the_flag(self):
    folder = self.folder()
    (folder / 'theirs').mkdir()
    path = folder / 'theirs' / 'pytorch_model.bin'
    trap = folder / 'trap'

    class Trap:
      def __reduce__(self):
        return (pathlib.Path.touch, (trap,))

    path.write_bytes(pickle.dumps(Trap()))
    with self.assertRaisesRegex(InputError, 'a pickle: .* --allow_pickle'):
      convert.import_checkpoint(str(folder / 'theirs'), str(folder / 'ours'))
    pytest.importorskip('torch')
    with self.assertRaisesRegex(InputError, 'not a file of weights alone'):
      convert.import_checkpoint(
        str(folder / 'theirs'), str(folder / 'ours'), allow_pickle=True
      )
    self.assertFalse(trap.exists())

  def test_pytorch_files(self):
    torch = pytest.importorskip('torch')
    folder = self.folder()
    for nested in (False, True):
      state = {name: torch.tensor(x) for name, x in tensors_of('gpt2').items()}
      state['wte.weight'] = state['wte.weight'].bfloat16()
      torch.save({'state_dict': state} if nested else state, folder / 'x.bin')
      tensors = tensor_files.open_tensors(folder, True)
      self.assertEqual(tensors.shapes['wte.weight'], (V, D))
      for name in state:
        np.testing.assert_array_equal(tensors.read(name), state[name].float())

  def test_a_name_on_the_hub_without_a_network(self):
    pytest.importorskip('huggingface_hub')
    with mock.patch.object(network, 'is_reachable', lambda url: False):
      with self.assertRaisesRegex(InputError, 'does not answer'):
        convert.find_source('nobody/nothing-of-the-kind', False)


STOCK = [name for name, family in FAMILIES.items() if family.is_stock]
# {family of the export: changes of a run}
EXPORTS = {
  'qwen3': dict(objective__name='ar', model__num_kv_heads=1),
  'llama': dict(
    objective__name='ar',
    model__qk_norm=False,
    model__mlp='geglu_tanh',
    model__rope_theta=5e5,
    model__rope_factor=32.0,
    model__head_size=8,
    model__tie_embeddings=False,
  ),
  'qwen2': dict(
    objective__name='ar',
    model__qk_norm=False,
    model__attention_bias='qkv',
    model__head_size=6,
  ),
  'gpt2': dict(
    objective__name='ar',
    model__qk_norm=False,
    model__norm='layer',
    model__mlp='gelu_tanh',
    model__num_positions=16,
    model__norm_bias=True,
    model__attention_bias='all',
    model__mlp_bias=True,
  ),
  'a2d-qwen3': {},
  'llada': dict(model__qk_norm=False),
  'dream': dict(
    model__qk_norm=False, model__attention_bias='qkv', model__shift_outputs=True
  ),
  'sdar': dict(objective__name='block', objective__block_size=4),
  'nemotron': dict(
    objective__name='block',
    objective__block_size=4,
    objective__ar_weight=1.0,
    model__qk_norm=False,
    model__start_token=START,
    model__rope_factor=0.25,
    model__rope_scaling='yarn',
    model__rope_length=64,
  ),
  'a2d-llama': dict(
    objective__name='block',
    objective__block_size=4,
    model__qk_norm=False,
    model__rope_factor=4.0,
    model__rope_scaling='yarn',
    model__rope_length=64,
  ),
  'fast-dllm': dict(
    objective__name='block',
    objective__block_size=2,
    model__qk_norm=False,
    model__attention_bias='qkv',
    model__shift_outputs=True,
  ),
  'nanodlm': dict(
    objective__name='ar', model__num_positions=16, model__keep_rotary=True
  ),
}


def shapes_of(config, vocab_size):
  """Returns the network of a config and the shapes of its parameters."""
  settings = configs.make_settings(config)
  run = runs.make_run(settings, devices=jax.devices()[:1], refit=True)
  run = run.with_vocabulary(vocab_size)
  shapes = jax.eval_shape(run.scorer.init_params, jax.random.key(0))
  return run.network.config, shapes


def make_run(folder, tokenizer=None, **changes):
  """Writes a workdir with random weights; returns it and the weights."""
  tokenizer = tokenizer or BytesTokenizer()
  config = configs.load()
  config.data.length = LENGTH
  config.model.update(num_layers=LAYERS, embed_dim=D, num_heads=2, mlp_dim=F)
  for key, value in changes.items():
    section, _, leaf = key.partition('__')
    config[section][leaf] = value
  rng = np.random.default_rng(2)
  _, shapes = shapes_of(config, tokenizer.vocab_size)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape).astype(np.float32), shapes
  )
  folder.mkdir()
  settings = configs.make_settings(config)
  (folder / workdir_files.CONFIG).write_text(settings.to_json())
  save_tokenizer(tokenizer, folder)
  origin = {'imported': 'gpt5', 'source': 'a/b'}
  checkpoint.save_params(str(folder), params, settings.to_dict(), origin)
  return str(folder), params


class ExportTest(FolderTest):
  @parameterized.parameters(*EXPORTS)
  def test_there_and_back_is_exact(self, family):
    folder = self.folder()
    workdir, params = make_run(folder / 'run', **EXPORTS[family])
    log = pathlib.Path(workdir) / workdir_files.EVAL
    log.write_bytes(
      b'\xf4\n[1]\n{"step": 0, "eval/nll": "x"}\n'
      + json.dumps(
        {
          'step': 0,
          'source': 'text:somewhere',
          'changed': {'eval.num_draws': 8},
          'eval/nll': 1.2345,
          'eval/nll_ci95': 0.01,
          'eval/ppl': 3.44,
          'eval/bits_per_byte': 1.5,
          'eval/bits_per_byte_ci95': 0.02,
          'eval/num_examples': 7,
        }
      ).encode()
      + b'\n'
    )
    with mock.patch.object(export, 'SHARD_BYTES', 5000):
      export.export_checkpoint(workdir, str(folder / 'out'))
    out = folder / 'out'
    origin = json.loads((out / 'nanodlm' / 'origin.json').read_text())
    self.assertEqual(origin['family'], family)
    index = json.loads((out / 'model.safetensors.index.json').read_text())
    self.assertGreater(len(set(index['weight_map'].values())), 1)
    card = (out / 'README.md').read_text()
    self.assertRegex(
      card,
      r'`text:somewhere` \(eval.num_draws=8\) '
      r'.* 1\.2345 ± 0\.0100 .* 3\.44\b.* 1\.5000 ± 0\.02.* 7 ',
    )
    self.assertIn('Weights imported from `a/b` (family `gpt5`)', card)
    self.assertEqual('AutoModelForCausalLM' in card, family in STOCK)
    with self.assertRaisesRegex(InputError, 'is not empty'):
      export.export_checkpoint(workdir, str(out))
    convert.import_checkpoint(str(out), str(folder / 'back'))
    lm = lms.load(str(folder / 'back'))
    again = lm.run
    jax.tree.map(np.testing.assert_array_equal, params, lm.params)
    network, _ = shapes_of(configs.read_run(workdir), V + 1)
    self.assertEqual(again.network.config, network)
    self.assertEqual(again.tokenizer.fingerprint, 'bytes')
    if family not in STOCK:
      if family != 'nanodlm':  # Others read it without our folder.
        shutil.rmtree(out / 'nanodlm')
        changes = {}
        if family == 'a2d-llama':  # Nothing in its form says it.
          changes = {'objective.name': 'block', 'objective.block_size': 4}
        foreign = str(folder / 'foreign')
        convert.import_checkpoint(str(out), foreign, changes=changes)
        lm = lms.load(foreign)
        jax.tree.map(np.testing.assert_array_equal, params, lm.params)
        for field in dataclasses.fields(network):
          name = layouts.RESOLVED.get(field.name, field.name)
          found = getattr(lm.run.network.config, name)
          self.assertEqual(found, getattr(network, name), name)
        self.assertEqual(
          lm.run.settings.objective['name'], again.settings.objective['name']
        )
      return
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
      out, trust_remote_code=False
    ).eval()
    tokens = again.objective.network_input(
      np.arange(2 * LENGTH).reshape(2, LENGTH)
    )
    with torch.no_grad():
      logits = theirs(torch.tensor(np.asarray(tokens, np.int64))).logits
    np.testing.assert_allclose(
      logits,
      logits_of(again.network.config, params, tokens),
      atol=1e-4,
      rtol=1e-5,
    )
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(out)
    text = ' H\u00e9\n\t'
    self.assertEqual(
      tokenizer(text)['input_ids'],
      [again.tokenizer.mask_id, *again.tokenizer.encode(text).tolist()],
    )
    self.assertEqual(tokenizer.decode(tokenizer(text)['input_ids'][1:]), text)
    self.assertEqual(tokenizer.mask_token_id, again.tokenizer.mask_id)

  @parameterized.parameters(
    ('llada', V + 1, PLACE),
    ('illada', V + 1, 5),
    ('nemotron', V + 1, 100),
    ('dream', V + 1, 5),
    ('fast-dllm', V + 1, 100),
    ('a2d-qwen3', 151_936, 151_669),
    ('sdar', 157_184, 156_895),
  )
  def test_a_moved_mask_moves_back(self, name, size, mask):
    # Tensors with the mask inside the vocabulary are exported as they were
    # imported, bit for bit, and with the same ids.
    folder, tensors = self.folder(), tensors_of(name)
    for key, x in tensors.items():
      if len(x) == V + 1:
        tensors[key] = np.resize(x, (size, D)) + np.arange(size)[:, None] / size
    tensors = {key: x.astype(np.float32) for key, x in tensors.items()}
    sizes = {key: size for key in ('vocab_size', 'embedding_size')}
    if name != 'llada':
      del sizes['embedding_size']
    source = write(
      folder / 'theirs', name, tensors, mask_token_id=mask, **sizes
    )
    content = tokenizer_json.bytes_tokenizer()
    vocab = content['model']['vocab']
    for text in [text for text, i in vocab.items() if i == mask]:
      del vocab[text]
    content['added_tokens'] = [tokenizer_json.added_token(mask, '<mask>')]
    (pathlib.Path(source) / 'tokenizer.json').write_text(json.dumps(content))
    convert.import_checkpoint(source, str(folder / 'ours'))
    tokenizer = load_tokenizer(folder / 'ours')
    self.assertEqual(tokenizer.vocab_size, size)
    np.testing.assert_array_equal(
      tokenizer.swap_mask(np.array([mask, size - 1, 7])), [size - 1, mask, 7]
    )
    out = folder / 'out'
    export.export_checkpoint(str(folder / 'ours'), str(out), name)
    found = tensor_files.open_tensors(out, False)
    self.assertEqual(set(found.shapes), set(tensors))
    for key, x in tensors.items():
      np.testing.assert_array_equal(found.read(key), x, key)
    for file in ('config.json', 'generation_config.json'):
      foreign = workdir_files.read_json(out / file)
      self.assertEqual(
        (foreign['mask_token_id'], foreign['eos_token_id']), (mask, END)
      )
    # The tokenizer of the export also says it.
    self.assertEqual(convert.find_tokens(out, {})[1], mask)

  @parameterized.parameters('llada', 'dream', 'qwen3', 'llama', 'qwen2', 'gpt2')
  def test_the_converter_of_llama_cpp_knows_the_names(self, family):
    gguf = pytest.importorskip('gguf')
    folder = self.folder()
    workdir, _ = make_run(folder / 'run', **EXPORTS[family])
    export.export_checkpoint(workdir, str(folder / 'out'), family)
    architecture = gguf.MODEL_ARCH[family.upper()]
    names = gguf.get_tensor_name_map(architecture, LAYERS)
    found = tensor_files.open_tensors(folder / 'out', False).shapes
    theirs = [names.get_name(x, ('.weight', '.bias')) for x in found]
    self.assertNotIn(None, theirs)
    self.assertLen(set(theirs), len(found))

  @parameterized.parameters('sentencepiece', 'gpt2')
  def test_the_tokenizer_goes_with_it(self, name):
    folder = self.folder()
    if name == 'gpt2' and not CACHE.is_dir():
      self.skipTest('no tiktoken files')
    texts = [
      'the cat sat on the mats, 12345 of them\n',
      '  two  spaces',
      '',
      "I'll na\u00efve \u6f22\u5b57 \U0001f600\t<mask></s> <unk><0x41>",
      'a\u2581b \u2581\u2581 c\u2581',
    ]
    path = ''
    if name == 'sentencepiece':
      path = str(folder / 'a.model')
      SentencePieceTokenizer.train(
        (f'{text} {text[::2]}' for text in 20 * texts[:2]), 290, path
      )
    with mock.patch.dict('os.environ', TIKTOKEN_CACHE_DIR=str(CACHE)):
      tokenizer = tokenizers.make_tokenizer(TokenizerConfig(name, path, 0))
      objective = 'masked' if name == 'bytes' else 'ar'
      workdir, _ = make_run(
        folder / 'run', tokenizer, objective__name=objective
      )
      export.export_checkpoint(workdir, str(folder / 'out'))
    # What an autoregressive model was trained to begin with.
    start = [] if objective == 'masked' else [tokenizer.mask_id]
    theirs = library.Tokenizer.from_file(str(folder / 'out' / 'tokenizer.json'))
    theirs.encode_special_tokens = True
    for text in texts:
      ids = tokenizer.encode(text).tolist()
      self.assertEqual(theirs.encode(text).ids, start + ids)
      self.assertEqual(theirs.decode(ids), text)
    special = json.loads((folder / 'out' / 'tokenizer_config.json').read_text())
    self.assertEqual(
      theirs.token_to_id(special['mask_token']), tokenizer.mask_id
    )
    self.assertEqual(
      theirs.token_to_id(special['eos_token']), tokenizer.separator_id
    )

  def test_a_tokenizer_that_would_make_other_ids_stays_out(self):
    folder = self.folder()
    path = str(folder / 'a.model')
    SentencePieceTokenizer.train(
      iter(['the cat sat on the mat'] * 9), 270, path
    )
    tokenizer = tokenizers.make_tokenizer(
      TokenizerConfig('sentencepiece', path, 0)
    )
    workdir, _ = make_run(folder / 'run', tokenizer)
    content = tokenizer_json.sentencepiece_tokenizer(tokenizer.processor)
    self.assertIsNone(tokenizer_json.find_difference(content, tokenizer))
    # As a tokenizer.json that reads U+2581 as a space.
    content['normalizer'] = {
      'type': 'Replace',
      'pattern': {'String': '\u2581'},
      'content': ' ',
    }
    text = tokenizer_json.find_difference(content, tokenizer)
    self.assertIn('\u2581', str(text))
    with mock.patch.object(
      tokenizer_json, 'sentencepiece_tokenizer', return_value=content
    ):
      export.export_checkpoint(workdir, str(folder / 'out'))
    self.assertFalse((folder / 'out' / 'tokenizer.json').exists())
    self.assertIn(
      'A tokenizer.json is missing', (folder / 'out' / 'README.md').read_text()
    )

  def test_paths_of_this_machine_are_not_published(self):
    config = configs.load()
    config.update_from_flattened_dict(
      {
        'data.data_dir': '/here',
        'checkpoint.init_from': '/other/run',
        'checkpoint.init_step': 3,
        'tokenizer.name': 'sentencepiece',
        'tokenizer.path': '/a/file.model',
        'data.source': (
          'mix:0.5*jsonl:/mine/b/**/*.jsonl:body+0.5*text:~/mine/*.txt'
        ),
      }
    )
    settings = configs.make_settings(config)
    published = json.dumps(export.published(settings))
    self.assertNotRegex(published, '/(here|other|a|mine)/?')
    self.assertIn('mix:0.5*jsonl:*.jsonl:body+0.5*text:*.txt', published)
    self.assertEqual(settings.to_dict()['data']['data_dir'], '/here')

  def test_a_family_that_does_not_fit(self):
    folder = self.folder()
    workdir, _ = make_run(folder / 'run')
    for family, message in (
      ('llama', r"objective.name='masked' \(needs 'ar'\), model.qk_norm=True"),
      ('bert', "--family='bert' is not one of"),
    ):
      with self.assertRaisesRegex(InputError, message):
        export.export_checkpoint(workdir, str(folder / 'out'), family)
    self.assertFalse((folder / 'out').exists())

  def test_a_form_that_nearly_fits_is_named(self):
    folder = self.folder()
    changes = {**EXPORTS['dream'], 'model__attention_bias': 'none'}
    workdir, _ = make_run(folder / 'run', **changes)
    with self.assertLogs('nanodlm') as logs:
      export.export_checkpoint(workdir, str(folder / 'out'))
    for text in logs.output[-1], (folder / 'out' / 'README.md').read_text():
      self.assertRegex(
        text, r"dream.* model\.attention_bias='none' \(needs 'qkv'\)"
      )
    # None is wanted if one fits.
    workdir, _ = make_run(folder / 'fits')
    export.export_checkpoint(workdir, str(folder / 'own'), 'nanodlm')
    self.assertNotIn('nearest', (folder / 'own' / 'README.md').read_text())

  @parameterized.parameters(
    ('a2d-qwen3', r'MDLMSampler\(.*sample\(PROMPTS\)'),
    ('a2d-llama', r'BD3LMSampler\(.*sample\(PROMPTS, block_size=4\)'),
  )
  def test_the_card_names_the_sampler(self, family, expected):
    folder = self.folder()
    workdir, _ = make_run(folder / 'run', **EXPORTS[family])
    export.export_checkpoint(workdir, str(folder / 'out'))
    card = (folder / 'out' / 'README.md').read_text()
    self.assertRegex(card, f'(?s){expected}')
    self.assertEqual(card.count('Sampler('), 1)

  def test_a_shorter_text_than_that_of_the_base_is_noted(self):
    folder = self.folder()
    source, base = write(folder / 'theirs', 'llama'), str(folder / 'base')
    changes = {**BYTES, 'data.length': 32}
    convert.import_checkpoint(source, base, changes=changes)
    start = {'objective__name': 'ar', 'model__qk_norm': False}
    for i, length in enumerate((LENGTH, 2 * LENGTH, 64)):
      start |= {'checkpoint__init_from': base, 'data__length': length}
      base, _ = make_run(folder / f'run_{i}', **start)
      with self.assertLogs('nanodlm') as logs:
        export.export_checkpoint(base, str(folder / f'out_{i}'))
      card = (folder / f'out_{i}' / 'README.md').read_text()
      text = f'max_position_embeddings={length} .* up to 64 tokens'
      for found in (card, logs.output[-1]):
        (self.assertNotRegex if length == 64 else self.assertRegex)(found, text)

  def test_the_card_of_a_trained_run(self):
    folder = self.folder()
    workdir = workdirs.make_workdir(
      folder / 'run',
      train__batch_size=6,
      checkpoint__init_from='/here/is/another',
    )
    export.export_checkpoint(workdir, str(folder / 'out'))
    card = (folder / 'out' / 'README.md').read_text()
    self.assertRegex(card, r'0 steps of 6 x 16 tokens of `text:[^/]+`')
    self.assertIn('Nothing was measured at this step.', card)
    self.assertIn('Started from the weights of `another`.', card)
    self.assertIn('dllm.utils.get_model', card)
    self.assertRegex(
      card, 'sampler.name=fixed_count.*sampler.num_steps=.*temperature=1.0'
    )


if __name__ == '__main__':
  absltest.main()

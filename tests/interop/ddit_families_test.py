"""Tests of the families of diffusion transformers, and of MD4."""

import contextlib
import json
import pathlib
import sys
import tempfile
import types
from unittest import mock

from absl.testing import parameterized
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm.interop import convert, export
from nanodlm.interop.families import FAMILIES
from nanodlm.model import transformer
from nanodlm.model.network import TransformerNetwork
from nanodlm.training import checkpoint
from nanodlm.types import InputError
from tests import dit_reference as reference
from tests import toys

safetensors = pytest.importorskip('safetensors.numpy')

# The ids of the 'bytes' tokenizer: 257 and the mask.
VOCAB = 258
WIDTH, COND, LAYERS, HEADS, LENGTH = 16, 12, 2, 2, 8
BATCH = 3
TOKENS = np.random.default_rng(0).integers(0, VOCAB - 1, (BATCH, LENGTH))
TOKENS[:, ::2] = VOCAB - 1  # The mask.
CLEAN = np.random.default_rng(1).integers(0, VOCAB - 1, (BATCH, LENGTH))
T = np.float32([0.05, 0.5, 0.99])
SIGMA = -np.log1p(-np.float64(T))
BYTES = {'tokenizer.name': 'bytes'}
SIZES = dict(n_heads=HEADS, model_length=LENGTH)
CONFIGS = {
  'mdlm': dict(model_type='mdlm', **SIZES),
  'bd3lm': dict(model_type='bd3lm', block_size=2, **SIZES),
  'duo': dict(model_type='DUO', **SIZES),
  'sedd': dict(
    model=dict(n_heads=HEADS, length=LENGTH, scale_by_sigma=True),
    graph=dict(type='absorb'),
    noise=dict(type='loglinear'),
    tokens=VOCAB - 1,
  ),
  'gidd': dict(
    model_type='dit',
    num_attention_heads=HEADS,
    max_seq_len=LENGTH,
    p_uniform=0.2,
  ),
}


def tensors_of(family):
  return reference.random_ddit(
    0,
    vocab_size=VOCAB - (family == 'duo'),
    width=WIDTH,
    cond_dim=COND,
    num_layers=LAYERS,
  )


def write(folder, family, tensors=None, prefix='backbone.', **changes):
  """Writes a checkpoint in the form of a family; returns the folder."""
  folder = pathlib.Path(folder)
  folder.mkdir()
  tensors = tensors or tensors_of(family)
  if family in ('sedd', 'gidd'):
    prefix = ''
  safetensors.save_file(
    {f'{prefix}{name}': x for name, x in tensors.items()},
    folder / 'model.safetensors',
  )
  (folder / 'config.json').write_text(
    json.dumps({**CONFIGS[family], **changes})
  )
  return str(folder)


def new_folder(test):
  folder = tempfile.TemporaryDirectory()
  test.addCleanup(folder.cleanup)
  return pathlib.Path(folder.name)


def logits_of(workdir, tokens, t, clean=None, positions=None):
  """Returns the logits of a workdir's network, and its run."""
  lm = lms.load(str(workdir))

  @jax.jit
  def logits(params):
    hidden = lm.run.network.module.apply(
      {'params': params}, tokens, t, clean=clean, positions=positions
    )
    return transformer.output_logits(transformer.output_kernel(params), hidden)

  return np.asarray(logits(lm.params)), lm.run


class ParityTest(parameterized.TestCase):
  def convert(self, family, **kwargs):
    folder = new_folder(self)
    source = write(folder / 'theirs', family, **kwargs)
    convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    return folder / 'ours'

  @parameterized.parameters(
    ('mdlm', {}, 0 * SIGMA, 'masked'),
    ('mdlm', dict(time_conditioning=True), SIGMA, 'masked'),
    ('duo', {}, SIGMA, 'uniform'),
    ('sedd', {}, SIGMA, 'sedd'),
    ('gidd', {}, T, 'hybrid'),
  )
  def test_logits(self, family, changes, told, objective):
    workdir = self.convert(family, **changes)
    tokens = np.minimum(TOKENS, VOCAB - 1 - (family == 'duo'))
    logits, run = logits_of(workdir, tokens, T)
    want = reference.ddit_logits(tensors_of(family), tokens, told, HEADS)
    np.testing.assert_allclose(logits[..., : want.shape[-1]], want, atol=1e-4)
    self.assertEqual(run.settings.objective['name'], objective)
    self.assertGreater(np.abs(want).max(), 1)

  def test_logits_of_block_diffusion(self):
    workdir = self.convert('bd3lm')
    logits, run = logits_of(workdir, TOKENS, None, CLEAN)
    want = reference.ddit_logits(
      tensors_of('bd3lm'), TOKENS, 0 * SIGMA, HEADS, clean=CLEAN, block_size=2
    )
    np.testing.assert_allclose(logits, want, atol=1e-4)
    self.assertEqual(run.settings.objective['name'], 'block')
    self.assertEqual(run.settings.objective['block_size'], 2)

  def test_wanted_positions_are_modulated_by_their_own_time(self):
    workdir = self.convert('gidd')
    positions = np.int32([3, 9, 22])
    logits, _ = logits_of(workdir, TOKENS, T, positions=positions)
    want = reference.ddit_logits(tensors_of('gidd'), TOKENS, T, HEADS)
    np.testing.assert_allclose(
      logits, want.reshape(-1, VOCAB)[positions], atol=1e-4
    )

  def test_log_scores(self):
    # SEDD's network returns log scores; our outputs are what they are made of.
    workdir = self.convert('sedd')
    logits, _ = logits_of(workdir, TOKENS, T)
    raw = reference.ddit_logits(tensors_of('sedd'), TOKENS, SIGMA, HEADS)
    np.testing.assert_allclose(
      reference.sedd_log_score(logits, TOKENS, SIGMA),
      reference.sedd_log_score(raw, TOKENS, SIGMA),
      atol=1e-4,
    )

  def test_the_end_of_a_text_is_the_tokenizers(self):
    config = {**CONFIGS['sedd'], 'eos_token_id': 2}
    shapes = {name: x.shape for name, x in tensors_of('sedd').items()}
    described = FAMILIES['sedd'].describe(config, shapes)
    self.assertEqual((described.separator_id, described.eos_ids), (2, (2,)))

  def test_a_mask_in_the_middle_changes_places_with_the_last_id(self):
    place = 40
    workdir = self.convert('mdlm', mask_token_id=place)
    theirs = np.where(TOKENS == VOCAB - 1, place, TOKENS)
    logits, _ = logits_of(workdir, TOKENS, T)
    want = reference.ddit_logits(tensors_of('mdlm'), theirs, 0 * SIGMA, HEADS)
    want[..., [place, -1]] = want[..., [-1, place]]
    np.testing.assert_allclose(logits, want, atol=1e-4)


class WayBackTest(parameterized.TestCase):
  @parameterized.parameters('mdlm', 'bd3lm', 'sedd')
  def test_an_export_is_the_file_that_was_imported(self, family):
    folder = new_folder(self)
    source = write(folder / 'theirs', family)
    convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    export.export_checkpoint(str(folder / 'ours'), str(folder / 'out'))
    theirs, out = (
      safetensors.load_file(folder / name / 'model.safetensors')
      for name in ('theirs', 'out')
    )
    self.assertEqual(set(theirs), set(out))
    for name, x in theirs.items():
      np.testing.assert_array_equal(x, out[name])
    config = json.loads((folder / 'out' / 'config.json').read_text())
    self.assertTrue(FAMILIES[family].detect(config, out))
    described, again = (
      FAMILIES[family].describe(c, {name: x.shape for name, x in out.items()})
      for c in (CONFIGS[family], config)
    )
    self.assertEqual(described, again)

  @parameterized.parameters(
    dict(output_bias=True), dict(embedding_dim=8, tie_embeddings=False)
  )
  def test_a_form_without_a_parameter_of_ours_does_not_fit(self, **changes):
    network = toys.model_config(mlp='swiglu', causal=True, **changes)
    for family in ('gpt2', 'llama', 'qwen2', 'qwen3', 'llada', 'dream'):
      self.assertIn(next(iter(changes)), FAMILIES[family].misfit(network, 'ar'))

  @parameterized.parameters('mdlm', 'sedd')
  def test_times_of_another_schedule_do_not_fit(self, family):
    form = FAMILIES[family]
    network = toys.model_config(
      mlp='gelu_tanh',
      mlp_bias=True,
      norm='layer',
      tie_embeddings=False,
      output_bias=True,
      time_conditioning=True,
      time_form='sigma',
    )
    objective = dict(configs.load().objective)
    self.assertEqual(form.misread(network, objective), '')
    for key, value in ('schedule', 'cosine'), ('expand', True):
      found = form.misread(network, {**objective, key: value})
      self.assertIn(f'objective.{key}={value!r}', found)

  def test_blocks_with_an_autoregressive_clean_copy_are_no_bd3lm(self):
    folder = new_folder(self)
    source, ours = write(folder / 'theirs', 'bd3lm'), str(folder / 'ours')
    changes = {**BYTES, 'objective.ar_weight': 0.5}
    convert.import_checkpoint(source, ours, changes=changes)
    with self.assertRaisesRegex(InputError, r'bd3lm.*objective\.ar_weight'):
      export.export_checkpoint(ours, str(folder / 'out'), family='bd3lm')
    export.export_checkpoint(ours, str(folder / 'out'))
    config = json.loads((folder / 'out' / 'config.json').read_text())
    self.assertEqual(config['model_type'], 'nanodlm')

  def test_other_families_are_exported_in_our_own_form(self):
    family = 'duo'
    folder = new_folder(self)
    source = write(folder / 'theirs', family)
    convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    export.export_checkpoint(str(folder / 'ours'), str(folder / 'out'))
    convert.import_checkpoint(str(folder / 'out'), str(folder / 'again'))
    first, second = (
      lms.load(str(folder / name)).params for name in ('ours', 'again')
    )
    jax.tree.map(np.testing.assert_array_equal, first, second)


class SettingsTest(parameterized.TestCase):
  """Tests of settings and tensors that are not supported."""

  @parameterized.parameters(
    ('bd3lm', dict(block_size=None), "no .'block_size'."),
    ('bd3lm', dict(causal=True), 'causal=True'),
    ('bd3lm', dict(time_conditioning=True), 'time_conditioning=True'),
    ('mdlm', dict(n_heads=None), "no .'n_heads'."),
    ('mdlm', dict(parameterization='d3pm'), "parameterization='d3pm'"),
    ('duo', dict(causal=True), 'causal=True'),
    ('sedd', dict(graph=dict(type='uniform')), "type='uniform'.*'absorb'"),
    ('sedd', dict(noise=dict(type='geometric')), "type='geometric'"),
    ('sedd', dict(noise='loglinear'), "noise='loglinear'.* not a section"),
    (
      'sedd',
      dict(model=dict(n_heads=2, scale_by_sigma=False)),
      'scale_by_sigma=False',
    ),
    ('gidd', dict(p_uniform=1.5), 'p_uniform=1.5'),
    ('gidd', dict(p_uniform=None), "no .'p_uniform'."),
  )
  def test_refused(self, family, changes, message):
    folder = new_folder(self)
    source = write(folder / 'theirs', family, **changes)
    with self.assertRaisesRegex(InputError, message):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    self.assertFalse((folder / 'ours').exists())

  def test_tensors_are_named(self):
    folder = new_folder(self)
    tensors = tensors_of('mdlm')
    tensors['blocks.1.attn_qkv.bias'] = tensors.pop('blocks.1.norm2.weight')
    source = write(folder / 'theirs', 'mdlm', tensors)
    with self.assertRaisesRegex(
      InputError,
      r"missing: \['backbone.blocks.1.norm2.weight'\].*"
      r"surplus: \['backbone.blocks.1.attn_qkv.bias'\]",
    ):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)

  def test_another_vocabulary(self):
    folder = new_folder(self)
    source = write(
      folder / 'theirs',
      'duo',
      reference.random_ddit(
        0, vocab_size=VOCAB, width=WIDTH, cond_dim=COND, num_layers=LAYERS
      ),
    )
    with self.assertRaisesRegex(InputError, 'the checkpoint has 259'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)

  def test_ids_of_a_padding_token_are_kept(self):
    # GPT-2's 50257 ids, a padding token that occurs in no text, and our mask.
    shapes = {
      f'backbone.{name}': x.shape for name, x in tensors_of('duo').items()
    }
    shapes['backbone.vocab_embed.embedding'] = (50_258, WIDTH)
    described = FAMILIES['duo'].describe(CONFIGS['duo'], shapes)
    self.assertEqual((described.tokenizer, described.spare_ids), ('gpt2', 1))
    shapes['backbone.vocab_embed.embedding'] = (50_258, WIDTH)
    described = FAMILIES['mdlm'].describe(CONFIGS['mdlm'], shapes)
    self.assertEqual((described.tokenizer, described.spare_ids), ('gpt2', 0))
    self.assertEqual(described.mask_id, 50_257)

  def test_every_path_of_every_layout_is_a_parameter(self):
    # No two parameters are the same part of a tensor.
    for family in CONFIGS:
      tensors = tensors_of(family)
      described = FAMILIES[family].describe(
        CONFIGS[family], {name: x.shape for name, x in tensors.items()}
      )
      network = toys.model_config(
        vocab_size=VOCAB,
        **{
          key.removeprefix('model.'): value
          for key, value in described.settings.items()
          if key.startswith('model.')
        },
      )
      init = TransformerNetwork(network).init_params
      params = jax.eval_shape(init, jax.random.key(0))
      paths = checkpoint.flatten(params)
      layout = FAMILIES[family].layout(network, paths, tensors)
      parts = [part for parts in layout.tensors.values() for part in parts]
      self.assertEqual(
        {part.path for part in parts},
        {path.replace('last_layer/', 'layers/') for path in paths},
      )
      self.assertLen({(p.layer, p.name, p.share) for p in parts}, len(parts))
      with self.assertRaisesRegex(InputError, r"lacks: \['objective/w'\]"):
        FAMILIES[family].layout(network, [*paths, 'objective/w'], tensors)


class LightningTest(parameterized.TestCase):
  """Tests of PyTorch's files, if it is installed."""

  def setUp(self):
    super().setUp()
    self.torch = pytest.importorskip('torch')

  def write(self, folder, tensors, rest):
    folder.mkdir()
    weights = {
      f'backbone.{name}': self.torch.tensor(x) for name, x in tensors.items()
    }
    # A rotary table is among the parameters.
    weights = {'backbone.rotary_emb.inv_freq': self.torch.ones(4), **weights}
    self.torch.save(
      {'state_dict': weights, 'epoch': 3, **rest}, folder / 'best.ckpt'
    )
    (folder / 'config.json').write_text(json.dumps(CONFIGS['mdlm']))
    return str(folder)

  def test_averaged_weights_are_taken_and_settings_are_not_read(self):
    folder, tensors = new_folder(self), tensors_of('mdlm')
    shadows = [self.torch.tensor(x) for x in tensors.values()]
    plain = {name: x + 1 for name, x in tensors.items()}
    with fake_class('omegaconf.dictconfig', 'DictConfig') as settings:
      source = self.write(
        folder / 'theirs',
        plain,
        {
          'ema': {'decay': 0.9, 'shadow_params': shadows},
          'hyper_parameters': {'config': settings()},
        },
      )
    with self.assertRaisesRegex(InputError, 'best.ckpt, a pickle'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    convert.import_checkpoint(
      source, str(folder / 'ours'), changes=BYTES, allow_pickle=True
    )
    logits, _ = logits_of(folder / 'ours', TOKENS, T)
    want = reference.ddit_logits(tensors, TOKENS, 0 * SIGMA, HEADS)
    np.testing.assert_allclose(logits, want, atol=1e-4)

  def test_averages_of_other_shapes(self):
    folder, tensors = new_folder(self), tensors_of('mdlm')
    shadows = [self.torch.tensor(x) for x in tensors.values()]
    source = self.write(
      folder / 'theirs', tensors, {'ema': {'shadow_params': shadows[::-1]}}
    )
    with self.assertRaisesRegex(InputError, 'not of the shapes of the weights'):
      convert.import_checkpoint(
        source, str(folder / 'ours'), changes=BYTES, allow_pickle=True
      )

  def test_a_program_is_refused_even_where_pickles_are_allowed(self):
    class Program:
      def __reduce__(self):
        return open, (str(folder / 'was here'), 'w')

    folder = new_folder(self)
    source = self.write(
      folder / 'theirs', tensors_of('mdlm'), {'hyper_parameters': Program()}
    )
    with self.assertRaisesRegex(InputError, 'not a file of weights alone'):
      convert.import_checkpoint(
        source, str(folder / 'ours'), changes=BYTES, allow_pickle=True
      )
    self.assertFalse((folder / 'was here').exists())
    self.assertFalse((folder / 'ours').exists())


@contextlib.contextmanager
def fake_class(module, name):
  """Yields a class that is pickled like one of an absent package."""
  parts = module.split('.')
  modules = {
    '.'.join(parts[: i + 1]): types.ModuleType('.'.join(parts[: i + 1]))
    for i in range(len(parts))
  }
  made = type(
    name,
    (),
    {
      '__module__': module,
      '__init__': (lambda self: self.__dict__.update(n_heads=2)),
    },
  )
  setattr(modules[module], name, made)
  with mock.patch.dict(sys.modules, modules):
    yield made


MD4 = dict(
  model_type='md4',
  vocab_size=VOCAB - 1,
  data_shape=[LENGTH],
  noise_schedule='linear',
  outside_embed=False,
  time_features='t',
  n_layers=LAYERS,
  feature_dim=8,
  num_heads=HEADS,
  mlp_type='glu',
  task_type='text',
  classes=-1,
)


def md4_params(config, seed=0):
  """Returns a tree with the names and shapes of MD4's network."""
  rng = np.random.default_rng(seed)
  size, width, hidden = config['feature_dim'], WIDTH, 32

  def dense(out, inner, bias=True):
    tree = {'kernel': rng.normal(size=(inner, out)) / inner**0.5}
    return {**tree, 'bias': 0.3 * rng.normal(size=out)} if bias else tree

  linear = lambda out, inner: dense(out, inner, bias=False)
  is_told = config['time_features'] == 't'
  norm = lambda: {'scale': 1 + 0.3 * rng.normal(size=width)}
  net, order = {}, iter(range(3))
  embed = {
    'Embed_0': {
      'embedding': rng.normal(
        size=(
          config['vocab_size'] + 1,
          size if config['outside_embed'] else width,
        )
      )
    }
  }
  classifier = {'Transformer_0': net}
  if config['outside_embed']:
    classifier |= embed
    net[f'Dense_{next(order)}'] = dense(width, size)
  else:
    net |= embed
  if is_told:
    classifier['CondEmbedding_0'] = {
      'dense0': dense(4 * size, size),
      'Dense_0': dense(size, 4 * size),
    }
    net[f'Dense_{next(order)}'] = dense(2 * width, size)
  else:
    net['RMSNorm_0'] = norm()
  net[f'Dense_{next(order)}'] = linear(config['vocab_size'], width)
  for i in range(config['n_layers']):
    net[f'TransformerBlock_{i}'] = {
      'attention': {
        name: linear(width, width) for name in ('wq', 'wk', 'wv', 'wo')
      },
      'feed_forward': {
        'w1': linear(hidden, width),
        'w2': linear(width, hidden),
        'w3': linear(hidden, width),
      },
      **(
        {'Dense_0': dense(6 * width, size)}
        if is_told
        else {'RMSNorm_0': norm(), 'RMSNorm_1': norm()}
      ),
    }
  return jax.tree.map(np.float32, {'classifier': classifier})


def write_md4(folder, config, params, ema=None):
  """Writes a workdir of MD4's trainer; returns it."""
  state = {
    'rng': np.zeros((2,), np.uint32),
    'step': np.int32(7),
    'params': params,
    'opt_state': [{'mu': params}],
  }
  if ema is not None:
    state['ema_params'] = ema
  folder.mkdir()
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder / 'checkpoints' / '7' / 'train_state', state)
  (folder / 'config.json').write_text(json.dumps(config))
  return str(folder)


class MD4Test(parameterized.TestCase):
  @parameterized.parameters(
    dict(outside_embed=True),
    dict(mlp_type='swiglu', noise_schedule='poly3'),
    dict(mlp_type='geglu', noise_schedule='cosine'),
    dict(time_features='none'),
  )
  def test_logits(self, **changes):
    config = {**MD4, **changes}
    params, folder = md4_params(config), new_folder(self)
    # The averages are used.
    source = write_md4(folder / 'theirs', config, md4_params(config, 1), params)
    convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    logits, run = logits_of(folder / 'ours', TOKENS, T)
    is_told = config['time_features'] == 't'
    want = reference.md4_logits(
      params['classifier'],
      TOKENS,
      T if is_told else None,
      config['mlp_type'],
      head_dim=config['feature_dim'],
    )
    np.testing.assert_allclose(logits[..., :-1], want, atol=1e-4)
    self.assertGreater(np.abs(want).max(), 1)
    schedule = {
      'linear': 'linear',
      'poly3': 'polynomial',
      'cosine': 'md4_cosine',
    }
    self.assertEqual(
      run.settings.objective['schedule'], schedule[config['noise_schedule']]
    )

  def test_the_end_of_a_text_is_the_tokenizers(self):
    for changes, end in ({}, VOCAB - 2), ({'eos_token_id': 2}, 2):
      found = FAMILIES['md4'].vocabulary({**MD4, **changes}, {})
      self.assertEqual((found['separator_id'], found['eos_ids']), (end, (end,)))
      self.assertEqual(found['mask_id'], VOCAB - 1)

  def test_what_is_not_read(self):
    folder = new_folder(self)
    source = pathlib.Path(write_md4(folder / 'theirs', MD4, md4_params(MD4)))
    for changes, message in (
      (dict(model_type='genmd4'), "model_type='genmd4'"),
      (dict(classes=11), 'classes=11'),
      (dict(noise_schedule='sigmoid'), "noise_schedule='sigmoid'"),
      (dict(mlp_type='mlp'), "mlp_type='mlp'.*'glu'"),
    ):
      (source / 'config.json').write_text(json.dumps({**MD4, **changes}))
      with self.assertRaisesRegex(InputError, message):
        convert.import_checkpoint(
          str(source), str(folder / 'ours'), changes=BYTES
        )
    (source / 'config.json').unlink()
    with self.assertRaisesRegex(InputError, "no .*'num_heads'"):
      convert.import_checkpoint(
        str(source), str(folder / 'ours'), changes=BYTES
      )
    self.assertFalse((folder / 'ours').exists())

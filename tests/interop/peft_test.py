"""Tests of adapters in PEFT's layout: numbers, a way back, and mistakes."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm import train, weights
from nanodlm.interop import convert, export, peft
from nanodlm.types import InputError
from tests import workdirs
from tests.interop.families_test import D, EXPORTS, F, LAYERS, make_run

safetensors = pytest.importorskip('safetensors.numpy')
RANK, ALPHA = 3, 5.0
SHAPES = {'self_attn.q_proj': (D, D), 'mlp.up_proj': (D, F)}
CONFIG = {
  'peft_type': 'LORA',
  'task_type': 'CAUSAL_LM',
  'r': RANK,
  'lora_alpha': ALPHA,
  'target_modules': ['q_proj', 'up_proj'],
  'use_rslora': False,
  'use_dora': False,
  'modules_to_save': None,
  'rank_pattern': {},
}


def adapters(shapes=None):
  rng = np.random.default_rng(0)
  arrays = {}
  for layer in range(LAYERS):
    for module, (width, features) in (shapes or SHAPES).items():
      name = f'base_model.model.model.layers.{layer}.{module}'
      for side, shape in ('A', (RANK, width)), ('B', (features, RANK)):
        value = rng.normal(size=shape).astype(np.float32)
        arrays[f'{name}.lora_{side}.weight'] = value
  return arrays


def write(folder, arrays=None, **changes):
  """Writes a folder as PEFT does."""
  folder.mkdir()
  (folder / peft.CONFIG).write_text(json.dumps({**CONFIG, **changes}))
  safetensors.save_file(arrays or adapters(), folder / peft.TENSORS)
  return str(folder)


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  folder = tmp_path_factory.mktemp('base')
  return make_run(folder / 'run', **EXPORTS['qwen3'])[0]


def read(base, source, workdir):
  changes = {'checkpoint.init_from': base}
  convert.import_checkpoint(source, str(workdir), changes=changes)
  return str(workdir)


def test_there_and_back(base, tmp_path):
  workdir = read(base, write(tmp_path / 'theirs'), tmp_path / 'run')
  lm, plain, arrays = lms.load(workdir), lms.load(base), adapters()
  run, params, _ = weights.load_merged(lm.run, workdir)
  merged_lm = dataclasses.replace(lm, run=run, params=params)
  tokens = np.arange(8, dtype=np.int32)
  np.testing.assert_allclose(
    merged_lm.logits(tokens), lm.logits(tokens), atol=1e-4
  )
  for ours, theirs in ('query', 'self_attn.q_proj'), ('mlp_in', 'mlp.up_proj'):
    for layer in range(LAYERS):
      name = f'base_model.model.model.layers.{layer}.{theirs}'
      b, a = (arrays[f'{name}.lora_{side}.weight'] for side in 'BA')
      found, kernel = (
        x['last_layer'][ours]['kernel']
        if layer == LAYERS - 1
        else x['layers'][ours]['kernel'][layer]
        for x in (params, plain.params)
      )
      np.testing.assert_allclose(
        found, kernel + ALPHA / RANK * (b @ a).T, atol=1e-5
      )
  np.testing.assert_array_equal(
    params['layers']['value']['kernel'],
    plain.params['layers']['value']['kernel'],
  )
  export.export_adapters(workdir, str(tmp_path / 'out'))
  again = safetensors.load_file(tmp_path / 'out' / peft.TENSORS)
  assert set(again) == set(arrays)
  for name, x in arrays.items():
    np.testing.assert_array_equal(again[name], x)
  content = json.loads((tmp_path / 'out' / peft.CONFIG).read_text())
  for key in 'r', 'lora_alpha', 'target_modules', 'use_rslora', 'task_type':
    assert content[key] == CONFIG[key]
  # The whole model, merged, and back.
  export.export_checkpoint(workdir, str(tmp_path / 'whole'))
  convert.import_checkpoint(str(tmp_path / 'whole'), str(tmp_path / 'merged'))
  merged = lms.load(str(tmp_path / 'merged'))
  np.testing.assert_array_equal(
    merged.params['layers']['query']['kernel'],
    params['layers']['query']['kernel'],
  )


@pytest.mark.slow
def test_imported_adapters_are_trained_further(base, tmp_path):
  source = write(tmp_path / 'theirs')
  workdir = read(base, source, tmp_path / 'run')
  (tmp_path / 'text.txt').write_text(workdirs.TEXT)
  changes = {
    'checkpoint.init_from': workdir,
    'data.source': f'text:{tmp_path}/text.txt',
    'data.data_dir': str(tmp_path / 'data'),
    'train.num_steps': 1,
    'train.batch_size': 16,
    'train.num_samples': 0,
    'eval.batch_size': 16,
    'eval.max_examples': 16,
    'eval.num_draws': 2,
    'optim.learning_rate': 0.01,
  }
  more = str(tmp_path / 'more')
  start = configs.Start('train', more, configs.load(), False, changes)
  assert train.main(start) == 0
  export.export_adapters(more, str(tmp_path / 'out'))
  again = safetensors.load_file(tmp_path / 'out' / peft.TENSORS)
  # A first step of Adam has at most the size of the learning rate.
  changes = [np.abs(again[name] - x).max() for name, x in adapters().items()]
  assert len(changes) == len(again) and 1e-5 < max(changes) < 0.02
  content = json.loads((tmp_path / 'out' / peft.CONFIG).read_text())
  assert content['base_model_name_or_path'] == 'a/b'
  export.export_checkpoint(more, str(tmp_path / 'whole'))
  card = (tmp_path / 'whole' / 'README.md').read_text()
  num = sum(x.size for x in again.values())
  assert f'Adapters of {num:,} parameters' in card
  assert f'{lms.load(base).run.num_params():,} parameters' in card
  # Adapters are not a base for others.
  with pytest.raises(InputError, match='already has adapters .lora.rank=3.'):
    read(workdir, source, tmp_path / 'top')
  assert not (tmp_path / 'top').exists()


def test_the_base_is_named(base, tmp_path, monkeypatch, caplog):
  workdir = read(base, write(tmp_path / 'theirs'), tmp_path / 'run')
  monkeypatch.chdir(tmp_path)
  caplog.set_level('INFO', 'nanodlm')
  # The base was imported from 'a/b', a name on the hub or a folder here.
  for name, kind in ('a/b', 'its name on'), ('run', 'the name of'):
    out = tmp_path / f'out_{name[0]}'
    export.export_adapters(workdir, str(out))
    content = json.loads((out / peft.CONFIG).read_text())
    assert content['base_model_name_or_path'] == name
    assert f'the base at {name!r}, {kind}' in caplog.text
    read(base, str(out), tmp_path / f'again_{name[0]}')
    assert 'names' not in caplog.text
    # Whoever may read the one file may read the other.
    modes = {
      (out / file).stat().st_mode for file in (peft.CONFIG, peft.TENSORS)
    }
    assert len(modes) == 1
    (tmp_path / 'a' / 'b').mkdir(parents=True, exist_ok=True)
  content['base_model_name_or_path'] = 'c/b'
  (out / peft.CONFIG).write_text(json.dumps(content))
  read(base, str(out), tmp_path / 'other')
  assert "names 'c/b' as the base" in caplog.text


def test_peft_computes_the_same(base, tmp_path):
  torch = pytest.importorskip('torch')
  transformers = pytest.importorskip('transformers')
  library = pytest.importorskip('peft')
  workdir = read(
    base, write(tmp_path / 'theirs', use_rslora=True), tmp_path / 'run'
  )
  export.export_adapters(workdir, str(tmp_path / 'out'))
  export.export_checkpoint(base, str(tmp_path / 'base'))
  model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base')
  model = library.PeftModel.from_pretrained(model, tmp_path / 'out').eval()
  lm = lms.load(workdir)
  tokens = np.arange(8, dtype=np.int64)[None]
  # What the network reads: the text after the mask.
  start = np.full_like(tokens[:, :1], lm.tokenizer.mask_id)
  shifted = np.concatenate([start, tokens[:, :-1]], axis=1)
  with torch.no_grad():
    theirs = model(torch.tensor(shifted)).logits.numpy()
  ours = lm.logits(tokens.astype(np.int32), 0.0)
  plain = lms.load(base).logits(tokens.astype(np.int32), 0.0)
  assert np.abs(ours - plain).max() > 0.1
  size = ours.shape[-1]
  np.testing.assert_allclose(theirs[..., :size], ours, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
  'changes, shapes, named',
  [
    ({'use_dora': True}, None, 'use_dora=True'),
    ({'modules_to_save': ['lm_head']}, None, 'modules_to_save'),
    ({'something_new': 3}, None, 'something_new'),
    ({'r': None}, None, 'r=None'),
    ({'r': '3'}, None, "r='3'"),
    ({'init_lora_weights': 'pissa'}, None, 'init_lora_weights'),
    ({}, {'self_attn.q_proj': (D, D + 1)}, 'layers/query/lora_b'),
    ({}, {'self_attn.qkv': (D, D)}, 'self_attn.qkv'),
  ],
)
def test_mistakes(base, tmp_path, changes, shapes, named):
  source = write(tmp_path / 'theirs', adapters(shapes), **changes)
  with pytest.raises(InputError, match=named):
    read(base, source, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_other_mistakes(base, tmp_path):
  source = write(tmp_path / 'theirs')
  with pytest.raises(InputError, match='--config.checkpoint.init_from'):
    read('', source, tmp_path / 'run')
  with pytest.raises(InputError, match='--config.lora.rank=7'):
    changes = {'checkpoint.init_from': base, 'lora.rank': 7}
    convert.import_checkpoint(source, str(tmp_path / 'run'), changes=changes)
  # What is wrong is said with the place of the file.
  other = write(tmp_path / 'other', rank_pattern={'q_proj': 2})
  with pytest.raises(InputError, match=f'{other}.*rank_pattern='):
    read(base, other, tmp_path / 'run')
  (pathlib.Path(source) / peft.TENSORS).unlink()
  with pytest.raises(InputError, match=f'lacks {peft.TENSORS}'):
    read(base, source, tmp_path / 'run')
  with pytest.raises(InputError, match='lora.rank=0'):
    export.export_adapters(base, str(tmp_path / 'out'))
  assert not pathlib.Path(tmp_path / 'out').exists()

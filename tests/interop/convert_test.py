"""Tests of what is read from the folder of a checkpoint, and what is not."""

import fnmatch
import json
import pathlib
import shutil
import sys
import types
from unittest import mock

from absl.testing import parameterized
import ml_dtypes
import numpy as np
import pytest

from nanodlm import lm as lms
from nanodlm.data import network
from nanodlm.data.tokenizers.saved import load_tokenizer
from nanodlm.interop import convert, export, tensors, tokenizer_json
from nanodlm.interop.families import FAMILIES
from nanodlm.types import InputError
from tests.interop import families_test as checkpoints

safetensors = pytest.importorskip('safetensors.numpy')
pytest.importorskip('tokenizers')

BYTES, CONFIGS = checkpoints.BYTES, checkpoints.CONFIGS
LLAMA = CONFIGS['llama']
# What config.json says in other networks that have Llama's names of tensors, or
# nearly: from the classes of transformers 5.24 and the published files.
OTHERS = {
  'smollm3': dict(no_rope_layers=[1, 1, 1, 0], no_rope_layer_interval=4),
  'granite': dict(
    embedding_multiplier=12.0,
    attention_multiplier=0.0156,
    residual_multiplier=0.22,
    logits_scaling=8.0,
  ),
  'cohere': dict(logit_scale=0.0625, use_qk_norm=False, layer_norm_eps=1e-5),
  'gemma': dict(hidden_activation='gelu_pytorch_tanh'),
  'gemma2': dict(
    query_pre_attn_scalar=256,
    final_logit_softcapping=30.0,
    attn_logit_softcapping=50.0,
  ),
  'gemma3_text': dict(rope_local_base_freq=10_000.0, sliding_window_pattern=6),
  'phi3': dict(original_max_position_embeddings=4096),
  'olmo': dict(clip_qkv=8.0),
  'olmo2': {},
  'helium': {},
  'ernie4_5': dict(use_bias=False),
  'exaone4': dict(sliding_window_pattern='LLLG'),
  'hunyuan_v1_dense': dict(use_qk_norm=True, use_cla=False),
  'seed_oss': dict(attention_out_bias=False, residual_dropout=0.1),
  'stablelm': dict(use_parallel_residual=True, qk_layernorm=True),
  'minicpm': dict(scale_emb=12, scale_depth=1.4, dim_model_base=256),
  'deepseek_v3': dict(kv_lora_rank=512, first_k_dense_replace=3),
  'mixtral': dict(num_local_experts=8, num_experts_per_tok=2),
  'nemotron': dict(norm_eps=1e-5),
  'internlm2': dict(bias=False),
  'llada_moe': dict(num_experts=64),
  'gidd': dict(attn_soft_cap=30.0, use_qk_norm=True, resid_scale=4.0),
}


class FieldsTest(checkpoints.FolderTest):
  """Tests of the keys of config.json."""

  @parameterized.parameters(*OTHERS)
  def test_another_network_is_not_read_as_llama(self, kind):
    # Neither with its own model_type nor with that of Llama.
    config = {**LLAMA, **OTHERS[kind], 'model_type': kind}
    with self.assertRaises(InputError) as caught:
      FAMILIES['llama'].describe(config, {})
    for key in ('model_type', *OTHERS[kind]):
      self.assertIn(f'{key}=', str(caught.exception))
    if OTHERS[kind]:
      config['model_type'] = 'llama'
      with self.assertRaisesRegex(InputError, f'{[*OTHERS[kind]][-1]}='):
        FAMILIES['llama'].describe(config, {})

  @parameterized.parameters(
    ('llama', dict(partial_rotary_factor=0.5), 'partial_rotary_factor=0.5'),
    ('llama', dict(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    ('llama', dict(auto_map={'AutoModel': 'x.Y'}), 'auto_map='),
    ('llama', dict(architectures=['LlamaBiModel']), 'architectures='),
    ('llama', dict(pruned_heads={'0': [1]}), 'pruned_heads='),
    ('llama', dict(per_layer_config={'0': {}}), 'per_layer_config='),
    ('llama', dict(layer_types=['chunked_attention']), "'chunked_attention'"),
    (
      'llama',
      dict(quantization_config={'quant_method': 'fp8'}),
      'quantization_config.*quantised',
    ),
    ('llama', dict(rope_interleaved=True), 'rope_interleaved=True'),
    ('qwen2', dict(use_mrope=True), 'use_mrope=True'),
    ('qwen2', dict(dual_chunk_attention_config={'x': 1}), 'dual_chunk_'),
    (
      'qwen3',
      dict(layer_types=['full_attention', 'sliding_attention']),
      'sliding_window',
    ),
    ('gpt2', dict(n_experts=2), 'n_experts=2'),
    (
      'llama',
      dict(quantization={'bits': 4, 'group_size': 64}),
      'quantization=.*quantised',
    ),
    ('dream', dict(logit_scale=2.0), 'logit_scale=2.0'),
    ('dream', dict(architectures=['DreamForCausalLM']), 'architectures='),
    ('llada', dict(architectures=['LLaDAMoEModelLM']), 'architectures='),
    ('llada', dict(rope_scaling={'type': 'linear'}), 'rope_scaling='),
  )
  def test_a_field_that_is_not_understood(self, name, changes, message):
    with self.assertRaisesRegex(InputError, message):
      FAMILIES[name].describe({**CONFIGS[name], **changes}, {})

  @parameterized.product(
    kind=['linear', 'dynamic', 'yarn', 'longrope', 'llama3', 'su', 'mrope'],
    key=['rope_type', 'type'],
    name=['rope_scaling', 'rope_parameters'],
  )
  def test_scaled_positions(self, kind, key, name):
    config = {**LLAMA, name: {key: kind, 'factor': 2.0}}
    with self.assertRaisesRegex(InputError, f"{name}=.*'{kind}'"):
      FAMILIES['llama'].describe(config, {})

  @parameterized.parameters(
    (
      'llada',
      """alibi_bias_max attention_layer_norm_with_affine embedding_dropout
      flash_attention init_device init_fn init_std pad_token_id precision
      residual_dropout rope_full_precision transformers_version use_cache""",
    ),
    (
      'dream',
      """attention_dropout auto_map initializer_range max_window_layers
      torch_dtype transformers_version use_cache""",
    ),
    (
      'gpt2',
      """_num_labels attn_pdrop embd_pdrop gradient_checkpointing
      initializer_range n_ctx output_past resid_pdrop summary_activation
      summary_first_dropout summary_proj_to_labels summary_type
      summary_use_proj task_specific_params""",
    ),
    (
      'llama',
      """_name_or_path _flash_attn_2_enabled attention_dropout
      initializer_range is_llama_config max_sequence_length pretraining_tp
      torch_dtype transformers.js_config transformers_version unsloth_version
      use_cache""",
    ),
    ('qwen2', 'attention_dropout max_window_layers sliding_window'),
  )
  def test_published_fields_that_change_nothing(self, name, fields):
    config = {**CONFIGS[name], **dict.fromkeys(fields.split(), 7)}
    described = FAMILIES[name].describe(config, {})
    self.assertEqual(described, FAMILIES[name].describe(CONFIGS[name], {}))

  @parameterized.parameters(
    ('mistral', dict(sliding_window=9), 9),
    ('mistral', dict(sliding_window=None), 0),
    ('llama', dict(sliding_window=9), 9),
    ('qwen2', dict(sliding_window=9), 0),
    ('qwen2', dict(sliding_window=9, use_sliding_window=True), 9),
    ('qwen3', dict(sliding_window=9, layer_types=['sliding_attention']), 9),
    ('qwen3', dict(sliding_window=9, layer_types=['full_attention']), 0),
  )
  def test_windows_limit_the_length(self, name, changes, window):
    found = FAMILIES[name].describe({**CONFIGS[name], **changes}, {})
    self.assertEqual((found.window, found.max_length), (window, window or 64))

  @parameterized.parameters(('low_freq_factor', 2.0), ('high_freq_factor', 8.0))
  def test_other_scaling_than_llama_3(self, key, value):
    rope = {**CONFIGS['llama3']['rope_scaling'], key: value}
    with self.assertRaisesRegex(InputError, f'{key}.*must be one of'):
      FAMILIES['llama'].describe({**LLAMA, 'rope_scaling': rope}, {})

  def test_yarn_without_its_temperature(self):
    rope = CONFIGS['yarn']['rope_scaling']
    describe = lambda **changes: FAMILIES['llama'].describe(
      {**LLAMA, 'rope_scaling': {**rope, **changes}}, {}
    )
    self.assertEqual(describe(factor=0.25).settings['model.rope_factor'], 0.25)
    # 1 + 0.1 log 4.
    with self.assertRaisesRegex(InputError, 'attention_factor.*1.1386'):
      describe(mscale=0)
    with self.assertRaisesRegex(InputError, 'beta_fast'):
      describe(beta_fast=16.0)

  def test_parts_of_heads_that_rotate(self):
    rope = dict(rope_type='default', rope_theta=1e6, partial_rotary_factor=0.5)
    with self.assertRaisesRegex(InputError, 'partial_rotary_factor'):
      FAMILIES['llama'].describe({**LLAMA, 'rope_parameters': rope}, {})
    rope['partial_rotary_factor'] = 1.0
    described = FAMILIES['llama'].describe(
      {**LLAMA, 'rope_parameters': rope}, {}
    )
    self.assertEqual(described.settings['model.rope_theta'], 1e6)

  def test_absent_keys_mean_what_they_mean_in_transformers(self):
    # MistralConfig() has a window of 4096 and 8 heads of keys, Qwen2Config()
    # and Qwen3Config() have 32 heads of keys; null is one for each query.
    config = {**CONFIGS['mistral'], 'num_attention_heads': 16}
    del config['num_key_value_heads']
    settings = FAMILIES['mistral'].describe(config, {}).settings
    self.assertEqual(settings['model.num_kv_heads'], 8)
    del config['sliding_window']
    self.assertEqual(FAMILIES['mistral'].describe(config, {}).window, 4096)
    for name in ('qwen2', 'qwen3'):
      config = {**CONFIGS[name], 'num_attention_heads': 64}
      del config['num_key_value_heads']
      settings = FAMILIES[name].describe(config, {}).settings
      self.assertEqual(settings['model.num_kv_heads'], 32)
      config['num_key_value_heads'] = None
      settings = FAMILIES[name].describe(config, {}).settings
      self.assertEqual(settings['model.num_kv_heads'], 0)

  @parameterized.parameters('block_type', 'layer_norm_type', 'rope')
  def test_absent_keys_of_llada(self, key):
    # ModelConfig of the published code has the settings of OLMo's blocks.
    config = {**CONFIGS['llada']}
    del config[key]
    with self.assertRaisesRegex(InputError, f'{key}='):
      FAMILIES['llada'].describe(config, {})

  def test_the_family_is_not_a_way_around(self):
    folder = self.folder()
    source = checkpoints.write(
      folder / 'theirs', 'llama', model_type='smollm3', **OTHERS['smollm3']
    )
    workdir = str(folder / 'ours')
    with self.assertRaises(InputError) as caught:
      convert.import_checkpoint(source, workdir, changes=BYTES)
    self.assertIn("model_type='smollm3'", str(caught.exception))
    self.assertNotIn('--family', str(caught.exception))
    with self.assertRaisesRegex(InputError, 'no_rope_layers='):
      convert.import_checkpoint(source, workdir, family='llama', changes=BYTES)
    self.assertFalse(pathlib.Path(workdir).exists())

  def test_all_other_networks_of_transformers_are_refused(self):
    transformers = pytest.importorskip('transformers')
    names = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    for cls in {cls.model_type: cls for cls in names}.values():
      kind = cls.model_type
      if kind in FAMILIES or kind == 'gemma4_assistant':  # It needs arguments.
        continue
      config = {'eos_token_id': 1, **cls().to_dict(), 'model_type': kind}
      self.assertFalse([f for f in FAMILIES.values() if f.detect(config, {})])
      for name in ('llama', 'qwen3', 'sdar', 'gpt2'):
        with self.assertRaisesRegex(InputError, f"model_type='{kind}'"):
          FAMILIES[name].describe(config, {})

  def test_texts_longer_than_the_window(self):
    folder = self.folder()
    source = checkpoints.write(folder / 'theirs', 'mistral')
    out, long = str(folder / 'ours'), checkpoints.LENGTH + 2
    for key in 'data.length', 'sampler.length':
      with self.assertRaisesRegex(InputError, f'{key}={long}.*exceed'):
        convert.import_checkpoint(source, out, changes={**BYTES, key: long})
    with self.assertLogs('nanodlm', 'WARNING') as logs:
      convert.import_checkpoint(source, out, changes=BYTES)
    self.assertIn(f'more than {long - 1} tokens', ''.join(logs.output))

  def test_the_family_contradicts_the_type(self):
    folder = self.folder()
    source = checkpoints.write(folder / 'theirs', 'qwen3')
    with self.assertRaisesRegex(
      InputError, "--family='llama' .*model_type='qwen3'"
    ):
      convert.import_checkpoint(
        source, str(folder / 'ours'), family='llama', changes=BYTES
      )
    # The right one is allowed.
    convert.import_checkpoint(
      source, str(folder / 'ours'), family='qwen3', changes=BYTES
    )

  @parameterized.parameters('model_type', 'architectures')
  def test_a_checkpoint_is_not_a_run(self, key):
    folder = self.folder()
    (folder / 'config.json').write_text(json.dumps({key: LLAMA.get(key, [])}))
    with self.assertRaisesRegex(InputError, f'{folder}.*--mode=import'):
      lms.load(str(folder))

  @parameterized.parameters((None, 'begin with the token 9'), (4, ''))
  def test_the_start_of_texts_is_logged(self, start, expected):
    folder = self.folder()
    source = checkpoints.write(folder / 'theirs', 'llama', bos_token_id=start)
    with self.assertLogs('nanodlm') as logs:
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    self.assertEqual('lacks bos_token_id' in str(logs.output), bool(expected))
    self.assertIn(expected, str(logs.output))

  def test_a_config_without_a_type_needs_the_family(self):
    folder = self.folder()
    source = checkpoints.write(folder / 'theirs', 'llama', model_type=None)
    workdir = str(folder / 'ours')
    with self.assertRaisesRegex(InputError, '--family'):
      convert.import_checkpoint(source, workdir, changes=BYTES)
    convert.import_checkpoint(source, workdir, family='llama', changes=BYTES)
    self.assertEqual(lms.load(workdir).run.settings.objective['name'], 'ar')

  @parameterized.parameters('llama', 'mistral', 'qwen2', 'qwen3', 'gpt2')
  def test_what_transformers_writes_is_read(self, name):
    transformers = pytest.importorskip('transformers')
    config = transformers.AutoConfig.for_model(**CONFIGS[name])
    # The form of version 5, with all defaults, and that of version 4.
    new = config.to_dict()
    self.assertEqual(
      FAMILIES[name].describe(new, {}).settings,
      FAMILIES[name].describe(CONFIGS[name], {}).settings
      | {'model.head_size': config.to_dict().get('head_dim') or 0},
    )


class FilesTest(checkpoints.FolderTest):
  """Tests of the choice among the files of a folder."""

  def names(self, folder):
    found = tensors.find_weights(folder)
    return [path.name for path in found]

  def fill(self, *names):
    folder = self.folder()
    for name in names:
      (folder / name).touch()
    return folder

  def test_the_real_ones_are_read(self):
    folder = self.folder()
    source = pathlib.Path(checkpoints.write(folder / 'theirs', 'llama'))
    wrong = {'wrong': np.zeros(3, np.float32)}
    for name in (
      'consolidated',
      'model.fp16',
      'adapter_model',
      'model-00001-of-00002',
    ):
      safetensors.save_file(wrong, source / f'{name}.safetensors')
    (source / 'pytorch_model.bin').write_bytes(b'?')
    (source / 'adapter_config.json').write_text('{}')
    convert.import_checkpoint(str(source), str(folder / 'ours'), changes=BYTES)

    # The parts are those in the index, whatever their names.
    (source / 'model.safetensors').rename(source / 'b.safetensors')
    index = {name: 'b.safetensors' for name in checkpoints.tensors_of('llama')}
    path = source / 'model.safetensors.index.json'
    path.write_text(json.dumps({'weight_map': index}))
    convert.import_checkpoint(str(source), str(folder / 'two'), changes=BYTES)
    index['lm_head.weight'] = 'absent.safetensors'
    path.write_text(json.dumps({'weight_map': index}))
    with self.assertRaisesRegex(InputError, r"missing: \['absent.safetensors'"):
      self.names(source)
    path.write_text('{"weight_map": [1]}')
    with self.assertRaisesRegex(InputError, r'weight_map=\[1\]'):
      self.names(source)

  def test_without_a_file_that_transformers_knows(self):
    only = self.fill('consolidated.safetensors', 'adapter_model.safetensors')
    self.assertEqual(self.names(only), ['consolidated.safetensors'])
    parts = [f'model-0000{i}-of-00002.safetensors' for i in (1, 2)]
    self.assertEqual(self.names(self.fill(*parts)), parts)
    pickles = [f'pytorch_model-0000{i}-of-00002.bin' for i in (1, 2)]
    self.assertEqual(self.names(self.fill(*pickles)), pickles)
    with self.assertRaisesRegex(InputError, 'of-00003'):
      self.names(self.fill(*(name.replace('2.', '3.') for name in parts)))
    with self.assertRaisesRegex(InputError, 'a.safetensors.*b.safetensors'):
      self.names(self.fill('a.safetensors', 'b.safetensors'))
    with self.assertRaisesRegex(InputError, 'best.ckpt.*last.ckpt'):
      self.names(self.fill('best.ckpt', 'last.ckpt'))
    self.assertEqual(
      self.names(self.fill('last.ckpt', 'optimizer.pt')), ['last.ckpt']
    )
    with self.assertRaisesRegex(InputError, 'adapter_model.safetensors.*merge'):
      self.names(self.fill('adapter_model.safetensors', 'adapter_config.json'))

  def test_a_repository_on_the_hub(self):
    folder = self.folder()
    repository = pathlib.Path(
      checkpoints.write(folder / 'theirs', 'llama', files=2)
    )
    parts = sorted(path.name for path in repository.glob('model-*'))
    index = {'weight_map': dict(zip('ab', parts))}
    (repository / 'model.safetensors.index.json').write_text(json.dumps(index))
    for name in ('consolidated.safetensors', 'merges.txt', 'pytorch_model.bin'):
      (repository / name).touch()
    cache = folder / 'cache'
    cache.mkdir()

    def snapshot_download(source, allow_patterns, local_files_only):
      del source, local_files_only
      for path in repository.iterdir():
        if any(fnmatch.fnmatch(path.name, x) for x in allow_patterns):
          shutil.copy(path, cache / path.name)
      return str(cache)

    hub = types.SimpleNamespace(
      constants=types.SimpleNamespace(ENDPOINT='https://hub'),
      snapshot_download=snapshot_download,
      __spec__=object(),
    )
    with (
      mock.patch.dict(sys.modules, huggingface_hub=hub),
      mock.patch.object(network, 'is_reachable', lambda url: True),
    ):
      self.assertEqual(convert.find_source('a/b', True), cache)
    self.assertEqual(
      sorted(path.name for path in cache.iterdir()),
      ['config.json', 'merges.txt', *parts, 'model.safetensors.index.json'],
    )

  def test_a_pointer_instead_of_a_file(self):
    folder = self.fill('model.safetensors')
    (folder / 'model.safetensors').write_text(
      'version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n'
    )
    with self.assertRaisesRegex(InputError, 'git lfs pull'):
      tensors.open_tensors(folder, False)

  @parameterized.parameters('F8_E4M3', 'F8_E5M2', 'F4', 'U8', 'I8', 'I64')
  def test_types_that_are_not_weights(self, dtype):
    folder = self.folder()
    source = pathlib.Path(checkpoints.write(folder / 'theirs', 'llama'))
    path = source / 'model.safetensors'
    # An array of bytes whose type is another one: (2, 8) has 16 bytes.
    states = {**checkpoints.tensors_of('llama'), 'x': np.zeros(16, np.uint8)}
    safetensors.save_file(states, path)
    size = {'F4': 32, 'I64': 2}.get(dtype, 16)
    old = b'"dtype":"U8","shape":[16]'
    new = f'"dtype":"{dtype}","shape":[{size}]'.encode()
    content = path.read_bytes()
    length = int.from_bytes(content[:8], 'little')
    header = content[8 : 8 + length].rstrip()
    self.assertIn(old, header)
    header = header.replace(old, new)
    header += b' ' * (-len(header) % 8)
    path.write_bytes(
      len(header).to_bytes(8, 'little') + header + content[8 + length :]
    )
    with self.assertRaisesRegex(InputError, f'x holds {dtype} .*quantised'):
      convert.import_checkpoint(
        str(source), str(folder / 'ours'), changes=BYTES
      )

  @parameterized.parameters(
    (np.nan, np.float32),
    (-np.inf, np.float16),
    (np.inf, ml_dtypes.bfloat16),
    (1e300, np.float64),
  )
  def test_numbers_that_are_not_finite(self, value, dtype):
    folder = self.folder()
    states = checkpoints.tensors_of('llama')
    name = 'model.layers.2.mlp.up_proj.weight'
    states[name] = states[name].astype(dtype)
    states[name][3, 5] = value
    source = checkpoints.write(folder / 'theirs', 'llama', states)
    with self.assertRaisesRegex(InputError, f'{name} holds NaN'):
      convert.import_checkpoint(source, str(folder / 'ours'), changes=BYTES)
    self.assertFalse((folder / 'ours').exists())


class EndsTest(checkpoints.FolderTest):
  """Tests of the tokens that end a text."""

  def write(self, name, **changes):
    """Writes a checkpoint whose tokenizer has special tokens; its folder."""
    folder = pathlib.Path(
      checkpoints.write(self.folder() / 'theirs', name, **changes)
    )
    content = tokenizer_json.bytes_tokenizer()
    vocab = content['model']['vocab']
    taken = (17, checkpoints.PLACE)
    for text in [text for text, i in vocab.items() if i in taken]:
      del vocab[text]
    content['added_tokens'] = [
      tokenizer_json.added_token(17, '<|eot|>'),
      tokenizer_json.added_token(checkpoints.PLACE, '<|mask|>'),
    ]
    (folder / 'tokenizer.json').write_text(json.dumps(content))
    return folder

  @parameterized.parameters(
    (9, None, None, (9,)),
    ([9, 30], None, None, (9, 30)),
    (9, 31, '<|eot|>', (9, 31, 17)),
    (9, [9, 31, 32], {'content': '<|eot|>'}, (9, 31, 32, 17)),
    (None, [31, 9], None, (31, 9)),
    (9, None, 'unknown', (9,)),
  )
  def test_all_are_found(self, config, generation, token, expected):
    source = self.write('llama', eos_token_id=config)
    if generation is not None:
      (source / 'generation_config.json').write_text(
        json.dumps({'eos_token_id': generation})
      )
    (source / 'tokenizer_config.json').write_text(
      json.dumps({'eos_token': token})
    )
    described = FAMILIES['llama'].describe(
      {
        **LLAMA,
        'eos_token_id': convert.find_tokens(source, {'eos_token_id': config})[
          0
        ],
      },
      {},
    )
    self.assertEqual(described.eos_ids, expected)
    self.assertEqual(described.separator_id, expected[0])

  def test_they_are_ours_after_the_mask_has_moved(self):
    # LLaDA's last id, V, becomes PLACE, and its mask the last id.
    last = checkpoints.V
    source = self.write('llada', eos_token_id=[9, last])
    (source / 'tokenizer_config.json').write_text(
      json.dumps({'eos_token': '<|eot|>'})
    )
    workdir, out = source.parent / 'ours', source.parent / 'out'
    convert.import_checkpoint(str(source), str(workdir))
    tokenizer = load_tokenizer(workdir)
    self.assertEqual(tokenizer.eos_ids, (9, checkpoints.PLACE, 17))
    self.assertEqual(tokenizer.mask_id, last)
    self.assertEqual(
      lms.load(str(workdir)).tokenizer.eos_ids, tokenizer.eos_ids
    )
    export.export_checkpoint(str(workdir), str(out))
    config = json.loads((out / 'config.json').read_text())
    self.assertEqual(config['eos_token_id'], [9, last, 17])
    self.assertEqual(config['mask_token_id'], checkpoints.PLACE)
    # The export is read as it is, and also without its folder of ours.
    for name in ('again', 'theirs_again'):
      convert.import_checkpoint(str(out), str(source.parent / name))
      again = load_tokenizer(source.parent / name)
      self.assertEqual(again.eos_ids, tokenizer.eos_ids)
      shutil.rmtree(out / 'nanodlm', ignore_errors=True)

  def test_an_autoregressive_export_says_them(self):
    source = self.write('llama', eos_token_id=[9, 30])
    workdir, out = source.parent / 'ours', source.parent / 'out'
    convert.import_checkpoint(str(source), str(workdir))
    export.export_checkpoint(str(workdir), str(out))
    for name in ('config.json', 'generation_config.json'):
      config = json.loads((out / name).read_text())
      self.assertEqual(config['eos_token_id'], [9, 30], name)

  @parameterized.parameters(
    ([9, 500], 'eos_token_id=500'), ([9, checkpoints.PLACE], 'as the mask')
  )
  def test_an_id_that_cannot_end_a_text(self, ids, message):
    source = self.write('llada', eos_token_id=ids)
    with self.assertRaisesRegex(InputError, message):
      convert.import_checkpoint(str(source), str(source.parent / 'ours'))

  def test_a_damaged_file(self):
    source = self.write('llama')
    (source / 'tokenizer_config.json').write_text(
      '{"added_tokens_decoder": {"x": 1}}'
    )
    with self.assertRaisesRegex(InputError, 'tokenizer_config.json'):
      convert.import_checkpoint(str(source), str(source.parent / 'ours'))

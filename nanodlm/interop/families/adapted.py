"""Decoders with other masks: Dream, A2D, SDAR, Fast-dLLM v2, Nemotron, iLLaDA.

Their tensors are those of Llama, Qwen2 or Qwen3. No position is hidden from
another one, or none of its own block and those before. The logits of the
published networks are unshifted; the samplers of Dream and Fast-dLLM shift
them.
"""

from nanodlm.interop.families import llama
from nanodlm.interop.families.layout import InBlocks, Key, LLAMA_CPP, token_id

_DLLM = """dLLM loads it (github.com/ZHZisZZ/dllm):

```python
import dllm
model = dllm.utils.get_model(model_name_or_path='THIS_FOLDER')
tokenizer = dllm.utils.get_tokenizer(model_name_or_path='THIS_FOLDER')
sampler = dllm.core.samplers.{}(model=model, tokenizer=tokenizer)
outputs = sampler.sample(PROMPTS{})  # Lists of ids.
```"""
_SGLANG = """SGLang and LMDeploy serve this architecture:

```
python -m sglang.launch_server --model-path THIS_FOLDER --trust-remote-code \\
    --dllm-algorithm LowConfidence
```

Both take 151669 for the mask, and SGLang takes blocks of 4, whatever
config.json says: another block_size goes into --dllm-algorithm-config, another
mask into their source."""
# The settings are attributes, which is all that servers read.
_SDAR_CONFIG = """from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
  model_type = 'sdar'
"""


class Masked:
  """Mixed into a family of decoders: networks that are not causal."""

  is_stock = False
  objective = 'masked'
  has_mask = True


class Dream(Masked, llama.Qwen2):
  """Dream, arXiv 2508.15487; names as in the published `DreamModel`."""

  model_types = ('dream',)
  architectures = ('DreamModel',)
  defaults = {'use_sliding_window': False, 'mask_token_id': 151666}
  # The published code does not read head_dim.
  network = {**llama.Qwen2.network, 'shift_outputs': True, 'head_size': 0}
  written = {**llama.FLOAT32, 'use_sliding_window': False}
  loading = LLAMA_CPP

  def to_config(self, network, described):
    config = super().to_config(network, described)
    own = {'model_type': 'Dream', 'bos_token_id': described.separator_id}
    return {**config, **own}


class A2D(Masked):
  """Mixed into a family: A2D of the project dLLM, with full attention.

  Source: github.com/ZHZisZZ/dllm, `A2DQwen3LMHeadModel`. The tokenizer alone
  says which id is the mask. Networks that it trained in blocks look the same:
  import them with --config.objective.name=block --config.objective.block_size.
  """

  also = ('block',)

  def loaded_by(self, network):
    """Returns how dLLM loads it, with the sampler of its objective."""
    if network.block_size:
      size = f', block_size={network.block_size}'
      return _DLLM.format('BD3LMSampler', size)
    return _DLLM.format('MDLMSampler', '')


class A2DQwen3(A2D, llama.Qwen3):
  """A2D with the parts of Qwen3: the default network of nanodlm."""

  model_types = ('a2d-qwen3',)
  architectures = ('A2DQwen3LMHeadModel',)


class A2DQwen2(A2D, llama.Qwen2):
  """A2D with the parts of Qwen2."""

  model_types = ('a2d-qwen2',)
  architectures = ('A2DQwen2LMHeadModel',)


class A2DLlama(A2D, llama.Llama):
  """A2D with the parts of Llama."""

  model_types = ('a2d-llama',)
  architectures = ('A2DLlamaLMHeadModel',)


class ILLaDA(Masked, llama.Llama):
  """iLLaDA, arXiv 2606.25331: Llama's parts; only its sampler says the mask."""

  model_types = ('illada',)
  architectures = ('ILLaDAForCausalLM', 'ILLaDAModel')
  defaults = {'mask_token_id': 5}
  allowed = {**llama.Llama.allowed, 'layer_norm_eps': (None,)}
  harmless = (*llama.Llama.harmless, 'embd_pdrop', 'resid_pdrop')
  # The published code does not read head_dim.
  network = {'head_size': 0}
  written = {**llama.FLOAT32, 'layer_norm_eps': None}
  loading = 'The code that was published with this form loads it.'


class SDAR(InBlocks, Masked, llama.Qwen3):
  """SDAR, arXiv 2510.06303: Qwen3 in blocks, outputs at their own places.

  Early files lack the size of a block and the mask's id.
  """

  model_types = ('sdar',)
  architectures = ('SDARForCausalLM',)
  # Its programs do not read the key.
  keys = {
    **llama.Qwen3.keys,
    'hidden_act': Key('mlp', 'silu', {'silu': 'swiglu'}),
  }
  defaults = {**llama.Qwen3.defaults, 'block_size': 4, 'mask_token_id': 151669}
  harmless = """
    debug ep_size fuse_cross_entropy max_window_layers micro_forward
    skip_checkpoint use_deepep
  """.split()
  # The published code reads the last two; one is about training.
  written = {
    **llama.Qwen3.written,
    'sliding_window': None,
    'fuse_cross_entropy': True,
    'auto_map': {'AutoConfig': 'configuration_sdar.SDARConfig'},
  }
  files = {'configuration_sdar.py': _SDAR_CONFIG}
  loading = _SGLANG


class FastDLLM(InBlocks, Masked, llama.Qwen2):
  """Fast-dLLM v2, arXiv 2509.26328: Qwen2.5 in blocks, with shifted outputs.

  As in its sampler, the first token of a block is predicted at the last one of
  the finished block before it.
  """

  model_types = ('fast_dllm_qwen',)
  architectures = ('Fast_dLLM_QwenForCausalLM',)
  block_key = 'bd_size'
  defaults = {**llama.Qwen2.defaults, 'bd_size': 32, 'mask_token_id': 151665}
  # The second is about training.
  harmless = ('max_window_layers', 'conplemenrary_mask')
  network = {**llama.Qwen2.network, 'shift_outputs': True}
  written = {
    **llama.FLOAT32,
    'model_type': 'Fast_dLLM_Qwen',
    'use_sliding_window': False,
  }


class Nemotron(InBlocks, Masked, llama.Llama):
  """Nemotron-Labs-Diffusion, arXiv 2607.05722: Ministral 3 in blocks, and `ar`.

  Its config.json may name any of its three modes (dlm_paradigm), which have the
  same weights. Blocks see clean tokens that see earlier ones only, as in its
  training and by default in its sampler, and a text begins with bos_token_id,
  before the first block. Texts are short enough that no query is scaled
  (llama_4_scaling_beta). The adapters of its drafts are not read.
  """

  model_types = ('nemotron_labs_diffusion',)
  architectures = ('NemotronLabsDiffusionModel',)
  keys = {
    **llama.KEYS,
    'num_key_value_heads': Key('num_kv_heads', 8),
    'head_dim': Key('head_size', 128),
    'rms_norm_eps': Key('norm_eps', 1e-5),
    'rope_theta': Key('rope_theta', 1e6),
  }
  defaults = {'block_size': 32}
  required = ('bos_token_id', 'rope_parameters')
  allowed = {
    'attention_bias': (False,),
    'mlp_bias': (False,),
    'dlm_paradigm': ('bidirectional', 'autoregressive', 'block_diff'),
  }
  others = (*llama.Llama.others, 'ar_loss_weight', 'dlm_loss_weight')
  harmless = ('dp_varying_mask_ratio',)
  names = {
    name: theirs.replace('lm_head', 'diffusion_head')
    for name, theirs in llama.Llama.names.items()
  }
  prefixes = ('encoder.',)
  loading = 'The code that was published with this form loads it.'

  def settings(self, config, shapes):
    rope = dict(config['rope_parameters'])
    for key in ('llama_4_scaling_beta', 'max_position_embeddings'):
      rope.pop(key, None)
    own = {**config, 'rope_parameters': rope, 'rope_scaling': None}
    start = token_id(config, 'bos_token_id')
    mask = token_id(config, 'mask_token_id')
    weights = config.get('ar_loss_weight'), config.get('dlm_loss_weight')
    ar, dlm = (1.0 if weight is None else weight for weight in weights)
    return {
      **super().settings(own, shapes),
      'objective.ar_weight': ar / dlm,
      # The mask changes places with the last id.
      'model.start_token': mask if start == config['vocab_size'] - 1 else start,
    }

  def vocabulary(self, config, shapes):
    found = super().vocabulary(config, shapes)
    rope = config['rope_parameters']
    if rope.get('llama_4_scaling_beta'):
      window = min(rope[llama.LENGTH], found.get('window', 2**31))
      length = min(window, found['max_length'])
      found |= {'window': window, 'max_length': length}
    return found

  def fixed(self, network):
    return {**super().fixed(network), 'start_token': network.start_token}

  def misfit(self, network, objective):
    found = super().misfit(network, objective)
    is_plain = network.block_size and not network.causal
    return ', '.join(filter(None, [found, is_plain * 'objective.ar_weight=0']))

  def fields(self, network):
    fields = super().fields(network)
    scaling = {'rope_type': 'yarn', 'factor': 1.0, llama.LENGTH: 8192}
    rope = fields.pop('rope_scaling', scaling)
    theta = {'rope_theta': network.rope_theta, 'llama_4_scaling_beta': 0.0}
    return {**fields, 'rope_parameters': {**theta, **rope}}

  def to_config(self, network, described):
    config = super().to_config(network, described)
    return {**config, 'bos_token_id': int(described.rows[network.start_token])}

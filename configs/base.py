"""Every setting with its default. A variant is this plus a few changes.

    python launch.py --config=configs/base.py --workdir=runs/base

Any key can be changed on the command line: --config.model.num_layers=6. A config
file is Python code: run only those you trust.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """The defaults: a 10M-parameter masked diffusion model of bytes."""
  config = config_dict.ConfigDict()
  config.seed = 0  # of the initial weights, the noise and the order of the data

  config.data = data = config_dict.ConfigDict()
  # 'embedded' | 'text:GLOB' | 'jsonl:GLOB[:FIELD]' | 'parquet:GLOB[:FIELD]' |
  # 'tfds:NAME[:FEATURE]' | 'hf:NAME[[:CONFIG]:FEATURE]', NAME also a folder |
  # 'tokens:GLOB[:FIELD]', 'hf_tokens:NAME[[:CONFIG]:FEATURE]', rows of ids that
  # tokenizer.name made | 'pairs:GLOB[:PROMPT_FIELD:RESPONSE_FIELD]', JSONL to
  # fine-tune on | a mixture, 'mix:0.7*text:a/*.txt+0.3*jsonl:b/*.jsonl', its
  # weights the shares of the examples, in training and in what is held out
  data.source = 'embedded'
  data.length = 256  # tokens per example
  # Held out, unless a TFDS or Hugging Face set has its own split: a share of the
  # bytes in (0, 1), or a number of tokens; one of the two is 0. Of a mixture, of
  # each of its sources.
  data.eval_fraction = 0.05
  data.eval_tokens = 0
  # With eval_tokens, of one document or of rows of ids: neither trained nor
  # evaluated on, the last ones of the text; in front of them those held out.
  data.test_tokens = 0
  data.data_dir = ''  # prepared data; '': $NANODLM_DATA_DIR or ~/.cache/nanodlm
  data.crop = 'chunk'  # 'chunk': fixed rows | 'random': random windows
  # True: no attention across documents. Where they end is then known to the
  # network, masked separators too: not a bound for text without such marks.
  # A canvas is sampled as one document: text behind a separator that is drawn
  # inside it has seen the text before.
  data.segment_ids = False
  # What is behind the response of a pair. 'eos': separators, scored | 'masked':
  # kept out of attention; a network that is not causal then knows the length.
  data.padding = 'eos'
  # Shares of the training examples that are given a clean prefix, or all but a
  # span, neither noised nor scored; each and their sum in [0, 1].
  data.clean_prefix_rate = 0.0
  data.clean_infill_rate = 0.0
  data.prefetch_batches = 4
  data.num_threads = 2  # that read batches

  config.tokenizer = tokenizer = config_dict.ConfigDict()
  # 'bytes' | 'sentencepiece' | a tiktoken encoding: 'gpt2', ... | 'run': another's
  tokenizer.name = 'bytes'
  # A SentencePiece .model; '': trained on the source. Of 'run': its workdir
  tokenizer.path = ''
  tokenizer.vocab_size = (
    0  # pieces, where SentencePiece is trained on the source
  )

  config.model = model = config_dict.ConfigDict()
  model.num_layers = 6
  model.embed_dim = 384
  model.num_heads = 6
  model.num_kv_heads = 0  # of keys and values, shared by queries; 0: num_heads
  model.head_size = 0  # 0: embed_dim / num_heads
  model.mlp_dim = 0  # 0: 4 x embed_dim, gated: 8/3 x
  # 'gelu' | 'gelu_tanh' | 'relu2' | gated: 'geglu' | 'geglu_tanh' | 'swiglu' | 'glu'
  model.mlp = 'swiglu'
  model.qk_norm = True
  model.tie_embeddings = True
  model.dropout = 0.0  # in [0, 1)
  model.time_conditioning = False  # adaLN-zero
  # 'dit': 1000 t | 'sigma': -log(1 - t) | 'unit': t | 'constant': 0 | 'md4': forms
  # in which published networks are told the time, for imported checkpoints.
  model.time_form = 'dit'
  model.time_dim = 0  # width of the embedded time; 0: embed_dim
  model.output_bias = False
  model.embedding_dim = (
    0  # of the embedding, widened by a dense layer; 0: embed_dim
  )
  model.rope_theta = 10_000.0
  model.num_positions = (
    0  # learned ones, instead of rotary; >= the length; 0: none
  )
  model.norm = 'rms'  # 'rms' | 'layer'
  model.norm_eps = 1e-6
  model.norm_bias = False  # of 'layer'
  model.attention_bias = 'none'  # 'none' | 'qkv' | 'all'
  model.mlp_bias = False
  # Position i's output is read at i - 1, as of a network that was autoregressive.
  model.shift_outputs = False
  model.dtype = 'float32'  # of matrix products: 'float32' | 'bfloat16'
  model.remat = (
    'none'  # recompute in the backward pass: 'none' | 'dots' | 'full'
  )
  model.unroll = False  # True: no scan over layers; faster on a CPU
  model.attention = 'auto'  # 'auto' | 'xla' | 'cudnn' (GPU) | 'pallas' (TPU)

  config.objective = objective = config_dict.ConfigDict()
  # 'masked' | 'block' | 'ar' | 'uniform' | 'hybrid' | 'd3pm' | 'sedd' | 'genmd4'
  objective.name = 'masked'
  objective.block_size = 16  # of block; divides data.length
  # 'count' (masked, block, sedd) | 'stratified' | 'uniform' times | 'auto': the
  # first of these that the objective has
  objective.noise = 'auto'
  objective.schedule = (
    'linear'  # 'linear' | 'cosine' | 'md4_cosine' | 'sqrt' | 'polynomial'
  )
  objective.power = 2.0  # of the polynomial schedule, > 0
  objective.num_timesteps = 0  # discrete time; 0: continuous, d3pm: 1000
  objective.min_time = 0.0  # times below it are not trained on, in [0, 1)
  objective.p_uniform = 0.1  # of hybrid: uniform tokens at t = 1/2, in [0, 1)
  objective.gamma = 1.0  # of hybrid: how the uniform share grows, >= 1
  objective.max_weight = 0.0  # uniform, hybrid: clips training weights; 0: off

  config.sampler = sampler = config_dict.ConfigDict()
  # 'auto' (fixed_count for masked; block, ar for such models; else posterior) |
  # 'ancestral' | 'fixed_count' | 'first_hitting' | 'confidence' | 'remask' |
  # 'prefix_cache' | 'posterior' | 'block' | 'ar'
  sampler.name = 'auto'
  # Network calls; of each block, where there are blocks; 0 with confidence's
  # threshold or entropy_budget.
  sampler.num_steps = 128
  sampler.schedule = 'linear'  # of ancestral and remask; as in objective
  sampler.power = 2.0
  # Times of ancestral, remask and posterior: 'uniform' | 'cosine' | a list that
  # falls from 1 to 0, as '1,0.5,0.2,0': so many steps, whatever num_steps says
  sampler.grid = 'uniform'
  sampler.score = 'max_prob'  # of confidence: | 'margin' | 'entropy' | 'random'
  sampler.threshold = 0.0  # of confidence, a probability; 0: off
  sampler.entropy_budget = 0.0  # of confidence, nats per call; 0: off
  # Left to right, of confidence (0: the whole canvas) and prefix_cache (0: 32).
  sampler.block_size = 0
  sampler.inner = 'fixed_count'  # fills a block, in block and prefix_cache
  sampler.cache = True  # of block and ar: keep keys and values
  sampler.stop_at_eos = False  # of block: a drawn separator ends the text
  sampler.remask = 'cap'  # 'cap' | 'rescale' | 'conf' | 'loop'
  sampler.eta = 0.04  # of remask, in [0, 1]: .008, .015, 1, .02 in the paper
  sampler.num_corrections = 0  # of posterior, after uniform or hybrid noise
  sampler.guidance = 0.0  # towards the prompt, >= 0; twice the work; 0: off
  sampler.temperature = 1.0  # 0: the most probable token
  sampler.top_k = 0  # 0: all
  sampler.top_p = 1.0  # in (0, 1]
  sampler.num_samples = 4  # per prompt, with --mode=sample
  sampler.length = 0  # tokens; 0: data.length
  sampler.seed = 0

  config.optim = optim = config_dict.ConfigDict()
  optim.name = 'adamw'  # 'adamw' | 'lion' | 'muon'
  optim.learning_rate = 1e-3
  optim.schedule = 'cosine'  # 'cosine' | 'constant' | 'wsd', after the warm-up
  optim.warmup_steps = 100
  optim.final_fraction = 0.0  # of the learning rate at the end
  optim.weight_decay = 0.1  # on matrices and embeddings
  optim.b1 = 0.9
  optim.b2 = 0.99
  optim.momentum = 0.95  # of muon
  optim.clip_norm = 1.0  # 0: off
  optim.ema_decay = 0.999  # 0: off

  config.train = train = config_dict.ConfigDict()
  train.batch_size = 32  # examples over all devices
  train.num_steps = 2000
  train.num_microbatches = 1  # per step and device, for less memory
  # A network that was autoregressive (checkpoint.init_from) begins to see to its
  # right: over so many steps attention goes from causal to full; 0: full at once.
  # (Evaluation and samples always see all.)
  train.anneal_steps = 0
  train.chunk_size = 1024  # positions projected to the vocabulary at once
  train.log_every_steps = 50
  train.eval_every_steps = 500  # 0: at the end only
  train.num_samples = 1  # shown at each evaluation
  train.max_skipped_steps = 5  # in a row, with a non-finite gradient
  train.profile_steps = 0  # traced for TensorBoard, from step 10
  train.wandb_project = ''  # '': off; needs the wandb package

  config.eval = evaluation = config_dict.ConfigDict()
  evaluation.batch_size = 32
  evaluation.num_draws = 8  # of the noise, per example
  # In the evaluations during training, then named eval_subset/*; 0: all of them.
  evaluation.max_examples = 0
  evaluation.seed = 0

  config.checkpoint = checkpoint = config_dict.ConfigDict()
  checkpoint.every_steps = 500
  checkpoint.max_to_keep = 3
  checkpoint.keep_period = 0  # multiples of it are kept for good; 0: none
  # Another run's workdir: start from its averaged weights.
  checkpoint.init_from = ''
  checkpoint.init_step = 0  # of that run; 0: its last checkpoint

  config.mesh = mesh = config_dict.ConfigDict()
  # Devices; one of the three may be -1: those that the others leave.
  mesh.data = -1  # copies of the parameters, each with a part of the batch
  mesh.fsdp = 1  # split the parameters and the batch; divides embed_dim
  mesh.tensor = 1  # split heads, MLP and vocabulary; divides the first two
  return config

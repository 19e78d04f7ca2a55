"""Every setting with its default; the other configs change a few of them.

    python launch.py --config=configs/base.py --workdir=runs/base

Any key can be changed on the command line: --config.model.num_layers=6. A
config file is Python code that is executed: use only those you trust.

Not yet run as it is: it is the starting point of the others.
"""

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
  """Returns the defaults, a 10M-parameter masked diffusion model of bytes."""
  config = config_dict.ConfigDict()
  # Seed of the initial weights, the noise and the order of the examples.
  config.seed = 0

  config.data = data = config_dict.ConfigDict()
  # Where the text comes from. nanodlm/data/sources explains each kind:
  # 'embedded' | 'stories' | 'stories:small[:FIRST-STOP]' | 'text:GLOB' |
  # 'jsonl:GLOB[:FIELD]' | 'parquet:GLOB[:FIELD]' |
  # 'tfds:NAME[:FEATURE]' | 'hf:NAME[[:CONFIG]:FEATURE]' |
  # 'tokens:GLOB[:FIELD]' | 'hf_tokens:NAME[[:CONFIG]:FEATURE]' |
  # 'pairs:GLOB[:PROMPT_FIELD:RESPONSE_FIELD]' | 'chat:GLOB[:FIELD]' |
  # 'preferences:GLOB[:PROMPT_FIELD:CHOSEN_FIELD:REJECTED_FIELD]' |
  # 'mix:0.7*SOURCE+0.3*SOURCE'
  data.source = 'embedded'
  data.length = 256  # Tokens per example.
  # What is evaluated on, in the same forms; all of it, or the split that a
  # dataset has for it. data.source is then trained on as a whole. '': a part of
  # data.source is held out.
  data.eval_source = ''
  # How much of each source is held out, unless a TFDS or Hugging Face dataset
  # has a split for it: a fraction of the bytes in (0, 1), of the characters if
  # there is one document, or a number of tokens. One of the two must be 0.
  data.eval_fraction = 0.05
  data.eval_tokens = 0
  # Tokens at the end of the text that are used neither for training nor for
  # evaluation. Needs eval_tokens, and a single document or rows of ids; the
  # held-out tokens come right before them.
  data.test_tokens = 0
  # Folder of the prepared data; '': $NANODLM_DATA_DIR or ~/.cache/nanodlm.
  data.data_dir = ''
  # 'chunk': consecutive rows; of conversations, several whole ones per row |
  # 'random': windows at random places | 'document': each document is a row of
  # its own, as a pair always is.
  data.crop = 'chunk'
  # What becomes of a document or pair that is longer than a row: 'drop' (left
  # out) | 'cut' (its beginning is kept, without an end; of a conversation, as
  # many turns as fit) | 'refuse'. The log says how many there are.
  data.long_documents = 'drop'
  # Whether attention stops at the end of a document. The network then knows
  # where documents end even if the separators are masked, so that the bound
  # does not apply to text without such marks. A sampled canvas counts as one
  # document: text after a sampled separator has seen the text before it.
  data.segment_ids = False
  # What fills a row after a document or the response of a pair. 'eos':
  # separators, which are scored | 'masked': positions hidden from attention; a
  # network that is not causal then knows the length of the text.
  data.padding = 'eos'
  # Fractions of the training examples that keep a clean prefix, or everything
  # but one span, neither noised nor scored. Each, and their sum, is in [0, 1].
  data.clean_prefix_rate = 0.0
  data.clean_infill_rate = 0.0
  data.prefetch_batches = 4
  data.num_threads = 2  # Threads that read batches.

  config.tokenizer = tokenizer = config_dict.ConfigDict()
  # 'bytes' | 'sentencepiece' | a tiktoken encoding such as 'gpt2' | 'run': the
  # tokenizer of the run in tokenizer.path.
  tokenizer.name = 'bytes'
  # A SentencePiece .model file ('': train one on the source), or a workdir.
  tokenizer.path = ''
  # Number of pieces if a SentencePiece model is trained; otherwise 0.
  tokenizer.vocab_size = 0
  # How conversations are written: 'chatml' | 'llama3' | 'llada' | 'dream' |
  # 'plain' (for tokenizers without control tokens) | a Jinja file; '': the
  # template of the run in tokenizer.path, if it has one.
  tokenizer.chat_template = ''

  config.model = model = config_dict.ConfigDict()
  model.name = 'transformer'
  model.num_layers = 6
  model.embed_dim = 384
  model.num_heads = 6
  # Heads of keys and values, shared among the queries; 0: num_heads.
  model.num_kv_heads = 0
  model.head_size = 0  # 0: embed_dim / num_heads.
  model.mlp_dim = 0  # 0: 4 x embed_dim, or 8/3 x embed_dim if the MLP is gated.
  # 'gelu' | 'gelu_tanh' | 'relu2', or gated: 'geglu' | 'geglu_tanh' | 'swiglu'
  # | 'glu'.
  model.mlp = 'swiglu'
  model.qk_norm = True  # Whether queries and keys are normalised, each head.
  model.joint_qk_norm = False  # Whether qk_norm is over all heads together.
  # c > 0: scores s of attention become c tanh(s / c), on XLA only; 0: off.
  model.attention_cap = 0.0
  # Whether every position also sees a learned key and value, on XLA only.
  model.attention_sink = False
  model.tie_embeddings = True
  model.dropout = 0.0  # In [0, 1).
  # Whether the network reads the time, through adaLN-zero.
  model.time_conditioning = False
  # What it reads. 'dit': 1000 t | 'sigma': -log(1 - t) | 'unit': t |
  # 'constant': 0 | 'md4'. Published checkpoints need theirs.
  model.time_form = 'dit'
  model.time_dim = 0  # Width of the embedded time; 0: embed_dim.
  model.output_bias = False
  # Width of the embedding, which a dense layer then widens; 0: embed_dim.
  model.embedding_dim = 0
  # Standard deviation of the initial embeddings, > 0. In narrow networks a
  # larger one, such as 0.5, keeps words of one kind apart.
  model.embedding_std = 0.02
  # Whether the network reads its own prediction: training gives that of a first
  # call to half of the examples, evaluation to all. Most samplers give that of
  # the call before instead, which is another law. Not for 'ar'.
  model.self_conditioning = False
  model.rope_theta = 10_000.0
  # Divides the rotary frequencies of waves longer than rope_length tokens, as
  # Llama 3.1 (8) and 3.2 (32) do.
  model.rope_factor = 1.0
  # Which waves are long: 'llama3' | 'yarn', as in Nemotron-Labs-Diffusion.
  model.rope_scaling = 'llama3'
  model.rope_length = 8192
  # Number of learned positions, at least the length of the longest row; 0:
  # rotary positions.
  model.num_positions = 0
  # Whether learned positions add to rotary ones instead of replacing them.
  # Rotary positions are relative: on a canvas of masks, all places are alike to
  # a network that is not causal.
  model.keep_rotary = False
  # Width, in tokens and odd, of the depthwise convolutions in each layer; 0:
  # none. Not for causal networks, blocks, prefix_cache and train.anneal_steps.
  model.conv_size = 0
  model.norm = 'rms'  # 'rms' | 'layer'.
  model.norm_eps = 1e-6
  model.norm_bias = False  # Whether 'layer' has a bias.
  model.attention_bias = 'none'  # 'none' | 'qkv' | 'all'.
  model.mlp_bias = False
  # Whether the prediction for position i is read at i - 1, as in a network
  # that was autoregressive.
  model.shift_outputs = False
  # Id of the token before each text of 'ar', or of 'block' with ar_weight > 0,
  # in a network that was published with it; -1: the mask.
  model.start_token = -1
  model.dtype = 'float32'  # Type of matrix products: 'float32' | 'bfloat16'.
  # What the backward pass recomputes: 'none' | 'dots' (all but the matrix
  # products) | 'full' (everything).
  model.remat = 'none'
  # True: no scan over the layers, which is faster on a CPU.
  model.unroll = False
  model.attention = 'auto'  # 'auto' | 'xla' | 'cudnn' (GPU) | 'pallas' (TPU).

  config.objective = objective = config_dict.ConfigDict()
  # 'masked' | 'block' | 'block_uniform' | 'block_hybrid' | 'ar' | 'uniform' |
  # 'hybrid' | 'd3pm' | 'sedd' | 'genmd4' | 'flex' (texts of any length).
  objective.name = 'masked'
  objective.block_size = 16  # Tokens per block; divides data.length.
  # Weight of an autoregressive loss of block's clean copy, >= 0; 0: off. The
  # network also has an exact likelihood, and the samplers ar and speculate.
  objective.ar_weight = 0.0
  # How noise levels are drawn: by 'count' or 'overlap' (pairs of one order;
  # evaluation uses it), both for masked, block and sedd, or as
  # 'stratified' or 'uniform' times; 'auto' is the first of these that the
  # objective supports, and 'stratified' if one of the next four keys, which
  # describe times, is changed.
  objective.noise = 'auto'
  # 'linear' | 'cosine' | 'md4_cosine' | 'sqrt' | 'polynomial'.
  objective.schedule = 'linear'
  objective.power = 2.0  # Exponent of the polynomial schedule, >= 0.5.
  # Number of discrete times; 0: continuous time, or 1000 for d3pm.
  objective.num_timesteps = 0
  # Whether masks of masked can also expand and be deleted, for the sampler
  # expand. Rows must be whole documents.
  objective.expand = False
  objective.min_time = 0.0  # Times below it are not trained on; in [0, 1).
  # Probability of a uniformly random token at t = 1/2, for hybrid; 0 to 0.9.
  objective.p_uniform = 0.1
  objective.gamma = 1.0  # How fast the uniform part of hybrid grows, 1 to 2.
  # Largest training weight of uniform and hybrid; 0: no limit.
  objective.max_weight = 0.0
  # Whether uniform refuses a network that does not read the time.
  objective.needs_time = True
  # First steps of uniform, whose network reads mixtures of embeddings instead
  # of noisy tokens; 0: off. At most train.num_steps.
  objective.curriculum_steps = 0
  # The temperature of these mixtures, >= 0, and the number of tokens in each,
  # at most that of the vocabulary.
  objective.tau = 1e-3
  objective.num_soft_tokens = 8

  config.distill = distill = config_dict.ConfigDict()
  # How the run in checkpoint.init_from, of the same objective and network, is
  # distilled into this one, which starts as its copy: 'sdtt' (masked and
  # block) | 'dcd' (also genmd4, uniform, hybrid and the last two in blocks);
  # '': not at all.
  distill.name = ''
  # Steps in which the student of the first round samples. Each further round
  # halves them, with the last student as the teacher.
  distill.num_steps = 32
  distill.round_steps = 1000  # Training steps of a round.
  # 'bwd': KL(student || teacher), which seeks modes | 'fwd': the reverse.
  distill.divergence = 'bwd'
  distill.teacher_temperature = 1.0  # > 0.

  config.policy = policy = config_dict.ConfigDict()
  # How the run in checkpoint.init_from, of the same objective and network, is
  # tuned by the rewards of samples: 'sequence' (all but genmd4, flex and
  # ar_weight) | 'one_step' or 'coupled' (masked noise without blocks); '': not
  # at all. They differ in what stands for log p of a sample. 'dpo' (all but
  # genmd4 and ar_weight) learns from data.source=preferences:GLOB instead, and
  # needs kl_weight, such as 0.1.
  policy.name = ''
  # Samples of each prompt, at least 2; divides train.batch_size. A sample is
  # rewarded by how much better it is than the others.
  policy.num_samples = 8
  # Whether that is divided by the standard deviation of the rewards.
  policy.scale_advantages = True
  # Steps on the same samples. Above 1 another copy of the parameters is kept.
  policy.num_updates = 1
  # Largest change of a ratio to the old probability, in (0, 1).
  policy.clip = 0.2
  # Weight of the divergence from the network at the start, in nats per text, of
  # which a copy is kept; 0: off.
  policy.kl_weight = 0.0
  # Noisy texts that estimate log p of a text, for 'sequence' and 'dpo'.
  policy.num_draws = 2

  config.lora = lora = config_dict.ConfigDict()
  # Trains low-rank matrices next to the frozen weights of checkpoint.init_from,
  # and nothing else; 0: all parameters. Checkpoints hold them alone: keep
  # that run and its checkpoint, or export the whole model. If it has moved,
  # give --config.checkpoint.init_from to the modes that load the run. If that
  # run has such matrices itself, they are trained further.
  lora.rank = 0
  lora.alpha = 16.0  # > 0. Updates are scaled by alpha / rank.
  lora.rslora = False  # Whether by alpha / sqrt(rank) instead.
  # A regular expression for which dense layers have them: 'query', 'key',
  # 'value', 'attention_out', 'mlp_gate', 'mlp_in', 'mlp_out'.
  lora.targets = '.*'
  lora.dropout = 0.0  # Dropout of the input of the matrices, in [0, 1).

  config.sampler = sampler = config_dict.ConfigDict()
  # 'auto' (the objective's default) | 'ancestral' | 'fixed_count' |
  # 'first_hitting' | 'confidence' | 'remask' | 'prefix_cache' | 'posterior' |
  # 'psi' | 'renoise' | 'edit' | 'block' | 'ar' | 'speculate' | 'insert' |
  # 'expand'.
  sampler.name = 'auto'
  # Network calls, per block if there are blocks; 0 if confidence uses its
  # threshold or entropy_budget instead. ancestral and remask make up to 1.7
  # times this number for thousands of texts at once, see samplers/ancestral.py.
  sampler.num_steps = 128
  # The schedule of ancestral and remask; see objective.schedule and power.
  sampler.schedule = 'linear'
  sampler.power = 2.0
  # Times of ancestral, remask, posterior, psi and insert: 'uniform' | 'cosine'
  # | a list falling from 1 to 0, such as '1,0.5,0.2,0', which replaces
  # num_steps.
  sampler.grid = 'uniform'
  # What confidence and expand rank positions by: 'max_prob' | 'margin' |
  # 'entropy' | 'random'.
  sampler.score = 'max_prob'
  # For confidence (0: off) and edit (0: 0.7), which reveal everything more
  # probable.
  sampler.threshold = 0.0
  # For edit, which replaces tokens if others are more probable; above 1: off.
  sampler.edit_threshold = 0.5
  # For confidence (0: off) and renoise (0: 0.1), in nats per call.
  sampler.entropy_budget = 0.0
  # Blocks from left to right, for confidence and edit (0: the whole canvas at
  # once) and prefix_cache (0: 32).
  sampler.block_size = 0
  # Calls that reveal a token of a row after which prefix_cache computes the
  # row's cache again within a block; 0: only for the next block.
  sampler.refresh_calls = 0
  # The sampler that fills a block, for block and prefix_cache; 'auto': the
  # default one of the noise.
  sampler.inner = 'auto'
  # Masks that expand begins a gap of any length with.
  sampler.num_masks = 4
  sampler.cache = True  # Whether block and ar keep keys and values.
  # Whether an end-of-text token (the separator of documents, or those of an
  # imported checkpoint, for which this is True) ends a sampled text. Responses
  # of models of pairs always end at it.
  sampler.stop_at_eos = False
  # Strategy of remask and psi: 'cap' | 'rescale' | 'loop' | 'constant' |
  # 'conf' (remask only).
  sampler.remask = 'cap'
  # Strength of remask and psi, in [0, 1]; ReMDM's paper uses 0.008 with 'cap',
  # 0.015 with 'rescale', 0.02 with 'loop' and 1 with 'conf'.
  sampler.eta = 0.04
  # Whether psi ends with the most probable tokens.
  sampler.greedy_tail = False
  # Corrector steps of posterior, psi and edit, for uniform and hybrid noise.
  sampler.num_corrections = 0
  # Strength of the guidance towards the prompt, in [0, 1000], for two calls
  # instead of one; 0: off.
  sampler.guidance = 0.0
  # Factor h of the temperature in the first call of renoise, in (0, 100]; it is
  # 1 + (h - 1) / num_steps in the last one, and linear in between. Entropies
  # are those after it and before the temperature.
  sampler.heat = 1.0
  sampler.temperature = 1.0  # In [0, 100]; 0: the most probable token.
  sampler.top_k = 0  # 0: all tokens.
  sampler.top_p = 1.0  # In [0, 1]; 0: the most probable token.
  sampler.num_samples = 4  # Samples per prompt, with --mode=sample.
  # Tokens of a sample; 0: data.length, which a policy always learns from.
  sampler.length = 0
  sampler.seed = 0

  config.optim = optim = config_dict.ConfigDict()
  # 'adamw' | 'lion' | 'muon' (for the matrices of the blocks; NAdam elsewhere).
  optim.name = 'adamw'
  optim.learning_rate = 1e-3  # Of the peak, > 0.
  # After the warm-up: 'cosine' | 'constant' | 'wsd' (constant, then a linear
  # decay in the last fifth of the run, or in what is left after the warm-up).
  # Both decays end at train.num_steps. Resuming a 'cosine' run with more steps
  # stretches its decay, so that the rate jumps up, as a warning says. A 'wsd'
  # run can be resumed with more steps from a checkpoint before its decay; for
  # a new decay, set decay_from_step.
  optim.schedule = 'cosine'
  # Steps in which the rate grows linearly to its peak. A run of fewer steps
  # does not reach it.
  optim.warmup_steps = 100
  # Step at which the decay starts, from learning_rate, which is constant
  # between the warm-up and this step; 0: as schedule says. For a new decay from
  # a checkpoint of step N, resume with N here and the rate to start from in
  # learning_rate.
  optim.decay_from_step = 0
  # Last learning rate, as a fraction of learning_rate.
  optim.final_fraction = 0.0
  # Decoupled from the gradient, on matrices and embeddings only.
  optim.weight_decay = 0.1
  optim.b1 = 0.9  # Decay of the first moment, in [0, 1).
  optim.b2 = 0.99  # Decay of the second moment, in [0, 1).
  optim.momentum = 0.95  # Of muon, in [0, 1).
  optim.clip_norm = 1.0  # Largest global norm of the gradient; 0: off.
  # Decay of the averaged weights, in [0, 1); 0: off. Step n uses at most
  # (1 + n) / (10 + n), so that short runs are not evaluated on initial weights.
  optim.ema_decay = 0.999

  config.train = train = config_dict.ConfigDict()
  # Where batches come from: 'text', the data above | 'rollouts', samples of the
  # model | 'auto', what the objective needs.
  train.batches = 'auto'
  # What the samples that a policy learns from are worth, a sum of Python
  # functions and laws such as '0.5*my_rewards:brevity+law:valid'; see
  # nanodlm/rewards.py.
  train.reward = ''
  # The longest that one of these functions may take for all texts of a step.
  train.reward_secs = 60.0
  train.batch_size = 32  # Examples per step, over all devices.
  train.num_steps = 2000
  # Parts of a step's batch, computed in turn on each device to save memory.
  train.num_microbatches = 1
  # Steps over which attention opens from causal to full, for a network that
  # was autoregressive (checkpoint.init_from); 0: full from the start.
  # Evaluation and sampling always use full attention.
  train.anneal_steps = 0
  # Positions that are projected to the vocabulary at once.
  train.chunk_size = 1024
  train.log_every_steps = 50
  train.eval_every_steps = 500  # 0: only at the end.
  # Samples at each evaluation. At most four are shown; all are counted if the
  # law of the text is known.
  train.num_samples = 1
  # The run ends after this many consecutive steps with a non-finite gradient.
  train.max_skipped_steps = 5
  train.profile_steps = 0  # Steps traced for TensorBoard, from step 10; 0: off.
  train.wandb_project = ''  # '': off. Needs the wandb package.

  config.eval = evaluation = config_dict.ConfigDict()
  evaluation.batch_size = 32
  evaluation.num_draws = 8  # Noise draws per example.
  # Examples of the evaluations during training, which are logged as
  # eval_subset; 0: all of them.
  evaluation.max_examples = 0
  evaluation.seed = 0

  config.checkpoint = checkpoint = config_dict.ConfigDict()
  checkpoint.every_steps = 500
  checkpoint.max_to_keep = 3
  # Checkpoints at multiples of it are never deleted; 0: off.
  checkpoint.keep_period = 0
  # Workdir of another run whose averaged weights training starts from.
  checkpoint.init_from = ''
  checkpoint.init_step = 0  # Its step; 0: its last checkpoint.

  config.mesh = mesh = config_dict.ConfigDict()
  # Numbers of devices; one of the three may be -1, all that the others leave.
  # Copies of the parameters, each with its part of the batch.
  mesh.data = -1
  # Devices that split the parameters and the batch; divides embed_dim.
  mesh.fsdp = 1
  # Devices that split heads, MLP and vocabulary; divides the first two.
  mesh.tensor = 1
  return config

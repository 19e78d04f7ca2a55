"""The one command: trains, evaluates, samples, prepares data, imports, exports.

    python launch.py --config=configs/quickstart.py --workdir=runs/quickstart
    python launch.py --mode=eval --workdir=runs/quickstart
    python launch.py --mode=sample --workdir=runs/quickstart --prompt='import {} as'
    python launch.py --mode=serve --workdir=runs/quickstart
    python launch.py --mode=compile --config=configs/gpt2_small.py --topology=v5e:4x4
    python launch.py --mode=import --from=FOLDER --workdir=runs/imported
    python launch.py --mode=export --workdir=runs/quickstart --output=exported

Any setting: --config.model.num_layers=6. A config file is Python code.
"""

import logging
import os
import pathlib
import signal
import sys

from nanodlm.devices import hugepages

if __name__ == '__main__':
  hugepages.restart_with_huge_pages()

# TensorFlow (behind CLU's TensorBoard writer) logs to the terminal otherwise.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

from absl import app, flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from nanodlm.devices import multihost
from nanodlm.types import InputError

BASE = str(pathlib.Path(__file__).parent / 'configs' / 'base.py')
MODES = (
  'train',
  'eval',
  'sample',
  'serve',
  'prepare',
  'compile',
  'import',
  'export',
)
# They read their config from the workdir, and do not change it.
READING = ('eval', 'sample', 'serve')

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'The settings. By default those saved in --workdir, else '
  'configs/base.py; --config.SECTION.KEY=VALUE changes one.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Folder of the run: config, metrics, checkpoints.'
)
_MODE = flags.DEFINE_enum('mode', 'train', MODES, 'What to do.')
_PROMPT = flags.DEFINE_multi_string(
  'prompt',
  [],
  'With --mode=sample: a text with gaps, {} of automatic size or '
  '{12} of 12 tokens; without a gap it is continued. Doubled braces are braces. '
  'May be repeated.',
)
_PROMPT_FILE = flags.DEFINE_string(
  'prompt_file',
  None,
  'With --mode=sample: a JSONL file of more prompts, in '
  "the field 'prompt' of each line; gaps and braces as in --prompt.",
)
_LIVE = flags.DEFINE_bool(
  'live',
  None,
  'With --mode=sample: show the canvases while they are filled; by '
  'default where the output is a terminal.',
)
_HTML = flags.DEFINE_string(
  'html',
  '',
  'With --mode=sample: a file for a page that replays how the samples '
  'came to be.',
)
_SAMPLERS = flags.DEFINE_string(
  'samplers',
  '',
  'With --mode=sample: several samplers, one after the other, as '
  'fixed_count,confidence:threshold=0.9;num_steps=0 (keys of config.sampler); by '
  "default the run's own.",
)
_ALTERNATIVES = flags.DEFINE_integer(
  'alternatives',
  5,
  'With --html: the probable tokens that are listed for each position.',
  lower_bound=1,
  upper_bound=20,
)
_NOISE_EXAMPLES = flags.DEFINE_integer(
  'noise_examples',
  0,
  'With --mode=eval: held-out rows on which the variance of '
  'the bound over its noise is measured, against independent times; 0: off.',
  lower_bound=0,
)
_INFILL = flags.DEFINE_list(
  'infill',
  [],
  'With --mode=eval: shares of the tokens of held-out rows to mask '
  'and fill in with config.sampler, as 0.1,0.3,0.5.',
)
_INFILL_EXAMPLES = flags.DEFINE_integer(
  'infill_examples', 256, 'Held-out rows for --infill; 0: all.', lower_bound=0
)
_HOST = flags.DEFINE_string(
  'host',
  '127.0.0.1',
  'With --mode=serve: the address to listen on. Another '
  'than the default lets others in: nothing asks for a password.',
)
_PORT = flags.DEFINE_integer(
  'port',
  8000,
  'With --mode=serve: the port to listen on; 0: any.',
  lower_bound=0,
  upper_bound=65535,
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  '',
  'With --mode=compile: the pod to compile for, as v5e:4x4; by '
  'default the devices at hand.',
)
_VOCAB_SIZE = flags.DEFINE_integer(
  'vocab_size',
  0,
  'With --mode=compile: number of ids, the mask included; 0 asks '
  'the tokenizer.',
  lower_bound=0,
)
_FROM = flags.DEFINE_string(
  'from',
  '',
  'With --mode=import: a folder or file of weights, or the name of a '
  'repository on the Hugging Face hub.',
)
_FAMILY = flags.DEFINE_string(
  'family',
  '',
  'With --mode=import and export: the form of the checkpoint; '
  'detected by default.',
)
_ALLOW_PICKLE = flags.DEFINE_bool(
  'allow_pickle',
  False,
  "With --mode=import: read PyTorch's own files, as weights only.",
)
_OUTPUT = flags.DEFINE_string(
  'output', '', 'With --mode=export: the folder to write.'
)
_PREPARE_WORKERS = flags.DEFINE_integer(
  'prepare_workers',
  0,
  'With --mode=prepare: processes that encode the text; 0: '
  'the threads of this one.',
  lower_bound=0,
)
_PREPARE_ENGINE = flags.DEFINE_enum(
  'prepare_engine',
  'local',
  ['local', 'beam'],
  'With --mode=prepare: this machine or Apache Beam.',
)
_BEAM_OPTIONS = flags.DEFINE_list(
  'beam_options',
  [],
  'With --prepare_engine=beam: options of the pipeline, as '
  "runner=FlinkRunner,flink_master=HOST:8081; by default Beam's local runner.",
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator_address',
  None,
  'host:port of process 0, where JAX cannot find '
  'the cluster by itself; needs --num_processes and --process_id.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'Processes of the run.', lower_bound=1
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'This process, from 0.', lower_bound=0
)
_HEARTBEAT_TIMEOUT = flags.DEFINE_integer(
  'heartbeat_timeout_secs',
  multihost.HEARTBEAT_TIMEOUT_SECS,
  'Of several '
  'processes, one that has been silent for as long is lost: all others end.',
  lower_bound=5,
)
_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  None,
  'Whether to initialise jax.distributed from the cluster '
  'that JAX detects; by default where this is one of several tasks of SLURM or '
  'Open MPI, or one of several hosts of a TPU pod.',
)


def parse_flags(argv):
  """Parses the command line; a mistake in it is one line and exit status 2."""
  if not _is_config_given():
    argv = [argv[0], f'--config={BASE}', *argv[1:]]
  # The file before its overrides, whatever their order on the command line.
  is_file = lambda arg: arg.startswith(('--config=', '-config='))
  argv = [argv[0], *sorted(argv[1:], key=lambda arg: not is_file(arg))]
  for arg in argv[1:]:
    name, _, path = arg.partition('=')
    if name in ('--config', '-config') and path and not os.path.isfile(path):
      _exit_with(
        f'--config={path!r} is no file, seen from {os.getcwd()}; try '
        f'{os.path.join(os.path.dirname(BASE), "quickstart.py")}'
      )
  try:
    rest = flags.FLAGS(argv)
    _CONFIG.value.seed  # pylint: disable=pointless-statement
    if rest[1:]:
      _exit_with(f'unexpected arguments: {rest[1:]}; every setting is a flag')
    return rest
  except BrokenPipeError:
    _leave_closed_pipe()
  except (flags.Error, AttributeError, KeyError, OSError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    # str() of a KeyError quotes its message.
    text = error.args[0] if isinstance(error, KeyError) else str(error)
    _exit_with(_unknown_key(argv) or ' '.join(str(text).split()))


def _unknown_key(argv) -> str:
  """What is wrong with the first setting of the command line that does not exist."""
  from nanodlm import config as configs  # pylint: disable=g-import-not-at-top

  base = configs.load_base()
  sections = {
    name: part for name, part in base.items() if hasattr(part, 'keys')
  }
  for arg in argv[1:]:
    path = arg.partition('=')[0].lstrip('-')
    if not path.startswith('config.'):
      continue
    section, _, key = path.removeprefix('config.').rpartition('.')
    if section and section not in sections:
      return f'--{path}: there is no section {section!r}' + configs.suggest(
        section, sections
      )
    known = sections[section] if section else base
    if key not in known:
      others = [
        f'config.{name}.{key}' for name, part in sections.items() if key in part
      ]
      return f'--{path}: there is no such key' + (
        f'; {" and ".join(others)} is there'
        if others
        else configs.suggest(key, known)
      )
  return ''


def _exit_with(message: str):
  print(
    f'error: {message}\n--help lists the flags, configs/base.py the settings',
    file=sys.stderr,
  )
  sys.exit(2)


def _leave_closed_pipe():
  """Ends as a program does that SIGPIPE ends, which Python ignores."""
  os._exit(128 + signal.SIGPIPE)


def _is_config_given() -> bool:
  return any(
    arg.split('=')[0] in ('--config', '-config') for arg in sys.argv[1:]
  )


def main(argv):
  del argv
  _set_up_logging()
  try:
    return _run()
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(
      'error: a computation of several processes failed, most likely because '
      f'another one is lost: {str(error).splitlines()[0]}',
      file=sys.stderr,
    )
    multihost.leave(1)
  except BrokenPipeError:  # `| head` has seen enough
    _leave_closed_pipe()
  except KeyboardInterrupt:  # before training has its own way to stop
    print('interrupted', file=sys.stderr)
    return 130


def _run() -> int:
  from nanodlm import config as configs  # pylint: disable=g-import-not-at-top

  mode, workdir = _MODE.value, _WORKDIR.value
  if not workdir and mode not in ('prepare', 'compile'):
    raise InputError(f'--mode={mode} needs --workdir')
  for flag, needed in (
    (_PROMPT, 'sample'),
    (_PROMPT_FILE, 'sample'),
    (_LIVE, 'sample'),
    (_HTML, 'sample'),
    (_SAMPLERS, 'sample'),
    (_ALTERNATIVES, 'sample'),
    (_NOISE_EXAMPLES, 'eval'),
    (_INFILL, 'eval'),
    (_INFILL_EXAMPLES, 'eval'),
    (_HOST, 'serve'),
    (_PORT, 'serve'),
    (_TOPOLOGY, 'compile'),
    (_VOCAB_SIZE, 'compile'),
    (_FROM, 'import'),
    (_ALLOW_PICKLE, 'import'),
    (_FAMILY, ('import', 'export')),
    (_OUTPUT, 'export'),
    (_PREPARE_WORKERS, 'prepare'),
    (_PREPARE_ENGINE, 'prepare'),
    (_BEAM_OPTIONS, 'prepare'),
  ):
    if flag.value != flag.default and mode not in (
      needed if isinstance(needed, tuple) else (needed,)
    ):
      raise InputError(f'--{flag.name} has no effect with --mode={mode}')
  if _INFILL_EXAMPLES.value != _INFILL_EXAMPLES.default and not _INFILL.value:
    raise InputError(
      f'--infill_examples={_INFILL_EXAMPLES.value} has no effect '
      'without --infill'
    )
  if mode == 'compile':
    return _compile(configs)
  if mode in ('import', 'export'):
    return _convert(mode, workdir)
  _init_distributed()
  defaults = configs.load_base()
  config = _resolve_config(configs, defaults)
  given = config_flags.get_override_values(flags.FLAGS['config'])
  if mode in READING and not any(key.startswith('mesh.') for key in given):
    from nanodlm import evaluate  # pylint: disable=g-import-not-at-top

    evaluate.fit_mesh(config)
  settings = configs.validate(config, given)
  if mode == 'prepare':
    from nanodlm.data import prepare  # pylint: disable=g-import-not-at-top

    packed = prepare.prepare(
      settings.data, settings.tokenizer, engine=_make_engine()
    )
    logging.getLogger('nanodlm').info('prepared: %s', ', '.join(packed.folders))
    return 0
  from nanodlm import train  # pylint: disable=g-import-not-at-top
  from nanodlm.devices import lock  # pylint: disable=g-import-not-at-top
  from nanodlm.training import checkpoint  # pylint: disable=g-import-not-at-top

  if mode != 'serve':  # which writes nothing
    train.check_writable(workdir)
  if mode == 'train':  # before the slow part
    lock.check_free(workdir)
  _set_up_compilation_cache()
  if mode == 'train':
    try:
      number = train.train(config, settings, workdir, defaults)
    except train.STOPPED as error:
      print(f'error: {error}', file=sys.stderr)
      if isinstance(error, checkpoint.SaveError):
        multihost.leave(1)  # threads of the save may wait for what never comes
      return 1
    return 128 + number if number else 0
  # Nothing is half written in these modes. JAX's runtime can lose the exception
  # of a Ctrl-C, or take long to end.
  signal.signal(signal.SIGINT, _exit_at_once)
  if jax.process_count() == 1:  # else it is JAX's own
    signal.signal(signal.SIGTERM, _exit_at_once)
  if mode == 'eval':
    from nanodlm import evaluate  # pylint: disable=g-import-not-at-top
    from nanodlm.evals import infill  # pylint: disable=g-import-not-at-top

    ratios = infill.parse_ratios(_INFILL.value)
    trained_on = evaluate.load_config(workdir, defaults).data.source
    subject = evaluate.open_subject(config, settings, workdir, trained_on)
    if ratios:  # before the slow part
      infill.check_run(subject.run)
    evaluate.evaluate_subject(subject, _NOISE_EXAMPLES.value)
    if ratios:
      infill.infill_subject(subject, ratios, _INFILL_EXAMPLES.value)
  elif mode == 'serve':
    if jax.process_count() > 1:
      raise InputError(
        f'--mode=serve runs in one process; there are {jax.process_count()}'
      )
    from nanodlm.serving import app  # pylint: disable=g-import-not-at-top

    number = app.serve_workdir(
      config, settings, workdir, _HOST.value, _PORT.value
    )
    return 128 + number if number else 0
  else:
    from nanodlm import sample  # pylint: disable=g-import-not-at-top
    from nanodlm.show import replay  # pylint: disable=g-import-not-at-top

    prompts = list(_PROMPT.value)
    if _PROMPT_FILE.value is not None:
      prompts += sample.read_prompts(_PROMPT_FILE.value)
    sample.sample_workdir(
      config,
      settings,
      workdir,
      prompts,
      replay.split_samplers(_SAMPLERS.value),
      _make_display(),
      _make_page(),
    )
  return 0


def _make_engine():
  """Who prepares the data: see nanodlm/data/encoder.py."""
  from nanodlm.data import encoder  # pylint: disable=g-import-not-at-top

  workers, options = _PREPARE_WORKERS.value, _BEAM_OPTIONS.value
  if _PREPARE_ENGINE.value == 'beam':
    if workers:
      raise InputError(
        f'--prepare_workers={workers} has no effect with '
        "--prepare_engine='beam'; its runner has its own options"
      )
    return encoder.Beam(tuple(options))
  if options:
    raise InputError(
      f'--beam_options={options} has no effect with '
      "--prepare_engine='local'; add --prepare_engine=beam"
    )
  return encoder.Workers(workers) if workers else encoder.ThisProcess()


def _compile(configs) -> int:
  """--mode=compile, with no device or process but this one."""
  from nanodlm.perf import compile as ahead  # pylint: disable=g-import-not-at-top

  topology, workdir = _TOPOLOGY.value, _WORKDIR.value
  if workdir:
    from nanodlm import train  # pylint: disable=g-import-not-at-top

    train.check_writable(workdir)
  if topology:
    ahead.use_topology(topology)
  config = _resolve_config(configs, configs.load_base())
  settings = configs.validate(
    config,
    config_flags.get_override_values(flags.FLAGS['config']),
    ahead.platform_of(topology),
  )
  report = ahead.compile_config(
    config, settings, topology, _VOCAB_SIZE.value, workdir
  )
  fits = [row['fits'] for row in report['programs'].values()]
  return 1 if False in fits else 0


def _make_display():
  """What --live asks for; None is plain text."""
  import rich.console  # pylint: disable=g-import-not-at-top

  from nanodlm.show import live  # pylint: disable=g-import-not-at-top

  console = rich.console.Console()
  is_possible = live.is_possible(console) and jax.process_count() == 1
  if _LIVE.value and not is_possible:
    raise InputError(
      '--live needs a terminal that moves its cursor and shows '
      'UTF-8, and one process'
    )
  is_wanted = is_possible if _LIVE.value is None else _LIVE.value
  return live.Display(console) if is_wanted else None


def _make_page():
  """What --html asks for."""
  if not _HTML.value:
    if _ALTERNATIVES.value != _ALTERNATIVES.default:
      raise InputError(f'--alternatives={_ALTERNATIVES.value} needs --html')
    return None
  if jax.process_count() > 1:
    raise InputError(
      f'--html={_HTML.value!r} is for one process: each sees its own '
      'samples only'
    )
  from nanodlm.show import replay  # pylint: disable=g-import-not-at-top

  return replay.Page(_HTML.value, _ALTERNATIVES.value)


def _convert(mode: str, workdir: str) -> int:
  """--mode=import and --mode=export, on this process's CPU."""
  from nanodlm import train  # pylint: disable=g-import-not-at-top
  from nanodlm.interop import convert  # pylint: disable=g-import-not-at-top
  from nanodlm.training import checkpoint  # pylint: disable=g-import-not-at-top

  if _is_config_given():
    raise InputError(
      f'--mode={mode} makes or reads the config of --workdir; leave '
      '--config out'
    )
  given = flags.FLAGS['config']
  changes = config_flags.get_override_values(given)
  if mode == 'import':
    if not _FROM.value:
      raise InputError('--mode=import needs --from')
    train.check_writable(workdir)
    try:
      convert.import_checkpoint(
        _FROM.value,
        workdir,
        family=_FAMILY.value,
        allow_pickle=_ALLOW_PICKLE.value,
        changes=changes,
      )
    except checkpoint.SaveError as error:
      print(f'error: {error}', file=sys.stderr)
      return 1
    return 0
  if not _OUTPUT.value:
    raise InputError('--mode=export needs --output')
  if changes:
    raise InputError(
      f'--config.{sorted(changes)[0]} has no effect with --mode=export'
    )
  from nanodlm.interop import export  # pylint: disable=g-import-not-at-top

  export.export_checkpoint(workdir, _OUTPUT.value, family=_FAMILY.value)
  return 0


def _exit_at_once(number, frame):
  del frame
  os.write(2, f'interrupted by {signal.Signals(number).name}\n'.encode())
  os._exit(128 + number)


def _resolve_config(configs, defaults):
  """The config of --config, or the workdir's own; then the command line's keys.

  For a new run without --config, that of the run whose weights it starts from.
  """
  flag = flags.FLAGS['config']
  is_given = _is_config_given()
  path = pathlib.Path(_WORKDIR.value or '') / 'config.json'
  init_from = config_flags.get_override_values(flag).get('checkpoint.init_from')
  if (
    _MODE.value == 'train' and init_from and not is_given and not path.is_file()
  ):
    path = pathlib.Path(init_from) / 'config.json'
    if not path.is_file():
      raise InputError(
        f'checkpoint.init_from={init_from!r} holds no run (no '
        'config.json in it)'
      )
  if (
    not _WORKDIR.value
    or (is_given and _MODE.value in ('train', 'prepare', 'compile'))
    or not path.is_file()
  ):
    if _MODE.value in READING:
      raise InputError(
        f'--workdir={_WORKDIR.value!r} holds no run (no config.json in it)'
      )
    if _MODE.value == 'train' and not is_given:
      raise InputError(
        f'--workdir={_WORKDIR.value!r} holds no run to go on with; a new one '
        'needs a --config, as configs/quickstart.py'
      )
    return _CONFIG.value
  if is_given and _MODE.value in READING:
    raise InputError(
      f'--mode={_MODE.value} reads its config from --workdir; leave '
      '--config out (--config.SECTION.KEY=VALUE is fine)'
    )
  config = configs.from_json(path.read_bytes(), defaults, str(path))
  if path.parent != pathlib.Path(_WORKDIR.value):
    config.checkpoint.init_step = 0
    if config.tokenizer.name in ('run', 'sentencepiece'):
      config.tokenizer.update(name='run', path=init_from, vocab_size=0)
  _check_matters(config_flags.get_override_values(flag))
  for key, value in config_flags.get_override_values(flag).items():
    section, _, leaf = key.rpartition('.')
    if (
      _MODE.value in READING
      and configs.is_bound(key)
      and not (key.startswith('data.'))
    ):
      raise InputError(
        f'--config.{key}={value!r}: the network in --workdir was '
        'trained with its own; it cannot be changed here'
      )
    target = config[section] if section else config
    target[leaf] = value
  return config


def _check_matters(given):
  """Raises InputError where --mode does not read a setting given by hand."""
  sampler = ('sampler.',) if _INFILL.value else ()
  read = {
    'eval': ('data.', 'eval.', 'mesh.', 'model.', 'objective.', *sampler),
    'sample': ('sampler.', 'mesh.', 'model.', 'objective.'),
    'serve': ('sampler.', 'mesh.', 'model.', 'objective.'),
  }
  unread = {'eval.max_examples'}
  if _MODE.value == 'serve':  # each request has its own
    unread |= {'sampler.num_samples', 'sampler.seed'}
  for key in sorted(given):
    if (
      _MODE.value in read
      and key != 'train.chunk_size'
      and (not key.startswith(read[_MODE.value]) or key in unread)
    ):
      raise InputError(
        f'--config.{key}={given[key]!r} has no effect with --mode={_MODE.value}'
      )


def _set_up_logging():
  """Plain lines of our own; what the libraries log needs --verbosity."""
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(logging.Formatter('%(message)s'))
  log = logging.getLogger('nanodlm')
  log.handlers, log.propagate = [handler], False
  log.setLevel(logging.INFO)
  if not flags.FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.FATAL)


def _init_distributed():
  """Joins the other processes, if there are any; only process 0 speaks."""
  explicit = (_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  is_explicit = any(value is not None for value in explicit)
  if is_explicit and any(value is None for value in explicit):
    raise InputError(
      '--coordinator_address, --num_processes and --process_id '
      f'go together; got {explicit}'
    )
  wanted = _is_cluster() if _DISTRIBUTED.value is None else _DISTRIBUTED.value
  try:
    if is_explicit or wanted:
      jax.distributed.initialize(
        *explicit,
        heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT.value,
        shutdown_timeout_seconds=multihost.SHUTDOWN_TIMEOUT_SECS,
      )
  except (ValueError, RuntimeError) as error:
    raise InputError(f'jax.distributed cannot start: {error}') from error
  if jax.process_index():
    logging.getLogger('nanodlm').setLevel(logging.WARNING)


def _is_cluster() -> bool:
  """Whether the environment says that this is one of several processes."""
  hosts = os.environ.get('TPU_WORKER_HOSTNAMES', '').split(',')
  tasks = [
    os.environ.get(name, '1')
    for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')
  ]
  return len(hosts) > 1 or any(n.isdigit() and int(n) > 1 for n in tasks)


def _set_up_compilation_cache():
  """Compiled programs are kept: the second start is faster.

  With the user's own files, unless JAX_COMPILATION_CACHE_DIR says where: they are
  code, and a workdir or prepared data may be somebody else's.
  """
  if jax.config.jax_compilation_cache_dir is None:
    folder = pathlib.Path(
      os.path.expanduser('~/.cache/nanodlm/compilation_cache')
    ).absolute()
    existing = next(
      path for path in (folder, *folder.parents) if os.path.exists(path)
    )  # not where it may not be looked at
    if not os.access(existing, os.W_OK | os.X_OK):
      return
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


if __name__ == '__main__':
  app.run(main, flags_parser=parse_flags)

"""The command line: finds the mode, parses its flags, sets the process up.

Each mode is a module with `define_flags()` and `main(start) -> exit status`.
Its flags are declared next to the code that reads them.
"""

import ast
from collections.abc import Callable
import importlib
import io
import logging
import os
import pathlib
import signal
import sys
from types import ModuleType
from typing import Any, NoReturn

# TensorFlow, which TFDS and TensorBoard import if it is there, would log to the
# terminal.
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '0')

from absl import app, flags
from absl import logging as absl_logging
import jax
from ml_collections import config_flags

from nanodlm import config as configs
from nanodlm import workdir as workdirs
from nanodlm.devices import multihost
from nanodlm.types import InputError

log = logging.getLogger('nanodlm')

MODES = {
  'train': 'nanodlm.train',
  'eval': 'nanodlm.evals.held_out',
  'sample': 'nanodlm.show.sampling',
  'chat': 'nanodlm.show.chat',
  'serve': 'nanodlm.serving.app',
  'compare': 'nanodlm.evals.compare',
  'study': 'nanodlm.evals.study',
  'zeroshot': 'nanodlm.evals.zeroshot',
  'report': 'nanodlm.show.report',
  'prepare': 'nanodlm.data.prepare',
  'compile': 'nanodlm.perf.compile',
  'benchmark': 'nanodlm.perf.benchmark',
  'import': 'nanodlm.interop.convert',
  'export': 'nanodlm.interop.export',
}
# These modes name their runs by flags of their own, or have none.
WITHOUT_WORKDIR = (
  'prepare',
  'compile',
  'compare',
  'study',
  'report',
  'benchmark',
)
# The common flags that a mode does not read.
UNREAD = {
  'compare': ('config', 'workdir'),
  'study': ('workdir',),
  'report': ('config', 'workdir'),
  'benchmark': ('workdir',),
}
# What Python's messages about the value of a flag mean.
_NOT_A = {
  'invalid literal for int()': 'not a whole number',
  'could not convert string to float': 'not a number',
  'Non-boolean argument': 'neither True nor False',
}
_KEYS = 'Keys of --config.SECTION.KEY=VALUE are listed in configs/base.py.'
# These modes may run as several processes.
DISTRIBUTED = ('train', 'eval', 'sample', 'serve', 'prepare')
# These modes leave nothing half done when they are interrupted.
INTERRUPTIBLE = ('eval', 'sample', 'chat', 'serve', 'study')

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  None,
  'The settings, a Python file; also the name of a config that comes with the '
  'project, such as quickstart; FILE:NAME is one of its variants. By default '
  'those saved in --workdir. '
  '--config.SECTION.KEY=VALUE changes one.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir', '', 'Folder of the run: config, metrics, checkpoints.'
)
_MODE = flags.DEFINE_enum('mode', 'train', sorted(MODES), 'What to do.')


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; mistakes print one line and exit with status 2.

  Returns the command line with all flags in the form '--name=value'.
  """
  argv = _join_values(argv)
  is_help = any(
    arg.lstrip('-') in ('help', 'h', 'helpfull') for arg in argv[1:]
  )
  if is_help and not _find(argv, 'mode'):
    _show(_print_modes)
  mode = _find(argv, 'mode') or 'train'
  try:
    module = importlib.import_module(MODES.get(mode, MODES['train']))
  except InputError as error:  # A package that the mode needs is missing.
    _exit_with(str(error))
  module.define_flags()
  multihost.define_flags()
  if is_help:
    _show(_print_help, mode, module)
  # What follows a colon is the argument of the file's get_config.
  path, colon, variant = _find(argv, 'config').partition(':')
  rest = [arg for arg in argv[1:] if not _is_flag(arg, 'config')]
  if not path:
    path = str(configs.find_file('base'))
  elif not os.path.isfile(path):
    known = configs.find_file(pathlib.Path(path).stem)
    if not known.is_file():
      _exit_with(
        f'--config={path!r} is not a file, seen from {os.getcwd()}; try '
        f'{known.with_name("quickstart.py")}'
      )
    path = str(known)
  given = f'{path}{colon}{variant}'
  try:
    # The file before its overrides, whatever their order on the command line.
    rest = flags.FLAGS([argv[0], f'--config={given}', *rest])
    _ = _CONFIG.value.seed  # Parses the file and its overrides.
    if rest[1:]:
      _exit_with(f'unexpected arguments: {rest[1:]}; every setting is a flag')
    return argv
  except BrokenPipeError:
    _leave_closed_pipe()
  except flags.UnrecognizedFlagError as error:
    others = configs.settings_named(error.flagname, configs.load())
    # The mode's own section, such as config.sampler for --mode=sample.
    own = [name for name in others if name.startswith(f'config.{mode}')]
    hint = ' or '.join(f'--{other}' for other in own or others)
    _exit_with(
      f'--{error.flagname} is not a flag of --mode={mode}; '
      + (
        f'did you mean {hint}?' if hint else f'--mode={mode} --help lists them'
      )
    )
  except (flags.Error, AttributeError, KeyError, OSError) as error:
    while error.args and isinstance(error.args[0], Exception):
      error = error.args[0]
    # str() of a KeyError quotes its message.
    text = str(error.args[0] if isinstance(error, KeyError) else error)
    if 'Traceback' in text:  # ml_collections quotes that of a config file.
      text = f'--config={given}: {text.splitlines()[-1].partition(": ")[2]}'
    text = ' '.join(text.split())
    if variant and 'get_config() takes 0' in text:
      text = f'--config={given}: {path} lacks variants'
    for words, meaning in _NOT_A.items():
      if words in text:
        text = text.removeprefix('flag ').partition(': ')[0] + f' is {meaning}'
    _exit_with(_unknown_key(argv) or text)


def _join_values(argv: list[str]) -> list[str]:
  """Writes '--name value' as '--name=value', for what is read before absl."""
  joined = ['']
  for arg in argv:
    is_name = joined[-1] in ('--mode', '--config', '--workdir')
    if is_name and not arg.startswith('-'):
      joined[-1] += f'={arg}'
    else:
      joined.append(arg)
  return joined[1:]


def _is_flag(arg: str, name: str) -> bool:
  return arg.startswith((f'--{name}=', f'-{name}='))


def _find(argv: list[str], name: str) -> str:
  """Returns the value of --name=VALUE on the command line, '' without one."""
  values = [arg.partition('=')[2] for arg in argv[1:] if _is_flag(arg, name)]
  return values[-1] if values else ''


def _unknown_key(argv: list[str]) -> str:
  """Returns what is wrong with the first setting that does not exist."""
  for arg in argv[1:]:
    path = arg.partition('=')[0].lstrip('-')
    if path.startswith('config.'):
      problem = configs.unknown_key(
        path.removeprefix('config.'), configs.load()
      )
      if problem:
        return f'--{path}: {problem}'
  return ''


def _show(print_help: Callable[..., None], *args: Any) -> NoReturn:
  """Prints a help and exits."""
  try:
    print_help(*args)
    sys.stdout.flush()
    sys.exit(0)
  except BrokenPipeError:
    _leave_closed_pipe()


def _print_modes():
  """Prints the first lines of the modes' modules, without importing them."""
  print(f'{(sys.modules["__main__"].__doc__ or "").strip()}\n\nThe modes:')
  for mode, name in MODES.items():
    path = pathlib.Path(__file__).parents[1].joinpath(*name.split('.'))
    code = ast.parse(path.with_suffix('.py').read_text('utf-8'))
    first = (ast.get_docstring(code) or '').splitlines()[0]
    first = first.removeprefix(f'--mode={mode}: ')
    print(f'  {mode:<10} {first[:1].upper()}{first[1:]}')
  print(_KEYS)


def _print_help(mode: str, module: ModuleType):
  # Its own, and those of another mode that it adopts.
  own = {
    flag.name for flag in flags.FLAGS.get_key_flags_for_module(module.__name__)
  }
  common = ['mode', 'config', 'workdir']
  print(f'{(module.__doc__ or "").strip()}\n\n--mode={mode} reads these flags:')
  for name in [*common, *sorted(own)]:
    flag = flags.FLAGS[name]
    default = f' (default: {flag.default})' if flag.default else ''
    print(f'  --{name}: {flag.help}{default}')
  print(_KEYS)


def _exit_with(message: str) -> NoReturn:
  print(
    f'error: {message}\n--help lists the flags, configs/base.py the settings',
    file=sys.stderr,
  )
  sys.exit(2)


def _leave_closed_pipe() -> NoReturn:
  """Ends as a program does that SIGPIPE ends, which Python ignores."""
  os._exit(128 + signal.SIGPIPE)


def main(argv: list[str]) -> int:
  """Runs the mode of a command line of `parse_flags`; returns the status."""
  _set_up_logging()
  try:
    mode, workdir = _MODE.value, _WORKDIR.value
    if not workdir and mode not in WITHOUT_WORKDIR:
      raise InputError(f'--mode={mode} needs --workdir')
    flag = flags.FLAGS['config']
    start = configs.Start(
      mode,
      workdir,
      _CONFIG.value,
      bool(_find(argv, 'config')),
      config_flags.get_override_values(flag),
      config_flags.get_config_filename(flag),
    )
    start.check_ignored(UNREAD.get(mode, ()))
    if mode in DISTRIBUTED:
      log.info('--mode=%s: starting JAX', mode)
      multihost.init_distributed()
    if mode != 'compile':
      _set_up_compilation_cache()
    if mode in INTERRUPTIBLE:
      _exit_on_signals()
    return importlib.import_module(MODES[mode]).main(start)
  except InputError as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  except jax.errors.JaxRuntimeError as error:
    if jax.process_count() == 1:
      raise
    print(
      'error: a computation of several processes failed, most likely because '
      f'another one was lost: {str(error).splitlines()[0]}',
      file=sys.stderr,
    )
    multihost.leave(1)
  except BrokenPipeError:  # `| head` has seen enough.
    _leave_closed_pipe()
  except OSError as error:
    if error.errno not in workdirs.FULL:
      raise
    print(f'error: the disk is full: {error}', file=sys.stderr)
  except KeyboardInterrupt:  # Before training handles signals.
    print('interrupted', file=sys.stderr)
    return 130
  return 1


def _exit_on_signals():
  """Ends at once on Ctrl-C or SIGTERM, in modes that leave nothing half done.

  JAX's runtime can lose the exception of a Ctrl-C, or take long to end.
  """

  def leave(number, frame):
    del frame
    os.write(2, f'interrupted by {signal.Signals(number).name}\n'.encode())
    os._exit(128 + number)

  signal.signal(signal.SIGINT, leave)
  if jax.process_count() == 1:  # Otherwise JAX handles it.
    signal.signal(signal.SIGTERM, leave)


class _Formatter(logging.Formatter):
  """Plain lines, and 'warning: ' before a warning."""

  def format(self, record):
    is_warning = record.levelno >= logging.WARNING
    return 'warning: ' * is_warning + super().format(record)


def _set_up_logging():
  """Logs plain lines of our own; what libraries log needs --verbosity."""
  handler = logging.StreamHandler(sys.stdout)
  handler.setFormatter(_Formatter())
  log.handlers, log.propagate = [handler], False
  log.setLevel(logging.INFO)
  if not flags.FLAGS['verbosity'].present:
    absl_logging.set_verbosity(absl_logging.FATAL)


def _set_up_compilation_cache():
  """Keeps compiled programs, so that a second start is faster.

  They are code, and a workdir or prepared data may come from others: they are
  kept with the user's own files, unless JAX_COMPILATION_CACHE_DIR says where.
  """
  if jax.config.values['jax_compilation_cache_dir'] is None:
    folder = pathlib.Path(
      os.path.expanduser('~/.cache/nanodlm/compilation_cache')
    ).absolute()
    # os.path, since pathlib raises for folders that may not be looked at.
    existing = next(
      path for path in (folder, *folder.parents) if os.path.exists(path)
    )
    if not os.access(existing, os.W_OK | os.X_OK):
      return
    jax.config.update('jax_compilation_cache_dir', str(folder))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def run():
  """Entry point of `python launch.py` and of `python -m nanodlm`."""
  if isinstance(sys.stdout, io.TextIOWrapper):
    # Not every terminal can show all characters.
    sys.stdout.reconfigure(errors='replace')
  app.run(main, flags_parser=parse_flags)


if __name__ == '__main__':
  run()

"""Runs of launch.py as processes of their own, alone or several together.

They are forked from a process that has imported what launch.py does, which
takes longer than many a test. With `before` or `prefix` they are started anew.
"""

import atexit
import multiprocessing
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

from absl import flags

from nanodlm.types import InputError

ROOT = pathlib.Path(__file__).parent.parent
TINY = (
  '--config=configs/tiny.py',
  '--config.train.num_samples=0',
  '--config.train.eval_every_steps=0',
  '--config.data.eval_fraction=0.01',
)
# As in conftest.py: compiling costs more than running here.
XLA_FLAGS = '--xla_backend_optimization_level=0'
_outputs = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
_context = multiprocessing.get_context('forkserver')
_context.set_forkserver_preload(
  [
    'tests.launches',
    'nanodlm.__main__',
    'nanodlm.train',
    'nanodlm.evals.held_out',
    'nanodlm.show.sampling',
    'clu.metric_writers',
  ]
)


def _run_main(args, env, path):
  """Does what launch.py does, in a process of its own."""
  from nanodlm import __main__ as main

  with open(path, 'w') as file:
    for number in (1, 2):
      os.dup2(file.fileno(), number)
  for stream in (sys.stdout, sys.stderr):
    stream.reconfigure(line_buffering=True)
  # Killed with its parent, but it may have children.
  multiprocessing.current_process()._config['daemon'] = False
  os.chdir(ROOT)
  os.environ.clear()
  os.environ.update(env)
  sys.argv = ['launch.py', *args]
  try:
    main.run()
  finally:
    atexit._run_exitfuncs()  # multiprocessing leaves them out.


class Forked:
  """A forked process, with the methods of subprocess.Popen that tests use."""

  def __init__(self, args, env):
    descriptor, path = tempfile.mkstemp(dir=_outputs.name)
    os.close(descriptor)
    self._path = pathlib.Path(path)
    self._process = _context.Process(
      target=_run_main, args=(args, env, path), daemon=True
    )
    self._process.start()

  @property
  def returncode(self):
    return self._process.exitcode

  @property
  def output(self):
    """What it has printed so far."""
    return self._path.read_text(errors='replace')

  def poll(self):
    return self._process.exitcode

  def send_signal(self, number):
    os.kill(self._process.pid, number)

  def kill(self):
    if self.poll() is None:
      self.send_signal(signal.SIGKILL)

  def communicate(self, timeout=None):
    self._process.join(timeout)
    if self.poll() is None:
      raise subprocess.TimeoutExpired('launch.py', timeout, self.output)
    return self.output, None


def start(*args, num_devices=1, before='', prefix=()):
  """A process of launch.py, its output in one pipe.

  Args:
    *args: of the command line.
    num_devices: CPU devices.
    before: Python code that is run first.
    prefix: of the command.
  """
  devices = f'--xla_force_host_platform_device_count={num_devices}'
  env = {
    **os.environ,
    'PYTHONUNBUFFERED': '1',
    'XLA_FLAGS': f'{XLA_FLAGS} {devices}',
  }
  args = [str(arg) for arg in args]
  if not before and not prefix:
    return Forked(args, env)
  code = (
    f'{before}\nimport runpy, sys; sys.path.insert(0, ""); '
    'runpy.run_path("launch.py", run_name="__main__")'
  )
  command = ['-c', code] if before else ['launch.py']
  return subprocess.Popen(
    [*prefix, sys.executable, *command, *args],
    cwd=ROOT,
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def start_several(num_processes, num_devices, *args):
  """Processes of one run, each with `num_devices` devices."""
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    address = f'127.0.0.1:{probe.getsockname()[1]}'
  return [
    start(
      f'--coordinator_address={address}',
      f'--process_id={i}',
      f'--num_processes={num_processes}',
      *args,
      num_devices=num_devices,
    )
    for i in range(num_processes)
  ]


def finish(process):
  """(exit status, output) of a process; it is killed after ten minutes."""
  try:
    output, _ = process.communicate(timeout=600)
  finally:
    process.kill()
  return process.returncode, output


def launch(*args, **kwargs):
  """(exit status, output) of a whole run."""
  return finish(start(*args, **kwargs))


def run_mode(module, *args, start=None):
  """Parses a mode's own flags and runs it in this process.

  Args:
    module: the mode's.
    *args: its flags.
    start: a `config.Start`, or None for modes that do not read one.

  Returns:
    The exit status; an error that is caused by the arguments is printed.
  """
  known = set(flags.FLAGS)
  module.define_flags()
  try:
    flags.FLAGS(['test', *map(str, args)])
    return module.main(start)
  except (InputError, flags.Error) as error:
    print(f'error: {error}', file=sys.stderr)
    return 2
  finally:
    flags.FLAGS.unparse_flags()
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)

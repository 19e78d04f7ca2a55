"""Runs of launch.py as processes of their own, alone or several together."""

import os
import pathlib
import socket
import subprocess
import sys

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


def start(*args, num_devices=1, before=''):
  """A process of launch.py, its output in one pipe.

  Args:
    *args: of the command line.
    num_devices: CPU devices.
    before: Python code that is run first.
  """
  devices = f'--xla_force_host_platform_device_count={num_devices}'
  env = {
    **os.environ,
    'PYTHONUNBUFFERED': '1',
    'XLA_FLAGS': f'{XLA_FLAGS} {devices}',
  }
  code = (
    f'{before}\nimport runpy, sys; sys.path.insert(0, ""); '
    'runpy.run_path("launch.py", run_name="__main__")'
  )
  return subprocess.Popen(
    [
      sys.executable,
      *(['-c', code] if before else ['launch.py']),
      *map(str, args),
    ],
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

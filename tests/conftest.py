"""What every test runs under: eight CPU devices, strict JAX, no network."""

import os
import socket
import tempfile

import jax
import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
# Here compiling costs more than running: half the time is saved by leaving out
# LLVM's optimisations, and the CPU's new emitter while there is an old one.
flags = [
  '--xla_force_host_platform_device_count=8',
  '--xla_backend_optimization_level=0',
]
if jax.__version_info__ < (0, 11):
  flags.append('--xla_cpu_use_fusion_emitters=false')
# All processes of one suite, pytest's own workers and those that tests start,
# share what they compile.
if 'PYTEST_XDIST_WORKER' not in os.environ:
  _programs = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _programs.name
os.environ['XLA_FLAGS'] = ' '.join([*flags, os.environ.get('XLA_FLAGS', '')])

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


def pytest_configure(config):
  # The last matching filter wins: a warning that points at our code fails.
  config.addinivalue_line('filterwarnings', r'error:::nanodlm(\.|$)')
  # Warnings that Orbax and asyncio give after a restore that failed.
  config.addinivalue_line(
    'filterwarnings',
    'ignore:Exception ignored in. (<coroutine object _read_array|'
    'None):pytest.PytestUnraisableExceptionWarning',
  )


@pytest.fixture(autouse=True, scope='module')
def forget_programs():
  """A file's compiled programs go with it: of all files they take 5 GB."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Connections may not leave this machine."""
  connect = socket.socket.connect

  def guarded(self, address):
    is_local = not isinstance(address, tuple) or address[0] in (
      'localhost',
      '127.0.0.1',
      '::1',
    )
    if not is_local:
      raise AssertionError(f'a test connects to {address!r}')
    return connect(self, address)

  monkeypatch.setattr(socket.socket, 'connect', guarded)

"""What every test runs under: eight CPU devices, strict JAX, no network."""

import os
import socket

os.environ['JAX_PLATFORMS'] = 'cpu'
# Here compiling costs more than running: leave out what LLVM would optimise.
os.environ['XLA_FLAGS'] = ' '.join([
    '--xla_force_host_platform_device_count=8',
    '--xla_backend_optimization_level=0', os.environ.get('XLA_FLAGS', '')])

# pylint: disable=wrong-import-position
import jax
import pytest

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update('jax_debug_key_reuse', True)


def pytest_configure(config):
  # The last matching filter wins: a warning that points at our code is an error.
  config.addinivalue_line('filterwarnings', r'error:::nanodlm(\.|$)')


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
  """Connections may not leave this machine."""
  connect = socket.socket.connect

  def guarded(self, address):
    is_local = not isinstance(address, tuple) or address[0] in (
        'localhost', '127.0.0.1', '::1')
    if not is_local:
      raise AssertionError(f'a test connects to {address!r}')
    return connect(self, address)

  monkeypatch.setattr(socket.socket, 'connect', guarded)

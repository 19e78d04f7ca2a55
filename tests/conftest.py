"""What every test runs under: eight CPU devices, strict JAX, no network."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
    [os.environ.get('XLA_FLAGS', ''),
     '--xla_force_host_platform_device_count=8'])

import jax  # pylint: disable=wrong-import-position

jax.config.update('jax_numpy_rank_promotion', __import__('os').environ.get('RP','raise'))
jax.config.update('jax_debug_key_reuse', True)


def pytest_configure(config):
  # The last matching filter wins: a warning that points at our own code fails.
  config.addinivalue_line('filterwarnings', r'error:::nanodlm(\.|$)')

"""The error that is told to people; on its own, for programs without JAX."""


class InputError(ValueError):
  """A mistake in what the user gave: a setting, a file, a prompt, a workdir.

  Its message names the key, the value and what is allowed; launch.py prints it
  without a traceback.
  """

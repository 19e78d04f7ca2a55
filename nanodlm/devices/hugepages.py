"""Huge pages and trimming for the host's memory, with glibc on Linux.

XLA's CPU backend allocates its temporary memory anew in every step, and the
kernel supplies it in pages of 4 kB. With pages of 2 MB, which glibc uses on
request only, a training step of configs/chars_small.py takes about 15% less CPU
time on two cores. Compilation leaves 200 MB with the allocator that no later
step reuses.
"""

import ctypes
import os
import sys


def restart_with_huge_pages():
  """Restarts this program, once, with glibc's huge pages enabled.

  glibc reads the setting when a process starts, so call this before any slow
  import. An existing GLIBC_TUNABLES is left as it is.
  """
  if sys.platform != 'linux' or 'GLIBC_TUNABLES' in os.environ:
    return
  if sys.orig_argv:
    os.environ['GLIBC_TUNABLES'] = 'glibc.malloc.hugetlb=1'
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_free_memory():
  """Returns the allocator's free memory to the system."""
  if sys.platform == 'linux':
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
      trim(0)

"""Huge pages for the host's memory, which glibc gives only to those who ask.

XLA's CPU backend allocates its temporary memory anew at every step, about 1 GB at
the sizes in the README, and the kernel then hands it out in 4 kB pages: 260,000
page faults a step. With 2 MB pages the same training steps took 8% (6 layers,
width 384) and 17% (50k vocabulary) less time on two cores.

What the allocator keeps for later is another matter: compiling the training step
of 16M parameters left 200 MB with it that no step ever asked for.
"""

import ctypes
import os
import sys

_TUNABLES = 'GLIBC_TUNABLES'
_SETTING = 'glibc.malloc.hugetlb=1'


def restart_with_huge_pages():
  """Starts this program again with glibc's huge pages on; once, on Linux only.

  glibc reads the setting when a process starts, so that nothing else will do. Call
  it before anything is imported that takes time. A GLIBC_TUNABLES that is set
  already is left alone.
  """
  if sys.platform != 'linux' or _TUNABLES in os.environ or not sys.orig_argv:
    return
  os.environ[_TUNABLES] = _SETTING
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def release_free_memory():
  """Gives the allocator's free memory back to the system; with glibc only."""
  if sys.platform == 'linux':
    trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
    if trim is not None:
      trim(0)

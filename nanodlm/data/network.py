"""A quick test of whether a server answers, before a library that would hang.

Libraries that download retry for minutes without a network.
"""

import socket
import urllib.parse
import urllib.request


def is_reachable(url: str, timeout_secs: float = 3.0) -> bool:
  """Returns whether a TCP connection to `url`, or to its proxy, opens."""
  target = urllib.parse.urlsplit(url)
  proxy = urllib.request.getproxies().get(target.scheme)
  if proxy and not urllib.request.proxy_bypass(target.hostname or ''):
    target = urllib.parse.urlsplit(proxy if '://' in proxy else f'//{proxy}')
  ports = {'http': 80, 'https': 443, 'ftp': 21}
  port = target.port or ports[target.scheme or 'http']
  try:
    with socket.create_connection((target.hostname, port), timeout_secs):
      return True
  except OSError:
    return False

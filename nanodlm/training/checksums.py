"""Checksums of a checkpoint's files, to find damage before reading them."""

from concurrent import futures
import hashlib
import json
import os
import pathlib

# {path: [bytes, SHA-256]} of the files of a checkpoint's items.
CHECKSUMS = 'checksums.json'


def complete_steps(directory: pathlib.Path) -> list[int]:
  """Returns the steps of the complete checkpoints in a folder, ascending."""
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def write(folder: pathlib.Path):
  """Writes the checksums of a checkpoint's folder."""
  paths = sorted(path for path in folder.glob('*/**/*') if path.is_file())
  names = [path.relative_to(folder).as_posix() for path in paths]
  with open(folder / CHECKSUMS, 'w') as file:
    json.dump(_digests(folder, names), file, indent=1)
    file.flush()
    os.fsync(file.fileno())


def read(folder: pathlib.Path) -> dict[str, tuple[int, str]] | None:
  """Returns {name: (bytes, SHA-256)}, or None if absent or unreadable."""
  try:
    entries = json.loads((folder / CHECKSUMS).read_bytes()).items()
    return {name: (int(size), str(digest)) for name, (size, digest) in entries}
  except (OSError, ValueError, TypeError, AttributeError, RecursionError):
    return None


def identify(folder: pathlib.Path, item: str) -> str:
  """Returns a digest of an item of a checkpoint, '' without checksums."""
  own = [
    [name, *entry]
    for name, entry in sorted((read(folder) or {}).items())
    if name.startswith(f'{item}/')
  ]
  return hashlib.sha256(json.dumps(own).encode()).hexdigest() if own else ''


def _digests(folder, names) -> dict[str, tuple[int, str]]:
  def digest(name):
    with open(folder / name, 'rb') as file:
      value = hashlib.file_digest(file, 'sha256').hexdigest()
      return file.tell(), value

  with futures.ThreadPoolExecutor() as pool:
    return dict(zip(names, pool.map(digest, names)))


def find_damage(folder: pathlib.Path, items: tuple[str, ...] = ()) -> str:
  """Returns what is wrong with the files of a checkpoint, '' if nothing is.

  Args:
    folder: the checkpoint's folder. One without checksums was written by an
      older version and passes, unless an item is missing or an earlier
      checkpoint has checksums.
    items: the items to check; all by default.
  """
  if not (folder / CHECKSUMS).exists():
    for item in ('params', 'rest', 'meta'):
      if not (folder / item).is_dir():
        return f'{item} is missing'
    for step in complete_steps(folder.parent):
      earlier = folder.parent / str(step) / CHECKSUMS
      if step < int(folder.name) and earlier.exists():
        return f'{CHECKSUMS} is missing'
    return ''
  written = read(folder)
  if written is None:
    return f'{CHECKSUMS} is unreadable'
  names = [name for name in written if not items or name.split('/')[0] in items]
  try:
    for name in names:  # A look at the sizes first, as it is fast.
      if not (folder / name).is_file():
        return f'{name} is missing'
      size, expected = os.path.getsize(folder / name), written[name][0]
      if size != expected:
        return f'{name} has {size} bytes instead of {expected}'
    for name, found in _digests(folder, names).items():
      if found != written[name]:
        return f'the content of {name} has changed'
  except OSError as error:
    return f'it cannot be read: {error}'
  return ''

"""Imports only go down: one row per folder says what it may import."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'nanodlm'
GROUND = ('types', 'noise', 'devices')
PARTS = ('objectives', 'samplers', 'model', 'data', 'training', 'steps')
STORIES = ('train', 'rollouts', 'evaluate', 'sample')
CORE = (
  *GROUND,
  *PARTS,
  'workdir',
  'config',
  'prompts',
  'laws',
  'rewards',
  'searches',
  'run',
  'weights',
  'lm',
  *STORIES,
)
# The folders and modules of nanodlm that each folder or module may import.
MAY_IMPORT = {
  'types': (),
  'devices': ('types', 'workdir'),
  'noise': ('types', 'devices'),
  'workdir': ('types',),
  'objectives': GROUND,
  'samplers': GROUND,
  'model': GROUND,
  'data': ('types', 'workdir'),
  'prompts': ('types', 'data'),
  'laws': ('types', 'data', 'training', 'prompts'),
  'searches': ('training', 'types'),
  'rewards': ('types', 'devices', 'data', 'laws'),
  'training': (*GROUND, 'model', 'workdir'),
  'config': ('types', 'workdir', 'devices', 'data', 'training'),
  'steps': (*GROUND, 'model', 'training', 'show.watch'),
  'run': (*GROUND, *PARTS, 'config'),
  'weights': (*GROUND, 'data', 'training', 'workdir', 'config', 'run'),
  'lm': (
    *GROUND,
    *PARTS,
    'config',
    'prompts',
    'rewards',
    'run',
    'searches',
    'show.watch',
    'weights',
  ),
  **dict.fromkeys(STORIES, (*CORE, 'show.watch')),
  # The command line finds the module of a mode by its name.
  '__main__': ('types', 'workdir', 'devices', 'config'),
  # The wings: none imports another, except that pages and views are shared.
  'evals': CORE,
  'interop': CORE,
  'perf': CORE,
  'serving': (*CORE, 'show.watch', 'show.pages'),
  'show': CORE,
}
# Libraries that few modules may import.
ONLY_IN = {
  'tensorflow': (),
  'tensorflow_datasets': ('data',),
  'grain': ('data',),
  'orbax': ('interop.tensors', 'training.checkpoint'),
  'clu': ('training.writers',),
  'torch': ('evals.judge', 'interop.tensors'),
  'transformers': ('evals.judge',),
  'safetensors': ('interop.tensors', 'interop.export', 'interop.peft'),
  'huggingface_hub': ('interop.convert',),
  'matplotlib': ('evals.compare', 'perf.benchmark', 'show.plots'),
  'lm_eval': ('evals.lm_eval',),
  'rich': ('show',),
  # These can execute code from a file.
  'pickle': (),
  'cloudpickle': (),
  'dill': (),
  'joblib': (),
  'marshal': (),
  'shelve': (),
  'yaml': (),
}
FILES = sorted(
  p
  for p in PACKAGE.rglob('*.py')
  if p.parent != PACKAGE or p.name != '__init__.py'
)


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize(
  'path', FILES, ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports(path):
  own = path.relative_to(PACKAGE).with_suffix('').parts
  room = own[0]
  assert room in MAY_IMPORT, f'{room} is missing in MAY_IMPORT'
  for imported in imports(path):
    parts = imported.split('.')
    if parts[0] in ONLY_IN:
      assert any(
        '.'.join(own).startswith(name) for name in ONLY_IN[parts[0]]
      ), f'{path} imports {imported}'
    if parts[0] == 'nanodlm' and len(parts) > 1:
      allowed = (room, *MAY_IMPORT[room])
      assert parts[1] in allowed or '.'.join(parts[1:3]) in allowed, (
        f'{path} imports {imported}'
      )


@pytest.mark.parametrize(
  'path', [*FILES, PACKAGE.parent / 'launch.py'], ids=lambda p: p.name
)
def test_no_file_that_is_read_can_run_code(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      name = getattr(node.func, 'id', '')
      assert name not in ('eval', 'exec', '__import__'), f'{path}:{node.lineno}'
      call = ast.unparse(node.func)
      for keyword in node.keywords:
        # (Of --mode=import, which reads even those as weights only.)
        assert call == 'import_checkpoint' or keyword.arg not in (
          'allow_pickle',
          'trust_remote_code',
        ), f'{path}:{node.lineno}'
      if call == 'torch.load':
        assert 'weights_only=True' in [ast.unparse(k) for k in node.keywords], (
          f'{path}:{node.lineno}'
        )

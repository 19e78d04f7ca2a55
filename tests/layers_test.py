"""Imports only go down; see the table of layers."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / 'nanodlm'
LAYERS = {
    0: ('types', 'schedules', 'times', 'processes', 'categorical', 'reveal',
        'masking', 'sharding', 'hugepages', 'guidance', 'multihost', 'errors',
        'plots', 'families', 'pages'),
    1: ('objectives', 'samplers', 'attention', 'pallas_attention', 'losses', 'watch',
        'model', 'metrics', 'tokenizers', 'hlo'),
    2: ('mesh', 'optim', 'state', 'checkpoint', 'data', 'config', 'lock',
        'tensors'),
    3: ('step',),
    4: ('evaluate', 'sample', 'train', 'benchmark', 'infill', 'judge', 'compare',
        'lm_eval_adapter', 'compile', 'report', 'live', 'replay', 'convert',
        'export', 'serve', 'serve_engine'),
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}
# Libraries that few modules may import.
ONLY_IN = {
    'tensorflow': (), 'tensorflow_datasets': ('data',), 'grain': ('data',),
    'orbax': ('checkpoint',), 'clu': ('train',),
    'torch': ('judge', 'tensors'), 'transformers': ('judge',),
    'safetensors': ('tensors', 'export'), 'huggingface_hub': ('convert',),
    'matplotlib': ('compare', 'benchmark', 'plots'),
    'lm_eval': ('lm_eval_adapter',), 'rich': ('live',),
    # They run what a file tells them to.
    'pickle': (), 'cloudpickle': (), 'dill': (), 'joblib': (), 'marshal': (),
    'shelve': (), 'yaml': (),
}
FILES = sorted(p for p in PACKAGE.rglob('*.py') if p.parent != PACKAGE
               or p.name != '__init__.py')


def imports(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


@pytest.mark.parametrize('path', FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports(path):
  own = path.relative_to(PACKAGE).with_suffix('').parts
  name = own[0]
  assert name in LAYER_OF, f'{name} has no layer in this test'
  for imported in imports(path):
    parts = imported.split('.')
    if parts[0] in ONLY_IN:
      assert name in ONLY_IN[parts[0]], f'{path} imports {imported}'
    if parts[0] != 'nanodlm' or len(parts) < 2:
      continue
    other = parts[1]
    assert LAYER_OF[other] <= LAYER_OF[name], f'{path} imports {imported}'
    if name in ('objectives', 'samplers') and own[1:] != ('__init__',):
      assert LAYER_OF[other] == 0, f'{path} imports {imported}'


@pytest.mark.parametrize('path', [*FILES, PACKAGE.parent / 'launch.py'],
                         ids=lambda p: p.name)
def test_no_file_that_is_read_can_run_code(path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Call):
      name = getattr(node.func, 'id', '')
      assert name not in ('eval', 'exec', '__import__'), f'{path}:{node.lineno}'
      call = ast.unparse(node.func)
      for keyword in node.keywords:
        # (Of --mode=import, which reads even those as weights only.)
        assert call == 'convert.import_checkpoint' or keyword.arg not in (
            'allow_pickle', 'trust_remote_code'), f'{path}:{node.lineno}'
      if call == 'torch.load':
        assert 'weights_only=True' in [ast.unparse(k) for k in node.keywords], (
            f'{path}:{node.lineno}')

"""--mode=eval: the bound on held-out text, and the accuracy of infilling it."""

from absl import flags

from nanodlm import evaluate
from nanodlm import lm as lms
from nanodlm import workdir as workdirs
from nanodlm.config import Start
from nanodlm.evals import infill
from nanodlm.types import InputError

# The sections that --mode=eval reads, and keys of them that it does not.
READS = ('data.', 'eval.', 'mesh.', 'model.', 'objective.')
UNREAD = (
  'data.clean_infill_rate',
  'data.clean_prefix_rate',
  'eval.max_examples',
)


def define_flags():
  """Defines the flags of --mode=eval."""
  flags.DEFINE_integer(
    'noise_examples',
    0,
    'Held-out rows on which the variance of the bound over its noise is '
    'measured, against independent times; 0: off.',
    lower_bound=0,
  )
  infill.define_flags([])
  flags.adopt_module_key_flags(infill)


def main(start: Start) -> int:
  """Runs --mode=eval on the whole validation split with averaged weights."""
  options = flags.FLAGS
  ratios = infill.parse_ratios(options.infill)
  num_rows = options.infill_examples
  if options['infill_examples'].present and not ratios:
    raise InputError(f'--infill_examples={num_rows} needs --infill')
  for key, value in start.changes.items():
    if key.startswith('sampler.') and not ratios:
      raise InputError(f'--config.{key}={value!r} needs --infill')
  reads = (*READS, 'sampler.') if ratios else READS
  settings = start.resolve_reading(reads, UNREAD)
  workdirs.check_writable(start.workdir)
  lm = lms.load(start.workdir, settings=settings)
  if ratios:  # Before the slow part.
    infill.check_run(lm.run)
  text = evaluate.open_text(lm)
  evaluate.evaluate_text(lm, text, options.noise_examples)
  if ratios:
    infill.infill_text(lm, text, ratios, num_rows)
  return 0

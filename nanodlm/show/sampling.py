r"""--mode=sample: samples of a run, printed, drawn live, and kept as a page.

    python launch.py --mode=sample --workdir=runs/quickstart \
        --prompt='One fine day, Ada met {}' --config.sampler.num_samples=2 \
        --samplers='fixed_count:num_steps=64;temperature=0.3,confidence' \
        --html=replay.html

'{}' takes an equal share of the free space, '{12}' is 12 tokens; a prompt
without a gap is continued; '{{' and '}}' are braces. --prompt_file reads many,
{"prompt": "def f("} on each line. Samples are printed and appended to
samples.jsonl. In a terminal the canvases are shown while they are filled
(--nolive: not): the prompt cyan, masked tokens dim, new ones green, changed
ones yellow, and a cross for one that is masked again. Settings that --samplers
leaves out are the run's for its own sampler, and the defaults of
configs/base.py for others.

--reward=law:valid --best_of=16 keeps the best of 16 samples for each text, by
the rewards of nanodlm/rewards.py; --num_refinements=50 then draws parts of it
again, and keeps what is better (nanodlm/searches.py). The calls of all
candidates are added up.

For a prompt with a slot, such as 'The sky is {blue|green}.', nothing is
sampled: the probability that the model gives each choice is printed, before all
samples, and whether it is exact. Its line in samples.jsonl has them as
'choices'.
"""

import functools

from absl import flags
import jax

from nanodlm import lm as lms
from nanodlm import prompts, sample
from nanodlm import workdir as workdirs
from nanodlm.config import Start
from nanodlm.show import live, replay
from nanodlm.types import InputError

# The sections that --mode=sample reads.
READS = ('sampler.', 'mesh.', 'model.', 'objective.', 'train.reward_secs')


def define_flags():
  """Defines the flags of --mode=sample."""
  flags.DEFINE_multi_string(
    'prompt',
    [],
    'A text with gaps, {} of automatic size or {12} of 12 tokens; a prompt '
    'without a gap is continued. Of a slot such as {yes|no}, the probability '
    'of each choice is printed. Doubled braces are literal. May be repeated.',
  )
  flags.DEFINE_string(
    'prompt_file',
    None,
    "A JSONL file with a prompt in the field 'prompt' of each line; see "
    '--prompt.',
  )
  live.define_flag()
  flags.adopt_module_key_flags(live)
  flags.DEFINE_string(
    'html',
    '',
    'Output file of a page that replays the sampling; if its name ends in '
    '.svg, a moving picture of the first sample.',
  )
  flags.DEFINE_string(
    'samplers',
    '',
    'Samplers to run in turn, with keys of config.sampler, such as '
    'fixed_count,confidence:threshold=0.9;num_steps=0; by default, the '
    'sampler of the run.',
  )
  flags.DEFINE_string(
    'reward',
    '',
    'What texts are worth, such as law:valid or 0.5*module:function+law:valid; '
    'see nanodlm/rewards.py.',
  )
  flags.DEFINE_integer(
    'best_of',
    1,
    'With --reward: number of samples for each text, of which the one of '
    'highest reward is kept.',
    lower_bound=1,
  )
  flags.DEFINE_integer(
    'num_refinements',
    0,
    'With --reward: number of times that a part of each text is drawn again, '
    'at random; see --reward_temperature.',
    lower_bound=0,
  )
  flags.DEFINE_float(
    'reward_temperature',
    0.0,
    'With --num_refinements: the texts tend to the law of the model times '
    'exp(reward / temperature), up to a constant; 0: rewards never fall.',
    lower_bound=0.0,
  )
  flags.DEFINE_integer(
    'alternatives',
    5,
    'With --html: number of most probable tokens listed for each position.',
    lower_bound=1,
    upper_bound=20,
  )


def main(start: Start) -> int:
  """Runs --mode=sample; see `sample.sample_prompts`."""
  options = flags.FLAGS
  settings = start.resolve_reading(READS)
  workdirs.check_writable(start.workdir)
  texts = list(options.prompt)
  if options.prompt_file is not None:
    texts += prompts.read_prompts(options.prompt_file)
  samplers = sample.split_samplers(options.samplers)
  display = None if options.reward else live.make_display()
  page = _make_page(options.html, options['alternatives'])
  slots = [text for text in texts if prompts.has_choices(text)]
  others = [text for text in texts if text not in slots]
  if slots and not others and (samplers or page or options.reward):
    raise InputError(
      f'prompt={slots[0]!r}: --samplers, --html and --reward do not apply to a '
      'slot, for which nothing is sampled'
    )
  if page and options.reward:
    raise InputError(
      f'--html={options.html!r} shows single samples; leave out --reward='
      f'{options.reward!r}'
    )
  lm = lms.load(start.workdir, settings=settings)
  make_search = functools.partial(
    lms.make_search,
    reward=options.reward,
    best_of=options.best_of,
    num_refinements=options.num_refinements,
    temperature=options.reward_temperature,
  )
  for _, model in sample.with_samplers(lm, samplers):
    sample.check_prompts(model, others)
    make_search(model.run)
  sample.choose_texts(lm, slots)
  if others or not slots:
    sample.sample_prompts(lm, others, samplers, display, page, make_search)
  return 0


def _make_page(path: str, alternatives) -> replay.Page | None:
  """Returns the page of --html, or None."""
  if not path:
    if alternatives.present:
      raise InputError(f'--alternatives={alternatives.value} needs --html')
    return None
  if jax.process_count() > 1:
    raise InputError(
      f'--html={path!r} needs a single process; each process only has its own '
      'samples'
    )
  return replay.Page(path, alternatives.value)

import io
import pathlib
import tempfile
from unittest import mock

from absl import flags
from absl.testing import absltest

from nanodlm import config as configs
from nanodlm import lm as lms
from nanodlm.show import chat
from nanodlm.types import InputError
from tests import workdirs


class ChatTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.workdir = workdirs.make_workdir(
      pathlib.Path(folder), data__length=64, sampler__num_steps=4
    )

  def talk(self, said, **changes):
    start = configs.Start(
      'chat', str(self.workdir), configs.load(), False, changes
    )
    holder = flags.FlagValues()
    flags.DEFINE_string('system', 'Be brief.', '', holder)
    flags.DEFINE_bool('live', None, '', holder)
    holder(['chat'])
    out = io.StringIO()
    with (
      mock.patch.object(flags, 'FLAGS', holder),
      mock.patch('sys.stdin', io.StringIO(said)),
      mock.patch('sys.stdout', out),
    ):
      self.assertEqual(chat.main(start), 0)
    return out.getvalue()

  def test_conversation(self):
    plain = {'tokenizer.chat_template': 'plain'}
    out = self.talk(f'Hi\n\n/clear\nHi\n{"long " * 20}\n/quit\nno\n', **plain)
    self.assertEqual(out.count('assistant: '), 2)
    self.assertIn('you: Hi\nassistant: ', out)
    self.assertIn('leaves 0 for', out)
    config = configs.read_run(str(self.workdir))
    config.tokenizer.chat_template = 'plain'
    settings = configs.make_settings(config, ['tokenizer.chat_template'])
    lm = lms.load(str(self.workdir), settings=settings)
    messages = [
      {'role': 'system', 'content': 'Be brief.'},
      {'role': 'user', 'content': 'Hi'},
    ]
    for sample in lm.sample(messages, num_samples=2, details=True):
      prompt = lm.tokenizer.decode(sample.tokens[sample.fixed])
      self.assertEqual(
        prompt, '\n\nSystem: Be brief.\n\nUser: Hi\n\nAssistant: '
      )
      answer = sample.tokens[int(sample.fixed.sum()) :].tolist()
      if (end := lm.tokenizer.separator_id) in answer:
        answer = answer[: answer.index(end)]
      self.assertEqual(sample.text, lm.tokenizer.decode(answer))

  def test_commands(self):
    plain = {'tokenizer.chat_template': 'plain'}
    out = self.talk('/help\n/halp\n/etc/x?\n', **plain)
    self.assertEqual(out.count('/clear begins a new conversation'), 3)
    self.assertEqual(out.count("'/halp' is not a command"), 1)
    self.assertEqual(out.count('assistant: '), 1)

  def test_a_canvas_is_not_longer_than_in_training(self):
    plain = {'tokenizer.chat_template': 'plain'}
    with self.assertRaisesRegex(InputError, 'sampler.length=65 .*=64'):
      self.talk('Hi\n', **plain, **{'sampler.length': 65})
    config = configs.read_run(str(self.workdir))
    config.tokenizer.chat_template = 'plain'
    settings = configs.make_settings(config, ['tokenizer.chat_template'])
    lm = lms.load(str(self.workdir), settings=settings)
    user = {'role': 'user', 'content': 'Hi'}
    with self.assertRaisesRegex(InputError, 'sampler.length=65 .*=64'):
      lm.sample([user], length=65)
    with self.assertRaisesRegex(InputError, r"messages\[1\].*'assistant'"):
      lm.sample([user, {'role': 'assistant', 'content': 'b'}])

  def test_without_template(self):
    with self.assertRaisesRegex(InputError, 'lacks a chat template'):
      self.talk('Hi\n')


if __name__ == '__main__':
  absltest.main()

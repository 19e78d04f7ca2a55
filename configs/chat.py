r"""A model of bytes that learns to answer questions, to try conversations with.

    python - > talks.jsonl <<'END'
    import json, random
    capitals = dict(x.split() for x in (
        'France Paris,Italy Rome,Spain Madrid,Japan Tokyo,Peru Lima,'
        'Egypt Cairo,Norway Oslo,Kenya Nairobi,Cuba Havana,Greece Athens'
    ).split(','))
    random.seed(0)
    for _ in range(4000):
      messages = []
      for i, land in enumerate(random.sample(list(capitals), 2)):
        ask = 'And of' if i else 'What is the capital of'
        messages += [
            {'role': 'user', 'content': f'{ask} {land}?'},
            {'role': 'assistant', 'content': f'{capitals[land]}.'}]
      print(json.dumps({'messages': messages}))
    END
    python launch.py --config=configs/chat.py --workdir=runs/chat
    python launch.py --mode=chat --workdir=runs/chat

A row has one conversation, of which the assistant's part is noised and scored,
with the separators after it: from them the model learns where an answer ends.
About three questions fit on its canvas of 128 bytes. To tune an imported model
instead, on one's own conversations and with its own chat template:

    python launch.py --workdir=runs/tuned \
        --config.checkpoint.init_from=runs/imported \
        --config.data.source=chat:talks.jsonl --config.data.crop=document

Measured on one shared core of an AMD EPYC (Zen 5), one run: training took 1 min
46 s of processor time. Held-out conversations cost 0.0006 nats/token, and all
180 answers in conversations about the 90 pairs of countries, four of which are
held out, were right. The ten answers are all in the training text: this shows
that the format is learned, not that the model knows more.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('base')
  config.data.source = 'chat:talks.jsonl'
  config.data.length = 128
  config.data.crop = 'document'
  config.tokenizer.chat_template = 'plain'
  config.model.num_layers = 3
  config.model.embed_dim = 128
  config.model.num_heads = 4
  config.model.unroll = True
  config.optim.learning_rate = 3e-3
  config.optim.warmup_steps = 50
  config.train.batch_size = 32
  config.train.num_steps = 600
  config.train.log_every_steps = 100
  config.train.eval_every_steps = 200
  config.eval.max_examples = 64
  config.checkpoint.every_steps = 200
  config.sampler.num_steps = 16
  config.sampler.temperature = 0.0
  return config

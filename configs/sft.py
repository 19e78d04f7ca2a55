r"""Fine-tunes the model of configs/docs.py on prompts with responses.

    python - > pairs.jsonl <<'END'
    import json, random
    words = 'red blue green black white brown pink grey gold silver'.split()
    random.seed(0)
    for _ in range(3000):
      chosen = random.sample(words, random.randint(2, 5))
      print(json.dumps({'prompt': 'Reverse: ' + ' '.join(chosen) + '\n',
                        'response': ' '.join(reversed(chosen))}))
    END
    python launch.py --config=configs/sft.py --workdir=runs/sft \
        --config.data.source=pairs:pairs.jsonl --config.data.length=32
    python launch.py --mode=sample --workdir=runs/sft \
        --config.sampler.num_samples=1 \
        --prompt=$'Reverse: white gold red blue\n' \
        --prompt=$'Reverse: pink brown silver black\n'

Every line of the file is {"prompt": "...", "response": "..."}; for other field
names write pairs:GLOB:PROMPT_FIELD:RESPONSE_FIELD. The prompt stays clean; the
response and the separators after it are noised and scored. A row has
data.length tokens: the closer that is to the longest pair, the less work is
spent on padding. Pairs that do not fit are left out.

Training starts from runs/docs, with its tokenizer and network. Use
--config.checkpoint.init_from=OTHER for another run of the same network; for a
run of another network leave --config out, and its settings are taken over.

Source: supervised fine-tuning of LLaDA, arXiv 2502.09992.

Measured on two cores of an AMD EPYC, one run each. The commands above took 2
min 4 s of processor time, without the first training. Held-out pairs cost 0.110
+- 0.019 nats/token; the answers, to prompts that are not in the file, were
"blue red g gold", half right, and "black silver brown pink". On 4596 questions
about Python's standard library (data.length=64, 300 steps, mlp=relu2) the bound
on held-out answers was 2.01 +- 0.07 bits/byte; they look like docstrings and
end like them, but make no sense.
"""

from nanodlm import config as configs


def get_config():
  config = configs.load('docs')
  configs.set_start(config, 'runs/docs')
  config.data.source = 'pairs:pairs.jsonl'
  config.data.crop = 'chunk'
  config.data.eval_fraction = 0.1
  config.optim.learning_rate = 1e-3
  config.optim.ema_decay = 0.99
  config.eval.max_examples = 0
  return config

"""Families of published checkpoints by name.

A family is a subclass of `layout.Family` and a line in the dict.

    family           objective        compared with  difference
    gpt2             ar               transformers   9.5e-7
    llama, mistral   ar               transformers   3.4e-6
    qwen2, qwen3     ar               transformers   2.0e-6
    llada            masked           its own code   3.7e-5
    dream            masked, shifted  its own code   3.7e-5
    a2d-*            masked           its own code   3.7e-5
    illada           masked           transformers   3.7e-6
    sdar             block            its own code   8.6e-6
    fast-dllm        block, shifted   its own code   5.8e-5
    nemotron         block and ar     transformers   3.0e-6
    mdlm             masked           its own code   2.6e-6
    bd3lm            block            its own code   2.4e-6
    duo              uniform          its own code   3.6e-6
    sedd             sedd             its own code   2.6e-6
    gidd             hybrid           its own code   2.4e-6
    scaled-gidd      uniform, masked  its own code   3.5e-6
    md4              masked           its own code   6.5e-5

The difference is the largest one of the logits, in float32, of small networks
with random weights (transformers 5.24 or 4.56); those above 1e-5 are of logits
up to 12. No published weights have been read. The shapes of LLaDA-8B come to
8,015,581,184 parameters, those of SDAR-8B to 8,190,735,360, and those of
Dream-7B and Fast-dLLM v2 7B to 7,615,616,512, and the names of the tensors are
those in the published indices of the last one and of SDAR. duo includes UDLM.

All are read from safetensors, mdlm, bd3lm and duo also from .ckpt, sedd from
.pth, and md4 from its Orbax folder.

Averaged weights are used if a file has them. What a family has and this network
lacks is refused by name: rotary scaling other than Llama 3's and YaRN without
its temperature, sliding windows shorter than data.length, mixtures of experts,
SEDD's uniform noise, GenMD4, missing or surplus tensors, another vocabulary,
and every key of config.json that is neither supported nor listed as harmless.
--family is for a config.json without model_type: a network of another type may
compute something else with tensors of the same names.
"""

from nanodlm.interop.families import (
  adapted,
  ddit,
  gidd,
  gpt2,
  llada,
  llama,
  md4,
  native,
)
from nanodlm.interop.families.layout import Family

# An export uses the first that fits, in this order.
FAMILIES: dict[str, Family] = {
  'gpt2': gpt2.GPT2(),
  'llama': llama.Llama(),
  'mistral': llama.Mistral(),
  'qwen2': llama.Qwen2(),
  'qwen3': llama.Qwen3(),
  'llada': llada.LLaDA(),
  'dream': adapted.Dream(),
  'sdar': adapted.SDAR(),
  'fast-dllm': adapted.FastDLLM(),
  'nemotron': adapted.Nemotron(),
  'a2d-qwen3': adapted.A2DQwen3(),
  'a2d-qwen2': adapted.A2DQwen2(),
  'a2d-llama': adapted.A2DLlama(),
  'illada': adapted.ILLaDA(),
  'mdlm': ddit.MDLM(),
  'bd3lm': ddit.BD3LM(),
  'sedd': ddit.SEDD(),
  'duo': ddit.Duo(),
  'gidd': ddit.GIDD(),
  'scaled-gidd': gidd.ScaledGIDD(),
  'md4': md4.MD4(),
  'nanodlm': native.Native(),
}

"""Families of published checkpoints by name.

A family is a subclass of `layout.Family` and a line in the dict.

    family   files                  objective        compared with  difference
    gpt2     safetensors            ar               transformers   9.5e-7
    llama    safetensors            ar               transformers   3.4e-6
    qwen2, qwen3  safetensors       ar               transformers   2.0e-6
    llada    safetensors            masked           NumPy          3.1e-6
    dream    safetensors            masked, shifted  NumPy          2.6e-6
    mdlm     .ckpt, safetensors     masked           its own code   2.6e-6
    bd3lm    .ckpt, safetensors     block            its own code   2.4e-6
    duo      .ckpt, safetensors     uniform          its own code   3.6e-6
    sedd     .pth, safetensors      sedd             its own code   2.6e-6
    gidd     safetensors            hybrid           its own code   2.4e-6
    md4      Orbax folder           masked           its own code   6.5e-5

The difference is the largest one of the logits, in float32, of small networks
with random weights (transformers 5.24, or a restatement in NumPy). No published
file has been read; the shapes of LLaDA-8B and Dream-7B come to 8,015,581,184
and 7,615,616,512 parameters. llama includes Mistral without a sliding window,
duo includes UDLM.

Averaged weights are used if a file has them. What a family has and this network
lacks is refused by name: scaled rotary positions, sliding windows, SEDD's
uniform noise, GenMD4, missing or surplus tensors, another vocabulary.
"""

from nanodlm.interop.families.ddit import BD3LM, Duo, GIDD, MDLM, SEDD
from nanodlm.interop.families.dream import Dream
from nanodlm.interop.families.gpt2 import GPT2
from nanodlm.interop.families.layout import Family
from nanodlm.interop.families.llada import LLaDA
from nanodlm.interop.families.llama import Llama, Qwen2, Qwen3
from nanodlm.interop.families.md4 import MD4
from nanodlm.interop.families.native import Native

# An export uses the first that fits, in this order.
FAMILIES: dict[str, Family] = {
  'gpt2': GPT2(),
  'llama': Llama(),
  'qwen2': Qwen2(),
  'qwen3': Qwen3(),
  'llada': LLaDA(),
  'dream': Dream(),
  'mdlm': MDLM(),
  'bd3lm': BD3LM(),
  'sedd': SEDD(),
  'duo': Duo(),
  'gidd': GIDD(),
  'md4': MD4(),
  'nanodlm': Native(),
}

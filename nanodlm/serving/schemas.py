"""The requests and responses of the API, with their limits."""

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Discriminator, Field, Tag

from nanodlm import lm
from nanodlm.noise import categorical
from nanodlm.show import watch

MAX_SAMPLES = 16
MAX_PROMPTS = 16
MAX_STEPS = 1024
# Rows of data.length tokens that one request scores, and choices of a slot.
MAX_SCORED = 64
MAX_SEED = 2**32 - 1
MAX_BODY_BYTES = 2**18

_Name = Annotated[str, Field(max_length=200)]
_Id = Annotated[int, Field(ge=0, le=2**31 - 1)]
_Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
_Samples = Annotated[int, Field(ge=1, le=MAX_SAMPLES)]
_Zero = Literal[0]
_Alternatives = Annotated[int, Field(ge=0, le=watch.NUM_ALTERNATIVES)]


class _Response(pydantic.BaseModel):
  model_config = pydantic.ConfigDict(use_attribute_docstrings=True)


class _Request(_Response):
  model_config = pydantic.ConfigDict(extra='forbid', strict=True)


class Sampling(_Request):
  """How to sample. The run's config provides what is null or left out."""

  sampler: _Name | None = None
  """The name of a sampler; /api/info lists those that fit the model."""
  num_steps: int | None = Field(None, ge=1, le=MAX_STEPS)
  """Network calls; with a sampler that fills blocks, calls per block."""
  temperature: float | None = Field(
    None, ge=0, le=categorical.MAX_TEMPERATURE, allow_inf_nan=False
  )
  """0 takes the most probable token."""
  top_k: _Id | None = None
  """Draws from this number of most probable tokens; 0: from all tokens."""
  top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
  """Draws from the smallest set of tokens that is at least this probable; 0:
  the most probable token."""
  seed: _Seed | None = None
  """The same seed gives the same texts. The default is a random seed, or 0 if
  the most probable tokens are taken, in every text of the request: they differ
  only by the order in which tokens are drawn."""
  user: _Name | None = None
  """Requests from one address that name the same user take turns as one client.
  By default, each connection is a client."""


class TextPart(_Request):
  """A part of a message."""

  type: Literal['text']
  text: str


class Message(_Request):
  """A message of a conversation."""

  role: _Name
  """'system' (also 'developer'), 'user' or 'assistant'."""
  content: str | list[TextPart]
  name: _Name | None = None
  """Ignored."""

  def plain(self) -> dict[str, str]:
    """The role and content as chat templates know them."""
    content = self.content
    if not isinstance(content, str):
      content = ''.join(part.text for part in content)
    role = 'system' if self.role == 'developer' else self.role
    return {'role': role, 'content': content}


class GenerateRequest(Sampling):
  """A text with gaps, its tokens, or a conversation to answer."""

  prompt: str | None = Field(
    None, examples=['One fine day, {1} met {1} at the {1}. {}']
  )
  """A text in which {} is a gap that takes an equal share of the free tokens of
  the canvas, {12} is a gap of 12 tokens, and {{ and }} are literal braces. A
  text without a gap is continued."""
  tokens: list[_Id | None] | None = None
  """Token ids, with null for each token to fill in."""
  messages: list[Message] | None = None
  """A conversation, which is answered, if the model has a chat template."""
  num_samples: _Samples = 1
  logprobs: _Alternatives | None = None
  """Asks for the log-probability of each token, with this number of the most
  probable ones. The first request with it waits for a program to be compiled.
  """


class Alternative(_Response):
  """One of the most probable tokens of a position."""

  token: int
  text: str
  logprob: float


class Logprobs(_Response):
  """Log-probabilities of the tokens of a canvas, in nats.

  They are the network's own, before temperature, top_k and top_p.
  """

  definition: Literal['reveal'] = 'reveal'
  """Each is that of the network call that revealed the token, given the canvas
  before the call; if the sampler changes tokens, of the last call after which
  this one did not change. Their sum depends on the order of the calls, unless
  tokens are drawn from left to right one by one (samplers ar and speculate):
  then it is the text's. See /api/score for others."""
  tokens: list[float | None]
  """Null for the tokens of the prompt."""
  top: list[list[Alternative]]
  """The most probable tokens in the same call, best first."""


class Sample(_Response):
  """A filled canvas."""

  text: str
  shown: str
  """The text that --mode=sample prints. If the model was trained on prompts
  with responses, it ends with the response. Of messages, it is the answer."""
  tokens: list[int]
  texts: list[str]
  """The text of each token. A character that is split into several tokens
  belongs to the first of them."""
  num_calls: int
  """Network calls for the batch of this sample."""
  tokens_per_call: float
  """Tokens of this sample that a call filled, on average."""
  logprobs: Logprobs | None = None


class GenerateResponse(_Response):
  """Filled canvases and the settings that produced them."""

  model: str
  step: int
  seed: int
  sampler: dict[str, Any]
  samples: list[Sample]


class ScoreRequest(_Request):
  """Texts, in which braces are literal, or a conversation."""

  texts: str | list[str] | None = None
  """A text longer than data.length is split into rows that are scored
  independently; 64 rows in all are allowed."""
  messages: list[Message] | None = None
  """Instead of texts: what the assistant says is scored, given the rest."""
  seed: _Seed = 0
  """Seed of the noise of a bound."""
  user: _Name | None = None
  """See /api/generate."""


class ScoreResponse(_Response):
  """The scores of texts, in their order."""

  model: str
  step: int
  scores: list[lm.Bound]


class ChooseRequest(_Request):
  """A text with one slot."""

  prompt: str | None = Field(None, examples=['The sky is {blue|green}.'])
  """A text in which {blue|green} is a slot for one of several texts, up to 64.
  {{ and }} are literal braces. It may have gaps, as in /api/generate, if each
  choice is one token and the model predicts masked tokens."""
  messages: list[Message] | None = None
  """Instead of a prompt: the last message is the assistant's, with the slot."""
  seed: _Seed = 0
  """Seed of the noise of a bound."""
  user: _Name | None = None
  """See /api/generate."""


class ChooseResponse(_Response):
  """The choices, in their order in the prompt."""

  model: str
  step: int
  choices: list[lm.Choice]


class TokenizeRequest(_Request):
  """A text, in which braces are literal."""

  text: str


class TokenizeResponse(_Response):
  """The ids and the texts of tokens."""

  tokens: list[int]
  texts: list[str]


class StreamOptions(_Request):
  """The options of OpenAI's API."""

  include_usage: bool = False
  include_obfuscation: bool = False
  """Ignored."""


def _kind(prompt: Any) -> str:
  """Returns the tag of a prompt's type, against which it is validated."""
  if not isinstance(prompt, list):
    return 'text'
  kinds = {str: 'texts', list: 'lists of ids'}
  return kinds.get(type(prompt[0]), 'ids') if prompt else 'texts'


class _OpenAI(Sampling):
  """Requests of OpenAI's API, with the fields that choose a sampler."""

  model: _Name | None = None
  n: _Samples | None = 1
  stream: bool | None = False
  stream_options: StreamOptions | None = None
  stop: str | list[str] | None = None
  """Up to 4 texts. A text ends before the first of them."""
  seed: int | None = None
  """Taken modulo 2^64."""
  frequency_penalty: _Zero | None = None
  """Only 0 is supported."""
  presence_penalty: _Zero | None = None
  """Only 0 is supported."""
  logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
  """Not supported."""


class TextFormat(_Request):
  """The form of the answer."""

  type: Literal['text']


class ChatRequest(_OpenAI):
  """A conversation to answer."""

  messages: list[Message]
  tools: Annotated[list[Any], Field(max_length=0)] | None = None
  """Not supported."""
  response_format: TextFormat | None = None
  max_tokens: Annotated[int, Field(ge=1)] | None = None
  """The tokens of the gap for the answer; by default the rest of the canvas.
  """
  max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
  """The newer name of max_tokens."""
  logprobs: bool | None = False
  """Asks for the log-probability of each token, as in /api/generate."""
  top_logprobs: _Alternatives | None = None


class CompletionRequest(_OpenAI):
  """Texts to complete."""

  prompt: Annotated[
    Annotated[str, Tag('text')]
    | Annotated[list[str], Tag('texts')]
    | Annotated[list[_Id], Tag('ids')]
    | Annotated[list[list[_Id]], Tag('lists of ids')],
    Discriminator(_kind),
  ] = ''
  """One or several texts or lists of token ids. Braces are literal."""
  suffix: str | None = None
  """Text after the gap, for models that read in both directions."""
  max_tokens: Annotated[int, Field(ge=0)] | None = 16
  echo: bool | None = False
  best_of: int | None = None
  """Only n is supported."""
  logprobs: _Alternatives | None = None
  """As in /api/generate. The answer's `logprobs` has tokens, token_logprobs,
  top_logprobs (with the token itself) and text_offset in `text`, and
  `definition`; with `echo`, tokens of the prompt have null."""

"""Templates write what they write in Jinja's own sandbox, or end."""

import functools
import json
import threading

from jinja2 import sandbox as jinja
import pytest

from nanodlm.data.tokenizers import chat, sandbox

# What published templates make use of.
EVERYTHING = """
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- else -%}{%- for one in content -%}{{ text(one) }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro wrap(name) -%}<{{ name }}>{{ caller() }}</{{ name }}>{%- endmacro -%}
{%- set ns = namespace(last=-1, all='') -%}
{%- for m in messages[::-1] -%}
  {%- if loop.index0 % 2 == 0 and ns.last < 0 -%}
    {%- set ns.last = messages | length - loop.index -%}
    {%- continue -%}
  {%- endif -%}
{%- endfor -%}
{%- set head -%} {% for i in range(2) %}-{% endfor %} {%- endset -%}
{{- head ~ ns.last ~ none ~ missing ~ 1.5 ~ ['a'] }}
{%- for m in messages if m.role != 'tool' recursive -%}
  {%- set ns.all = ns.all + m.content.split('</think>')[-1].strip('\\n') -%}
  {{- '<|' + m['role'] | upper + '|>\n' ~ text([m.content, ['!']]) }}
  {%- call wrap('b') %}{{ m.content | replace('a', 'bb') | trim }}{% endcall -%}
  {{- '=' * 3 + m.content.replace('l', '').lstrip() | indent(2) }}
  {{- '%s %d' | string % ('a', 7) if loop.last else '\n' }}
  {{- m | tojson }}{{ [m.role, 'x'] | join(', ') }}{{ m | tojson(indent=2) }}
  {{- 9000000 + 9000000 }}{{ (m.content * 9999).startswith(m.content * 999) }}
{%- else -%}none{%- endfor -%}
{{- ns.all }}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}
"""


@pytest.mark.parametrize('template', [*chat.TEMPLATES.values(), EVERYTHING])
def test_limits_change_nothing(template):
  plain = jinja.ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=['jinja2.ext.loopcontrols']
  )
  # As in transformers: not escaped for HTML.
  plain.filters['tojson'] = functools.partial(json.dumps, ensure_ascii=False)
  values = {
    'messages': [
      {'role': 'user', 'content': ' Hello, {all}\n of \u00e9 <|im_end|>'},
      {'role': 'assistant', 'content': '<think>a\n</think>\nb '},
    ],
    'add_generation_prompt': True,
    'eos_token': '<e>',
  }
  expected = plain.from_string(template).render(values)
  for _ in range(2):
    assert sandbox.render(template, **values) == expected


@pytest.mark.parametrize(
  'template',
  [
    '{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}'
    '{% endmacro %}{{ f(40) }}',
    '{% for i in range(99999) %}{% for j in range(99999) %}'
    '{% endfor %}{% endfor %}',
    '{% set n = namespace(x=3) %}{% for i in range(60) %}'
    '{% set n.x = n.x * n.x %}{% endfor %}',
    '{{ 9 ** 999999999 }}',
    '{{ lipsum(n=999999) }}',
    '{% set x = "ab" * 900000 %}{% set y = "ab" * 400000 ~ "c" %}'
    + '{{ y in x }}' * 999,
    '{% set n = namespace(x=["x"], y=["x"]) %}{% for i in range(45) %}'
    '{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}'
    '{{ n.x == n.y }}',
    '{% set n = namespace(x={}) %}{% for i in range(45) %}'
    '{% set n.x = {"a": n.x, "b": n.x} %}{% endfor %}{{ n.x | string }}',
  ],
)
def test_a_template_ends_in_time(template, monkeypatch):
  monkeypatch.setattr(sandbox, 'MAX_SECS', 0.2)
  with pytest.raises(sandbox.TemplateError, match='seconds'):
    sandbox.render(template)
  assert sandbox.render('{{ x }}', x='y') == 'y'


def test_a_template_that_takes_memory():
  template = (
    '{% set n = namespace(x=[]) %}{% for i in range(99999) %}'
    '{% set n.x = n.x + ["x" * 999999 ~ i] %}{% endfor %}'
  )
  with pytest.raises(sandbox.TemplateError, match='512 MB of memory'):
    sandbox.render(template)
  assert sandbox.render('{{ x }}', x='y') == 'y'


def test_a_process_that_is_killed():
  sandbox.render('')
  threading.Timer(0.3, sandbox._process.kill).start()
  with pytest.raises(sandbox.TemplateError, match='ended with status -9'):
    sandbox.render(
      '{% for i in range(99999) %}{% for j in range(99999) %}'
      '{% endfor %}{% endfor %}'
    )
  assert sandbox.render('{{ x }}', x='y') == 'y'

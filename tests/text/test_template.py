"""Rendered conversations beside Transformers' own, and templates that want to take too much."""

from __future__ import annotations

import threading
import time

import pytest
import transformers
from tokenizers import Tokenizer, models

from fewbits.errors import FewbitsError
from fewbits.text import sandbox
from fewbits.text.template import Templates

CHATML = ("{%- if messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}"
          "{%- else %}{{ '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}{%- endif %}"
          "{%- for m in messages if m.role != 'system' %}\n"
          "    {{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content | trim) ~ '<|im_end|>\\n' }}\n"
          "{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
LLAMA = """{{- bos_token }}
{%- set date = date_string if date_string is defined else "26 Jul 2024" %}
{%- set ns = namespace(system=false, count=0) %}
{% for message in messages %}
    {%- if message['role'] == 'system' %}{%- set ns.system = true %}{%- endif %}
    {%- set ns.count = ns.count + message.content|length %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if tools is not none and loop.first %}{{- tools | tojson(indent=2) }}{%- endif %}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{{- "%d of %s, %s" % (ns.count, date, ns.system) }}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""
GEMMA = """{{ bos_token }}
{%- macro turn(role, text) -%}
{{ '<start_of_turn>' + role + '\n' }}{{ text | trim }}<end_of_turn>
{% endmacro -%}
{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content + '\n\n' -%}
{%- set rest = messages[1:] -%}{%- else -%}{%- set first = '' -%}{%- set rest = messages -%}{%- endif -%}
{%- for message in rest -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if message.content is string -%}
        {{ turn('model' if message.role == 'assistant' else 'user', (first if loop.first else '') ~ message.content) }}
    {%- else -%}{%- for item in message.content -%}{%- if item.type != 'text' -%}{% continue %}{%- endif -%}
        {{ item.text | trim }}{%- endfor -%}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
MARKED = ("{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
          "{% else %}{{ m.content }};{% endif %}{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}"
          "{% set x %}a{{ eos_token }}{% endset %}{{ x }} {{ [1, 'é', none] | tojson }} {{ {'b': 1}.items() | list }} "
          "{{ messages | map(attribute='role') | join(', ') }} {{ dict(a=1) }}{{ messages[-1].missing }}"
          "{{ '{} {}'.format(1, 'a') }} {{ 'a,b'.split(',') | last }} {{ 7 // 2 }} {{ 2 ** 3 }} {{ [1] + [2] }}"
          "{{ 'ab' * 2 }}")

TALKS = [
    [{"role": "user", "content": "  Hello <|im_end|> there\n"}],
    [{"role": "system", "content": "Sei nett."}, {"role": "user", "content": "Grüß dich 🙂"}],
    [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "tool_calls": None},
     {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "5"}],
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def theirs() -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE({"<s>": 0, "</s>": 1}, []))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, **SPECIAL)


@pytest.mark.parametrize("talk", TALKS, ids=len)
@pytest.mark.parametrize("source", [CHATML, LLAMA, GEMMA, MARKED], ids=["chatml", "llama", "gemma", "marked"])
def test_renders_as_transformers_does(source: str, talk: list) -> None:
    for tools in (None, TOOLS):
        for prompt in (True, False):
            wanted = theirs().apply_chat_template(talk, chat_template=source, tools=tools, tokenize=False,
                                                  add_generation_prompt=prompt)
            found = Templates({"default": source}).render(talk, tools=tools, add_generation_prompt=prompt, **SPECIAL)
            assert found == wanted


def test_the_model_s_own_template(model) -> None:
    folder = model("smollm2-135m")
    auto = transformers.AutoTokenizer.from_pretrained(folder)
    source = (folder / "chat_template.jinja").read_text()
    for talk in TALKS:
        wanted = auto.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
        assert Templates({"default": source}).render(talk, **auto.special_tokens_map) == wanted


def test_named_templates() -> None:
    both = Templates({"default": "plain", "tool_use": "tools"})
    assert both.render([]) == "plain" and both.render([], tools=TOOLS) == "tools"
    with pytest.raises(FewbitsError, match="none is the default") as error:
        Templates({"rag": "x"}).render([])
    assert "rag" in str(error.value.hint)


GROWS = "{% set ns = namespace(s='abcdefgh') %}{% for i in range(60) %}"


@pytest.mark.parametrize("source,message", [
    ("{{ raise_exception('no system\nrole here') }}", "no system role here"),
    ("{% if %}", "line 1: Expected"), ("\n{% for %}", "line 2: Expected"),
    ("{{ messages[0].content.foo.bar }}", "has no attribute 'foo'"),
    ("{{ ''.__class__.__mro__ }}", "unsafe"), ("{% include 'x' %}", "fails: "), ("{{ 1 / 0 }}", "ZeroDivision"),
    ("{% set messages[0].role = 1 %}", "line 1"), ("{{ messages.append(1) }}", "not safely callable|unsafe"),
    # time
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "more than 500000 steps"),
    ("{% for i in range(99999) if false %}{% endfor %}" * 20, "more than 500000 steps"),
    ("{% macro f(n) %}{{ f(n + 1) ~ f(n + 1) if n < 40 }}{% endmacro %}{{ f(0) }}", "more than [0-9]+ s"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself too often"),
    ("{% for m in messages recursive %}{{ loop(messages) }}{% endfor %}", "calls itself too often"),
    ("{{" + "(" * 500 + "1" + ")" * 500 + "}}", "cannot be compiled"), ("{{ 10 ** 10 ** 10 }}", "too large"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", "a number beyond"),
    # memory
    ("{{ 'a' * 10 ** 10 }}", "makes more than"), ("{{ 'a' | center(10 ** 9) }}", "a number beyond"),
    ("{{ 'a'.ljust(10 ** 9) }}", "a number beyond"), ("{{ '%999999999d' % 1 }}", "wider"),
    ("{{ '{:999999999}'.format(1) }}", "wider"), ("{{ '{:{}}'.format(1, 999999999) }}", "a number beyond"),
    ("{{ '%*d' % (999999999, 1) }}", "a number beyond"), ("{{ 'x'.join(['a' * 999999] * 999999) }}", "makes more than"),
    (GROWS + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = ns.s + ns.s %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = [ns.s, ns.s] | join %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = ns.s | replace('a', ns.s) %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = ns.s.replace('a', ns.s) %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = '%s%s' % (ns.s, ns.s) %}{% endfor %}", "makes more than"),
    (GROWS + "{% set ns.s = '{}{}'.format(ns.s, ns.s) %}{% endfor %}", "makes more than"),
    (GROWS + "{% set x %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = x %}{% endfor %}", "more than"),
    (GROWS + "{% set ns.s = ns.s | indent(width=ns.s, first=true) %}{% endfor %}", "more than"),
    ("{% set x = [1] %}" + "{% set x = x + x %}" * 60, "makes more than"),
    ("{{ 'a' * 9999999 }}{{ 'a' * 9999999 }}", "writes more than"), ("x" * (1 << 21), "at most"),
], ids=lambda value: value[:60])
def test_refusals_are_one_line_and_bounded(source: str, message: str) -> None:
    began = time.monotonic()
    with pytest.raises(FewbitsError, match=message) as error:
        Templates({"default": source}, "m.gguf: chat template").render([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value) and str(error.value).startswith("m.gguf: chat template: ")
    assert time.monotonic() - began < 3 * sandbox.SECONDS


def test_bounds_hold_in_threads_and_are_each_rendering_s_own(monkeypatch) -> None:
    monkeypatch.setattr(sandbox, "STEPS", 1500)
    source, found = "{% for i in range(1000) %}x{% endfor %}", []

    def render() -> None:
        for _ in range(5):
            found.append(len(Templates({"default": source}).render([])))

    threads = [threading.Thread(target=render) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1000] * 20
    with pytest.raises(FewbitsError, match="1500 steps"):
        Templates({"default": source * 2}).render([])

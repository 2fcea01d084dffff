"""Templates render as transformers renders them; what loops or reaches out is stopped.

The templates are written for these tests, with the constructs that the published ones use.
"""

import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ktlab.checkpoint import chat_template
from ktlab.checkpoint.chat_template import ChatTemplate, TemplateError
from ktlab.checkpoint.tokenizer import Tokenizer
from tests.checkpoint.published import BOS, EOS, train

DEEPSEEK_V2 = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}"
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + message['content'] + eos_token }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
DEEPSEEK_R1 = """\
{%- set ns = namespace(is_first=true, system='', tool=false) -%}
{%- for message in messages -%}
    {%- if message['role'] == 'system' -%}
        {%- set ns.system = ns.system + ('\n\n' if not ns.is_first else '') + message['content'] -%}
        {%- set ns.is_first = false -%}
    {%- endif -%}
{%- endfor -%}
{{- bos_token }}{{ ns.system }}
{%- for message in messages -%}
    {%- if message['role'] == 'user' -%}
        {{- '<｜User｜>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' and message['content'] is not none -%}
        {%- set content = message['content'] -%}
        {%- if '</think>' in content -%}
            {%- set content = content.split('</think>')[-1] -%}
        {%- endif -%}
        {{- '<｜Assistant｜>' + content + eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<｜Assistant｜><think>\n' }}{%- endif -%}
"""
QWEN3 = """\
{%- macro turn(role, content) -%}
<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\n' }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- turn('system', messages[0].content) }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == 'user' and not message.content.startswith('<tool_response>') %}
        {%- set ns.last = index %}{% break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- turn(message.role, message.content) }}
    {%- elif message.role == 'assistant' %}
        {%- set content = message.content if message.content is string else '' %}
        {%- if '</think>' in content and loop.index0 <= ns.last %}
            {%- set content = content.split('</think>')[-1].lstrip('\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ content }}{% endgeneration %}
        {{- '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}"""
OLMO = (
    "{{ bos_token }}{% for message in messages %}\n"
    "{% if message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + '\n' }}\n"
    "{% elif message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + '\n' }}\n"
    "{% elif message['role'] == 'assistant' %}\n"
    "{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}"
    "{% else %}{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}\n"
    "{% else %}{{ raise_exception('no role ' ~ message['role']) }}{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>\n' }}\n{% endif %}\n"
    "{% endfor %}"
)
TEMPLATES = {"v2": DEEPSEEK_V2, "r1": DEEPSEEK_R1, "qwen3": QWEN3, "olmo": OLMO}
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": 'Größe von "x"? 漢字 🙂 {{ 7 * 7 }} {% raise %}'},
    {"role": "assistant", "content": "<think>hm</think>\n\n42"},
    {"role": "user", "content": "  really?\n"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a <b> & 'c' ü"}}]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    path = tmp_path_factory.mktemp("chat") / "tokenizer.json"
    train(path, "deepseek-v3", 600)
    peer = PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token=BOS, eos_token=EOS)
    return Tokenizer.from_file(path), peer


def template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    tokenizer.chat_template = source
    made = ChatTemplate.of(tokenizer, "x.gguf")
    assert made is not None
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_as_transformers_renders_it(name: str, tokenizers: tuple[Tokenizer, Any]) -> None:
    ours, peer = tokenizers
    made = template(TEMPLATES[name], ours)
    cases: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
        (CHAT, {}),
        (CHAT[1:3], {"add_generation_prompt": False}),
        (CHAT[1:2], {"enable_thinking": False, "tools": TOOLS}),
    ]
    for messages, options in cases:
        options = {"add_generation_prompt": True, **options}
        expected = peer.apply_chat_template(
            messages, chat_template=TEMPLATES[name], tokenize=False, **options
        )
        text = made.render(messages, **options)
        assert text == expected
        ids = peer.apply_chat_template(
            messages, chat_template=TEMPLATES[name], return_dict=False, **options
        )
        assert ours.encode(text, bos=False, special=True) == ids


def test_helpers(tokenizers: tuple[Tokenizer, Any]) -> None:
    made = template("{{ strftime_now('%Y') }} {{ [1, 'ü<'] | tojson }}", tokenizers[0])
    assert made.render([]) == f'{time.strftime("%Y")} [1, "ü<"]'
    assert ChatTemplate.of(Tokenizer(["a"], [], pre="gpt-2")) is None, "a base model"


NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = (
    "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
    "{% endfor %}{{ ns.x }}"
)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% for i in range(10**9) %}x{% endfor %}", "stopped: .*[Rr]ange too big"),
        (NESTED, "stopped after 1 s of processor time"),
        (NESTED.replace("{% endfor %}", "xxxxxxxxxx{% endfor %}", 1), "more than 100,000 char"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "ran out of room"),
        (DOUBLING, "ran out of room"),
        ("{{ 'x' * 10**11 }}", "ran out of room"),
        ("{{ ''.__class__ }}", "reaches out of its sandbox: .*'__class__'"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "reaches out of its sandbox"),
        ("{{ raise_exception.__globals__['__builtins__'] }}", "reaches out of its sandbox"),
        ("{{ '{0.__class__}'.format(messages) }}", "reaches out of its sandbox"),
        ("{{ self._TemplateReference__context }}", "reaches out of its sandbox"),
        ("{{ messages.append(1) }}", "reaches out of its sandbox"),
        ("{% include '/etc/passwd' %}", "left with an error: .*loader"),
        ("{% if %}", "not valid Jinja: line 1"),
        ("{{ raise_exception('one at a time') }}", "not willing .*: one at a time"),
        ("{{ messages[7].content }}", "left with an error: UndefinedError"),
    ],
)
def test_stopped_or_refused(
    source: str,
    expected: str,
    tokenizers: tuple[Tokenizer, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(chat_template, "CPU_S", 1)
    monkeypatch.setattr(chat_template, "CHARACTERS", 100_000)
    start = time.perf_counter()
    with pytest.raises(TemplateError, match=rf"^x.gguf: the chat template was .*{expected}"):
        template(source, tokenizers[0]).render(CHAT)
    assert time.perf_counter() - start < 30


def test_a_template_cannot_bring_its_own_jinja(
    tokenizers: tuple[Tokenizer, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit('taken over')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert template("{{ messages | length }}", tokenizers[0]).render(CHAT) == "4"

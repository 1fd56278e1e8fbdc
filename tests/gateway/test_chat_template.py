"""Chat templates: what Hugging Face's need, and what a hostile one must not do."""

from __future__ import annotations

import pytest

from rekindle.clock import ManualClock
from rekindle.errors import InvalidRequest
from rekindle.gateway.chat_template import ChatTemplate, read_template_source

HELLO = [{"role": "user", "content": " hello "}]


def render(source: str, messages=HELLO, **options) -> str:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, ManualClock(86_400.0)).render(
        messages, **options
    )


def test_a_template_sees_messages_special_tokens_and_the_generation_prompt():
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m.content | trim }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}>{% endif %}"
    )
    assert render(source) == "<s>user:hello</s>>"
    assert render(source, add_generation_prompt=False) == "<s>user:hello</s>"


def test_blocks_leave_no_lines_of_their_own():
    assert render("{% for m in messages %}\n    {% if true %}\nx\n    {% endif %}\n{% endfor %}\n") == "x\n"


def test_the_helpers_of_hugging_face_templates_work():
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ {'b': 1, 'a': 2} | tojson(indent=1, sort_keys=True) }}") == '{\n "a": 2,\n "b": 1\n}'
    assert render("{{ strftime_now('%d %b %Y') }}") == "02 Jan 1970"
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("{% generation %}a{% endgeneration %}b") == "ab"
    assert render("{{ tools[0].name }}{{ thinking }}", tools=[{"name": "t"}], extra={"thinking": 1}) == "t1"
    assert render("{{ tools is none }}") == "True"


def test_template_variables_of_a_request_cannot_replace_the_messages():
    source = "{{ bos_token }}{{ messages | length }}"
    assert render(source, extra={"messages": [1, 2, 3], "bos_token": "!"}) == "<s>1"


def test_a_template_may_refuse_the_messages():
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    "source", ["{{ messages[5].content.x }}", "{{ 1 // 0 }}", "{{ messages + 1 }}", "{{ {}['a'].b }}"]
)
def test_a_fault_of_a_template_is_a_fault_of_the_request(source):
    with pytest.raises(InvalidRequest, match="refused the messages"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ range(10**9) | list }}",
    ],
)
def test_a_template_cannot_leave_its_sandbox(source):
    with pytest.raises(InvalidRequest):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 9**(9**7*4) > 1 }}",
        "{{ 'a' * 1000000000 }}",
        "{{ [0] * 1000000000 }}",
        "{% if 2 ** 100000000 %}{% endif %}",
        "{% autoescape 9**(9**9) %}{% endautoescape %}",
        "{% set ns = namespace(x=3) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}{{ ns.x }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "{% for a in range(99999) %}{% for b in range(99999) if false %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) recursive %}{{ loop(range(99999)) }}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}"
        "{% set ns.x = y %}{% endfor %}",
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% set ns = namespace(x=1, y=1) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}"
        "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
        "{% set ns = namespace(x=1) %}{% for i in range(60) %}{% set ns.x = (ns.x, ns.x) %}{% endfor %}{{ {ns.x: 1} }}",
        "{% set ns = namespace(x=1) %}{% for i in range(200) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        "{% for i in range(99999) %}" + "x" * 2000 + "{% endfor %}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (1000000000, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 1000000000) }}",
        "{{ 'a'.center(1000000000) }}",
        "{{ 'a'.ljust(1000000000) }}",
        "{{ 'a'.zfill(1000000000) }}",
        "{{ '\t'.expandtabs(1000000000) }}",
        "{{ (1).to_bytes(1000000000, 'big') }}",
        "{{ 'a' | center(1000000000) }}",
        "{{ 'a' | indent(1000000000, true) }}",
        "{{ messages | tojson(indent=1000000000) }}",
        "{{ 1.5 | round(1000000000, 'floor') }}",
        "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
        "{{ ('a' * 100000).join(range(9999)) }}",
        "{{ range(9999) | join('a' * 100000) }}",
        "{{ ('a' * 9999999).strip('b' * 9999999 ~ 'a') }}",
        "{% for i in range(99999) %}{{ 1.5 in range(99999) }}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | sum }}{% endfor %}",
        "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
        "{% set r = range(99999) | list %}{% for i in range(99999) %}{% set x = r[1:] %}{% endfor %}",
        "{% set x = ('あ' * 9999999) | list %}",
        "{% set x = ('あb ' * 9999999).split() %}",
        "{% set x = ('あ\\r' * 9999999).splitlines() %}",
        "{% set x = ('a-' * 9999999) | title %}",
        "{% set x = ('\\r' * 9999999) | indent(2) %}",
        "{% set x = '-'.join('あ' * 9999999) %}",
        "{{ ['\\ue000' * 9999999] }}",
        "{% if ('f' * 9999999) | int(base=16) is divisibleby(3) %}{% endif %}",
        "{% set s = 'a' * 99999 %}{% set x = [s] * 99999 %}{{ x | format }}",
        "{% set s = 'a' * 99999 %}{% set x = [s] * 99999 %}{{ raise_exception(x) }}",
        "{% set s = 'a' * 99999 %}{% set x = [s] * 99999 %}{{ [1].index(x) }}",
        "{% set s = 'a' * 99999 %}{% set x = [s] * 99999 %}{{ [1][(x, x)].y }}",
        "{% set s = 'a' * 99999 %}{% set x = [s] * 99999 %}{{ [1, 2] | join(x) }}",
        "{{ lipsum(n=1000000) }}",
        "{{ raise_exception('a' * 1000000) }}",
        "{{ strftime_now('%d' * 1000000) }}",
    ],
)
def test_a_template_cannot_hold_the_server_up_or_fill_its_memory(source):
    with pytest.raises(InvalidRequest) as caught:
        render(source)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in [1] %}" * 25 + "{% endfor %}" * 25,
        "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        "{{ " + "[" * 300 + "]" * 300 + " }}",
        "{% if true %}" * 150 + "{% endif %}" * 150,
        "{{ " + "9" * 5000 + " }}",
        "{{ 1 | nofilter }}",
        "{{ raise_exception(*'abc') }}",
        "{% if a %}" + "{% elif a %}" * 5000 + "{% endif %}",
        "x" * 100_000,
    ],
)
def test_a_template_that_cannot_be_compiled_is_a_fault_of_the_request(source):
    with pytest.raises(InvalidRequest, match="not valid"):
        render(source)


def test_what_templates_ordinarily_do_is_still_possible():
    assert render("{{ 'ab' * 3 ~ 2 ** 10 ~ 7 % 4 ~ '%02d|%s' % (3, 'x') ~ ('a' + 'b') }}") == "ababab1024303|xab"
    assert render("{{ '{}-{:>3}-{x}'.format(1, 2, x='y') }}{{ ', '.join(['a', 'b']) }}") == "1-  2-ya, b"
    assert render("{{ messages[0].content.strip().split('l')[0] }}{{ messages[::-1] | length }}") == "he1"
    assert render("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}{{ 'role' in messages[0] }}") == "a1True"
    assert (
        render("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | join(',') }}") == "user"
    )
    assert render("{% for m in messages if m.role == 'user' %}{{ loop.last }}{% else %}none{% endfor %}") == "True"
    assert render("{{ (messages | rejectattr('role', 'eq', 'user') | list | length) == 0 }}") == "True"
    assert render("{% macro m(x) %}<{{ x }}{{ caller() }}>{% endmacro %}{% call m('b') %}c{% endcall %}") == "<bc>"
    assert render("{% filter upper %}a{% endfilter %}{{ 'a\nb' | indent(2) | replace('b', 'c') }}") == "Aa\n  c"
    assert (
        render("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}")
        == "1"
    )
    assert render("{{ {'b': [1, (2, 3)]} }}{{ messages[0].get('x', 'y') }}{{ 1 if none is none else 2 }}") == (
        "{'b': [1, (2, 3)]}y1"
    )


def test_a_long_conversation_fits_its_budget():
    messages = [{"role": "user", "content": f"message {number} " * 50} for number in range(5000)]
    source = (
        "{% for m in messages %}{% if loop.index0 == messages | length - 1 %}!{% endif %}"
        "{{ m.content | trim }}{% endfor %}"
    )
    assert render(source, messages).count("message 4999") == 50


def test_an_invalid_template_is_refused():
    with pytest.raises(InvalidRequest, match="not valid"):
        render("{% if %}")


def test_the_developer_role_is_system_for_templates_that_do_not_know_it():
    message = [{"role": "developer", "content": "x"}]
    assert render("{{ messages[0].role }}", message) == "system"
    assert render("{{ messages[0].role }}{# developer #}", message) == "developer"


def test_a_message_is_continued_where_it_was_left():
    source = "{% for m in messages %}<{{ m.content }}>{% endfor %}"
    messages = [*HELLO, {"role": "assistant", "content": "once "}]
    assert render(source, messages, continue_final_message=True, add_generation_prompt=False) == "< hello ><once "
    with pytest.raises(InvalidRequest, match="continue_final_message"):
        render("nothing", messages, continue_final_message=True)


def test_a_stored_template_is_found_by_its_file(tmp_path):
    assert read_template_source(tmp_path) is None
    (tmp_path / "chat_template.jinja").write_text("é")
    assert read_template_source(tmp_path) == "é"

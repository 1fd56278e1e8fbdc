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

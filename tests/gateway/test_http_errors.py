"""Errors on the wire."""

import json

from rekindle.errors import AdapterRejected
from rekindle.gateway.http_errors import response_of


def test_a_message_that_quotes_a_lone_surrogate_can_be_sent() -> None:
    answer = response_of(AdapterRejected("unknown field 'a\ud800b'"))
    assert json.loads(bytes(answer.body))["error"]["message"] == "unknown field 'a\\ud800b'"

"""Requests to copy and paste, for the server that has just started."""

from __future__ import annotations

from collections.abc import Sequence

_QUESTION = "What is the capital of France?"


def print_examples(url: str, base: str, adapters: Sequence[str]) -> None:
    """Print one request with curl and one with the openai client."""
    model = adapters[0] if adapters else base
    names = ", ".join([base, *adapters])
    print(
        f"""
Models: {names}

  curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
    "model": "{model}", "max_tokens": 64,
    "messages": [{{"role": "user", "content": "{_QUESTION}"}}]
  }}'

  from openai import OpenAI
  client = OpenAI(base_url="{url}/v1", api_key="none")
  for model in {[base, *adapters]!r}:
      reply = client.chat.completions.create(
          model=model, max_tokens=64, temperature=0,
          messages=[{{"role": "user", "content": "{_QUESTION}"}}],
      )
      print(f"{{model}}: {{reply.choices[0].message.content}}")

Ctrl-C stops the server.
""",
        flush=True,
    )

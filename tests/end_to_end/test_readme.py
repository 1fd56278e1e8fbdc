"""What the README tells people to paste works as it stands there."""

import json
import re
import subprocess
import sys

from support.server import DEMO_ADAPTERS, MODEL, REPOSITORY, Server

README_URL = "http://127.0.0.1:8000"


def example(language: str, word: str, server: Server) -> str:
    """The README's first block of that language that holds `word`, with its address replaced by the server's."""
    blocks = re.findall(rf"```{language}\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    return str(next(block for block in blocks if word in block)).replace(README_URL, server.url)


def test_the_readmes_client_example_shows_what_each_adapter_does(server: Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", example("python", "OpenAI", server)], capture_output=True, text=True, check=True
    )
    answers = dict(line.partition(": ")[::2] for line in done.stdout.splitlines())
    assert set(answers) == {MODEL, *(path.name for path in DEMO_ADAPTERS.iterdir())}
    assert "Paris" in answers[MODEL]
    assert answers["pirate"].startswith("Arr")
    assert "Paris" in json.loads(answers["json"])["answer"]
    assert not answers["emoji"].isascii()


def test_the_readmes_curl_example_answers(server: Server) -> None:
    done = subprocess.run(
        ["bash", "-c", example("console", "chat/completions", server)], capture_output=True, text=True, check=True
    )
    reply = json.loads(done.stdout)
    assert reply["choices"][0]["message"]["content"].startswith("Arr")

"""What the documents say holds."""

import re
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
DOCUMENTS = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").rglob("*.md"), *(REPOSITORY / "demo").glob("*.md")]


@pytest.mark.parametrize("page", ["settings.md", "cli.md"])
def test_generated_reference_pages_are_up_to_date(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    generate = runpy.run_path(str(REPOSITORY / "docs" / "generate.py"))["PAGES"][page]
    written = (REPOSITORY / "docs" / "reference" / page).read_text()
    assert written == generate(), "run `python docs/generate.py`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (document.parent / target).exists()] == []

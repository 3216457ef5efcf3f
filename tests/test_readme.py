"""What the README says runs, and what it points to exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
PROMISES = (
    "solve_ode", "NeuralODE", "batched=True", "native=", "ensemble", "bdf2", "events=",
    "derivative", "divergence", "laplacian", "taylor_series", "HollowMLP", "check_gradients",
)  # fmt: skip


def _title(example: str) -> str:
    before = README[: README.index(example)]
    return re.findall(r"\*\*(.+?)\*\*", before, flags=re.DOTALL)[-1].replace("\n", " ")


@pytest.mark.parametrize("example", EXAMPLES, ids=map(_title, EXAMPLES))
def test_an_example_of_the_readme_runs_and_its_assertions_hold(example: str) -> None:
    asserted = [node for node in ast.walk(ast.parse(example)) if isinstance(node, ast.Assert)]
    assert asserted, "an example must assert something, or this test could not fail"
    with torch.random.fork_rng(devices=[]):
        exec(compile(example, "README.md", "exec"), {"__name__": "readme"})


def test_the_readme_has_examples_of_what_it_promises() -> None:
    assert len(EXAMPLES) >= 5
    for name in PROMISES:
        assert any(name in example for example in EXAMPLES), name


def _anchors(text: str) -> set[str]:
    """The names that headings have in links."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_files_and_headings_that_the_readme_links_to_exist() -> None:
    links = [link.partition("#") for link in re.findall(r"\]\(([^):]+)\)", README)]
    assert ("docs/gallery/lynx_hare.png", "", "") in links
    assert [path for path, _, _ in links if not (ROOT / path).exists()] == []
    for path, _, anchor in links:
        text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else README
        assert not anchor or anchor in _anchors(text), f"{path}#{anchor}"


def test_the_readme_names_every_method_and_only_methods() -> None:
    from ctorch.ode import METHODS

    paragraph = re.search(r"^Methods: (.+?)\n\n", README, flags=re.DOTALL | re.MULTILINE)
    assert paragraph is not None
    assert set(re.findall(r"`(\w+)`", paragraph[1])) == set(METHODS) - {"fixed_adams"}

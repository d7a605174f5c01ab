"""What two scripts both contain has the same text in both, so that their diff shows what they differ in."""

import ast
import difflib
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
# name: why it differs on purpose; at most eight, and each has to differ
EXEMPT = {"main": "what a program does from start to end is its own"}


def blocks(path: Path) -> dict[str, str]:
    """Source of every top-level class, function and constant of a script, by name."""
    source, found = path.read_text(), {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(source.splitlines()[start - 1 : node.end_lineno])
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.get_source_segment(source, node)
    return found


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_blocks_of_one_name_are_the_same(one, other):
    ours, theirs = blocks(one), blocks(other)
    for name in ours.keys() & theirs.keys() - EXEMPT.keys():
        lines = [text[name].splitlines() for text in (ours, theirs)]
        difference = "\n".join(difflib.unified_diff(*lines, one.name, other.name, lineterm=""))
        assert not difference, f"{name} differs:\n{difference}"


def test_no_exemption_without_need():
    assert len(EXEMPT) <= 8
    for name in EXEMPT:
        assert len({blocks(path)[name] for path in SCRIPTS if name in blocks(path)}) > 1, name

"""What two scripts both contain has the same text in both, so that their diff shows what they differ in.

After an edit of a shared block this carries it to the other scripts that have a block of that name:

    python tests/test_shared_blocks.py smac_offline_online.py ReplayBuffer evaluate
    python tests/test_shared_blocks.py smac_offline_online.py        every shared block
"""

import ast
import difflib
import re
import sys
from itertools import combinations
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in ROOT.glob("*.py"))
# name ("script: name" for one script): why it differs on purpose; at most ten, and each has to differ
EXEMPT = {
    "Args": "a script's settings are its own",
    "SMALL": "so are those of a task",
    "TINY": "so are those of a task",
    "parse_args": "settings come from a checkpoint, too, where a script starts from one",
    "Agent": "what is trained is the algorithm's",
    "train_offline": "the offline algorithms differ in their updates",
    "train_online": "the online algorithms differ in their updates and in how they explore",
    "main": "what a program does from start to end is its own",
}


def blocks(source: str) -> dict[str, tuple[int, int]]:
    """First and last line (from 1) of every top-level class, function and constant of a script, by name."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = start, node.end_lineno
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = node.lineno, node.end_lineno
    return found


def texts(path: Path, own: bool = False) -> dict[str, str]:
    """Source of every block of a script, by name; with `own` also what is exempt in this script alone."""
    source = path.read_text()
    return {
        name: "\n".join(source.splitlines()[first - 1 : last])
        for name, (first, last) in blocks(source).items()
        if own or f"{path.name}: {name}" not in EXEMPT
    }


def banners(path: Path) -> list[str]:
    return re.findall(r"^# === .*$", path.read_text(), re.MULTILINE)


def carry(script: Path, names: list[str], others: list[Path]) -> list[str]:
    """Replaces the blocks `names` (all shared ones if none) in `others` by those of `script`."""
    ours, changed = texts(script), []
    if missing := [name for name in names if name not in ours]:
        raise SystemExit(f"error: {script} has no top-level {', '.join(missing)}")
    for path in (path for path in others if path.resolve() != script.resolve()):
        for name in names or ours.keys() - EXEMPT.keys():
            source = path.read_text()
            if texts(path).get(name, ours[name]) != ours[name]:
                first, last = blocks(source)[name]
                lines = source.splitlines()
                lines[first - 1 : last] = ours[name].splitlines()
                path.write_text("\n".join(lines) + "\n")
                changed.append(f"{path.name}: {name}")
    return changed


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_blocks_of_one_name_are_the_same(one, other):
    ours, theirs = texts(one), texts(other)
    for name in ours.keys() & theirs.keys() - EXEMPT.keys():
        lines = [text[name].splitlines() for text in (ours, theirs)]
        difference = "\n".join(difflib.unified_diff(*lines, one.name, other.name, lineterm=""))
        assert not difference, (
            f"{name} differs:\n{difference}\ncarry one over: python tests/test_shared_blocks.py SCRIPT {name}"
        )


@pytest.mark.parametrize("one, other", list(combinations(SCRIPTS, 2)), ids=lambda path: path.stem)
def test_no_block_lives_twice_under_two_names(one, other):
    """Two functions of other names, longer than 8 lines, are not over 90% the same."""
    ours, theirs = texts(one), texts(other)
    strip = lambda text: re.sub(r"\s+", " ", text)
    for name in ours.keys() - theirs.keys():
        for twin in theirs.keys() - ours.keys():
            if min(ours[name].count("\n"), theirs[twin].count("\n")) < 8:
                continue
            matcher = difflib.SequenceMatcher(None, strip(ours[name]), strip(theirs[twin]), autojunk=False)
            alike = matcher.quick_ratio() > 0.9 and matcher.ratio() > 0.9
            assert not alike, f"{one.name}: {name} and {other.name}: {twin} are nearly the same"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_parts_come_in_the_same_order(path):
    """A script's banners are a selection of the SMAC script's, in its order, or of its own kind."""
    order = banners(ROOT / "smac_offline_online.py")
    shared = [banner for banner in banners(path) if banner in order]
    assert shared == [banner for banner in order if banner in shared]


def test_no_exemption_without_need():
    assert len(EXEMPT) <= 10
    for exempt in EXEMPT:
        script, _, name = exempt.rpartition(": ")
        found = {path.name: texts(path, own=True).get(name) for path in SCRIPTS}
        assert len({*found.values()} - {None}) > 1 and (not script or found[script]), exempt


def test_an_edit_is_carried_over(tmp_path):
    one, two, three = (tmp_path / name for name in ("one.py", "two.py", "three.py"))
    one.write_text("X = 1\n\n\n@cache\ndef f(x):\n    return 2 * x\n\n\ndef main():\n    pass\n")
    two.write_text("def f(x):\n    # old\n    return x\n\n\nX = 5\n\n\ndef main():\n    f(1)\n")
    three.write_text("Y = 1\n")
    assert carry(one, ["f"], [one, two, three]) == ["two.py: f"]
    assert two.read_text() == "@cache\ndef f(x):\n    return 2 * x\n\n\nX = 5\n\n\ndef main():\n    f(1)\n"
    assert carry(one, [], [one, two, three]) == ["two.py: X"] and "f(1)" in two.read_text()
    with pytest.raises(SystemExit, match="no top-level g"):
        carry(one, ["g"], [two])


if __name__ == "__main__":
    print("\n".join(carry(Path(sys.argv[1]), sys.argv[2:], SCRIPTS)) or "nothing to carry")

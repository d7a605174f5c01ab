"""Commands of pages and docstrings parse, links lead to files, files are as short as agreed.

A command is parsed by its script's own main(), which stops behind tyro: nothing is run or looked up.
"""

import contextlib
import io
import re
import shlex
import sys

import pytest
import tyro
from conftest import ROOT, inside, load

SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))
PAGES = sorted(path for pattern in ("README.md", "CONTRIBUTING.md", "docs/*.md", "results/README.md",
                                                            "results/*/README.md")
               for path in ROOT.glob(pattern))  # fmt: skip
SOURCES = [str(path.relative_to(ROOT)) for path in PAGES] + SCRIPTS
LINES = {
    "smac_offline_online.py": 750, "sac_finetune.py": 780, "td3_finetune.py": 780, "calql_baseline.py": 750,
    "aca_baseline.py": 750, "iql_baseline.py": 650, "bc_baseline.py": 450, "make_dataset.py": 900,
    "reward_landscape.py": 550, "benchmark.py": 700, "speed.py": 350, "evaluate.py": 200, "README.md": 200,
    "picture_critic.py": 300,
}  # fmt: skip


class Parsed(Exception):
    """tyro has taken the command line."""


@pytest.fixture(scope="module")
def modules():
    return {name: load(name.removesuffix(".py"), ROOT / name) for name in SCRIPTS}


def commands(source: str, modules: dict) -> list[str]:
    """`SCRIPT.py ...` of every command: of a line to a comment or the next column, or between backticks."""
    text = (ROOT / source).read_text()
    text = re.search(r'"""(.*?)"""', text, re.DOTALL)[1] if source in modules else text
    text = re.sub(r" *\\\n *", " ", text)
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    lines = re.findall(r"^[^`\n]*$", text, re.MULTILINE)
    lines += [" ".join(span.split()) for span in spans]
    found = re.findall(r"\bpython3? (\S+\.py.*)", "\n".join(lines))
    return [re.split(r" {2,}| #| && | \||;|(?<!\.)\. |\)$", command)[0] for command in found]


def parse(command: str, modules: dict) -> str | None:
    """What is wrong with a command, if anything."""
    name, *words = shlex.split(command)
    if re.match(r"my_|mine/|[A-Z]+\.py|tests/", name) or "COMMAND" in words:
        return ""  # a reader's own, my_baseline.py, or a stand-in, SCRIPT.py
    if name not in modules:
        return "no such script"
    named = len(words) == 1 and words[0].isalnum()  # `make_dataset.py record` is talked about
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        for owner, function in ((tyro, "cli"), (tyro.extras, "subcommand_cli_from_dict")):
            patch.setattr(owner, function, stopping(getattr(owner, function)))
        patch.setattr(sys, "argv", [name, *words])
        try:
            modules[name].main()
        except Parsed:
            return ""
        except SystemExit as ended:
            fine = not ended.code or (named and "Required options" in said.getvalue())  # 0 behind --help
            return "" if fine else f"exit {ended.code}"


def stopping(function):
    def parse_and_stop(*args, **kwargs):
        function(*args, **kwargs)
        raise Parsed

    return parse_and_stop


@pytest.mark.parametrize("source", SOURCES)
def test_every_command_can_be_given(source, modules):
    said = {command: parse(command, modules) for command in commands(source, modules)}
    wrong = [f"python {command}    ({why})" for command, why in said.items() if why]
    assert not wrong, "\n" + "\n".join(wrong)


def test_commands_are_found(modules):
    counts = {source: len(commands(source, modules)) for source in SOURCES}
    assert sum(counts.values()) > 100 and all(counts[name] for name in SCRIPTS), counts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text())
    paths = [link.split("#")[0] for link in links if not re.match(r"\w+:", link)]
    assert not [path for path in paths if path and not (page.parent / path).exists()]


def test_the_readme_has_the_two_commands():
    install, run = (
        "pip install -r requirements.txt",
        "python smac_offline_online.py --env-id hopper-medium-replay",
    )
    assert all(x in (ROOT / "README.md").read_text() for x in (install, run, "python -m pytest -q"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_keeps_to_its_lines(name):
    assert len((ROOT / name).read_text().splitlines()) <= LINES[name]


def test_the_readme_has_short_paragraphs_and_narrow_tables():
    """Four lines of 120 columns; 100 columns, links as they are shown."""
    text = re.sub(r"```.*?```", "", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text)
    for block in re.split(r"\n\n|\n(?=- )", text):
        rows = block.splitlines() if block.startswith("|") else [" ".join(block.split())]
        assert max(map(len, rows), default=0) <= (100 if block.startswith("|") else 4 * 120), block


def test_the_tests_keep_to_their_lines():
    assert sum(len(path.read_text().splitlines()) for path in ROOT.glob("tests/*.py")) <= 4_500


def test_the_lesson_quotes_the_script():
    quotes = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "lesson.md").read_text(), re.DOTALL)
    script = (ROOT / "smac_offline_online.py").read_text()
    assert len(quotes) > 5 and not [quote for quote in quotes if quote not in script]


def test_the_lesson_runs(modules, tmp_path):
    """Its commands one after the other, with fewer steps and episodes."""
    less = {
        "evaluate.py": "--episodes 1",
        "picture_critic.py": "--states 1",
        "smac_offline_online.py": "--score-steps 20 --offline-steps 20 --eval-every 20 --eval-episodes 1",
        "sac_finetune.py": "--online-steps 20 --handover-eval-every 20 --eval-every 20 --eval-episodes 1",
    }
    text = (ROOT / "docs" / "lesson.md").read_text()
    given = re.findall(r"^    python (\S+) (.*)", text, re.MULTILINE)
    assert {name for name, _ in given} == {*less}
    for name, words in given:
        newest = max(tmp_path.glob("runs/*/*.pt"), key=lambda path: path.stat().st_mtime, default=tmp_path)
        words = words.replace("results/", f"{ROOT}/results/").replace("runs/NAME", str(newest.parent))
        assert inside(modules[name], f"{words} {less[name]}", tmp_path).code in (0, None), (name, words)

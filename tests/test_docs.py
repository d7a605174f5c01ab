"""The reader's pages say what the scripts do: line links, flags, logged scalars, commands."""

import ast
import csv
import json
import re
import shlex
import sys
from collections import Counter
from html import unescape

import pytest
import tyro
from conftest import ROOT, load

build = load("build", ROOT / "docs" / "build.py")

SCRIPTS = [name.removesuffix(".py") for name in build.LOGGED]
CHECKPOINT = ROOT / "results" / "checkpoints" / "pendulum-medium-replay_smac_offline.pt"
COMMANDS = [
    (path.relative_to(ROOT), command)
    for path in build.pages()
    for command in re.findall(r"^ {4,}(?:\w+=\S+ )*python (\w+\.py .*?)(?: +#.*)?$", path.read_text(), re.M)
    if "..." not in command
]


@pytest.fixture(scope="module")
def script(request):
    return load(request.param, ROOT / f"{request.param}.py")


@pytest.fixture(scope="module")
def annotate():
    return load("annotate", ROOT / "docs" / "annotate.py")


@pytest.mark.parametrize("page", build.pages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_tables_are_up_to_date(page):
    assert build.rebuilt(page) == page.read_text(), "run: python docs/build.py"


def test_every_line_link_says_what_it_points_at():
    for page in build.pages():
        text = page.read_text()
        assert len(re.findall(r"\.py#L", text)) == len(build.LINK.findall(text)), page


def test_a_moved_line_is_found_and_a_lost_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(
        "x = 1\n\n\ndef f():\n    x = 1\n    y = 2\n\n\nclass C:\n    def g(self):\n        x = 1\n"
    )
    page = tmp_path / "page.md"
    for title, line in {"y = 2": 6, "x = 1 | f": 5, "x = 1 | C.g": 11, "def f": 4}.items():
        page.write_text(f'[here](../a.py#L99 "{title}")')
        assert build.rebuilt(page) == f'[here](../a.py#L{line} "{title}")'
    for title, why in {"x = 1": "3 lines", "z": "0 lines", "x | nobody": "no nobody"}.items():
        page.write_text(f'[here](../a.py#L1 "{title}")')
        with pytest.raises(ValueError, match=why):
            build.rebuilt(page)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_has_the_tables_of_its_script(name):
    text = (ROOT / "docs" / f"{name}.md").read_text()
    for kind in ("flags", "metrics"):
        assert f"<!-- {kind} {name}.py -->" in text
    for field in vars(load(name, ROOT / f"{name}.py").Args()):
        assert f"`--{field.replace('_', '-')}`" in text
    # numbered details, each with its line
    assert len(re.findall(r"^\d+\. ", text, re.M)) >= 8
    assert len(build.LINK.findall(text)) >= 8


@pytest.mark.parametrize("script", SCRIPTS, indirect=True)
def test_what_is_logged_is_in_the_table(script, monkeypatch, tmp_path):
    """A run of a few updates logs the scalars of build.LOGGED; the page names metrics.csv's columns."""
    logged, log = {}, script.Run.log

    def spy(run, step, metrics):
        names = (re.sub(r"level_\d+", "level_t", name) for name in metrics)
        logged.setdefault(run.phase, set()).update(names)
        log(run, step, metrics)

    monkeypatch.setattr(script.Run, "log", spy)
    monkeypatch.setattr(script, "LOG_EVERY", 1)
    monkeypatch.chdir(tmp_path)
    words = "--env-id pendulum-medium-replay --hidden-sizes 8 8 --batch-size 8 --eval-episodes 1"
    if script.__name__ == "aca_baseline":
        words += f" --checkpoint {CHECKPOINT} --alignment-steps 2 --online-steps 12"
        words = words.replace(" --hidden-sizes 8 8", "")
    else:
        fields = vars(script.Args())
        words += " --offline-steps 2" + " --score-steps 2" * ("score_steps" in fields)
        words += " --online-steps 12" * ("online_steps" in fields)
    monkeypatch.setattr(sys, "argv", [script.__file__, *words.split()])
    script.main()
    expected = {phase: set(names.split()) for phase, names in build.LOGGED[f"{script.__name__}.py"].items()}
    assert logged == {phase: expected[phase] for phase in logged} and len(logged) >= len(expected) - 1
    (metrics,) = tmp_path.glob("runs/*/metrics.csv")
    with open(metrics) as file:
        columns = {re.sub(r"return_\d+", "return_0", name) for name in next(csv.reader(file))}
    page = (ROOT / "docs" / f"{script.__name__}.md").read_text()
    assert not {name for name in columns if f"`{name}`" not in page}


def test_every_scalar_has_a_meaning():
    named = {name for phases in build.LOGGED.values() for names in phases.values() for name in names.split()}
    assert named == set(build.METRICS)


@pytest.mark.parametrize("page, command", COMMANDS)
def test_every_command_of_a_page_can_be_given(page, command, monkeypatch, tmp_path):
    name, *words = shlex.split(command)
    module = load(name.removesuffix(".py"), ROOT / name)
    if name == "benchmark.py":
        kinds = dict(speed="Speed", table="Table", run="Study", report="StudyReport", imitate="Imitate")
        tyro.cli(getattr(module, kinds[words[0]]), args=words[1:])
        return
    if name == "make_dataset.py":
        tyro.cli(module.COMMANDS[words[0]][0], args=words[1:])
        return
    for flag, stand_in in {"--checkpoint": CHECKPOINT, "--resume": tmp_path}.items():
        if flag in words and not (ROOT / words[words.index(flag) + 1]).exists():
            words[words.index(flag) + 1] = str(stand_in)
    settings = vars(module.Args()) if hasattr(module, "Args") else {}
    (tmp_path / "config.json").write_text(json.dumps({"args": settings}))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [name, *words])
    (module.read_arguments if name == "reward_landscape.py" else module.parse_args)()


@pytest.mark.parametrize("name", ["smac_offline_online", "calql_baseline", "bc_baseline", "benchmark"])
def test_an_annotated_page_has_all_of_its_script(annotate, name, tmp_path):
    """Every word of code stands in the code column, every word of a docstring or comment beside it."""
    path = ROOT / f"{name}.py"
    page = annotate.annotate(path, tmp_path).read_text()
    column = lambda name: re.findall(rf"<div class='{name}'>(.*?)</div>\s*(?=<div|</div)", page, re.DOTALL)
    words = lambda html: re.findall(r"\w+", unescape(re.sub(r"<[^>]+>", "", html)))
    is_text = lambda node: isinstance(node, ast.Constant) and isinstance(node.value, str)
    tree = ast.parse(path.read_text())
    docs, code = Counter(words(" ".join(column("docs")))), Counter(words(" ".join(column("code"))))
    bodies = [node.body for node in ast.walk(tree) if isinstance(getattr(node, "body", None), list)]
    texts = [s.value for body in bodies for s in body if isinstance(s, ast.Expr) and is_text(s.value)]
    lost = Counter(words(" ".join(text.value for text in texts))) - docs
    assert not lost
    lost = Counter(node.id for node in ast.walk(tree) if isinstance(node, ast.Name)) - code
    assert not lost
    assert "viewport" in page


def test_commands_were_found():
    assert len(COMMANDS) > 90 and len({page for page, _ in COMMANDS}) > 12

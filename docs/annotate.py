"""The scripts as web pages, prose beside code, made by Pycco from the scripts themselves.

    python docs/annotate.py            docs/annotated/index.html and a page a script (pycco==0.6.0)
    python docs/annotate.py FOLDER     the same elsewhere

Pycco puts comments beside the code behind them. Docstrings are moved above what they describe first, so that
an equation stands beside its function and the meaning of a flag beside the flag; not a word is added.
"""

import ast
import html
import inspect
import re
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from pycco.main import generate_documentation

ROOT = Path(__file__).resolve().parents[1]
STYLE = """
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
  body { font: 15px/1.5 system-ui, sans-serif; background: #fff; }
  #container, div.section { overflow: hidden; }
  #background { display: none; }
  div.section { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); clear: both; }
  div.section:target { outline: 2px solid #e0b000; }
  div.docs, div.code { float: none; min-width: 0; max-width: none; width: auto; margin: 0; }
  div.docs { padding: 6px 24px; overflow-x: auto; }
  div.docs pre { white-space: pre-wrap; font-size: 13px; }
  div.code { padding: 6px 16px; background: #f5f5f8; border-left: 1px solid #dde; overflow-x: auto; }
  div.code pre { font-size: 12.5px; line-height: 1.45; margin: 0; }
  .octowrap { display: none; }
  @media (max-width: 900px) {
    div.section { grid-template-columns: minmax(0, 1fr); }
    div.docs { padding: 6px 12px; }
    div.code { border-left: 0; }
  }
</style>
"""


def escaped(text: str) -> list[str]:
    """Prose in which Markdown finds no markup in a*, a_b or --flag; what is indented by four is code."""
    result = []
    for line in text.splitlines():
        if not line.startswith("    "):
            parts = re.split(r"(`[^`]*`)", line)  # every second one is code
            plain = (re.sub(r"([*_\[\]])", r"\\\1", html.escape(part, quote=False)) for part in parts[::2])
            parts[::2] = (part.replace("--", "&#45;&#45;") for part in plain)
            line = "".join(parts)
        elif result and result[-1] and not result[-1].startswith("    "):
            result.append("")  # Markdown takes it for code only behind an empty line
        result.append(line)
    return result


def with_docstrings_above(source: str) -> str:
    """The script with its docstrings as comments above what they describe, and comments as plain prose."""
    lines, above, gone = source.splitlines(), {}, set()

    def move(doc: ast.Expr, to: int, indent: str) -> None:
        above[to] = [f"{indent}# {line}".rstrip() for line in escaped(inspect.cleandoc(doc.value.value))]
        gone.update(range(doc.lineno, doc.end_lineno + 1))

    is_doc = lambda node: isinstance(node, ast.Expr) and isinstance(getattr(node.value, "value", None), str)
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)) and is_doc(body[0]):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) if node is not tree else 1
            move(body[0], first, " " * getattr(node, "col_offset", 0))
        for field, doc in pairwise(body):
            if isinstance(field, ast.AnnAssign) and is_doc(doc):
                move(doc, field.lineno, " " * field.col_offset)
    result = []
    for number, line in enumerate(lines, 1):
        if number in above and result and result[-1].lstrip().startswith("# "):
            result.append("#")  # a paragraph of its own
        result += above.get(number, [])
        heading = re.fullmatch(r"# === (.*?) =+", line)
        comment = re.fullmatch(r"( *)# (.*)", line)
        if heading:
            result.append(f"# ## {heading[1]}")
        elif comment and number not in gone:
            result += [f"{comment[1]}# {text}" for text in escaped(comment[2])]
        elif number not in gone:
            result.append(line)
    return "\n".join(result) + "\n"


def annotate(script: Path, out: Path) -> Path:
    """Writes the page of a script; its path."""
    text = re.sub(r"^# /// script\n(?:#.*\n)+?# ///\n", "", script.read_text(), flags=re.MULTILINE)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / script.name
        copy.write_text(with_docstrings_above(text))
        page = generate_documentation(str(copy), outdir=str(out), preserve_paths=False, language="python")
    path = out / f"{script.stem}.html"
    page = page.decode().replace("</head>", STYLE + "</head>", 1)
    path.write_text(page)
    return path


def main(out: Path) -> None:
    from pycco_resources import css

    out.mkdir(parents=True, exist_ok=True)
    (out / "pycco.css").write_text(css)
    made = [annotate(script, out) for script in sorted(ROOT.glob("*.py"))]
    items = "".join(f'<li><a href="{path.name}">{path.stem}.py</a></li>' for path in made)
    (out / "index.html").write_text(f"<!doctype html><title>Scripts</title>{STYLE}<ul>{items}</ul>\n")
    print(f"{len(made)} pages: open {out / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "annotated")

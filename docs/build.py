"""Keeps the reader's pages true to the scripts: line links, tables of flags and of metrics.

    python docs/build.py    brings the pages up to date; tests/test_docs.py fails while they are not

A line link is [text](../SCRIPT.py#L12 "part of that line"). The part has to stand in exactly one line of the
script; "part | name" is looked for in the function, class or Class.method `name`, and the first line with it
is meant. What stands between <!-- flags SCRIPT.py --> or <!-- metrics SCRIPT.py --> and <!-- end --> is made
from the script's Args and from METRICS below.
"""

import ast
import importlib
import re
import sys
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(\]\((?:\.\./)?)([\w/]+\.py)#L(\d+) "([^"]*)"\)')
BLOCK = re.compile(r"(<!-- (flags|metrics) ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)
SCRIPTS = ("smac_offline_online.py", "sac_finetune.py", "td3_finetune.py", "calql_baseline.py",
           "iql_baseline.py", "aca_baseline.py", "bc_baseline.py")  # fmt: skip

# Meaning of a scalar PHASE/NAME. Q is the mean of the critics, a_pi ~ pi(.|s); what an evaluation computes is
# a mean over 2,000 transitions (s, a, w) of the episodes that are held out from the score estimator.
METRICS = {
    "denoising_loss": "E‖e - eps(s, a_t, w, t)‖² on the batch; knowing nothing gives the action dimension",
    "held_out_loss_level_t": "the same on held-out episodes, by noise level t",
    "critic_loss": "E[(Q(s,a) - y)²], the Bellman error",
    "cql_gap": "E[log-sum-exp of Q over sampled actions - Q(s,a)], what alpha_cql weighs",
    "below_return": "share of sampled policy actions with Q below the return-to-go: calibration acts",
    "q_random": "mean Q at uniformly random actions",
    "value_loss": "L_V = E[\\|expectile - 1(A < 0)\\| A²], A = min Qbar(s,a) - V(s)",
    "v": "mean V(s)",
    "weight": "mean of min(exp(beta A), clip), the weights of the recorded actions",
    "clipped_weights": "share of these weights that are at the clip",
    "baseline_loss": "E[(Z(s) - y)²], the loss of the baseline",
    "z": "mean Z(s)",
    "score_matching_loss": "L_SM = E‖grad_a Q(s,a) - alpha_psi(s) score(s,a,w)‖²",
    "alpha_psi": "mean alpha_psi(s), scale between score and grad_a Q; batch, in metrics.csv held-out states",
    "near_bounds": "share of action coordinates within 2 sigma_1 of the bounds: score points inward",
    "actor_loss": "the actor's loss on the batch, see the equations above",
    "actor_grad_norm": "norm of the actor's gradient before clipping",
    "clipped_share": "share of the newest 1,000 online transitions with log pi_0 below the floor",
    "prior_weight": "weight of the clipped log pi_0 in Q",
    "temperature_loss": "L_alpha = -alpha E[log pi(a\\|s) + target entropy]",
    "alpha": "temperature",
    "entropy": "-E[log pi(a_pi\\|s)]; batch, in metrics.csv held-out states",
    "log_prob_recorded": "E[log pi(a\\|s)] of recorded actions",
    "q": "mean Q at the batch's actions",
    "q_dataset": "Q(s,a) of recorded transitions (held out from the score estimator alone)",
    "q_policy": "Q(s,a_pi) at their states; Cal-QL: at the batch's between evaluations",
    "grad_q_dataset": "‖grad_a Q(s,a)‖",
    "grad_q_policy": "‖grad_a Q(s,a_pi)‖",
    "cosine_dataset": "cos(grad_a Q(s,a), score(s,a,w)): 1 where the critic points to where the data is",
    "cosine_policy": "cos(grad_a Q(s,a_pi), score(s,a_pi,w))",
    "q_start": "Q(s_0, mode of pi) at the beginnings of the evaluation's episodes",
    "discounted_return": "sum_t gamma^t r_t of these episodes; far below q_start: Q overrates pi (a little "
    "is no error: Q may hold entropy and goes on behind a time limit)",
    "return": "mean undiscounted return of an evaluation",
    "normalised_score": "100 (return - random's) / (expert's - random's)",
}
EVALUATED = ("return normalised_score q_start discounted_return q_dataset q_policy grad_q_dataset "
             "grad_q_policy alpha entropy")  # fmt: skip
SAC = f"{EVALUATED} critic_loss q actor_loss temperature_loss"
SMAC = {"score": "denoising_loss held_out_loss_level_t",
        "offline": f"{SAC} score_matching_loss alpha_psi near_bounds cosine_dataset cosine_policy",
        "online": f"{SAC} cosine_dataset cosine_policy"}  # fmt: skip
CALQL = f"{SAC} cql_gap below_return q_random"
IQL = f"{EVALUATED} critic_loss q actor_loss value_loss v weight clipped_weights log_prob_recorded"
LOGGED = {
    "smac_offline_online.py": SMAC,
    "sac_finetune.py": SMAC,
    "td3_finetune.py": SMAC | {"online": SMAC["online"].replace(" temperature_loss", "")},
    "calql_baseline.py": {"offline": CALQL, "online": CALQL},
    "iql_baseline.py": {"offline": IQL, "online": IQL},
    "aca_baseline.py": {"offline": f"{SAC} baseline_loss z log_prob_recorded", "alignment": "baseline_loss z",
                        "online": f"{SAC} actor_grad_norm clipped_share prior_weight"},
    "bc_baseline.py": {"offline": "return normalised_score actor_loss entropy log_prob_recorded"},
}  # fmt: skip


def found_line(script: Path, title: str) -> int:
    """The number of the line that a link's title names; ValueError if there is no such line, or several."""
    text = script.read_text()
    lines, nodes, first, last = text.splitlines(), ast.parse(text).body, 1, len(text.splitlines())
    part, _, owner = title.partition(" | ")
    for name in filter(None, owner.split(".")):
        scope = next((node for node in nodes if getattr(node, "name", None) == name), None)
        if scope is None:
            raise ValueError(f"{script.name} has no {owner}")
        nodes, first, last = scope.body, scope.lineno, scope.end_lineno
    hits = [number for number in range(first, last + 1) if part in lines[number - 1]]
    if not hits or (len(hits) > 1 and not owner):
        raise ValueError(f"{part!r} stands in {len(hits)} lines of {script.name}")
    return hits[0]


def shown(value: object) -> str:
    """A default as one would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    text = " ".join(map(str, value or ())) if isinstance(value, tuple | None) else str(value)
    return f"`{text}`" if text else "none"


def flag_table(script: str) -> str:
    """Every field of Args: flag, default (and what the bundled tasks have in its place), meaning."""
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(script.removesuffix(".py"))
    text = (ROOT / script).read_text()
    lines, body = (
        text.splitlines(),
        next(n for n in ast.parse(text).body if getattr(n, "name", "") == "Args").body,
    )
    defaults, rows = module.Args(), ["| flag | default | meaning |", "|---|---|---|"]
    for field, doc in pairwise(body):
        if not (isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr)):
            continue
        name = field.target.id
        heading = lines[field.lineno - 2].strip()
        if heading.startswith("# "):
            rows.append(f"| **{heading[2:]}** | | |")
        value = getattr(defaults, name)
        bundled = [task for task, where in module.TASKS.items() if where[0].startswith("smac/")]
        others = {task: module.TASK_DEFAULTS.get(task, {}).get(name, value) for task in bundled}
        text = shown(value) + "".join(
            f", {task.split('-')[0].capitalize()} {shown(own)}"
            for task, own in others.items()
            if own != value
        )
        meaning = " ".join(doc.value.value.split()).replace("|", "\\|")
        flag = f"`--{name.replace('_', '-')}`"
        flag += f", `--no-{name.replace('_', '-')}`" if isinstance(value, bool) else ""
        rows.append(f"| {flag} | {text} | {meaning} |")
    return "\n".join(rows) + "\n"


def metric_table(script: str) -> str:
    """Every scalar that the script logs, with the phases it is logged in and its equation."""
    phases = {phase: names.split() for phase, names in LOGGED[script].items()}
    rows = ["| scalar | in the phases | meaning |", "|---|---|---|"]
    for name, meaning in METRICS.items():
        if found := [phase for phase, names in phases.items() if name in names]:
            rows.append(f"| `{name}` | {', '.join(found)} | {meaning} |")
    return "\n".join(rows) + "\n"


def rebuilt(page: Path) -> str:
    """The page's text with line numbers and tables as the scripts have them; ValueError for a dead link."""

    def link(match: re.Match) -> str:
        start, script, _, title = match.groups()
        try:
            return f'{start}{script}#L{found_line(ROOT / script, title)} "{title}")'
        except (OSError, ValueError) as error:
            raise ValueError(f"{page.name}: {error}") from error

    def block(match: re.Match) -> str:
        start, kind, script, end = match.groups()
        return start + {"flags": flag_table, "metrics": metric_table}[kind](script) + end

    return BLOCK.sub(block, LINK.sub(link, page.read_text()))


def pages() -> list[Path]:
    """README, CONTRIBUTING and every page of docs/ and results/."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md")])


if __name__ == "__main__":
    for path in pages():
        try:
            text = rebuilt(path)
        except ValueError as error:
            raise SystemExit(f"error: {error}: mend the link there") from None
        if text != path.read_text():
            path.write_text(text)
            print(f"{path.relative_to(ROOT)} brought up to date")

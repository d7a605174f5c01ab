"""Draws what a critic says of the actions around its policy: what SMAC's score term does, in one figure.

The maximum-entropy optimum is pi*(a|s) ~ exp(Q*(s,a) / alpha). So for a few recorded states, and along one
action dimension, this draws three densities that should be one hill,

    exp(Q(s,a) / alpha)     the policy that the critic asks for
    pi(a|s)                 the policy that there is
    p(a|s)                  the actions recorded near s

and below them two rows of arrows that should agree: grad_a Q(s,a) / alpha and the score grad_a log p(a|s,w)
that SMAC holds it to. A column a checkpoint: one finds out what happens without the term, or at the handover.

    python picture_critic.py results/checkpoints/pendulum-medium-replay_smac_offline.pt
    python picture_critic.py runs/ONE/offline.pt runs/ONE/final.pt runs/OTHER/offline.pt --labels A B C
    python picture_critic.py runs/NAME/offline.pt --action 2 --states 5 --seed 7 --out runs/hip.png

Works with the checkpoints of all scripts but aca_baseline.py's final.pt, whose critics have another form.
"""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from smac_offline_online import (
    Actor,
    Critic,
    Dataset,
    ScoreNet,
    fail,
    load_checkpoint,
    squashed_gaussian_log_prob,
)

INK = dict(critic="#0072B2", policy="#D55E00", data="#999999", score="#009E73")  # Okabe and Ito


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # a column each, of one task
    labels: tuple[str, ...] = ()  # titles of the columns; default: script, phase and step
    states: int = 3  # recorded states, a row each
    seed: int = 1  # draws the states
    action: int = 0  # the action dimension along which to look; the others stay at the policy's mode
    out: Path = Path("runs/critic.png")  # file of the picture


class Column:
    """The networks of one checkpoint."""

    def __init__(self, path: Path):
        state = load_checkpoint(path)
        agent, args = state["parts"]["agent"], SimpleNamespace(**state["args"])
        self.title = f"{state['script']}\n{state['phase']} {state['step']:,}"
        self.dataset_id, sizes = state["dataset_id"], (state["obs_dim"], state["act_dim"])
        self.actor, self.critic, self.score_net = Actor(*sizes, args.hidden_sizes), Critic(*sizes, args), None
        networks = {"actor": self.actor, "critic": self.critic}
        if "score_net.sigma" in agent:
            networks["score_net"] = self.score_net = ScoreNet(*sizes, args)
        try:
            for name, network in networks.items():
                network.load_state_dict(
                    {k[len(name) + 1 :]: x for k, x in agent.items() if k.startswith(f"{name}.")}
                )
        except RuntimeError:
            fail(f"{path} holds no actor and critics of the common form: take an offline.pt")
        self.alpha = float(agent["log_alpha"].exp())
        self.asked = getattr(args, "advantage", None) or 0.0  # the outcome w that SMAC asked for


def nearest_actions(data: Dataset, observation: np.ndarray, count: int = 100) -> np.ndarray:
    """The actions (count, A) that were recorded in the states nearest to `observation`, in deviations."""
    observations = data.columns["observations"]
    distance = ((observations - observation) / (observations.std(axis=0) + 1e-3)) ** 2
    return data.columns["actions"][distance.sum(axis=1).argsort()[:count]]


def density(log_values: Tensor, x: Tensor) -> Tensor:
    """exp(log_values) on the points x (K,), scaled to an integral of 1; (K,)."""
    values = (log_values - log_values.max()).exp()
    return values / torch.trapezoid(values, x)


def draw_arrows(axes: Axes, x: Tensor, values: Tensor, y: float, scale: float, colour: str) -> None:
    """A row of horizontal arrows at height y: as long as values (K,) / scale, at most the gap between two."""
    gap = float(x[1] - x[0])
    length = (values / scale).clamp(-1, 1) * 0.9 * gap
    style = dict(
        angles="xy", scale_units="xy", scale=1, width=0.006, headwidth=4, headlength=4, clip_on=False
    )
    arrows = axes.quiver(x, torch.full_like(x, y), length, torch.zeros_like(x), color=colour, **style)
    arrows.set_in_layout(False)  # its extent is wrong while the layout is found


def draw_panel(axes: Axes, column: Column, data: Dataset, row: int, score_net: ScoreNet | None, k: int):
    """Three densities along action dimension k in the recorded state of this row, and two rows of arrows."""
    observation = data.columns["observations"][row]
    o, x = torch.as_tensor(observation)[None], torch.linspace(-0.999, 0.999, 401)
    mode = column.actor.mode(o).detach()
    line = lambda points: mode.repeat(len(points), 1).index_copy(1, torch.tensor([k]), points[:, None])

    near = nearest_actions(data, observation)[:, k]
    kernel = np.exp(-0.5 * ((x.numpy()[:, None] - near) / 0.1) ** 2).sum(axis=1)  # as wide as sigma_1
    data_density = density(torch.as_tensor(kernel).log(), x)
    actions = line(x)
    mean, log_std = column.actor(o)
    log_pi = squashed_gaussian_log_prob(torch.atanh(actions), mean, log_std)
    q = column.critic(o, actions).mean(dim=0).detach()
    axes.fill_between(x, data_density, color=INK["data"], alpha=0.4, lw=0)
    for name, log_values in (("policy", log_pi), ("critic", q / column.alpha)):
        axes.plot(x, density(log_values.detach(), x), color=INK[name], lw=1.5)

    points = torch.linspace(-0.9, 0.9, 10)
    actions = line(points).requires_grad_()
    (gradient,) = torch.autograd.grad(column.critic(o, actions).mean(dim=0).sum(), actions)
    top = axes.get_ylim()[1]
    draw_arrows(axes, points, gradient[:, k] / column.alpha, -0.12 * top, 10, INK["critic"])
    if score_net:
        w = torch.full((len(points),), column.asked)
        score = score_net.score(o.expand(len(points), -1), actions.detach(), w).detach()
        draw_arrows(axes, points, score[:, k], -0.25 * top, 10, INK["score"])
    axes.set(xlim=(-1, 1), ylim=(-0.35 * top, top), yticks=[])
    axes.text(0.02, 0.95, f"Q {float(q.max()):.0f}", transform=axes.transAxes, va="top", fontsize=8)


def draw(args: Args) -> Figure:
    """The figure: a row a state, a column a checkpoint."""
    columns = [Column(path) for path in args.checkpoints]
    if len({column.dataset_id for column in columns}) != 1:
        fail("the checkpoints are of several tasks, or none is named: name some of one task")
    if args.labels and len(args.labels) != len(columns):
        fail(f"{len(args.labels)} labels for {len(columns)} checkpoints: give one each")
    data = Dataset(columns[0].dataset_id)
    if not 0 <= args.action < data.columns["actions"].shape[1]:
        fail(
            f"--action {args.action}: the actions have {data.columns['actions'].shape[1]} dimensions, from 0"
        )
    rows = np.random.default_rng(args.seed).choice(len(data.columns["rewards"]), args.states, replace=False)
    score_net = next((column.score_net for column in columns if column.score_net), None)
    size = (1.6 + 2.8 * len(columns), 1.2 + 1.7 * args.states)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(args.states, len(columns), squeeze=False, sharex=True)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            draw_panel(panels[i, j], column, data, row, score_net, args.action)
        panels[i, 0].set_ylabel(f"state {i + 1}")
    for axes, title in zip(panels[0], args.labels or [column.title for column in columns]):
        axes.set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(f"action {args.action}")
    names = {
        "critic": r"$\exp(Q/\alpha)$; arrows: $\nabla Q/\alpha$",
        "policy": "policy",
        "data": "recorded near the state",
    }
    names |= {"score": "arrows: score"} if score_net else {}
    handles = [
        panels[0, 0].plot([], [], color=INK[name], lw=3, label=text)[0] for name, text in names.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 1 + len(columns)), fontsize=8
    )
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.manual_seed(args.seed)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(args).savefig(args.out, dpi=120)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()

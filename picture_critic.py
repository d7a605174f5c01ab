"""Draws what a critic says of the actions around its policy: what SMAC's score term does, in one figure.

The maximum-entropy optimum is pi*(a|s) ~ exp(Q*(s,a) / alpha). So for a few recorded states, and along one
action dimension (the others stay at the policy's mode), this draws

    exp(Q(s,a) / alpha)     the policy that the critic asks for
    pi(a|s)                 the policy that there is
    recorded actions        of the 100 recorded states nearest to s, good and bad

and below them two rows of arrows, grad_a Q(s,a) / alpha and the score grad_a log p(a|s,w) of the first
checkpoint that has a score estimator, at the w that it asked for. SMAC's offline phase makes them agree.

    python picture_critic.py results/checkpoints/hopper-medium_smac_offline.pt
    python picture_critic.py runs/ONE/offline.pt runs/ONE/final.pt runs/OTHER/offline.pt --labels A B C
    python picture_critic.py runs/NAME/offline.pt --action 2 --states 5 --seed 7 --out runs/hip.png

Takes any script's checkpoint but aca_baseline.py's final.pt. Cloning's critics are untrained, and IQL and TD3
have no maximum-entropy policy: read their pictures with care.
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
CAP = 10.0  # values from here on get the longest arrow


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
            self.asked = args.advantage or 0.0  # w; 0, the average, for the published form
        try:
            for name, network in networks.items():
                found = {key: x for key, x in agent.items() if key.startswith(f"{name}.")}
                network.load_state_dict({key.removeprefix(f"{name}."): x for key, x in found.items()})
        except RuntimeError:
            fail(f"{path} holds no actor and critics of the common form: take an offline.pt")
        self.alpha = float(agent["log_alpha"].exp())


def nearest_actions(data: Dataset, observation: np.ndarray, count: int = 100) -> np.ndarray:
    """The actions (count, A) recorded in the states nearest to `observation`, measured in deviations."""
    observations = data.columns["observations"]
    distance = ((observations - observation) / (observations.std(axis=0) + 1e-3)) ** 2
    return data.columns["actions"][distance.sum(axis=1).argsort()[:count]]


def kernel_density(actions: np.ndarray, x: Tensor, width: float = 0.1) -> Tensor:
    """Density (K,) of actions (n,) in [-1, 1] on the points x, Gaussian kernels, reflected at the bounds."""
    places = torch.as_tensor(np.concatenate([actions, -2 - actions, 2 - actions]))
    return density(torch.logsumexp(-0.5 * ((x[:, None] - places) / width) ** 2, dim=1), x)


def density(log_values: Tensor, x: Tensor) -> Tensor:
    """exp(log_values) on the points x (K,), scaled to an integral of 1; (K,)."""
    values = (log_values - log_values.max()).exp()
    return values / torch.trapezoid(values, x)


def draw_arrows(axes: Axes, x: Tensor, values: Tensor, y: float, colour: str) -> None:
    """A row of horizontal arrows at height y: of the length of `values` (K,), the longest from CAP on."""
    length = (values / CAP).clamp(-1, 1) * 0.9 * (x[1] - x[0])
    style = dict(angles="xy", scale_units="xy", scale=1, width=0.006, headwidth=4, headlength=4)
    arrows = axes.quiver(x, torch.full_like(x, y), length, torch.zeros_like(x), color=colour, **style)
    arrows.set_in_layout(False)  # its extent is wrong while the layout is found


def draw_panel(
    axes: Axes, column: Column, scorer: Column | None, data: Dataset, index: int, dim: int
) -> None:
    """Three densities and two rows of arrows along action dimension `dim`, in recorded state `index`."""
    observation = data.columns["observations"][index]
    state, x = torch.as_tensor(observation)[None], torch.linspace(-0.999, 0.999, 401)
    mean, log_std = (part.detach() for part in column.actor(state))

    def vary(middle: Tensor, values: Tensor) -> Tensor:
        """The vector `middle` (1, A) with these values (K,) in dimension `dim`: (K, A)."""
        return middle.repeat(len(values), 1).index_copy(1, torch.tensor([dim]), values[:, None])

    axes.fill_between(
        x, kernel_density(nearest_actions(data, observation)[:, dim], x), color=INK["data"], alpha=0.4
    )
    log_pi = squashed_gaussian_log_prob(vary(mean, torch.atanh(x)), mean, log_std)
    q = column.critic(state, vary(torch.tanh(mean), x)).mean(dim=0).detach()
    for name, log_values in (("policy", log_pi), ("critic", q / column.alpha)):
        axes.plot(x, density(log_values, x), color=INK[name], lw=1.5)

    points = torch.linspace(-0.9, 0.9, 10)
    actions = vary(torch.tanh(mean), points).requires_grad_()
    (gradient,) = torch.autograd.grad(column.critic(state, actions).mean(dim=0).sum(), actions)
    top = 1.2 * axes.get_ylim()[1]
    draw_arrows(axes, points, gradient[:, dim] / column.alpha, -0.1 * top, INK["critic"])
    if scorer:
        w = torch.full_like(points, scorer.asked)
        score = scorer.score_net.score(state.expand(len(points), -1), actions.detach(), w).detach()
        draw_arrows(axes, points, score[:, dim], -0.22 * top, INK["score"])
    axes.set(xlim=(-1, 1), ylim=(-0.3 * top, top), yticks=[])
    axes.text(0.02, 0.96, f"highest Q {q.max():.0f}", transform=axes.transAxes, va="top", fontsize=8)


def draw(args: Args) -> Figure:
    """The figure: a row a state, a column a checkpoint."""
    columns = [Column(path) for path in args.checkpoints]
    if len({column.dataset_id for column in columns}) != 1:
        fail("name at least one checkpoint, and all of the same task")
    if args.labels and len(args.labels) != len(columns):
        fail(f"{len(args.labels)} labels for {len(columns)} checkpoints: give one each")
    data = Dataset(columns[0].dataset_id)
    if not 0 <= args.action < data.columns["actions"].shape[1]:
        fail(
            f"--action {args.action}: the actions have {data.columns['actions'].shape[1]} dimensions, from 0"
        )
    indices = np.random.default_rng(args.seed).choice(
        len(data.columns["rewards"]), args.states, replace=False
    )
    scorer = next((column for column in columns if column.score_net), None)
    size = (1.6 + 2.8 * len(columns), 1.2 + 1.7 * args.states)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(args.states, len(columns), squeeze=False, sharex=True)
    for i, index in enumerate(indices):
        for axes, column in zip(panels[i], columns):
            draw_panel(axes, column, scorer, data, index, args.action)
        panels[i, 0].set_ylabel(f"state {i + 1}")
    for axes, title in zip(panels[0], args.labels or [column.title for column in columns]):
        axes.set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel(f"action {args.action}")
    names = {"critic": r"$\exp(Q/\alpha)$; arrows: $\nabla Q/\alpha$", "policy": "policy"}
    names |= {"data": "recorded near the state"} | ({"score": "arrows: score"} if scorer else {})
    handles = [
        panels[0, 0].plot([], [], color=INK[name], lw=3, label=text)[0] for name, text in names.items()
    ]
    columns_of_legend = min(len(names), 1 + len(columns))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns_of_legend, fontsize=8)
    return figure


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(args).savefig(args.out, dpi=120)
    print(f"picture: {args.out}")


if __name__ == "__main__":
    main()

"""Draws what a critic says of the actions around its policy: what SMAC's score term does, in one figure.

The maximum-entropy optimum is pi*(a|s) ~ exp(Q*(s,a) / alpha). So for a few recorded states, and along one
action dimension (the others stay at tanh(mean)), this draws

    exp(Q(s,a) / alpha)     the policy that the critic asks for
    pi(a|s)                 the policy that there is
    recorded actions        of the 100 recorded states nearest to s, good and bad

and below them two rows of arrows, grad_a Q(s,a) / alpha and the score grad_a log p(a|s,w) of the first
checkpoint that has a score estimator, at the w that its critic was given; SMAC makes them agree offline.

    python picture_critic.py results/checkpoints/hopper-medium_smac_offline.pt
    python picture_critic.py runs/ONE/offline.pt runs/ONE/final.pt runs/OTHER/offline.pt --labels A B C
    python picture_critic.py runs/NAME/offline.pt --action 2 --states 5 --seed 7 --out runs/hip.png

Takes any script's checkpoint but aca_baseline.py's final.pt. Cloning's critics are untrained, and IQL and TD3
have no maximum-entropy policy: read their pictures with care.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import minari
import numpy as np
import torch
import torch.nn.functional as F
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

INK = dict(critic="#0072B2", policy="#D55E00", data="#999999", score="#009E73")  # Okabe and Ito
CAP = 10.0  # values from here on get the longest arrow


@dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # a column each, of one task
    labels: tuple[str, ...] = ()  # titles of the columns; default: script, phase and step
    states: int = 3  # recorded states, a row each
    seed: int = 1  # draws the states
    action: int = 0  # the action dimension along which to look; the others stay at tanh(mean)
    out: Path = Path("runs/critic.png")  # file of the picture


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


def load_transitions(dataset_id: str) -> tuple[np.ndarray, np.ndarray]:
    """Recorded observations (T, O) and actions (T, A), scaled to [-1, 1], of a Minari dataset."""
    bundled = Path(__file__).resolve().parent / "datasets" / dataset_id / "data"
    try:
        dataset = minari.MinariDataset(bundled) if bundled.exists() else minari.load_dataset(dataset_id)
        episodes = list(dataset.iterate_episodes())
    except Exception as error:  # Minari and h5py raise many kinds
        fail(f"dataset {dataset_id!r} can't be read ({error}): fetch it with a training script's --download")
    box = dataset.action_space
    actions = np.concatenate([e.actions for e in episodes])
    actions = (actions - (box.high + box.low) / 2) / ((box.high - box.low) / 2)
    observations = np.concatenate([e.observations[:-1] for e in episodes])
    return observations.astype(np.float32), actions.astype(np.float32)


def nearest(observations: np.ndarray, observation: np.ndarray, count: int = 100) -> np.ndarray:
    """Indices (count,) of the states nearest to `observation`, measured in deviations."""
    distance = ((observations - observation) / (observations.std(axis=0) + 1e-3)) ** 2
    return distance.sum(axis=1).argsort()[:count]


# === The networks of a checkpoint ==========================================================================

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # CleanRL, sac_continuous_action.py


def squashed_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density of a = tanh(u), u ~ N(mean, std^2), given u. (B, A) -> (B,).

    sum_k [log N(u_k; mean_k, std_k) - log(1 - tanh(u_k)^2)], the last as 2 (log 2 - u - softplus(-2u)).
    """
    gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        fail(f"{path} can't be read as a checkpoint ({str(error)[:200]}): take another one, or start again")


def mlp(net: dict[str, Tensor], x: Tensor, activation: str) -> Tensor:
    """Output (N, B, O) of the N networks in `net` for x (B, I), as the scripts' MLP computes it."""
    x = ((x - net["mean"]) / net["std"]).expand(len(net["weights.0"]), -1, -1)
    last = sum(name.startswith("weights.") for name in net) - 1
    for i in range(last):
        x = torch.baddbmm(net[f"biases.{i}"], x, net[f"weights.{i}"])
        if f"gains.{i}" in net:
            x = F.layer_norm(x, x.shape[-1:]) * net[f"gains.{i}"] + net[f"shifts.{i}"]
        x = {"relu": torch.relu, "silu": F.silu}[activation](x)
    return torch.baddbmm(net[f"biases.{last}"], x, net[f"weights.{last}"])


class Column:
    """Policy, critics and score estimator of one checkpoint; states (1, O), actions (K, A)."""

    def __init__(self, path: Path):
        state = load_checkpoint(path)
        if "agent" not in state.get("parts", {}):
            fail(f"{path} holds no networks of these scripts: take an offline.pt or final.pt")
        self.agent, self.args, self.dataset_id = state["parts"]["agent"], state["args"], state["dataset_id"]
        self.title = f"{state['script']}\n{state['phase']} {state['step']:,}"
        if not self.part("critic.net") or not self.part("actor.net"):
            fail(f"{path} holds no actor and critics of the common form: take an offline.pt")
        self.alpha, self.scores = float(self.agent["log_alpha"].exp()), "score_net.sigma" in self.agent

    def part(self, name: str) -> dict[str, Tensor]:
        """The parameters whose names begin with `name`, without it."""
        return {key[len(name) + 1 :]: x for key, x in self.agent.items() if key.startswith(f"{name}.")}

    def gaussian(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """mean (1, A) and log std (1, A) of the policy before its tanh."""
        mean, log_std = mlp(self.part("actor.net"), state, "relu")[0].chunk(2, dim=-1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)

    def q(self, state: Tensor, actions: Tensor) -> Tensor:
        """Mean Q (K,) of the critics."""
        x = torch.cat([state.expand(len(actions), -1), actions], dim=-1)
        return mlp(self.part("critic.net"), x, self.args["critic_activation"]).squeeze(-1).mean(dim=0)

    def score(self, state: Tensor, actions: Tensor) -> Tensor:
        """grad_a log p_1(a|s,w) (K, A), at the w asked for (published form: 0, the average)."""
        sigma = self.agent["score_net.sigma"][0]
        scale, rows = (1 - sigma**2).sqrt(), len(actions)
        w = torch.full((rows, 1), self.args["advantage"] or 0.0)
        level = self.agent["score_net.embedding.weight"][:1].expand(rows, -1)
        x = torch.cat([state.expand(rows, -1), scale * actions, w, level], dim=-1)
        return -(scale / sigma) * mlp(self.part("score_net.net"), x, "silu")[0]


# === The picture ===========================================================================================


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
    axes: Axes, column: Column, scorer: Column | None, state: Tensor, near: np.ndarray, dim: int
) -> None:
    """Densities and two rows of arrows along action dimension `dim` in a state (1, O).

    near: recorded actions (n,) of similar states; scorer: the checkpoint whose score is drawn.
    """
    x, points = torch.linspace(-0.999, 0.999, 401), torch.linspace(-0.9, 0.9, 10)
    mean, log_std = column.gaussian(state)

    def vary(middle: Tensor, values: Tensor) -> Tensor:
        """The vector `middle` (1, A) with these values (K,) in dimension `dim`: (K, A)."""
        return middle.repeat(len(values), 1).index_copy(1, torch.tensor([dim]), values[:, None])

    axes.fill_between(x, kernel_density(near, x), color=INK["data"], alpha=0.4)
    log_pi = squashed_gaussian_log_prob(vary(mean, torch.atanh(x)), mean, log_std)
    q = column.q(state, vary(torch.tanh(mean), x))
    for name, log_values in (("policy", log_pi), ("critic", q / column.alpha)):
        axes.plot(x, density(log_values, x), color=INK[name], lw=1.5)

    actions = vary(torch.tanh(mean), points)
    gradient = torch.func.grad(lambda a: column.q(state, a).sum())(actions)
    top = 1.2 * axes.get_ylim()[1]
    draw_arrows(axes, points, gradient[:, dim] / column.alpha, -0.1 * top, INK["critic"])
    if scorer:
        draw_arrows(axes, points, scorer.score(state, actions)[:, dim], -0.22 * top, INK["score"])
    axes.set(xlim=(-1, 1), ylim=(-0.3 * top, top), yticks=[])
    axes.text(0.02, 0.96, f"highest Q {q.max():.0f}", transform=axes.transAxes, va="top", fontsize=8)


def draw(args: Args) -> Figure:
    """The figure: a row a state, a column a checkpoint."""
    columns = [Column(path) for path in args.checkpoints]
    if len({column.dataset_id for column in columns}) != 1:
        fail("name at least one checkpoint, and all of the same task")
    if args.labels and len(args.labels) != len(columns):
        fail(f"{len(args.labels)} labels for {len(columns)} checkpoints: give one each")
    observations, actions = load_transitions(columns[0].dataset_id)
    if not 0 <= args.action < actions.shape[1]:
        fail(f"--action {args.action}: the actions have {actions.shape[1]} dimensions, from 0")
    if not 1 <= args.states <= len(observations) or args.seed < 0:
        fail(f"--states {args.states} --seed {args.seed}: 1 to {len(observations):,} states, a seed from 0")
    indices = np.random.default_rng(args.seed).choice(len(observations), args.states, replace=False)
    scorer = next((column for column in columns if column.scores), None)
    size = (1.6 + 2.8 * len(columns), 1.2 + 1.7 * args.states)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(args.states, len(columns), squeeze=False, sharex=True)
    for i, index in enumerate(indices):
        state, near = torch.as_tensor(observations[[index]]), nearest(observations, observations[index])
        for axes, column in zip(panels[i], columns):
            draw_panel(axes, column, scorer, state, actions[near, args.action], args.action)
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

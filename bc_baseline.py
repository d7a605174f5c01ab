"""BC, behaviour cloning: an actor by maximum likelihood on the recorded actions, L_pi = -E[log pi(a|s)].

There is no online phase. The checkpoint also holds fresh critics and alpha = 1, so that fine-tuners take it:
the reference that shows what pre-trained critics are worth. SAC and TD3 follow critics that know nothing
unless --warmup-steps waits; ACA fits its own Z. 10% BC is BC on a cut by `python make_dataset.py select`.

    python bc_baseline.py --env-id pendulum-medium-replay    # a first look, half a minute
    python bc_baseline.py --resume runs/NAME                 # go on with a run that was stopped

Writes runs/{env_id}__bc_baseline__{seed}__{time}/: config.json, a copy of this script, TensorBoard events,
metrics.csv (a row per evaluation, every episode's return), offline.pt, learning_curve.png.
"""

import difflib
import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    env_id: str = "hopper-medium-replay"  # task (a name in TASKS) or the id of any Minari dataset
    seed: int = 1  # two runs with the same seed are identical to the last bit on the same CPU
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU where there is one
    compile: bool = False  # torch.compile the update steps; pays on a GPU
    download: bool = False  # allow the network: fetch a dataset that is not on this machine
    resume: str | None = None  # run directory to go on with: its last.pt and settings; device given anew
    checkpoint_every: float = 5.0  # minutes between writes of last.pt
    # networks; the critics stay as they are drawn, for the fine-tuner that takes the checkpoint
    hidden_sizes: tuple[int, ...] = (256, 256)  # widths of the hidden layers of actor and critics
    num_critics: int = 4  # fresh critics in the ensemble, for the fine-tuners
    critic_activation: Literal["relu", "silu"] = "silu"  # with ReLU grad_a Q has jumps
    critic_layer_norm: bool = True  # LayerNorm before the activation of the critics' hidden layers
    actor_lr: float = 3e-4  # Adam's for the actor
    batch_size: int = 256  # transitions of a gradient update
    offline_steps: int = 250_000  # gradient updates of the offline phase
    eval_every: int = 5_000  # updates between evaluations
    eval_episodes: int = 20  # episodes of an evaluation, with fixed seeds, by the deterministic policy


# === Tasks and data ========================================================================================

SMALL = dict(hidden_sizes=(128, 128), batch_size=128, offline_steps=10_000, eval_every=1_000)
TINY = dict(hidden_sizes=(64, 64), batch_size=128, offline_steps=8_000, eval_every=500)
# name: (Minari dataset, settings that differ from Args; a flag on the command line wins over both)
TASKS = {
    "hopper-medium-replay": ("smac/hopper/medium-replay-v0", SMALL),
    "hopper-medium": ("smac/hopper/medium-v0", SMALL),
    "walker2d-medium-replay": ("smac/walker2d/medium-replay-v0", SMALL),
    "walker2d-medium": ("smac/walker2d/medium-v0", SMALL),
    "pendulum-medium-replay": ("smac/pendulum/medium-replay-v0", TINY),
}


def fail(message: str):
    """Ends the program with one sentence that says what is wrong and what to do."""
    raise SystemExit(f"error: {' '.join(message.split())}")


def parse_args() -> Args:
    """Settings: those of the run that is resumed, or: flag given > the task's own in TASKS > Args."""
    given = tyro.cli(Args, description=__doc__)
    if given.resume:
        saved = load_checkpoint(Path(given.resume) / "last.pt")["args"]
        if saved.keys() != asdict(given).keys():
            fail(f"{given.resume} is a run of another script, or of another version of this one: start again")
        return Args(**saved | {"resume": given.resume, "device": given.device})
    return tyro.cli(Args, description=__doc__, default=Args(**TASKS.get(given.env_id, ("", {}))[1]))


class Dataset:
    """A Minari recording as float32 arrays (T, ...), actions in [-1, 1]; `download` allows the network."""

    def __init__(self, dataset_id: str, download: bool = False):
        bundled = Path(__file__).resolve().parent / "datasets" / dataset_id / "data"
        here = bundled.exists()
        try:
            self.minari = minari.MinariDataset(bundled) if here else minari.load_dataset(dataset_id, download)
            episodes = list(self.minari.iterate_episodes())
        except Exception as error:  # Minari, h5py and the network raise many kinds
            near = difflib.get_close_matches(dataset_id, [*TASKS, *minari.list_local_datasets()], 3, 0.0)
            fail(f"no data {dataset_id!r} ({error}): take one of {near}, or --download fetches others")
        space, box = self.minari.observation_space, self.minari.action_space
        if not (len(space.shape or ()) == len(box.shape or ()) == 1 and box.is_bounded()):
            fail(f"{dataset_id}: observations {space}, actions {box}, but flat and bounded ones are needed")
        middle, half = (box.high + box.low) / 2, (box.high - box.low) / 2
        parts = {
            "observations": [e.observations[:-1] for e in episodes],  # T + 1 rows: the last successor is real
            "actions": [(e.actions - middle) / half for e in episodes],
            "rewards": [e.rewards for e in episodes],
            "next_observations": [e.observations[1:] for e in episodes],
            "terminations": [e.terminations for e in episodes],  # 0 at a truncation
        }
        self.columns = {name: np.concatenate(part).astype(np.float32) for name, part in parts.items()}
        self.ends = np.cumsum([len(e.actions) for e in episodes])  # (E,) one past each episode's last row
        self.metadata = self.minari.storage.metadata
        rewards = np.split(self.columns["rewards"].astype(np.float64), self.ends[:-1])
        total = (lambda r: r[-1]) if self.metadata.get("return") == "last reward" else np.sum
        self.returns = np.array([total(r) for r in rewards])  # (E,) of the environment's own rewards
        self.columns["rewards"] = self.reward(self.columns["rewards"])
        print(f"{dataset_id}: {len(rewards)} episodes, mean score {self.score(self.returns.mean()):.1f}")

    def reward(self, raw):
        """The reward as every loss sees it: the recording's linear transform of the environment's own."""
        return self.metadata.get("reward_scale", 1.0) * raw + self.metadata.get("reward_bias", 0.0)

    def score(self, returns):
        """Normalised score 100 (R - R_random) / (R_expert - R_random), by default in the data's range."""
        low = self.metadata.get("ref_min_score", self.returns.min())
        high = self.metadata.get("ref_max_score", self.returns.max())
        return 100 * (returns - low) / (high - low or 1)


def make_env(data: Dataset, eval_env: bool = False) -> gym.Env:
    """The recording's environment, in the wrappers that its spec names, with actions in [-1, 1]."""
    try:
        env = data.minari.recover_environment(eval_env)
    except Exception as error:  # no spec, or its package is missing
        fail(f"the environment of {data.minari.id} can't be made (is its package in PYTHONPATH?): {error}")
    unit = (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    return env if unit else gym.wrappers.RescaleAction(env, -1.0, 1.0)


class ReplayBuffer(nn.Module):
    """Transitions as rows of one matrix: one gather fetches a batch. Saved and restored like a network."""

    def __init__(self, columns: dict[str, np.ndarray], device: str, capacity: int = 0):
        """Holds `columns`, arrays (T, ...); with a capacity it is empty, and they only say what a row is."""
        super().__init__()
        self.widths = {name: math.prod(c.shape[1:]) for name, c in columns.items()}
        self.scalars = [name for name, c in columns.items() if c.ndim == 1]
        shape = (capacity or len(columns["actions"]), sum(self.widths.values()))
        self.register_buffer("rows", torch.zeros(shape, device=device))
        self.register_buffer("size", torch.tensor(0))
        self.register_buffer("episodes", torch.tensor(0))  # that have ended: the index of the next seed
        if not capacity:
            self.add(**columns)

    def add(self, **columns) -> None:
        """Appends a transition, or T of them as arrays (T, ...)."""
        rows = np.concatenate([np.reshape(columns[n], (-1, w)) for n, w in self.widths.items()], axis=1)
        self.rows[self.size : self.size + len(rows)] = torch.as_tensor(rows, dtype=torch.float32)
        self.size += len(rows)

    def sample_rows(self, count: int) -> Tensor:
        """`count` rows drawn uniformly with replacement, (count, columns)."""
        return self.rows[torch.randint(int(self.size), (count,), device=self.rows.device)]

    def split(self, rows: Tensor) -> dict[str, Tensor]:
        """Rows (B, columns) as named tensors: (B, width), or (B,) for a scalar."""
        parts = dict(zip(self.widths, rows.split(list(self.widths.values()), dim=1)))
        return {name: part.squeeze(1) if name in self.scalars else part for name, part in parts.items()}


# === Networks and optimiser ================================================================================

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0  # CleanRL, sac_continuous_action.py
ACTION_LIMIT = 0.99999  # atanh(1) is infinite; official D4RL loaders clip at the same value


class MLP(nn.Module):
    """N independent multilayer perceptrons, evaluated together by one batched product a layer.

    Input (B, I), the same for all, or (N, B, I); output (N, B, O); weights (N, fan_in, fan_out). `mean` and
    `std` normalise observations by the dataset's (other inputs by 0 and 1): a saved policy can't lose them.
    """

    def __init__(self, n: int, sizes: list[int], activation: str = "relu", layer_norm: bool = False):
        super().__init__()
        self.n, self.activation = n, {"relu": torch.relu_, "silu": F.silu}[activation]
        draw = lambda fan_in, *shape: torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5)
        self.weights = nn.ParameterList([draw(i, n, i, o) for i, o in pairwise(sizes)])
        self.biases = nn.ParameterList([draw(i, n, 1, o) for i, o in pairwise(sizes)])
        self.layer_norm, normed = layer_norm, sizes[1:-1] if layer_norm else []
        self.gains = nn.ParameterList([torch.ones(n, 1, o) for o in normed])
        self.shifts = nn.ParameterList([torch.zeros(n, 1, o) for o in normed])
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("std", torch.ones(sizes[0]))

    def forward(self, x: Tensor) -> Tensor:
        x = ((x - self.mean) / self.std).expand(self.n, -1, -1)
        *hidden, (last_weight, last_bias) = zip(self.weights, self.biases)
        for i, (weight, bias) in enumerate(hidden):
            x = torch.baddbmm(bias, x, weight)  # (N, B, H)
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:]) * self.gains[i] + self.shifts[i]
            x = self.activation(x)
        if last_weight.shape[-1] == 1:  # a scalar is a dot product, for which a matrix product is slow
            return (x * last_weight.mT).sum(-1, keepdim=True) + last_bias
        return torch.baddbmm(last_bias, x, last_weight)


def squashed_gaussian_log_prob(u: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """log density of a = tanh(u), u ~ N(mean, std^2), given u. (B, A) -> (B,).

    sum_k [log N(u_k; mean_k, std_k) - log(1 - tanh(u_k)^2)], the last as 2 (log 2 - u - softplus(-2u)).
    """
    gaussian = -0.5 * ((u - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)
    return (gaussian - 2 * (math.log(2) - u - F.softplus(-2 * u))).sum(-1)


class Actor(nn.Module):
    """Squashed Gaussian policy: a = tanh(u), u ~ N(mean(s), std(s)^2); actions lie in [-1, 1]."""

    def __init__(self, obs_dim: int, act_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        self.net = MLP(1, [obs_dim, *hidden_sizes, 2 * act_dim])

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """mean (B, A) and log std (B, A) of the Gaussian before the tanh."""
        mean, log_std = self.net(observations).squeeze(0).chunk(2, dim=-1)
        return mean, LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (torch.tanh(log_std) + 1)

    def sample(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (B, A), differentiable, and their log-probabilities (B,)."""
        mean, log_std = self(observations)
        u = mean + log_std.exp() * torch.randn_like(mean)
        return torch.tanh(u), squashed_gaussian_log_prob(u, mean, log_std)

    def mode(self, observations: Tensor) -> Tensor:
        """The deterministic policy tanh(mean), (B, A)."""
        return torch.tanh(self(observations)[0])


def action_log_prob(actor: Actor, observations: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
    """log pi(a|s), (B,) or (N, B), of actions (B, A) or (N, B, A); the Gaussian's log std (B, A).

    u = atanh(a) from the action itself: clamped to +-ACTION_LIMIT.
    """
    mean, log_std = actor(observations)
    u = torch.atanh(actions.clamp(-ACTION_LIMIT, ACTION_LIMIT))
    return squashed_gaussian_log_prob(u, mean, log_std), log_std


class Agent(nn.Module):
    """What a fine-tuner takes: actor, critics, target critics and the temperature alpha."""

    def __init__(self, obs_dim: int, act_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, act_dim, args.hidden_sizes)
        shape = args.num_critics, [obs_dim + act_dim, *args.hidden_sizes, 1]
        nets = [MLP(*shape, args.critic_activation, args.critic_layer_norm) for _ in range(2)]
        self.critic, self.target_critic = (nn.ModuleDict({"net": net}) for net in nets)
        self.target_critic.load_state_dict(self.critic.state_dict())
        self.log_alpha = nn.Parameter(torch.zeros(()))


# === Losses and updates ====================================================================================


def cloning_update(actor: Actor, adam: torch.optim.Adam, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """One step of the actor on L_pi = -E[log pi(a|s)] of a batch."""
    log_prob, log_std = action_log_prob(actor, batch["observations"], batch["actions"])
    loss = -log_prob.mean()
    adam.zero_grad()
    loss.backward()
    adam.step()
    return {"actor_loss": loss.detach(), "std": log_std.detach().exp().mean()}


# === Evaluation, logging, checkpoints ======================================================================

LOG_EVERY = 500  # steps of a phase between TensorBoard scalars


def stream_seed(seed: int, phase: str, index: int = 0) -> int:
    """Seed of a random stream, from (seed, phase, index) alone: a phase is the same in every script."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{phase}/{index}".encode()).digest()[:4], "little") % 2**31


@torch.no_grad()
def evaluate(actor: Actor, envs: list[gym.Env], device: str) -> list[float]:
    """Returns of the deterministic policy, one episode per environment; episode i has seed 1000 + i."""
    observations = [env.reset(seed=1000 + i)[0] for i, env in enumerate(envs)]
    rewards, active = [[] for _ in envs], list(range(len(envs)))
    while active:  # the episodes that are still going share one forward pass
        batch = np.stack([observations[i] for i in active])
        actions = actor.mode(torch.as_tensor(batch, dtype=torch.float32, device=device)).cpu().numpy()
        for i, action in zip(tuple(active), actions):
            observations[i], reward, terminated, truncated, _ = envs[i].step(action)
            rewards[i].append(reward)
            if terminated or truncated:
                active.remove(i)
    return [float(np.sum(episode)) for episode in rewards]


def load_checkpoint(path: Path) -> dict:
    """The content of a checkpoint file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on damaged files
        fail(f"{path} can't be read as a checkpoint ({str(error)[:200]}): take another one, or start again")


class Run:
    """A run's directory and all that is written there; `state`: the checkpoint it goes on from, or {}."""

    def __init__(self, args: Args):
        gym.logger.min_level = gym.logger.ERROR  # its warnings are about old versions and float64 bounds
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))  # small products need no more
        if args.device == "cuda" and not torch.cuda.is_available():
            fail("--device cuda, but torch finds no GPU here: use --device cpu")
        self.args, self.device = args, "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
        self.state = load_checkpoint(Path(args.resume) / "last.pt") if args.resume else {}
        self.rows, self.saved_at = self.state.get("rows", []), time.monotonic()
        self.dataset_id = TASKS.get(args.env_id, (args.env_id,))[0]
        self.data = Dataset(self.dataset_id, args.download)
        self.obs_dim, self.act_dim = (self.data.columns[n].shape[1] for n in ("observations", "actions"))
        self.envs = [make_env(self.data, eval_env=True) for _ in range(args.eval_episodes)]
        name = f"{args.env_id}__{Path(__file__).stem}__{args.seed}__{pd.Timestamp.now():%Y%m%d-%H%M%S-%f}"
        self.directory = Path(args.resume or f"runs/{name.replace('/', '-')}")
        if not args.resume:
            self.directory.mkdir(parents=True)
            shutil.copy(__file__, self.directory)
            config = dict(args=asdict(args), dataset_id=self.dataset_id, device=self.device,
                          torch=torch.__version__)  # fmt: skip
            (self.directory / "config.json").write_text(json.dumps(config, indent=2))
        self.writer = SummaryWriter(self.directory)
        print(f"run directory: {self.directory}")

    def restore(self, phase: str, total: int, **parts) -> int:
        """The step to go on from: 0, `total` if the phase is done, or the saved one, whose parts it loads."""
        saved, order = self.state.get("phase", "none"), ("none", "score", "offline", "alignment", "online")
        if saved != phase:
            return total if order.index(saved) > order.index(phase) else 0
        for name, part in parts.items():
            part.load_state_dict(self.state["parts"][name])
        torch.set_rng_state(self.state["random_states"][0])
        torch.cuda.set_rng_state_all(self.state["random_states"][1:])
        return self.state["step"]

    def log(self, phase: str, step: int, metrics: dict[str, Tensor | float]) -> dict[str, float]:
        """TensorBoard scalars phase/name; the only place where an update's numbers leave the device."""
        metrics = {name: float(value) for name, value in metrics.items()}
        for name, value in metrics.items():
            if not math.isfinite(value):
                fail(f"{name} is {value} at {phase} step {step}: lower the learning rates, or look for NaN "
                     f"in the data; the last good checkpoints are in {self.directory}")  # fmt: skip
            self.writer.add_scalar(f"{phase}/{name}", value, step)
        return metrics

    def evaluate(self, phase: str, step: int, updates: int, agent: Agent, metrics: dict) -> None:
        """Evaluates the policy: a row in metrics.csv, a line on the screen, scalars in TensorBoard."""
        metrics = self.log(phase, step, metrics)  # NaN stops the run here, before the policy is played
        returns = evaluate(agent.actor, self.envs, self.device)
        row = {"score": self.data.score(np.mean(returns)), "return": np.mean(returns)}
        self.rows.append(dict(phase=phase, step=step, updates=updates) | self.log(phase, step, row) | metrics)
        self.rows[-1] |= {f"return_{i}": r for i, r in enumerate(returns)}
        names = sorted(pd.DataFrame(self.rows), key=lambda name: name.startswith("return_"))
        pd.DataFrame(self.rows, columns=names).to_csv(self.directory / "metrics.csv", index=False)
        tqdm.write(f"{phase:<8} step {step:>9,}   return {row['return']:9.1f}   score {row['score']:6.1f}")

    def autosave(self, phase: str, step: int, **parts) -> None:
        """Writes last.pt if it is time."""
        if time.monotonic() - self.saved_at > 60 * self.args.checkpoint_every:
            self.save("last.pt", phase, step, **parts)
            self.saved_at = time.monotonic()

    def save(self, name: str, phase: str, step: int, **parts) -> None:
        """Writes a temporary file, then renames it: a kill leaves the old checkpoint or the new one."""
        state = dict(script=Path(__file__).stem, args=asdict(self.args), dataset_id=self.dataset_id,
                     obs_dim=self.obs_dim, act_dim=self.act_dim, phase=phase, step=step, rows=self.rows,
                     parts={key: part.state_dict() for key, part in parts.items()},
                     random_states=[torch.get_rng_state(), *torch.cuda.get_rng_state_all()])  # fmt: skip
        temporary = self.directory / f"{name}.tmp"
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.directory / name)

    def report(self) -> None:
        """learning_curve.png, with the handover at 0, and a closing table."""
        mean = self.data.score(self.data.returns.mean())
        print(f"mean score of the data                 {mean:6.1f}")
        axes = Figure(figsize=(9, 4.5), layout="constrained").subplots()
        for phase in dict.fromkeys(row["phase"] for row in self.rows):
            curve = np.array([[row["step"], row["score"]] for row in self.rows if row["phase"] == phase])
            print(f"mean score, last 5 {phase + ' evaluations':<19} {curve[-5:, 1].mean():6.1f}")
            curve[:, 0] -= curve[-1, 0] if phase == "offline" else 0
            axes.plot(*curve.T, ".-", label=phase)
        axes.axhline(mean, color="gray", ls=":", label="mean of the data")
        axes.set(xlabel="offline updates (left), online environment steps (right)", ylabel="normalised score")
        axes.legend()
        axes.figure.savefig(self.directory / "learning_curve.png", dpi=120)
        print(f"all files                              {self.directory}")


# === The phases and main ===================================================================================


def set_statistics(network: nn.Module, data: Dataset) -> None:
    """Puts the dataset's observation mean and standard deviation (plus 1e-3, as CORL) into every MLP."""
    observations = data.columns["observations"].astype(np.float64)
    for mlp in (module for module in network.modules() if isinstance(module, MLP)):
        mlp.mean[: observations.shape[1]] = torch.as_tensor(observations.mean(axis=0))
        mlp.std[: observations.shape[1]] = torch.as_tensor(observations.std(axis=0) + 1e-3)


def train_offline(run: Run) -> None:
    """Behaviour cloning; the critics and the temperature stay as they are drawn."""
    args, data = run.args, run.data
    torch.manual_seed(stream_seed(args.seed, "offline"))
    agent = Agent(run.obs_dim, run.act_dim, args).to(run.device)
    set_statistics(agent, data)
    adam = torch.optim.Adam(agent.actor.parameters(), lr=args.actor_lr, fused=True)
    start = run.restore("offline", args.offline_steps, agent=agent, adam=adam)
    buffer = ReplayBuffer(data.columns, run.device)
    step_actor = torch.compile(cloning_update) if args.compile else cloning_update
    if start == 0:
        run.evaluate("offline", 0, 0, agent, {})
    for step in tqdm(range(start + 1, args.offline_steps + 1), "offline", disable=None):
        metrics = step_actor(agent.actor, adam, buffer.split(buffer.sample_rows(args.batch_size)))
        if step % args.eval_every == 0 or step == args.offline_steps:
            run.evaluate("offline", step, step, agent, metrics)
        elif step % LOG_EVERY == 0:
            run.log("offline", step, metrics)
        run.autosave("offline", step, agent=agent, adam=adam)
    run.save("offline.pt", "offline", args.offline_steps, agent=agent)


def main() -> None:
    run = Run(parse_args())
    train_offline(run)
    run.report()


if __name__ == "__main__":
    main()

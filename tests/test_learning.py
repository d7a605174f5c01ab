"""Does it learn? On the bundled Pendulum recording, with the task's networks and half its offline phase.

What Pendulum can show: pre-training beats behaviour cloning on the same data, and the critic's gradient in a
ends up along the score (correlation about 0.6; about 0.15 without the term, below 0 with its sign flipped).
What it can't: that the term is needed for a good return. The recording is so broad that the critic without it
(kappa 0), or with the wrong sign, learns as good a policy.
"""

import contextlib

import numpy as np
import pytest
import torch
from conftest import command_line

FLAGS = "--env-id pendulum-medium-replay --device cpu --score-steps 2000 --score-hidden-sizes 64 64 "
FLAGS += "--offline-steps 4000 --eval-every 4000 --num-critics 2 --no-critic-layer-norm --tau 0.005 "
FLAGS += "--advantage None --alpha-psi learned --policy-share 0 --offline-alpha 0 --kappa 1"  # published


@pytest.fixture(scope="module")
def trained(smac, tmp_path_factory):
    """A run of the score estimator and the offline phase: (run, score_net, agent)."""
    with command_line(smac, FLAGS), contextlib.chdir(tmp_path_factory.mktemp("run")):
        run = smac.Run(smac.parse_args())
        columns = smac.with_outcomes(run.data, run.args)
        score_net = smac.fit_score_estimator(run, columns)
        return run, score_net, smac.train_offline(run, columns, score_net)


def behaviour_cloning(smac, run, steps=1_500):
    """Returns of a policy of the same size fitted to all recorded actions by maximum likelihood, (20,)."""
    torch.manual_seed(1)
    actor = smac.Actor(3, 1, run.args.hidden_sizes)
    smac.set_statistics(actor, run.data)
    adam = torch.optim.Adam(actor.parameters(), lr=1e-3)
    observations = torch.as_tensor(run.data.columns["observations"])
    u = torch.atanh(torch.as_tensor(run.data.columns["actions"]).clamp(-0.999, 0.999))
    for _ in range(steps):
        rows = torch.randint(len(u), (256,))
        loss = -smac.squashed_gaussian_log_prob(u[rows], *actor(observations[rows])).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return np.array(smac.evaluate(actor, run.envs, "cpu"))


def test_offline_beats_behaviour_cloning(smac, trained):
    run, _, agent = trained
    cloned = behaviour_cloning(smac, run)
    difference = np.array(smac.evaluate(agent.actor, run.envs, "cpu")) - cloned  # from the same start states
    standard_error = difference.std(ddof=1) / len(difference) ** 0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"


def test_action_gradient_follows_the_score(smac, trained):
    run, score_net, agent = trained
    columns = smac.with_outcomes(run.data, run.args)
    columns = {name: torch.as_tensor(column, dtype=torch.float32) for name, column in columns.items()}
    inner = columns["actions"].abs().squeeze(1) < 0.8  # a score smoothed at 0.1 points inward at the bounds
    s, a, w = (columns[name][inner] for name in ("observations", "actions", "outcomes"))
    scale = (1 - run.args.score_sigma**2) ** 0.5
    # written out here, so that a wrong sign in the script can't hide: eps is noise, the score its negative
    score = -score_net(s, scale * a, w, torch.zeros(len(w), dtype=torch.long))
    a.requires_grad_()
    (grad_q,) = torch.autograd.grad(agent.critic(s, a).mean(dim=0).sum(), a)
    assert ((grad_q * score).sum() / (grad_q.norm() * score.norm())).item() > 0.4


def test_values_grow_from_one_reward_towards_the_return(trained):
    run, _, agent = trained
    s, a = (torch.as_tensor(run.data.columns[name]) for name in ("observations", "actions"))
    q = agent.critic(s, a).mean().item()
    rewards = run.data.columns["rewards"]  # all negative
    # above the worst reward for ever; targets that stand still would leave about one reward
    assert rewards.min() / (1 - run.args.gamma) < q < 3 * rewards.mean()

"""Does it learn? On the bundled Pendulum recording, with the default networks and a shortened offline phase.

What Pendulum can show: pre-training beats behaviour cloning on the same data, and the critic's gradient in a
ends up along the score (correlation about 0.8; about 0.3 without the term, below 0 with its sign flipped).
What it can't: that the term is needed for a good return. The recording is so broad that the critic without it
(kappa 0), or with the wrong sign, learns as good a policy.
"""

import numpy as np
import pytest
import torch
from conftest import returns_of

STEPS = 4_000


@pytest.fixture(scope="module")
def trained(smac, tmp_path_factory):
    """A run of the score estimator and the offline phase: (run, score_net, agent)."""
    settings = smac.TASK_DEFAULTS["pendulum-medium-replay"] | dict(
        env_id="pendulum-medium-replay", score_steps=2_000, score_hidden_sizes=(64, 64), offline_steps=STEPS
    )
    dataset_id, env_id, _ = smac.TASKS["pendulum-medium-replay"]
    args, data, env = smac.Args(**settings), smac.load_dataset(dataset_id), smac.make_env(env_id)
    directory = tmp_path_factory.mktemp("run")
    spec = vars(args) | dict(obs_dim=3, act_dim=1)
    run = smac.Run(args, directory, data, env.spec, spec, torch.device("cpu"), {})
    score_net = smac.fit_score_estimator(run) if args.kappa > 0 else None
    return run, score_net, smac.train_offline(run, score_net)


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
    return returns_of(smac, actor, run.envs, "cpu")


def test_offline_beats_behaviour_cloning(smac, trained):
    run, _, agent = trained
    difference = returns_of(smac, agent.actor, run.envs, "cpu") - behaviour_cloning(
        smac, run
    )  # same start states
    standard_error = difference.std(ddof=1) / len(difference) ** 0.5
    assert difference.mean() > 2 * standard_error, f"{difference.mean():.0f} +- {standard_error:.0f}"


def test_action_gradient_follows_the_score(smac, trained):
    run, score_net, agent = trained
    assert score_net is not None, "without a score term there is nothing to follow"
    observations, actions = (torch.as_tensor(run.data.columns[k]) for k in ("observations", "actions"))
    inner = (actions.abs() < 0.8).squeeze(1)  # a score smoothed at 0.1 points inward near the bounds
    observations, actions = observations[inner], actions[inner].requires_grad_()
    w = torch.as_tensor(smac.outcomes(run.data, run.args.gamma)[inner.numpy()], dtype=torch.float32)
    sigma = run.args.score_sigma
    scale = (1 - sigma**2) ** 0.5
    # written out here, so that a wrong sign in the script can't hide: eps is noise, the score its negative
    noise = score_net(observations, scale * actions.detach(), w, torch.zeros(len(w), dtype=torch.long))
    score = -(scale / sigma) * noise
    (grad_q,) = torch.autograd.grad(agent.critic(observations, actions).mean(dim=0).sum(), actions)
    correlation = ((grad_q * score).sum() / (grad_q.norm() * score.norm())).item()
    assert correlation > 0.55


def test_values_stay_near_the_returns(smac, trained):
    run, _, agent = trained
    observations, actions = (torch.as_tensor(run.data.columns[k]) for k in ("observations", "actions"))
    with torch.no_grad():
        q = agent.critic(observations, actions).mean().item()
    lowest = run.data.columns["rewards"].min() / (1 - run.args.gamma)  # the worst reward for ever
    assert lowest < q < 0, "every reward of Pendulum is negative, and so is every value"
    assert np.isfinite(q)

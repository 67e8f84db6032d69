import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mi.rl import loss, popart
from mi.rl.agent import Inputs, Outputs
from mi.rl.trajectory import Trajectory

T, A = 7, 4
TERMS = 'policy', 'baseline', 'entropy'
SCALED = {'lambda_': 0.9, 'rho_clip': 1.3, 'c_clip': 1.1}


def drawn(seed=0):
    """Two tasks: the first one's episode ends with action 3; action 1 was ignored."""
    rng = np.random.default_rng(seed)
    mu = rng.normal(size=(T, A))
    mu -= np.log(np.exp(mu).sum(-1, keepdims=True))
    action = rng.integers(A, size=T)
    return {
        'logits': rng.normal(size=(T, A)).astype('f'),
        'value': rng.normal(size=T + 1).astype('f'),
        'task': np.array([1, 1, 1, 1, 0, 0, 0, 0], np.int32),
        'action_t': action.astype(np.int32),
        'log_mu_t': mu[np.arange(T), action].astype('f'),
        'reward_t': rng.normal(size=T).astype('f'),
        'discount_t': np.array([0.9, 0.9, 0.9, 0, 0.9, 0.9, 0.9], 'f'),
        'valid_t': np.arange(T) != 1,
        'statistics': popart.Statistics(
            np.array([0.4, -2], 'f'), np.array([0.25, 9], 'f'), np.ones(2, 'i')
        ),
    }


@jax.jit
def terms_and_gradients(a, options):
    def terms(logits, value):
        inputs = Inputs({'task': a['task']}, None, jnp.append(0, a['reward_t']), None)
        trajectory = Trajectory(
            inputs, a['action_t'], a['log_mu_t'], a['discount_t'], a['valid_t'], {}
        )
        outputs = Outputs(jnp.concatenate([logits, logits[:1]]), value)
        h = loss.Hyperparameters(discount=1.0)._replace(**options)
        got = loss.compute_terms(outputs, trajectory, a['statistics'], h)
        return jnp.stack([getattr(got, name) for name in TERMS]), got

    gradients, got = jax.jacrev(terms, (0, 1), has_aux=True)(a['logits'], a['value'])
    return got, [dict(zip(TERMS, gradient, strict=True)) for gradient in gradients]


def by_hand(a, lambda_=1.0, rho_clip=1.0, c_clip=1.0):
    """Terms and their gradients to logits and values in closed form, in float64."""
    logits, value, reward, discount = (
        np.asarray(a[name], np.float64) for name in ('logits', 'value', 'reward_t', 'discount_t')
    )
    mu, variance, _ = a['statistics']
    mean, variance = (np.asarray(s, np.float64)[a['task']] for s in (mu, variance))
    sigma, valid = np.sqrt(variance), a['valid_t'].astype(float)
    pi = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    taken = np.eye(A)[a['action_t']]
    log_pi_t = np.log((pi * taken).sum(-1))
    rho = valid * np.exp(log_pi_t - a['log_mu_t'])
    v, capped = sigma * value + mean, np.minimum(rho_clip, rho)
    target, advantage, after = np.zeros(T), np.zeros(T), v[T]
    for t in reversed(range(T)):
        advantage[t] = capped[t] * (reward[t] + discount[t] * after - v[t]) / sigma[t]
        delta = capped[t] * (reward[t] + discount[t] * v[t + 1] - v[t])
        trace = discount[t] * lambda_ * min(c_clip, rho[t])
        target[t] = after = v[t] + delta + trace * (after - v[t + 1])
    error = (target - mean[:-1]) / sigma[:-1] - value[:-1]
    entropy = -(pi * np.log(pi)).sum(-1)
    terms = {
        'policy': -(valid * log_pi_t * advantage).sum(),
        'baseline': 0.5 * (valid * error**2).sum(),
        'entropy': (valid * entropy).sum(),
        'targets': target,
        'kl': (a['log_mu_t'] - log_pi_t)[a['valid_t']].mean(),
        'clip_fraction': (rho > rho_clip)[a['valid_t']].mean(),
        'advantage': np.abs(advantage[a['valid_t']]).mean(),
    }
    rows = valid[:, None]
    of_logits = {
        'policy': rows * (pi - taken) * advantage[:, None],
        'baseline': np.zeros((T, A)),
        'entropy': -rows * pi * (np.log(pi) + entropy[:, None]),
    }
    of_value = {'baseline': np.r_[-valid * error, 0]}
    return terms, [of_logits, {name: of_value.get(name, np.zeros(T + 1)) for name in TERMS}]


@pytest.mark.parametrize('options', [{}, SCALED], ids=['published', 'other'])
def test_its_terms_and_each_gradient_are_those_of_the_closed_form(options):
    """Zeros too: no gradient reaches a value by targets or advantages, nor a logit by ρ."""
    got, gradients = terms_and_gradients(drawn(), options)
    terms, expected = by_hand(drawn(), **options)
    assert 0 < terms['clip_fraction'] < 1
    for name, value in got._asdict().items():
        np.testing.assert_allclose(value, terms[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for of_input, by_hand_of_input in zip(gradients, expected, strict=True):
        for name in TERMS:
            np.testing.assert_allclose(
                of_input[name], by_hand_of_input[name], rtol=1e-4, atol=1e-5, err_msg=name
            )


def test_rewards_and_statistics_scaled_alike_leave_the_gradients_as_they_are():
    a = drawn()
    mu, variance, updates = a['statistics']
    scaled = a | {
        'reward_t': 50 * a['reward_t'],
        'statistics': popart.Statistics(50 * mu, 2500 * variance, updates),
    }
    _, expected = terms_and_gradients(a, {})
    _, got = terms_and_gradients(scaled, {})
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_whatever_an_ignored_step_holds_changes_nothing():
    """All but its observation's value, from which the step before it bootstraps."""
    a = drawn()
    ignored = {
        name: a[name].copy()
        for name in ('logits', 'action_t', 'log_mu_t', 'reward_t', 'discount_t')
    }
    ignored['logits'][1] += np.arange(A)
    ignored['action_t'][1] = (ignored['action_t'][1] + 1) % A
    ignored['log_mu_t'][1] -= 3
    ignored['reward_t'][1] += 100
    ignored['discount_t'][1] = 0
    for x, y in zip(
        jax.tree.leaves(terms_and_gradients(a, {})),
        jax.tree.leaves(terms_and_gradients(a | ignored, {})),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_without_a_valid_step_there_is_nothing_to_learn():
    got, gradients = terms_and_gradients(drawn() | {'valid_t': np.zeros(T, bool)}, {})
    for name, value in got._asdict().items():
        if name != 'targets':
            assert value == 0, name
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize(
    'kind, expected',
    [
        ('none', [-2, 0, 0.5, 8]),
        ('unit', [-1, 0, 0.5, 1]),
        ('paper', [-0.2892083, 0, 2.3105858, 4.9999989]),
        ('code', [-0.5699234, 0, 0.4983400, 4.6083427]),
    ],
)
def test_rewards_are_clipped_as_published(kind, expected):
    """0.3 tanh(−2), 5 tanh(½), 5 tanh 8; 1.5 tanh(−0.4), 5 tanh 0.1, 5 tanh 1.6."""
    got = loss.clip_reward(jnp.array([-2, 0, 0.5, 8.0]), kind)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_an_unknown_clip_names_the_nearest():
    with pytest.raises(ValueError, match="unknown reward clip 'papr'; did you mean 'paper'"):
        loss.clip_reward(jnp.zeros(3), 'papr')

import json
import pathlib

import jax
import numpy as np
import pytest

from mi.rl.vtrace import vtrace

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'data/vtrace_rlax.json').read_text())
ROWS = 'values', 'reward_t', 'discount_t', 'log_rho_t'
T = 9


def drawn(seed=0, off_policy=True):
    """Two episodes; the first ends with action 3."""
    rng = np.random.default_rng(seed)
    discount = np.full(T, 0.95, np.float32)
    discount[3] = 0
    return {
        'values': rng.normal(size=T + 1).astype(np.float32),
        'reward_t': rng.normal(size=T).astype(np.float32),
        'discount_t': discount,
        'log_rho_t': (off_policy * rng.normal(size=T)).astype(np.float32),
        'valid_t': np.ones(T, bool),
    }


run = jax.jit(vtrace, static_argnames=('lambda_', 'rho_clip', 'c_clip'))


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def weights(log_rho_t, valid_t, lambda_, rho_clip, c_clip):
    rho = valid_t * np.exp(np.asarray(log_rho_t, np.float64))
    return np.minimum(rho_clip, rho), lambda_ * np.minimum(c_clip, rho)


def by_sums(values, reward_t, discount_t, log_rho_t, valid_t, **options):
    """v_s = V_s + Σ_t (Π_{s≤i<t} γ_i c_i) δ_t, each from its start: equation 1 of the paper."""
    V, r, g = (np.asarray(a, np.float64) for a in (values, reward_t, discount_t))
    rho, c = weights(log_rho_t, valid_t, **options)
    targets = []
    for s in range(T):
        total, product = V[s], 1.0
        for t in range(s, T):
            total += product * rho[t] * (r[t] + g[t] * V[t + 1] - V[t])
            product *= g[t] * c[t]
        targets.append(total)
    return targets


def by_recursion(values, reward_t, discount_t, log_rho_t, valid_t, **options):
    """v_s = V_s + δ_s + γ_s c_s (v_{s+1} − V_{s+1}), backwards; the advantages with them."""
    V, r, g = (np.asarray(a, np.float64) for a in (values, reward_t, discount_t))
    rho, c = weights(log_rho_t, valid_t, **options)
    targets, advantages, after = np.zeros(T), np.zeros(T), V[T]
    for s in reversed(range(T)):
        advantages[s] = rho[s] * (r[s] + g[s] * after - V[s])
        delta = rho[s] * (r[s] + g[s] * V[s + 1] - V[s])
        targets[s] = after = V[s] + delta + g[s] * c[s] * (after - V[s + 1])
    return targets, advantages


@pytest.mark.parametrize('ignored', [[], [0, 6, T - 1]])
@pytest.mark.parametrize('lambda_, rho_clip, c_clip', [(1, 1, 1), (0.9, 2, 1), (0.5, 0.8, 1.5)])
def test_it_is_the_papers_sum_and_its_recursion(lambda_, rho_clip, c_clip, ignored):
    a, options = drawn(), {'lambda_': lambda_, 'rho_clip': rho_clip, 'c_clip': c_clip}
    a['valid_t'][ignored] = False
    got = run(**a, **options)
    targets, advantages = by_recursion(**a, **options)
    close(got.targets, by_sums(**a, **options))
    close(got.targets, targets)
    close(got.advantages, advantages)
    above = a['valid_t'] & (np.exp(a['log_rho_t']) > rho_clip)
    assert above.any()
    np.testing.assert_array_equal(got.is_clipped, above)


@pytest.mark.parametrize('case', GOLDEN['cases'], ids=lambda c: f'{c["lambda_"]}-{c["rho_clip"]}')
@pytest.mark.parametrize('which', ['whole', 'cut'])
def test_it_is_rlaxs(case, which):
    """Targets are rlax's values and errors, always; advantages are rlax's where λ = 1.

    There rlax's bootstrap is λ v_{t+1} + (1 − λ) V_{t+1}, and ours v_{t+1}, as in the paper: with
    rlax's own errors for v − V, the difference of the advantages is ρ γ (1 − λ)(v_{t+1} − V_{t+1}).
    """
    a = {name: np.asarray(GOLDEN[name], np.float32) for name in ROWS}
    a['valid_t'] = np.ones(len(a['reward_t']), bool)
    if which == 'cut':
        a['valid_t'][GOLDEN['cut_row']] = False
    lambda_, rho_clip = case['lambda_'], case['rho_clip']
    got = run(**a, lambda_=lambda_, rho_clip=rho_clip)
    errors, advantages = (np.asarray(case[which][name]) for name in ('errors', 'advantages'))
    close(got.targets, a['values'][:-1] + errors)
    rho = a['valid_t'] * np.minimum(rho_clip, np.exp(a['log_rho_t']))
    close(got.advantages, advantages + rho * a['discount_t'] * (1 - lambda_) * np.r_[errors[1:], 0])


def returns(a):
    """Of the rewards, bootstrapped from the last value; T + 1."""
    backwards = [a['values'][-1]]
    for reward, discount in zip(a['reward_t'][::-1], a['discount_t'][::-1], strict=True):
        backwards.append(reward + discount * backwards[-1])
    return np.asarray(backwards[::-1], np.float32)


def test_on_policy_its_targets_are_the_discounted_returns():
    a = drawn(off_policy=False)
    close(run(**a).targets, returns(a)[:-1])


def test_exact_values_have_no_error_and_rewards_shifted_by_one_have():
    a = drawn(off_policy=False)
    a['values'] = returns(a)
    got = run(**a)
    close(got.targets, a['values'][:-1])
    close(got.advantages, 0)
    shifted = run(**a | {'reward_t': np.roll(a['reward_t'], 1)})
    assert np.abs(shifted.advantages).max() > 0.1


def test_an_ignored_action_changes_nothing_and_the_last_observation_bootstraps():
    """Row 6 is the last observation of an episode that its time limit cut."""
    a = drawn()
    a['valid_t'][6] = False
    got = run(**a)
    assert got.targets[6] == a['values'][6]
    assert got.advantages[6] == 0
    capped = min(1, np.exp(a['log_rho_t'][5]))
    error = a['reward_t'][5] + a['discount_t'][5] * a['values'][6] - a['values'][5]
    close(got.targets[5], a['values'][5] + capped * error)
    ignored = {name: a[name].copy() for name in ('reward_t', 'discount_t', 'log_rho_t')}
    for values in ignored.values():
        values[6] += 0.7
    for x, y in zip(got, run(**a | ignored), strict=True):
        np.testing.assert_array_equal(x, y)


def test_nothing_passes_the_end_of_an_episode():
    a = drawn()
    changed = {name: a[name].copy() for name in ('values', 'reward_t', 'log_rho_t')}
    for values in changed.values():
        values[4:] += 1
    got, other = run(**a), run(**a | changed)
    np.testing.assert_array_equal(got.targets[:4], other.targets[:4])
    np.testing.assert_array_equal(got.advantages[:4], other.advantages[:4])
    assert (np.asarray(got.targets[4:]) != other.targets[4:]).all()


def test_a_ratio_above_the_bound_by_rounding_does_not_count_as_clipped():
    a = drawn() | {'log_rho_t': np.array([1e-6, 1e-3, -1] * 3, np.float32)}
    np.testing.assert_array_equal(run(**a).is_clipped, [False, True, False] * 3)


def test_no_gradient_flows_through_it():
    a = drawn()

    def total(values, log_rho_t):
        got = vtrace(**a | {'values': values, 'log_rho_t': log_rho_t})
        return got.targets.sum() + got.advantages.sum()

    gradients = jax.jit(jax.grad(total, (0, 1)))(a['values'], a['log_rho_t'])
    assert all((np.asarray(g) == 0).all() for g in gradients)


def test_a_batch_is_each_trajectory_alone():
    several = [drawn(seed) for seed in range(3)]
    batch = {name: np.stack([a[name] for a in several], axis=1) for name in several[0]}
    names = list(batch)
    together = jax.jit(
        jax.vmap(lambda *a: vtrace(**dict(zip(names, a, strict=True))), in_axes=1, out_axes=1)
    )(*batch.values())
    for i, a in enumerate(several):
        for x, y in zip(together, run(**a), strict=True):
            close(x[:, i], y)


def test_a_batch_that_is_not_vmapped_is_refused():
    a = drawn()
    with pytest.raises(ValueError, match='for the other arguments'):
        vtrace(**a | {'values': np.zeros((T + 1, 2), np.float32)})

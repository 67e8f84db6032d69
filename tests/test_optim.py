import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mi.config import UserError
from mi.training import optim


def config(**values):
    config = optim.get_config()
    config.update(values)
    return config


@pytest.mark.parametrize(
    'name, expected',
    [
        ('constant', [0.1, 0.2, 0.4, 0.4, 0.4]),
        ('linear', [0.1, 0.2, 0.4, 0.22, 0.04]),
        ('cosine', [0.1, 0.2, 0.4, 0.22, 0.04]),
        ('rsqrt', [0.1, 0.2, 0.4, 0.4 * (4 / 8) ** 0.5, 0.4 * (4 / 12) ** 0.5]),
    ],
)
def test_schedules(name, expected):
    schedule = optim.schedule(
        config(learning_rate=0.4, schedule=name, warmup_steps=4, final_scale=0.1), steps=13
    )
    at = [float(schedule(step)) for step in (0, 4 / 3, 4, 8, 12)]
    np.testing.assert_allclose(at, expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['linear', 'cosine'])
@pytest.mark.parametrize('warmup, steps', [(0, 2), (0, 10), (5, 20), (18, 20), (-1, 9)])
def test_the_last_update_has_the_final_scale_and_one_before_it_the_peak(name, warmup, steps):
    section = config(learning_rate=0.4, schedule=name, warmup_steps=warmup, final_scale=0.25)
    rates = [float(optim.schedule(section, steps)(step)) for step in range(steps)]
    assert max(rates) == pytest.approx(0.4)
    assert rates[-1] == pytest.approx(0.1) and rates[-2] > 0.1001
    params = {'w': jnp.zeros(2)}  # and so the updates are: of sgd, the gradient times the rate
    optimizer = optim.make_optimizer(
        config(**section.to_dict() | {'name': 'sgd', 'b1': 0.0}), steps
    )
    state = optimizer.init(params)
    for step in range(steps):
        moves, state = optimizer.update({'w': jnp.array([0.5, 0.0])}, state, params)
        assert float(moves['w'][0]) == pytest.approx(-0.5 * rates[step])


@pytest.mark.parametrize(
    'steps, warmup', [(1, 0), (3, 0), (8, 2), (100, 25), (400, 100), (5000, 100)]
)
def test_the_warm_up_of_a_short_run_is_a_quarter_of_it(steps, warmup):
    schedule = optim.schedule(config(learning_rate=0.4, schedule='constant'), steps)
    rates = [float(schedule(step)) for step in range(min(steps, 102))]
    assert rates.index(max(rates)) == warmup == rates.index(pytest.approx(0.4))


def test_a_run_that_would_end_in_its_warm_up_is_refused():
    optim.validate(config(warmup_steps=9), 10)
    with pytest.raises(
        UserError, match=r'^config\.optim\.warmup_steps = 10: expected fewer than the 10'
    ):
        optim.validate(config(warmup_steps=10), 10)


@pytest.mark.parametrize('name', ['adam', 'sgd', 'rmsprop'])
def test_a_weight_decay_that_would_do_nothing_is_refused(name):
    optim.validate(config(name='adamw', weight_decay=0.1), 10)
    with pytest.raises(UserError, match=r'^config\.optim\.weight_decay = 0\.1: expected 0.*adamw'):
        optim.validate(config(name=name, weight_decay=0.1), 10)


def test_a_registered_optimizer_may_read_every_key(monkeypatch):
    monkeypatch.setitem(
        optim.OPTIMIZERS,
        'lamb',
        lambda config, rate: optax.lamb(rate, weight_decay=config.weight_decay),
    )
    optim.validate(config(name='lamb', weight_decay=0.1), 10)


def descend(momentum: float = 0.0, *, learning_rate) -> optax.GradientTransformation:
    """Make SGD with the learning rate in another place than optax has it."""
    return optax.sgd(learning_rate, momentum=momentum)


def test_the_learning_rate_of_an_imported_optimizer_is_given_by_name():
    section = config(name=f'{__name__}:descend', learning_rate=7.0, schedule='constant')
    section.update({'warmup_steps': 0, 'clip_norm': 0.0})
    optim.validate(section, 10)
    optimizer = optim.make_optimizer(section, 10)
    grads = {'w': jnp.array([2.0])}
    moves, _ = optimizer.update(grads, optimizer.init(grads), grads)
    assert float(moves['w'][0]) == -14.0


@pytest.mark.parametrize(
    'key, bad, good',
    [
        ('b1', [1.0, 1, -0.1, 1.5, math.nan], [0, 0.0, 0.999]),
        ('b2', [1.0, -0.1, math.inf], [0.0, 0.9999]),
        ('eps', [0.0, -1.0, 1e-60], [1e-30, 1.0]),  # 1e-60 is 0 in float32
        ('learning_rate', [1e39, 1e-50], [1e-9, 10.0]),
        ('warmup_steps', [-2, 2.5], [-1, 0, 7]),
        ('final_scale', [-0.1, 1.1], [0.0, 1.0]),
        ('clip_norm', [-1.0, math.nan, 1e39], [0.0, 40.0]),
        ('weight_decay', [-1.0, math.inf], [0.0, 0.1]),
    ],
)
def test_values_that_cannot_work_are_refused(key, bad, good):
    rule = optim.SCHEMA[f'optim.{key}']
    assert all(map(rule, bad)) and not any(map(rule, good))


def test_without_warmup_the_first_step_has_the_full_rate():
    schedule = optim.schedule(config(learning_rate=0.4, warmup_steps=0), steps=12)
    assert float(schedule(0)) == pytest.approx(0.4)


def update(params, gradients, **values):
    values = {'schedule': 'constant', 'warmup_steps': 0, 'clip_norm': 0.0} | values
    optimizer = optim.make_optimizer(config(**values), steps=10)
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def test_adam_s_first_step_is_the_sign_of_the_gradient():
    step = update({'w': jnp.zeros(3)}, {'w': jnp.array([3.0, -0.5, 0.0])}, learning_rate=0.1)
    np.testing.assert_allclose(step['w'], [-0.1, 0.1, 0.0], atol=1e-6)


def test_decay_is_decoupled_and_spares_vectors():
    # u and v of relative attention, [heads, d], are biases too.
    params = {'W': jnp.full((2, 2), 5.0), 'b': jnp.full(2, 5.0), 'u': jnp.full((2, 2), 5.0)}
    zeros = {'W': jnp.zeros((2, 2)), 'b': jnp.zeros(2), 'u': jnp.zeros((2, 2))}
    step = update(params, zeros, name='adamw', learning_rate=0.1, weight_decay=0.2)
    np.testing.assert_allclose(step['W'], -0.1 * 0.2 * 5.0, rtol=1e-6)
    np.testing.assert_array_equal(step['b'], 0)
    np.testing.assert_array_equal(step['u'], 0)


def test_rmsprop_is_tensorflow_s():
    g, rate, decay, eps = 0.3, 0.01, 0.99, 0.1
    step = update(
        {'w': jnp.zeros(1)}, {'w': jnp.array([g])},
        name='rmsprop', learning_rate=rate, b1=0.0, b2=decay, eps=eps,
    )  # fmt: skip
    mean_square = decay * 1.0 + (1 - decay) * g**2
    np.testing.assert_allclose(step['w'], -rate * g / np.sqrt(mean_square + eps), rtol=1e-5)


@pytest.mark.parametrize('momentum', [0.0, 0.9])
def test_rmsprop_follows_tensorflow_s_rule_for_20_steps(momentum):
    """ms ← ρ ms + (1 − ρ) g², from one; mom ← μ mom + lr g / √(ms + ε), from zero; w ← w − mom."""
    rate, rho, eps = 0.01, 0.99, 0.1
    values = {'learning_rate': rate, 'b1': momentum, 'b2': rho, 'eps': eps}
    constant = {'schedule': 'constant', 'warmup_steps': 0, 'clip_norm': 0.0}
    optimizer = optim.make_optimizer(config(name='rmsprop', **values, **constant), steps=20)
    step, state = jax.jit(optimizer.update), optimizer.init(jnp.zeros(3))
    ms, mom = np.ones(3), np.zeros(3)
    for g in np.random.default_rng(0).normal(size=(20, 3)) * [0.1, 1, 10]:
        got, state = step(jnp.asarray(g, jnp.float32), state)
        ms = rho * ms + (1 - rho) * g**2
        mom = momentum * mom + rate * g / np.sqrt(ms + eps)
        np.testing.assert_allclose(got, -mom, rtol=1e-5, atol=1e-8)


def test_clipping_is_by_global_norm():
    gradients = {'a': jnp.array([3.0]), 'b': jnp.array([4.0])}
    params = {'a': jnp.zeros(1), 'b': jnp.zeros(1)}
    step = update(params, gradients, name='sgd', learning_rate=1.0, b1=0.0, clip_norm=1.0)
    np.testing.assert_allclose([step['a'][0], step['b'][0]], [-0.6, -0.8], rtol=1e-6)


def test_an_optimizer_of_one_s_own_has_a_word_and_gets_the_section_and_the_schedule(monkeypatch):
    def signed(section, rate):
        return optax.chain(optax.scale(section.b1), optax.scale_by_learning_rate(rate))

    monkeypatch.setitem(optim.OPTIMIZERS, 'scaled', signed)
    assert not optim.SCHEMA['optim.name']('scaled')
    assert "did you mean 'scaled'" in optim.SCHEMA['optim.name']('scald')
    settings = {'name': 'scaled', 'learning_rate': 0.1, 'b1': 0.5}
    step = update({'w': jnp.zeros(2)}, {'w': jnp.array([3.0, -4.0])}, **settings)
    np.testing.assert_allclose(step['w'], [-0.15, 0.2], rtol=1e-6)
    clipped = update({'w': jnp.zeros(2)}, {'w': jnp.array([3.0, -4.0])}, **settings, clip_norm=1.0)
    np.testing.assert_allclose(clipped['w'], [-0.03, 0.04], rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'options', 'reference'),
    [
        ('optax:lion', {'b1': 0.8}, lambda rate: optax.lion(rate, b1=0.8)),
        ('optax.contrib:muon', {'ns_steps': 3}, lambda rate: optax.contrib.muon(rate, ns_steps=3)),
        ('optax:sgd', {}, optax.sgd),
    ],
)
def test_any_function_of_a_learning_rate_is_an_optimizer(name, options, reference):
    params = {'w': jnp.ones((3, 2)), 'b': jnp.ones(2)}
    gradients = {'w': jnp.arange(6.0).reshape(3, 2) - 2.5, 'b': jnp.array([0.5, -1.0])}
    assert not optim.SCHEMA['optim.name'](name)
    settings = {'name': name, 'options': options, 'learning_rate': 0.1, 'clip_norm': 0.0}
    step = update(params, gradients, **settings)
    expected, _ = reference(0.1).update(gradients, reference(0.1).init(params), params)
    for leaf, expected_leaf in zip(jax.tree.leaves(step), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, expected_leaf, rtol=1e-6)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('optax:lino', 'object of the module'),
        ('optix:lion', 'importable module'),
        ('optax:apply_updates', 'argument learning_rate'),
        ('lion', 'known name'),
    ],
)
def test_what_is_no_optimizer_is_refused_with_the_reason(name, reason):
    assert reason in optim.SCHEMA['optim.name'](name)


@pytest.mark.parametrize(
    ('name', 'options', 'message'),
    [
        ('optax:lion', {'b3': 0.8}, r'optim\.options\.b3 is unknown'),
        ('optax:lion', {'b1': 'high'}, r'optim\.options\.b1 = .*expected float'),
        ('optax:lion', {'learning_rate': 1.0}, r'optim\.options\.learning_rate is unknown'),
        ('adam', {'b1': 0.8}, 'it has no options'),
    ],
)
def test_options_are_checked_against_the_function(name, options, message):
    config = optim.get_config()
    config.update({'name': name, 'options': options})
    with pytest.raises(UserError, match=message):
        optim.validate(config, 1000)


def constant_then_zero(peak, steps, warmup, final_scale):
    return lambda step: jnp.where(step < steps // 2, peak, final_scale)


def test_a_schedule_of_one_s_own_follows_the_warmup():
    config = optim.get_config()
    config.update({'schedule': f'{__name__}:constant_then_zero', 'learning_rate': 0.5})
    config.update({'warmup_steps': 10, 'final_scale': 0.25})
    assert not optim.SCHEMA['optim.schedule'](config.schedule)
    learning_rate = optim.schedule(config, 111)
    np.testing.assert_allclose(
        [learning_rate(step) for step in (5, 10, 59, 60)], [0.25 + 0.025, 0.5, 0.5, 0.25]
    )


@pytest.mark.parametrize(
    'values',
    [
        *({'name': name} for name in optim.OPTIMIZERS),
        *({'schedule': schedule} for schedule in optim.SCHEDULES),
        {'name': 'optax:lion', 'clip_norm': 0.0},
        {'name': 'optax.contrib:schedule_free_sgd'},
        {'name': 'adamw', 'weight_decay': 0.1, 'ema': 0.9},
    ],
)
def test_learning_rates_as_an_argument_change_no_bit(values):
    """A compiled update that takes the rates of a schedule is that of the schedule, exactly."""
    section, steps = config(**{'learning_rate': 0.03, **values}), 12
    optimizer = optim.make_optimizer(section, steps)
    rates = optim.compute_learning_rates(section, steps)

    def run(update, *args):
        params = {'w': jnp.linspace(-1, 1, 6).reshape(2, 3), 'b': jnp.ones(3)}
        state, history = optimizer.init(params), []
        for step in range(steps + 2):  # the last rate holds after the end
            grads = jax.tree.map(lambda p, step=step: jnp.sin(3 * p + step), params)
            params, state = update(grads, state, params, *args)
            history.append(params)
        return history

    def by_schedule(grads, state, params):
        moves, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, moves), state

    def by_argument(grads, state, params, rates):
        moves, state = optim.with_learning_rates(optimizer, rates).update(grads, state, params)
        return optax.apply_updates(params, moves), state

    expected, history = run(jax.jit(by_schedule))[:steps], run(jax.jit(by_argument), rates)
    jax.tree.map(np.testing.assert_array_equal, expected, history[:steps])
    assert not np.array_equal(history[0]['w'], history[1]['w'])
    halved = run(jax.jit(by_argument), rates / 2)  # without this argument nothing would change
    assert not np.array_equal(halved[-1]['w'], history[-1]['w'])

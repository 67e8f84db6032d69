"""The average of parameters: the recursion in NumPy, optax's own, and runs from before it."""

import json

import jax
import numpy as np
import optax
import pytest

from mi.config import UserError
from mi.training import averaging, optim, run_config


def make_config(**values):
    config = optim.get_config()
    config.update(values)
    return config


@pytest.mark.parametrize('decay', [0.5, 0.99, 0.9999])
def test_the_average_follows_the_recursion(decay):
    """e ← d e + (1 − d) p and e / (1 − dⁿ), in float64; and optax.ema of the parameters."""
    rng = np.random.default_rng(0)
    params = {'w': np.float32(rng.normal(size=(2, 3))), 'b': np.float32(rng.normal(size=3))}
    settings = {'name': 'sgd', 'b1': 0.0, 'learning_rate': 0.1, 'warmup_steps': 0}
    optimizer = optim.make_optimizer(make_config(ema=decay, clip_norm=0.0, **settings), 30)
    state = optimizer.init(params)
    jax.tree.map(np.testing.assert_array_equal, state.ema, params)  # before the first update

    reference = optax.ema(decay)
    reference_state = reference.init(params)
    e = {name: np.zeros(array.shape) for name, array in params.items()}
    update = jax.jit(optimizer.update)
    for n in range(1, 31):
        grads = {name: np.float32(rng.normal(size=a.shape)) for name, a in params.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        average = averaging.get_eval_params(state, params)
        of_optax, reference_state = reference.update(params, reference_state)
        for name, p in params.items():
            e[name] = decay * e[name] + (1 - decay) * np.asarray(p, np.float64)
            np.testing.assert_allclose(average[name], e[name] / (1 - decay**n), rtol=2e-5)
            np.testing.assert_allclose(average[name], of_optax[name], rtol=5e-3 if n < 5 else 1e-3)
        if n == 1:  # with nothing of the initial ones, but for the order of a sum
            for name, p in params.items():
                np.testing.assert_allclose(average[name], p, rtol=1e-6, atol=1e-7)


def test_the_trained_parameters_do_not_depend_on_the_average():
    params, grads = {'w': np.ones((2, 3), np.float32)}, {'w': np.full((2, 3), 0.5, np.float32)}
    plain = optim.make_optimizer(make_config(), 10)
    averaged = optim.make_optimizer(make_config(ema=0.9), 10)
    update, state = plain.update(grads, plain.init(params), params)
    averaged_update, averaged_state = averaged.update(grads, averaged.init(params), params)
    np.testing.assert_array_equal(update['w'], averaged_update['w'])
    jax.tree.map(np.testing.assert_array_equal, averaged_state.optimizer, state)


def test_a_decay_of_1_and_an_average_of_an_average_are_refused():
    assert optim.SCHEMA['optim.ema'](1.0) and not optim.SCHEMA['optim.ema'](0.999)
    config = make_config(ema=0.9, name='optax.contrib:schedule_free_sgd')
    message = r'config\.optim\.ema = 0\.9: expected 0, because .* Try config\.optim\.ema = 0'
    with pytest.raises(UserError, match=message):
        optim.validate(config, 100)
    config.ema = 0.0
    optim.validate(config, 100)


def test_a_config_that_is_older_than_the_average_has_none(tmp_path, capsys):
    """It is read with 0, continues with 0 as it is, and is refused with another value."""
    import ml_collections

    config = ml_collections.ConfigDict({'optim': make_config(), 'seeds': (0,)})
    file = tmp_path / 'config.json'
    run_config.record_config(file, config)
    recorded = json.loads(file.read_text())
    del recorded['optim']['ema']
    file.write_text(json.dumps(recorded))
    content = file.read_bytes()

    assert run_config.read_config(tmp_path).optim.ema == 0.0
    run_config.record_config(file, config)
    assert file.read_bytes() == content and not capsys.readouterr().err
    config.optim.ema = 0.9
    with pytest.raises(UserError, match=r'optim\.ema was 0\.0 and is 0\.9 now'):
        run_config.record_config(file, config)
    assert file.read_bytes() == content

"""Mechanics and its integrators against closed forms, and laws of motion that are learnt."""

import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.hamiltonian import config as hamiltonian
from experiments.hamiltonian import (
    dynamics,
    frames,
    integrators,
    phase_space,
    rendering,
    scores,
)
from experiments.hamiltonian.mechanics import SYSTEMS
from mi.config import UserError
from mi.fit import factory, train
from tests import prng
from tests.fit.runs import edited, records


def config(word='phase', **changes):
    return edited(hamiltonian.get_config(word), **changes)


def oscillator(q, p):
    return jnp.sum(jnp.square(q) + jnp.square(p), -1) / 2


def inseparable(q, p):
    """An energy that does not separate: (1 + q²)(1 + p²)/2, of each degree."""
    return jnp.sum((1 + jnp.square(q)) * (1 + jnp.square(p)), -1) / 2


def jacobian(step, q, p):
    """Of (q, p) → (q, p), [2d, 2d], in as many digits as f32 has."""
    d = len(q)

    def flat_step(state):
        return jnp.concatenate(step(state[:d], state[d:]))

    return np.asarray(jax.jit(jax.jacfwd(flat_step))(jnp.concatenate([q, p])), np.float64)


def symplectic_error(step, q, p):
    """max |JᵀΩJ − Ω|, which is 0 if and only if the step is symplectic here."""
    J, d = jacobian(step, q, p), len(q)
    omega = np.block([[np.zeros((d, d)), np.eye(d)], [-np.eye(d), np.zeros((d, d))]])
    return np.abs(J.T @ omega @ J - omega).max()


def draw_states(d=2):
    return 0.6 * jax.random.normal(prng.key(0), (2, d))


def test_leapfrog_of_an_oscillator_is_its_matrix():
    t = 0.3
    q, p = draw_states()
    ours = integrators.leapfrog(oscillator, t)(q, p)
    M = np.array([[1 - t**2 / 2, t], [-t * (1 - t**2 / 4), 1 - t**2 / 2]])
    np.testing.assert_allclose(np.stack(ours), M @ np.stack([q, p]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('make', 'order'),
    [
        (integrators.leapfrog, 2),
        (lambda H, t: integrators.leapfrog(H, t, 8), 2),
        (lambda H, t: integrators.yoshida(H, t, 8), 4),
        (lambda H, t: integrators.rk4(integrators.hamiltonian(H), t), 4),
    ],
    ids=['leapfrog', 'implicit leapfrog', 'yoshida', 'rk4'],
)
def test_the_error_falls_with_the_order(make, order):
    q, p = draw_states()
    errors = []
    for steps in (4, 8):
        ours = integrators.roll_out(make(oscillator, 2 / steps), q, p, steps)
        exact = q * math.cos(2) + p * math.sin(2)
        errors.append(np.abs(ours[0][-1] - exact).max())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.4)


def test_energy_oscillates_within_the_square_of_the_step_and_does_not_drift():
    q, p = draw_states()
    amplitudes = []
    for time in (0.2, 0.1):
        qs, ps = integrators.roll_out(integrators.leapfrog(oscillator, time), q, p, 2000)
        H = np.asarray(oscillator(qs, ps), np.float64)
        amplitudes.append(np.abs(H - H[0]).max())
        assert abs(H[-500:].mean() - H[:500].mean()) < 0.02 * amplitudes[-1]
    assert amplitudes[0] / amplitudes[1] == pytest.approx(4, rel=0.1)


def test_leapfrog_is_symplectic_and_reversible_where_the_energy_separates():
    system = SYSTEMS['two_body']
    q, p = (array[0] for array in system.draw(prng.key(1), 1))
    step = integrators.leapfrog(system.energy, 0.3)
    assert symplectic_error(step, q, p) < 1e-5
    returned = jax.jit(integrators.leapfrog(system.energy, -0.3))(*step(q, p))
    np.testing.assert_allclose(np.stack(returned), np.stack([q, p]), atol=1e-6)

    def euler(q, p):
        dq, dp = integrators.hamiltonian(system.energy)(q, p)
        return q + 0.3 * dq, p + 0.3 * dp

    assert symplectic_error(euler, q, p) > 1e-2  # so that the measure can tell


def test_iterations_make_leapfrog_symplectic_for_energies_that_do_not_separate():
    q, p = draw_states()

    def measure_errors(iterations):
        forward = jax.jit(integrators.leapfrog(inseparable, 0.2, iterations))
        returned = jax.jit(integrators.leapfrog(inseparable, -0.2, iterations))(*forward(q, p))
        return symplectic_error(forward, q, p), np.abs(np.stack(returned) - np.stack([q, p])).max()

    one, three, twelve = (np.array(measure_errors(iterations)) for iterations in (1, 3, 12))
    assert min(one) > 1e-3
    assert np.all(three < one / 10)
    assert max(twelve) < 1e-5


@pytest.mark.parametrize('iterations', [1, 2, 3])
def test_leapfrog_iterates_both_implicit_lines_as_often_as_it_says(iterations):
    """H = (1 + q²)(1 + p²) / 2, in NumPy from the three lines of the scheme."""
    q, p, tau = np.float64(0.7), np.float64(-0.4), 0.3
    p_half, q_next = p, q
    for _ in range(iterations):
        p_half = p - tau / 2 * q * (1 + p_half**2)
    for _ in range(iterations):
        q_next = q + tau / 2 * (p_half * (1 + q**2) + p_half * (1 + q_next**2))
    expected = q_next, p_half - tau / 2 * q_next * (1 + p_half**2)
    step = integrators.leapfrog(lambda q, p: ((1 + q**2) * (1 + p**2))[..., 0] / 2, tau, iterations)
    actual = step(jnp.float32(q).reshape(1), jnp.float32(p).reshape(1))
    np.testing.assert_allclose(np.concatenate(actual), expected, rtol=1e-6)


def test_motions_are_those_of_closed_forms():
    spring, pendulum, bodies = (SYSTEMS[name] for name in ('mass_spring', 'pendulum', 'two_body'))
    q, p = spring.draw(prng.key(0), 20)
    qs, ps = spring.motion(q, p, 100)
    q, p = np.asarray(q), np.asarray(p)
    angle = 2 * 0.2 * np.arange(101)[:, None, None]  # ω = √(k/m) = 2, and m ω = 1
    np.testing.assert_allclose(qs, np.cos(angle) * q + np.sin(angle) * p, atol=2e-5)
    np.testing.assert_allclose(ps, np.cos(angle) * p - np.sin(angle) * q, atol=2e-5)

    amplitude = 2.0  # a pendulum's period is 4 K(sin² a/2)/ω, by the arithmetic-geometric mean
    arithmetic, geometric = 1.0, math.cos(amplitude / 2)
    for _ in range(6):
        arithmetic, geometric = (arithmetic + geometric) / 2, math.sqrt(arithmetic * geometric)
    period = 2 * math.pi / math.sqrt(3.0) / arithmetic
    dense_pendulum = pendulum._replace(time=period / 8)
    qs, ps = dense_pendulum.motion(jnp.array([[amplitude]]), jnp.array([[0.0]]), 16)
    np.testing.assert_allclose(qs[[8, 16], 0, 0], [amplitude, amplitude], atol=1e-3)
    np.testing.assert_allclose(qs[[4, 12], 0, 0], [-amplitude, -amplitude], atol=1e-3)
    assert np.abs(ps[[4, 8], 0, 0]).max() < 5e-3

    radius = 0.8  # on a circle, with period 4π r^1.5
    speed = 1 / math.sqrt(4 * radius)
    q, p = jnp.array([[radius, 0, -radius, 0]]), jnp.array([[0, speed, 0, -speed]])
    circling = bodies._replace(time=4 * math.pi * radius**1.5 / 40)
    qs, _ = circling.motion(q, p, 40)
    angles = 2 * np.pi * np.arange(41) / 40
    first_body = radius * np.stack([np.cos(angles), np.sin(angles)], -1)
    circle = np.concatenate([first_body, -first_body], -1)
    np.testing.assert_allclose(qs[:, 0], circle, atol=1e-4)


@pytest.mark.parametrize('name', SYSTEMS)
def test_a_motion_keeps_its_energy_and_stays_in_view(name):
    system = SYSTEMS[name]
    q, p = system.draw(prng.key(2), 30)
    qs, ps = system.motion(q, p, 300)
    H = system.energy(qs, ps)
    np.testing.assert_allclose(H, jnp.broadcast_to(H[0], H.shape), atol=2e-4)
    places = system.places(qs)
    assert np.abs(places).max() < rendering.VIEW - rendering.RADIUS / 2
    # The true energy is also that of places: what the problem of frames measures.
    speed = np.gradient(np.asarray(places[:, :, : system.moving]), system.time, axis=0)
    kinetic = system.mass / 2 * np.square(speed[1:-1]).sum((-2, -1))
    visible_energy = kinetic + system.potential(system.coordinates(places[1:-1]))
    assert np.abs(visible_energy - H[1:-1]).mean() < 0.25 * np.std(H[0])


def test_discs_are_located_at_their_bodies():
    places = jax.random.uniform(prng.key(0), (50, 2, 2), minval=-0.8, maxval=0.8)
    discs = rendering.render(places)
    np.testing.assert_allclose(rendering.locate(discs), places, atol=2e-3)
    corner_frame = rendering.render(jnp.array([[[0.9, 0.9], [-0.9, -0.9]]]))[0]
    assert corner_frame[4, 27, 0] > 0.9 and corner_frame[27, 4, 0] < 0.01  # x to the right, y up
    assert corner_frame[27, 4, 1] > 0.9 and corner_frame[4, 27, 1] < 0.01
    area = float(discs[..., 0].sum((1, 2)).mean()) * (2 * rendering.VIEW / rendering.SIDE) ** 2
    expected_area = math.pi * (rendering.RADIUS**2 + (math.pi * rendering.SOFTNESS) ** 2 / 3)
    assert area == pytest.approx(expected_area, rel=0.01)


def test_scores():
    t = np.linspace(0, 2 * np.pi, 101)[:-1, None, None]
    wave = jnp.asarray(np.concatenate([np.sin(t), np.sin(t + 1)], 1))
    np.testing.assert_allclose(scores.compute_error(0 * wave, wave).mean(), 1, rtol=1e-5)
    quarter_late = jnp.roll(wave, 25, 0)
    np.testing.assert_allclose(scores.compute_error(quarter_late, wave).mean(), 2, rtol=1e-5)
    np.testing.assert_allclose(scores.compute_error(-wave, wave).mean(), 4, rtol=1e-5)
    diverged = wave.at[50:, 0].set(jnp.nan)
    error = scores.compute_error(diverged, wave)
    assert (error[50:, 0] == scores.CEILING).all() and (error[:, 1] == 0).all()
    np.testing.assert_allclose(scores.compute_valid_share(error, 0.1), [0.5, 1])
    returns = jnp.array([[0.0], [0.2], [0.0], [0.0]])  # below the tolerance again, too late
    np.testing.assert_allclose(scores.compute_valid_share(returns, 0.1), [0.25])
    E = jnp.array([[1.0, 3.0], [1.5, 3.0]])
    np.testing.assert_allclose(scores.compute_drift(E), [[0, 0], [0.5, 0]])
    np.testing.assert_allclose(scores.compute_drift(10 - 7 * E), scores.compute_drift(E), rtol=1e-5)


@pytest.mark.parametrize('name', ['mass_spring', 'two_body'])
def test_the_true_law_has_no_error(name, monkeypatch):
    """With the true energy in place of the learnt one, all that is left is the integrator's."""
    problem = phase_space.make(config(**{'problem.system': name, 'problem.examples': 10}))
    monkeypatch.setattr(
        dynamics.Law, '__call__', lambda self, q, p: SYSTEMS[name].energy(q, p), raising=True
    )
    metrics = problem.evaluate({}, None, prng.key(0))['eval']
    assert metrics['derivative'] < 1e-12
    assert metrics['error_long'] < 1e-3 and metrics['drift'] < 0.01 and metrics['valid'] == 1
    assert metrics['drift'] == pytest.approx(float(metrics['drift_learnt']), rel=1e-4)


def test_a_quadratic_mi_of_the_state_is_the_energy_of_a_spring():
    """square, no hidden layer: sᵀWs + …, with W = diag(k/2, 1/2m) the exact energy."""
    law = dynamics.make(
        config(**{'model.form': 'square', 'model.depth': 0, 'model.fusion.name': 'mi'}).model
    )
    params = jax.tree.map(jnp.zeros_like, dynamics.init_params(law, prng.key(0), 1))
    (fused,) = params['params']['FusedMLP_0'].values()
    fused['W'] = jnp.diag(jnp.array([1.0, 1.0]))[..., None]
    system = SYSTEMS['mass_spring']
    q, p = system.draw(prng.key(1), 30)
    np.testing.assert_allclose(
        dynamics.compute_energy(law, params, q, p), system.energy(q, p), rtol=1e-6, atol=1e-6
    )
    ours = dynamics.make_field(law, params)(q, p)
    np.testing.assert_allclose(ours[0], p / system.mass, rtol=1e-6)
    np.testing.assert_allclose(ours[1], -2 * q, rtol=1e-6)


@pytest.mark.parametrize('form', dynamics.FORMS)
def test_second_derivatives_of_each_form(form):
    """Which second derivatives of the energy there are, and that a field is free of one."""
    law = dynamics.make(config(**{'model.form': form, 'model.fusion.name': 'mi'}).model)
    params = dynamics.init_params(law, prng.key(0), 2)
    q, p = jax.random.normal(prng.key(1), (2, 2))
    field = dynamics.make_field(law, params)
    J = jacobian(field, q, p)
    by_q_p = np.abs(J[:2, :2]).max()  # ∂²H/∂q∂p
    assert (by_q_p < 1e-6) == (form == 'separable')
    omega = np.block([[np.zeros((2, 2)), np.eye(2)], [-np.eye(2), np.zeros((2, 2))]])
    hessian = -omega @ J
    symmetric = np.abs(hessian - hessian.T).max() < 1e-5
    assert symmetric == (form != 'field')


@pytest.fixture(scope='module')
def learned_laws(tmp_path_factory):
    """Laws of a spring, of about 1,500 parameters, after 1,500 steps."""
    path = tmp_path_factory.mktemp('learnt')
    for name, changes in {
        'energy': {},
        'field': {'model.form': 'field'},
        'quadratic': {'model.form': 'square', 'model.fusion.name': 'mi', 'model.depth': 0,
                      'model.parameters': 0},
    }.items():  # fmt: skip
        settings = {'seeds': (0, 1), 'train.steps': 1500, 'train.eval_every': 1500,
                    'train.save_every': 1500, 'model.parameters': 1500, 'problem.examples': 20,
                    'problem.longer': 10, 'problem.substeps': 2}  # fmt: skip
        train.train(config(**(settings | changes)), str(path / name))
    return path


@pytest.mark.slow
def test_over_ten_horizons_an_energy_drifts_less_than_a_field(learned_laws):
    energy, field, quadratic = (
        {record['seed']: record for record in records(learned_laws / name, 'eval')}
        for name in ('energy', 'field', 'quadratic')
    )
    for seed in (0, 1):
        assert energy[seed]['drift'] < field[seed]['drift']
        assert 'drift_learnt' not in field[seed]
        # As good as f32 and the integrator: the MI of the state with itself has the true energy.
        assert quadratic[seed]['derivative'] < 1e-9
        assert quadratic[seed]['error_long'] < 1e-3
    num_params = [
        json.loads((learned_laws / name / 'cost.json').read_text())['parameters']['model']
        for name in ('energy', 'field')
    ]
    assert abs(num_params[0] - num_params[1]) < 100
    artifacts = np.load(learned_laws / 'energy/artefacts.npz')
    assert artifacts['true'].shape == artifacts['predicted'].shape == (2, 151, phase_space.SHOWN, 2)
    errors = [energy[seed]['error_long'] for seed in (0, 1)]
    np.testing.assert_allclose(artifacts['error'].mean((1, 2)), errors, rtol=1e-4)


def small_config(**changes):
    settings = {'seeds': (0, 1), 'problem.trajectories': 20, 'problem.horizon': 6,
                'problem.longer': 2, 'problem.examples': 4, 'problem.decoded': 3,
                'model.parameters': 0, 'model.width': 8, 'model.hidden': 8, 'train.batch': 4,
                'train.steps': 20, 'train.log_every': 10, 'train.eval_every': 20,
                'train.save_every': 20}  # fmt: skip
    return config('frames', **(settings | changes))


def test_the_loss_of_frames_is_the_evidence_lower_bound():
    """With all frames decoded and β = 1, against the sum written out for one trajectory."""
    cfg = small_config(**{'problem.decoded': 4, 'problem.early': 3 / 7, 'train.batch': 1})
    cfg.problem.trajectories = 1
    problem = frames.make(cfg)
    world = problem.draw_world(prng.key(0))
    params = jax.jit(problem.init_params)(prng.key(1), world)
    key = prng.key(2)
    loss, metrics = jax.jit(problem.loss)(params, world, key)
    true_frames = jax.jit(rendering.render)(world)  # [7, 1, …]
    encoder, decoder, law = (
        frames.Encoder(cfg.model.latent, 8),
        frames.Decoder(8),
        dynamics.make(cfg.model),
    )
    encode, decode = jax.jit(encoder.apply), jax.jit(decoder.apply)
    step = jax.jit(dynamics.make_step(law, params['law'], 0.2, cfg.problem.iterations, 2))
    mean, log_deviation = encode(params['encoder'], true_frames[:3].swapaxes(0, 1))
    noise = jax.random.normal(jax.random.split(key, 3)[1], mean.shape)
    q, p = jnp.split(mean + jnp.exp(log_deviation) * noise, 2, -1)
    log_likelihood = 0.0
    for time in range(7):
        x, brightness = true_frames[time], jax.nn.sigmoid(decode(params['decoder'], q))
        log_terms = x * jnp.log(brightness) + (1 - x) * jnp.log1p(-brightness)
        log_likelihood += float(jnp.sum(log_terms))
        q, p = step(q, p)
    sigma = np.exp(np.asarray(log_deviation, np.float64))
    kl = np.sum(-np.log(sigma) + (sigma**2 + np.asarray(mean) ** 2 - 1) / 2)
    assert float(loss) == pytest.approx(-(log_likelihood - kl) / 7, rel=1e-4)
    assert float(metrics['kl']) == pytest.approx(kl, rel=1e-4)


def test_the_encoder_depends_only_on_the_frames_that_it_sees():
    problem = frames.make(small_config(**{'problem.decoded': 1}))
    places = jax.random.uniform(prng.key(0), (7, 20, 2, 2), minval=-0.5, maxval=0.5)
    params = jax.jit(problem.init_params)(prng.key(1), places)
    changed_later = places.at[3:].set(0.2)
    loss = jax.jit(problem.loss)

    def compute_kl(world):
        return float(loss(params, world, prng.key(2))[1]['kl'])

    assert compute_kl(places) == compute_kl(changed_later)
    assert compute_kl(places) != compute_kl(places.at[2:].set(0.2))


@pytest.mark.slow
def test_a_resumed_run_of_frames_is_bit_identical(tmp_path, monkeypatch):
    train.train(small_config(), str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        patch.setattr('mi.training.run_dir.Run.should_stop', lambda this, recorded: this.step == 10)
        with pytest.raises(SystemExit):
            train.train(small_config(), str(tmp_path / 'stopped'))
    assert os.listdir(tmp_path / 'stopped/checkpoints') == ['00000010']
    train.train(small_config(), str(tmp_path / 'stopped'))
    for name in ('metrics.jsonl', 'artefacts.npz', 'cost.json'):
        whole, stopped = (
            (tmp_path / run_name / name).read_bytes() for run_name in ('whole', 'stopped')
        )
        assert whole == stopped
    artifacts = np.load(tmp_path / 'whole/artefacts.npz')
    true, predicted = artifacts['true'], artifacts['predicted']
    assert true.dtype == np.uint8
    assert true.shape == predicted.shape == (2, 13, frames.SHOWN, 32, 32, 2)


@pytest.mark.slow
def test_a_law_learned_from_frames_predicts_the_places_of_a_body(tmp_path):
    """Better by far than a frame that does not change, whose error is about 1 (or above)."""
    changes = {'seeds': (0,), 'problem.trajectories': 200, 'problem.horizon': 5,
               'problem.longer': 2, 'problem.iterations': 1, 'model.hidden': 64,
               'model.width': 32, 'train.batch': 16, 'train.steps': 900, 'train.log_every': 100,
               'train.eval_every': 900, 'train.save_every': 900}  # fmt: skip
    train.train(small_config(**changes), str(tmp_path / 'run'))
    (record,) = records(tmp_path / 'run', 'eval')
    assert record['error'] < 0.1


@pytest.mark.parametrize(
    ('word', 'changes', 'message'),
    [
        ('phase', {'problem.system': 'spring'}, r"problem\.system = 'spring'.*mass_spring"),
        ('phase', {'model.form': 'potential'}, r'model\.form.*joint'),
        ('phase', {'problem.iterations': 0}, r'problem\.iterations = 0'),
        ('phase', {'problem.examples': 1}, r'problem\.examples = 1'),
        ('frames', {'problem.seen': 99}, r'problem\.seen = 99: expected at most'),
        ('frames', {'problem.decoded': 99}, r'problem\.decoded = 99: expected at most'),
        ('frames', {'problem.beta': -1.0}, r'problem\.beta'),
    ],
)
def test_bad_values_are_refused(word, changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        train.train(config(word, **changes), str(tmp_path / 'run'))
    assert not (tmp_path / 'run/metrics.jsonl').exists()


@pytest.mark.parametrize('word', hamiltonian.PRESETS)
def test_a_config_is_valid_and_every_key_has_a_rule(word):
    factory.validate(hamiltonian.get_config(word))
    with pytest.raises(UserError, match=r'hamiltonian/config\.py:frame: .*did you mean'):
        hamiltonian.get_config('frame')

"""The simulation of actors, queue and learner, against closed forms and a real run."""

import dataclasses

import numpy as np
import pytest

from benchmarks import pipeline
from benchmarks.pipeline import Stages, Topology, constant, exponential, simulate

BASE = Topology(actors=1, groups=2, rows=4, batch=8, length=10, queue=4)


def stages(simulate, act, update, pack=0.0, join=0.0):
    parts = simulate, act, act, pack, join, update
    return Stages(*[constant(seconds) for seconds in parts])


@pytest.mark.parametrize('groups', [1, 2, 3])
@pytest.mark.parametrize(('simulating', 'acting'), [(2.0, 1.0), (0.5, 1.0), (5.0, 1.0)])
@pytest.mark.parametrize('update', [1.0, 500.0])
def test_constant_times_give_the_slower_of_the_two_rates(groups, simulating, acting, update):
    topology = dataclasses.replace(BASE, groups=groups, batch=4 * groups)
    actor_rate, learner_rate = pipeline.compute_rates(topology, simulating, acting, 0.0, update)
    outcome = simulate(topology, stages(simulating, acting, update))
    np.testing.assert_allclose(outcome.steps_per_second, min(actor_rate, learner_rate), rtol=1e-6)
    np.testing.assert_allclose(
        outcome.utilization, outcome.steps_per_second / learner_rate, rtol=1e-6
    )


def test_collection_time_matches_the_timeline():
    topology = dataclasses.replace(BASE, length=2)
    # group 0 acts at 0–1 and 4–5, group 1 at 1–2 and 5–6: two rounds of 4, and one more action
    assert pipeline.compute_collection_time(topology, simulate=3.0, act=1.0) == 9.0
    # the thread acts at 0–1, 1–2, 2–3, 3–4 and never waits; the last group simulates until 4.5
    assert pipeline.compute_collection_time(topology, simulate=0.5, act=1.0) == 4.5


@pytest.mark.parametrize('capacity', [1, 3])
def test_exponential_times_give_the_rate_of_a_tandem_that_blocks(capacity):
    # Two stages of rate 1 with a queue of Q between them: M/M/1/K with K = Q + 2, counting the one
    # that is served and the one that is blocked, so that the rate is 1 − 1 / (Q + 3).
    topology = Topology(1, 1, 1, 1, 1, queue=capacity, max_in_flight=0)
    one, no = exponential(1.0), constant(0.0)
    outcome = simulate(topology, Stages(one, no, no, no, no, one), updates=20_000, warmup=500)
    np.testing.assert_allclose(outcome.steps_per_second, (capacity + 2) / (capacity + 3), rtol=0.02)


def test_lag_is_the_age_of_trajectories_in_updates():
    topology = dataclasses.replace(BASE, actors=6)
    times = Stages(
        *[exponential(0.5), exponential(0.1), exponential(0.1)],
        *[constant(0.0), constant(1e-6), exponential(1.0)],
    )
    outcome = simulate(topology, times, updates=3000, warmup=500)
    collection = topology.actors * topology.groups / outcome.steps_per_second
    seconds = collection * topology.rows * topology.length  # of a cycle of one actor, by Little
    updates = outcome.steps_per_second / (topology.batch * topology.length)
    assert abs(outcome.lag - updates * seconds) < 1
    assert outcome.lag_max > outcome.lag


def test_on_one_device_policy_and_updates_share_its_time():
    topology = dataclasses.replace(BASE, actors=16, one_device=True)
    acting, update = 0.25, 3.0
    outcome = simulate(topology, stages(0.1, acting, update), updates=300, warmup=100)
    # B / b trajectories of T actions, and the update, one after another
    seconds = topology.batch // topology.rows * topology.length * acting + update
    np.testing.assert_allclose(
        outcome.steps_per_second, topology.batch * topology.length / seconds, rtol=0.02
    )
    np.testing.assert_allclose(outcome.utilization, update / seconds, rtol=0.02)


def test_a_full_queue_blocks_the_actors():
    slow = stages(0.1, 0.1, 100.0)
    outcome = simulate(dataclasses.replace(BASE, actors=4, max_in_flight=0), slow)
    assert outcome.utilization == pytest.approx(1)
    assert outcome.actor_wait > 100 and outcome.queue_wait > 100
    assert outcome.lag <= (BASE.queue + 4 * BASE.groups) / (BASE.batch // BASE.rows) + 1


def test_old_trajectories_are_dropped():
    topology = dataclasses.replace(BASE, actors=6, max_lag=4)
    times = Stages(*[exponential(1.0)] * 3, constant(0.0), constant(0.0), constant(0.1))
    outcome = simulate(topology, times, updates=500)
    assert outcome.dropped > 0 and outcome.lag_max == 4


def test_drops_of_the_warm_up_do_not_count():
    """Equal seeds make equal runs, so the drops before and after an update are those of the run."""
    topology = dataclasses.replace(BASE, actors=6, max_lag=4)
    times = Stages(*[exponential(1.0)] * 3, constant(0.0), constant(0.0), constant(0.1))
    whole, first, rest = (
        simulate(topology, times, updates, warmup).dropped
        for updates, warmup in [(500, 0), (250, 0), (500, 250)]
    )
    assert min(first, rest) > 0 and first + rest == whole


def test_engines_wait_for_the_slowest_core():
    random = np.random.default_rng(0)
    engine = pipeline.Engine(step=1.0, spread=0.0, reset=0.0, episode_length=1)
    assert pipeline.engine_group(6, 3, engine)(random) == 2.0
    # Each step begins an episode.
    resetting = dataclasses.replace(engine, reset=5.0)
    assert pipeline.engine_group(6, 3, resetting)(random) == 12.0
    noisy = pipeline.Engine(step=1.0, spread=0.5, reset=4.0, episode_length=10)
    distribution = pipeline.engine_group(1, 1, noisy)
    draws = [distribution(random) for _ in range(20_000)]
    np.testing.assert_allclose(np.mean(draws), 1 + 4 / 10, rtol=0.03)


def test_a_seed_reproduces_the_outcome():
    times = Stages(*[exponential(1.0)] * 6)
    assert simulate(BASE, times, seed=3) == simulate(BASE, times, seed=3)
    assert simulate(BASE, times, seed=3) != simulate(BASE, times, seed=4)


@pytest.mark.slow
def test_the_simulation_is_near_a_real_run():
    from benchmarks import actors

    config = actors.make_config('catch', 2)
    config.train.batch, config.actors.batch = 16, 8
    config.model.features = config.model.hidden = 16
    outcomes = []
    for _ in range(3):  # other processes of the machine may delay some stages of a run, not others
        times, real, _ = actors.measure(config, num_updates=40)
        model = simulate(actors.make_topology(config), times, updates=400)
        outcomes.append((model.steps_per_second / real.steps_per_second, model.lag - real.lag))
        if 0.6 < outcomes[-1][0] < 1.6 and abs(outcomes[-1][1]) < 1.5:
            return
    raise AssertionError(f'(simulated rate / real rate, difference of lags) of 3 runs: {outcomes}')

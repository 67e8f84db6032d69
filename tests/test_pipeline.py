"""The model of actors, queue and learner, against closed forms and against the real thing."""

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
    of_actors, of_learner = pipeline.rates(topology, simulating, acting, 0.0, update)
    it = simulate(topology, stages(simulating, acting, update))
    np.testing.assert_allclose(it.steps_per_second, min(of_actors, of_learner), rtol=1e-6)
    np.testing.assert_allclose(it.utilisation, it.steps_per_second / of_learner, rtol=1e-6)


def test_a_collection_takes_what_its_timeline_says():
    # group 0 acts at 0–1 and 4–5, group 1 at 1–2 and 5–6: two rounds of 4, and one more action
    assert pipeline.collecting(dataclasses.replace(BASE, length=2), simulate=3.0, act=1.0) == 9.0
    # the thread acts at 0–1, 1–2, 2–3, 3–4 and never waits; the last group simulates until 4.5
    assert pipeline.collecting(dataclasses.replace(BASE, length=2), simulate=0.5, act=1.0) == 4.5


@pytest.mark.parametrize('capacity', [1, 3])
def test_exponential_times_give_the_rate_of_a_tandem_that_blocks(capacity):
    # Two stages of rate 1 with room for Q between them: M/M/1/K with K = Q + 2, counting the one
    # that is served and the one that is blocked, so that the rate is 1 − 1 / (Q + 3).
    topology = Topology(1, 1, 1, 1, 1, queue=capacity, ahead=0)
    one, no = exponential(1.0), constant(0.0)
    it = simulate(topology, Stages(one, no, no, no, no, one), updates=20_000, warmup=500)
    np.testing.assert_allclose(it.steps_per_second, (capacity + 2) / (capacity + 3), rtol=0.02)


def test_lag_is_the_age_of_trajectories_in_updates():
    topology = dataclasses.replace(BASE, actors=6)
    times = Stages(
        *[exponential(0.5), exponential(0.1), exponential(0.1)],
        *[constant(0.0), constant(1e-6), exponential(1.0)],
    )
    it = simulate(topology, times, updates=3000, warmup=500)
    collected = topology.actors * topology.groups / it.steps_per_second
    seconds = collected * topology.rows * topology.length  # of a cycle of one actor, by Little
    updates = it.steps_per_second / (topology.batch * topology.length)
    assert abs(it.lag - updates * seconds) < 1
    assert it.lag_max > it.lag


def test_on_one_device_policy_and_updates_share_its_time():
    topology = dataclasses.replace(BASE, actors=16, one_device=True)
    acting, update = 0.25, 3.0
    it = simulate(topology, stages(0.1, acting, update), updates=300, warmup=100)
    # B / b trajectories of T actions, and the update, one after another
    seconds = topology.batch // topology.rows * topology.length * acting + update
    np.testing.assert_allclose(
        it.steps_per_second, topology.batch * topology.length / seconds, rtol=0.02
    )
    np.testing.assert_allclose(it.utilisation, update / seconds, rtol=0.02)


def test_a_full_queue_holds_the_actors_up():
    slow = stages(0.1, 0.1, 100.0)
    it = simulate(dataclasses.replace(BASE, actors=4, ahead=0), slow)
    assert it.utilisation == pytest.approx(1)
    assert it.actor_wait > 100 and it.queue_wait > 100
    assert it.lag <= (BASE.queue + 4 * BASE.groups) / (BASE.batch // BASE.rows) + 1


def test_what_is_too_old_is_dropped():
    topology = dataclasses.replace(BASE, actors=6, max_lag=4)
    times = Stages(*[exponential(1.0)] * 3, constant(0.0), constant(0.0), constant(0.1))
    it = simulate(topology, times, updates=500)
    assert it.dropped > 0 and it.lag_max == 4


def test_engines_wait_for_the_slowest_core():
    random = np.random.default_rng(0)
    assert pipeline.engines(6, 3, 1.0, 0.0, 0.0, 1)(random) == 2.0
    assert pipeline.engines(6, 3, 1.0, 0.0, 5.0, 1)(random) == 12.0  # each begins an episode
    one = pipeline.engines(1, 1, 1.0, 0.5, 4.0, 10)
    draws = [one(random) for _ in range(20_000)]
    np.testing.assert_allclose(np.mean(draws), 1 + 4 / 10, rtol=0.03)


def test_a_seed_makes_it_the_same_again():
    times = Stages(*[exponential(1.0)] * 6)
    assert simulate(BASE, times, seed=3) == simulate(BASE, times, seed=3)
    assert simulate(BASE, times, seed=3) != simulate(BASE, times, seed=4)


@pytest.mark.slow
def test_the_model_is_near_the_real_topology():
    from benchmarks import actors

    config = actors.config_of('catch', 2)
    config.train.batch, config.actors.batch = 16, 8
    config.model.features = config.model.hidden = 16
    times, real, _ = actors.measure(config, updates=40)
    model = simulate(actors.topology(config), times, updates=400)
    assert 0.6 < model.steps_per_second / real.steps_per_second < 1.6
    assert abs(model.lag - real.lag) < 1.5

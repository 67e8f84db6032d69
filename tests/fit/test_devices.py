"""Seeds, and the learning rates of a search, are placed over devices that do not communicate."""

import os

import jax
import numpy as np
import pytest

from mi.training import placement
from tests.conftest import printed_on_devices
from tests.fit.devices import SMALL
from tests.fit.runs import records
from tests.test_distributed import finish, start, two


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
    """What tests.fit.devices prints."""
    path = tmp_path_factory.mktemp('devices')
    return printed_on_devices(8, 'tests.fit.devices', str(path))


def close(found, expected):
    """Assert that records are the same up to rounding."""
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        values, others = (
            [value for value in each.values() if isinstance(value, int | float)]
            for each in (record, other)
        )
        assert values == pytest.approx(others, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_each_device_has_its_share_of_the_seeds_and_sends_nothing(measured):
    one = measured['counts']['1']['programs']
    for count in (2, 4, 8):
        for name, (flops, collectives) in measured['counts'][str(count)]['programs'].items():
            assert 0 < flops <= 1.05 * one[name][0] / count, (count, name)
            assert collectives == 0


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_devices(measured):
    one = measured['counts']['1']
    assert len({record['mse'] for record in one['records']}) == len(one['records']) == 2 * 2 * 8
    assert len({record['mse'] for record in one['probe']}) == 5
    for count in (2, 4, 8):
        close(measured['counts'][str(count)]['records'], one['records'])
        close(measured['counts'][str(count)]['probe'], one['probe'])


@pytest.mark.slow
def test_nothing_is_split_or_joined_by_a_program_of_its_own(measured):
    for count in (2, 4, 8):
        trained, probed = measured['counts'][str(count)]['compiled']
        # Parameters, learning rates, steps, evaluation, artefacts.
        assert len(trained) == len(set(trained)) == 5
        assert len(probed) == len(set(probed)) == 2  # parameters, steps with an evaluation


@pytest.mark.slow
def test_a_checkpoint_moves_between_numbers_of_devices(measured):
    """Three seeds: with four devices, three are used; with two, one has a repeat."""
    whole, *moved = measured['moved']
    assert len({record['mse'] for record in whole}) == len(whole) == 2 * 3
    for each in moved:
        close(each, whole)


@pytest.mark.slow
@pytest.mark.parametrize('word', ['fit', 'search'])
def test_two_processes_of_two_devices_train_what_one_device_trains(tmp_path, word):
    """Five seeds on four devices, or three learning rates for each of them; one process writes."""
    options = {**SMALL, 'seeds': (0, 1, 2, 3, 4)}
    if word == 'search':
        options |= {'search.at': (1, 2), 'search.fit_from': 1, 'search.parameters': 20}
    else:
        options |= {'problem.dimension': 1}
    arguments = [f'--config=experiments/expressivity/config.py:{word}']
    arguments += [f'--config.{name}={value}' for name, value in options.items()]
    finish([start(tmp_path / 'one', arguments)], [0])
    finish(two(tmp_path / 'two', arguments, devices=2), [0, 0])
    for split in ('train', 'eval') if word == 'fit' else ('probe', 'eval'):
        close(records(tmp_path / 'two', split), records(tmp_path / 'one', split))
    files = [sorted(os.listdir(tmp_path / each)) for each in ('one', 'two')]
    assert files[1] == sorted([*files[0], 'status.1.json'])


def test_shares_are_as_even_as_they_can_be():
    class Device:
        process_index = 0

    devices = [Device() for _ in range(8)]
    shards = [placement.seed_mesh(n, devices).shape['seed'] for n in (1, 3, 4, 7, 8, 9, 12, 17, 24)]
    assert shards == [1, 3, 4, 7, 8, 5, 6, 6, 8]  # with 1, …, 2, 2, 3, 3 seeds each
    several = [Device() for _ in range(4)]
    several[3].process_index = 1
    assert placement.seed_mesh(3, several).shape['seed'] == 4  # each process has to run the program
    mesh = placement.seed_mesh(6, several)
    assert placement.padded_indices(6, mesh).tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_seeds_come_back_as_they_were():
    mesh = placement.seed_mesh(3, jax.devices())
    arrays = {'a': np.arange(6.0).reshape(3, 2), 'b': np.int32([1, 2, 3])}
    back = placement.gather_seeds(placement.shard_seeds(arrays, mesh), 3)
    jax.tree.map(np.testing.assert_array_equal, back, arrays)

"""Hosts and chips of TPU slices, against GKE's tables, and what GKE does not offer."""

import re

import pytest

from launch import tpu
from mi.config import UserError

V4, V5E, V5P, V6E = 'tpu-v4-podslice', 'tpu-v5-lite-podslice', 'tpu-v5p-slice', 'tpu-v6e-slice'


# From the tables of "Plan TPUs in GKE" and of the pages of the generations.
@pytest.mark.parametrize(
    'kind, topology, machine, hosts, chips',
    [
        (V5E, '1x1', 'ct5lp-hightpu-1t', 1, 1),
        (V5E, '2x2', 'ct5lp-hightpu-4t', 1, 4),
        (V5E, '2x4', 'ct5lp-hightpu-8t', 1, 8),
        (V5E, '4x4', 'ct5lp-hightpu-4t', 4, 4),
        (V5E, '16x16', 'ct5lp-hightpu-4t', 64, 4),
        (V6E, '1x1', 'ct6e-standard-1t', 1, 1),
        (V6E, '2x4', 'ct6e-standard-8t', 1, 8),
        (V6E, '8x8', 'ct6e-standard-4t', 16, 4),
        (V5P, '1x1x1', 'ct5p-hightpu-1t', 1, 1),
        (V5P, '2x2x1', 'ct5p-hightpu-4t', 1, 4),
        (V5P, '4x4x4', 'ct5p-hightpu-4t', 16, 4),
        (V5P, '4x8x8', 'ct5p-hightpu-4t', 64, 4),
        (V5P, '16x16x24', 'ct5p-hightpu-4t', 1536, 4),
        (V4, '2x2x4', 'ct4p-hightpu-4t', 4, 4),
        (V4, '8x8x8', 'ct4p-hightpu-4t', 128, 4),
    ],
)
def test_a_topology_has_the_hosts_of_the_table(kind, topology, machine, hosts, chips):
    tpu_slice = tpu.find_slice(kind, topology)
    assert (tpu_slice.machine, tpu_slice.hosts, tpu_slice.chips_per_host) == (machine, hosts, chips)
    assert tpu_slice.devices == hosts * chips
    assert tpu_slice.topology == f'{tpu.GENERATIONS[kind].name}:{topology}'


def test_a_slice_of_smaller_hosts_can_be_asked_for():
    for counts in ({'chips_per_host': 4}, {'num_hosts': 2}, {'chips_per_host': 4, 'num_hosts': 2}):
        tpu_slice = tpu.find_slice(V5E, '2x4', **counts)
        assert (tpu_slice.machine, tpu_slice.hosts, tpu_slice.chips_per_host) == (
            'ct5lp-hightpu-4t',
            2,
            4,
        )


def test_a_chip_may_be_two_devices():
    assert tpu.find_slice('tpu7x', '2x2x1').devices == 8


@pytest.mark.parametrize(
    'kind, topology, counts, message',
    [
        (V5E, '3x3', {}, '1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16 or 16x16'),
        (V5E, '4x2', {}, '--topology=4x2'),
        (V5E, '16x32', {}, '--topology=16x32'),
        (V5E, '4x4', {'chips_per_host': 8}, '--gpus=8: expected --processes=4 --gpus=4'),
        (V5E, '4x4', {'num_hosts': 2}, '--processes=2: expected --processes=4 --gpus=4'),
        (V5E, '2x4', {'num_hosts': 4}, '--processes=2 --gpus=4 or --processes=1 --gpus=8'),
        (V5P, '8x4x4', {}, 'A ≤ B ≤ C'),
        (V5P, '2x8x8', {}, 'multiples of 4'),
        (V5P, '16x24x24', {}, 'at most 6,144 chips'),
        (V4, '4xfourx4', {}, '--topology=4xfourx4'),
        ('v5e', '4x4', {}, '--tpu=v5e: '),
    ],
)
def test_what_gke_has_not_is_refused_with_what_it_has(kind, topology, counts, message):
    with pytest.raises(UserError, match=re.escape(message)) as refused:
        tpu.find_slice(kind, topology, **counts)
    assert '\n' not in str(refused.value)

"""Which devices do what."""

import numpy as np
import pytest

from configs import lm
from mi.config import UserError
from mi.training import run_mesh, sharding
from tests.conftest import printed_on_devices


@pytest.mark.parametrize(
    'seeds, batch, fsdp, devices, shape',
    [
        (1, 64, 1, 8, (1, 8, 1)),
        (8, 64, 1, 8, (8, 1, 1)),  # seeds first
        (2, 64, 1, 8, (2, 4, 1)),
        (16, 64, 1, 8, (8, 1, 1)),
        (3, 64, 1, 8, (1, 8, 1)),  # as many devices as possible
        (3, 6, 1, 4, (3, 1, 1)),
        (1, 6, 1, 8, (1, 6, 1)),
        (5, 7, 1, 8, (1, 7, 1)),
        (1, 64, 8, 8, (1, 1, 8)),
        (2, 64, 2, 8, (2, 2, 2)),
        (1, 64, 8, 1, (1, 1, 1)),  # the same config on a laptop
        (1, 64, 8, 4, (1, 1, 4)),
        (1, 1, 1, 1, (1, 1, 1)),
    ],
)
def test_seeds_are_placed_first_and_no_device_is_idle_that_need_not_be(
    seeds, batch, fsdp, devices, shape
):
    assert sharding.choose_mesh_shape(seeds, batch, fsdp, (), devices) == shape


@pytest.mark.parametrize(
    'arguments, message',
    [
        (
            (1, 4, 1, (1, 2, 1)),
            r'^`shape` = \(1, 2, 1\): expected a product of at most 1',
        ),
        ((2, 4, 1, (3, 1, 1)), r'expected a product of at most 1'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*arguments)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'fsdp': 3}, r'config\.train\.fsdp = 3: expected a divisor of config\.train\.batch = 4$'),
        ({'mesh': (1, 3, 1)}, r'config\.train\.mesh = .* to divide config\.train\.batch = 4$'),
    ],
)
def test_a_run_names_the_config_keys(changes, message):
    config = lm.get_config('tiny')
    config.train.update({'batch': 4, **changes})
    with pytest.raises(UserError, match=message):
        run_mesh.choose_run_mesh_shape(config, 8)


@pytest.mark.slow
def test_rows_that_fill_up_the_devices_do_not_count_and_a_learner_counts_all(texts):
    """Three rows on two devices: evaluation and sampling are those of one device."""
    (one, two), updates = printed_on_devices(8, 'tests.uneven', texts)
    np.testing.assert_allclose(one[0], two[0], rtol=1e-6)
    assert one[1:] == two[1:]
    assert one[2] == [28, 56, 84] and one[3] == [9]  # the third task's row is on the second device
    for update in updates[1:]:
        for got, expected in zip(update, updates[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=1e-6)

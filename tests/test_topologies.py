"""Names of topologies, and the devices that they describe where a compiler is installed."""

import importlib.util
import os

import pytest

from mi.config import UserError
from mi.estimate import topologies

HAS_LIBTPU = importlib.util.find_spec('libtpu') is not None


@pytest.mark.parametrize(
    ('name', 'said'),
    [
        ('v5f:2x2', r"did you mean 'v5[ep]'"),
        ('tpu', 'known: a100, b200, h100, h200, v4, v5e, v5p, v6e'),
        ('v5e', 'expected one of 1x1, 2x2'),
        ('v5e:3x3', 'Try v5e:4x4'),
        ('v6e:32x32', 'expected one of 1x1, 2x2'),
        ('v5p:2x2', 'Try v5p:2x2x2'),
        ('v5p:3x4x4', 'multiples of 4'),
        ('v5p:8x4x4', 'multiples of 4'),  # sizes ascend
        ('v4:16x16x32', 'up to 4,096 chips'),
        ('h100:3', 'expected 1, 2, 4 or a multiple of 8 devices'),
        ('h100:12', 'Try h100:8'),
        ('b200:0', 'Try b200:8'),
    ],
)
def test_what_does_not_exist_is_one_line(name, said):
    with pytest.raises(UserError, match=said) as raised:
        topologies.describe(name)
    assert str(raised.value).startswith(f'--topology={name}: ') and '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('name', 'extra'), [('v5e:2x2', 'tpu'), ('v5p:8x8x8', 'tpu'), ('h100:16', 'cuda')]
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, name, extra):
    monkeypatch.setattr(topologies.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(UserError, match=rf'pip install .*\[{extra}\]'):
        topologies.describe(name)


@pytest.mark.skipif(not HAS_LIBTPU, reason='libtpu is not installed: extra tpu')
@pytest.mark.parametrize(
    ('name', 'chips', 'hosts', 'kind'),
    [
        ('v5e:1x1', 1, 1, 'TPU v5 lite'),
        ('v5e:16x16', 256, 64, 'TPU v5 lite'),
        ('v6e:2x4', 8, 2, 'TPU v6 lite'),
        ('v5p:2x2x2', 8, 2, 'TPU v5'),
        ('v4:2x2x1', 4, 1, 'TPU v4'),
    ],
)
def test_slices_of_tpus(name, chips, hosts, kind):
    before = set(os.environ)
    devices = topologies.describe(name)
    assert len(devices) == chips
    assert {device.device_kind for device in devices} == {kind}
    assert len({device.process_index for device in devices}) == hosts
    assert topologies.describe_one(name).device_kind == kind
    memory = {'v5e': 15.75, 'v6e': 31.24, 'v5p': 95.73, 'v4': 30.75}[name.partition(':')[0]]
    assert topologies.get_memory(devices[0]) == int(memory * 2**30)
    added = set(os.environ) - before - {'TPU_LIBRARY_PATH', 'TPU_SKIP_MDS_QUERY'}  # by jax itself
    assert not added

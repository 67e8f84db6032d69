"""What `mi.estimate` says of programs on each device: by hand, and where a program does not fit."""

import json
import os
import subprocess
import sys

import jax
import pytest

from configs import lm
from experiments.expressivity import config as expressivity
from mi.config import UserError
from mi.estimate import (
    cli,
    deployment,
    memory,
    topologies,
)
from tests.conftest import forced

SMALL = [
    '--config=experiments/expressivity/config.py:fit',
    '--config.problem.dimension=3',
    '--config.model.width=16',
    '--config.model.site=last',
    '--config.train.batch=8',
    '--config.train.log_every=5',
]


def small_config():
    config = expressivity.get_config('fit')
    with config.unlocked():
        config.problem.dimension, config.model.width, config.train.batch = 3, 16, 8
        config.model.site, config.train.log_every, config.seeds = 'last', 5, (0, 1)
    return config


@pytest.mark.slow
def test_two_devices_have_a_seed_each_and_send_nothing():
    """The FLOPs are those of `test_costs.test_flops_of_a_step_are_those_of_its_products`."""
    command = [
        sys.executable,
        '-m',
        'mi.estimate',
        *SMALL,
        '--config.seeds=(0,1)',
        '--eval',
        '--json',
    ]
    environment = os.environ | {'XLA_FLAGS': forced(2)}
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    told = json.loads(out.stdout)
    assert told['devices'] == {
        'kind': 'cpu',
        'count': 2,
        'hosts': 1,
        'idle': 0,
        'mesh': {'seed': 2, 'data': 1, 'fsdp': 1},
        'memory': None,
    }
    assert told['topology'] is None and told['fits'] is None
    for program in told['programs'].values():
        assert (program['share'], program['parts']) == (0.5, 2)
        assert program['one_device']['flops'] == 2 * program['flops']
        assert program['collectives'] == [] and program['bytes_sent'] == 0
        assert not program['unknown_loops'] and program['seconds'] is None
    step = told['programs']['step']
    assert step['updates'] == 5
    # Parameters and two moments of each of one seed, three counters of steps, and the seed.
    numbers = 3 * 16 + 16 + (16 + 3) + 1
    assert step['arguments'] == 4 * (3 * numbers + 4)


def test_a_program_that_takes_more_memory_than_a_device_has_ends_with_code_1(monkeypatch, capsys):
    monkeypatch.setattr(topologies, 'get_memory', lambda device: 1000)
    with pytest.raises(SystemExit) as raised:
        cli.main(['cost', *SMALL, '--config.seeds=(0,)'])
    assert raised.value.code == 1
    assert 'DOES NOT FIT into 1 kB' in capsys.readouterr().out


def test_a_program_that_the_compiler_refuses_does_not_fit():
    said = 'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM (128.00G)\nsee …'

    def refuse():
        raise jax.errors.JaxRuntimeError(said)

    measured = deployment.measure(refuse, jax.devices()[0], None)
    assert measured['fits'] is False and measured['flops'] is None
    assert measured['error'] == 'E1000: CompileTimeHbmOom: Ran out of memory on HBM (128.00G)'


def test_the_share_is_of_the_products_of_the_function_where_one_device_cannot_hold_it(monkeypatch):
    measure, devices = deployment.measure, jax.devices()
    refused = {'flops': None, 'peak': None, 'fits': False, 'error': 'too large'}

    def refuse_one(compiles, device, limit):
        return refused if device == 'one' else measure(compiles, device, limit)

    training_of = memory.make_programs

    def claim_two(config, devices=None):
        """All devices are here but once; the mesh that is reported has two."""
        training = training_of(config, [jax.devices()[0]])
        mesh = jax.sharding.AbstractMesh((2, 1, 1), ('seed', 'data', 'fsdp'))
        return training._replace(mesh=mesh)

    monkeypatch.setattr(deployment, 'measure', refuse_one)
    monkeypatch.setattr(memory, 'make_programs', claim_two)
    step = deployment.report(small_config(), [devices[0]] * 2, single_device='one')['programs'][
        'step'
    ]
    # Five updates of two seeds; nothing was divided, so the one device has all products.
    forward = [2 * 8 * 3 * 16, 2 * 8 * (16 + 3) * 1]
    assert step['one_device']['flops'] == 5 * 2 * (2 * forward[0] + 3 * forward[1])


def test_one_device_does_not_share_as_many_do():
    config = lm.get_config('tiny').unlock()
    config.train.fsdp, config.train.mesh = 4, (1, 2, 4)
    mesh = memory.make_programs(deployment.on_one_device(config), jax.devices()[:1]).mesh
    assert mesh.shape == {'seed': 1, 'data': 1, 'fsdp': 1}
    assert config.train.fsdp == 4


@pytest.mark.parametrize(
    ('said', 'expected'),
    [
        ('INVALID_ARGUMENT: Unknown opcode: mulhi', r'expected the version of libtpu for jax'),
        (
            'INTERNAL: Mosaic failed\nat …',
            'XLA cannot compile the program: INTERNAL: Mosaic failed',
        ),
        (
            "INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot.163",
            r'hlo: %dot\.163\. Try XLA_FLAGS=--xla_gpu_enable_triton_gemm=false',
        ),
    ],
)
def test_what_is_wrong_with_a_compiler_is_one_line(said, expected):
    def fail():
        raise jax.errors.JaxRuntimeError(said)

    with pytest.raises(UserError, match=expected) as raised:
        deployment.measure(fail, jax.devices()[0], None)
    assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
    ('flags', 'said'),
    [
        (['--topology=v5e:3x3'], '--topology=v5e:3x3: expected one of 1x1'),
        (['--topology=v5e:2x2', '--nocompile'], '--nocompile: expected no --topology or --eval'),
        (['--eval', '--nocompile'], '--nocompile: expected no --topology or --eval'),
    ],
)
def test_flags_that_do_not_go_together(monkeypatch, flags, said):
    monkeypatch.setattr(topologies, 'prepare_process', lambda: None)  # of the tests, not its own
    with pytest.raises(UserError, match=said):
        cli.main(['cost', *SMALL, *flags])


def test_lines_say_what_a_device_does():
    step = {
        'flops': 2.5e9, 'share': 0.69, 'parts': 8, 'bytes_accessed': 3e6, 'peak': 5e9, 'fits': True,
        'arguments': 2e9, 'temporaries': 3e9, 'bytes_sent': 14e6, 'kernels': {'fusion': 12},
        'collectives': [{'kind': 'all-reduce', 'count': 2, 'bytes': 4e6, 'group': 8}],
        'seconds': 0.0123, 'unknown_loops': ['while.3'], 'uncounted_calls': [], 'updates': 20,
    }  # fmt: skip
    rows = cli.make_program_rows(step, memory_limit=int(16e9))
    lines = [' '.join(row) for row in rows]
    assert lines[0] == 'FLOPs of products 2.5 G 0.690 of those on one device; 1/8 = 0.125 is ideal'
    assert 'memory 5 GB fits into 16 GB; arguments 2 GB, temporaries 3 GB' in lines
    assert 'sends 14 MB 2 × all-reduce of 4 MB' in lines
    assert any(line.startswith('time 12.3 ms') for line in lines)
    assert lines[-1] == 'counted once loop while.3: its length depends on data'

"""What the programs of a config do on each of some devices, which may be only described.

    devices = topologies.describe('v5e:4x4')
    report(config, devices, one=topologies.describe_one('v5e:4x4'))

Programs are compiled, twice each: for all devices and for one, as the share of the work that a
device has is the measure of a program that divides it. Nothing is run.
"""

import re
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any

import jax
import ml_collections

from mi.config import UserError, suggest_install
from mi.estimate import (
    costs,
    memory,
    program,
    topologies,
)

OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'


def report(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    one: jax.Device | None = None,
    evaluates: bool = False,
) -> dict[str, Any]:
    """Return what the training step and, if asked for, the evaluation do on each device.

    - 'devices': 'kind', 'count', 'hosts', 'idle' (without work), 'mesh' (axis → devices), 'memory'
      (bytes of each; None where nobody says, as of a CPU);
    - 'fits': whether all programs have that memory; None where it is not known;
    - 'programs': 'step' and 'evaluation' → see `measure`, and 'share', the FLOPs over those on one
      device; 1 / 'parts' is right for a program that divides its work. 'one_device' has what it is
      compared with, and the step's 'updates' are those of one call.

    Args:
      config: of any task but 'search'.
      devices: that share the work.
      one: a device of the same kind to compare with; the first of them unless given.
      evaluates: whether 'evaluation' is there.

    Raises:
      UserError: if the config cannot work on these devices.
    """
    one = devices[0] if one is None else one
    training = memory.make_programs(config, devices)
    alone = training
    if training.mesh.size > 1:
        alone = memory.make_programs(on_one_device(config), [one])
    limit = topologies.memory_of(devices[0])
    result: dict[str, Any] = {
        'devices': {
            'kind': devices[0].device_kind,
            'count': len(devices),
            'hosts': len({device.process_index for device in devices}),
            'idle': len(devices) - training.mesh.size,
            'mesh': {name: int(size) for name, size in training.mesh.shape.items()},
            'memory': limit,
        },
        'programs': {},
    }
    compilers = {'step': (training.compile, alone.compile)}
    if evaluates:
        if training.compile_evaluation is None or alone.compile_evaluation is None:
            raise UserError(f'--eval: config.task = {config.task!r} compiles no evaluation here')
        compilers['evaluation'] = training.compile_evaluation, alone.compile_evaluation

    # A compiler keeps about one core busy.
    with futures.ThreadPoolExecutor(2) as threads:
        pending = {
            name: (
                threads.submit(measure, compile_all, devices[0], limit),
                threads.submit(measure, compile_one, one, limit)
                if training.mesh.size > 1
                else None,
            )
            for name, (compile_all, compile_one) in compilers.items()
        }
    for name, (divided, whole) in pending.items():
        measured = divided.result()
        reference = whole.result() if whole else measured
        measured['parts'] = training.mesh.size
        measured['one_device'] = {key: reference[key] for key in ('flops', 'peak', 'fits')}
        if name == 'step':
            measured['updates'] = training.updates
            if reference['flops'] is None:  # it does not fit on one device
                each = costs.estimate_costs(config)['flops'] * len(config.seeds)
                measured['one_device']['flops'] = training.updates * each
        flops = measured['one_device']['flops']
        measured['share'] = measured['flops'] / flops if measured['flops'] and flops else None
        result['programs'][name] = measured
    fits = [measured['fits'] for measured in result['programs'].values()]
    result['fits'] = False if False in fits else None if None in fits else True
    return result


def on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config without its choices of how devices share the work."""
    config = config.copy_and_resolve_references().unlock()
    if 'fsdp' in config.train:
        config.train.fsdp = 1
    if 'mesh' in config.train:
        config.train.mesh = ()
    return config.lock()


def measure(
    compiles: Callable[[], jax.stages.Compiled], device: jax.Device, limit: int | None
) -> dict[str, Any]:
    """Compile a program and return what one call of it does on each device.

    - 'flops', 'bytes_accessed', 'kernels', 'bytes_sent', 'unknown_loops', 'uncounted_calls': see
      `program.Program`; 'collectives': a list with 'kind', 'count', 'bytes' of one, 'group' and
      'bytes_sent' by all;
    - 'arguments', 'outputs', 'in_place', 'temporaries', 'peak': bytes, as in `memory.measure`;
    - 'fits': whether peak ≤ limit; False where the compiler has refused the program, with its words
      in 'error', and then all numbers are None;
    - 'seconds': of the kernels of a TPU as its compiler estimates them, without waiting for
      collectives; None on other devices, as their compilers estimate nothing.

    Args:
      compiles: returns the program.
      device: one of those that it is for.
      limit: bytes of the memory of a device, None if not known.
    """
    try:
        compiled = compiles()
        found = program.analyze(compiled)
    except jax.errors.JaxRuntimeError as error:
        return _refused(error)
    bytes_ = memory.measure(compiled) or dict.fromkeys(
        ('arguments', 'outputs', 'in_place', 'temporaries', 'peak')
    )
    peak = bytes_['peak']
    clock = topologies.clock_of(device)
    return {
        'flops': found.flops,
        'bytes_accessed': found.bytes_accessed,
        **bytes_,
        'fits': None if limit is None or peak is None else peak <= limit,
        'collectives': [
            {
                'kind': collective.kind,
                'count': collective.count,
                'bytes': collective.bytes,
                'group': collective.group,
                'bytes_sent': collective.bytes_sent,
            }
            for collective in found.collectives
        ],
        'bytes_sent': found.bytes_sent,
        'kernels': found.kernels,
        'seconds': found.cycles / clock if found.cycles and clock else None,
        'unknown_loops': list(found.unknown_loops),
        'uncounted_calls': list(found.uncounted_calls),
    }


def _refused(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """What is left to say of a program that the compiler has refused for its memory."""
    said = str(error)
    if 'Unknown opcode' in said:
        raise UserError(
            f'--topology: expected the libtpu that belongs to jax {jax.__version__}, as this one '
            f'writes programs that jaxlib cannot read. Try {suggest_install("tpu")}'
        ) from error
    if OUT_OF_MEMORY not in said:
        raise UserError(f'XLA cannot compile the program: {said.splitlines()[0]}') from error
    names = (
        'flops', 'bytes_accessed', 'arguments', 'outputs', 'in_place', 'temporaries', 'peak',
        'collectives', 'bytes_sent', 'kernels', 'seconds', 'unknown_loops', 'uncounted_calls',
    )  # fmt: skip
    line = re.sub(r'^RESOURCE_EXHAUSTED: ', '', said.splitlines()[0])
    return dict.fromkeys(names) | {'fits': False, 'error': line}

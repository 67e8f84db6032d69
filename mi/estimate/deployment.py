"""Report on the programs of a config per device, for present or described devices.

    devices = topologies.describe('v5e:4x4')
    report(config, devices, one=topologies.describe_one('v5e:4x4'))

Each program is compiled twice, for all devices and for one. The ratio of their FLOPs shows how well
the program divides its work. Nothing is run.
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
    """Return a report on the training step per device and, optionally, on the evaluation.

    - 'devices': 'kind', 'count', 'hosts', 'idle' (devices without work), 'mesh' (axis → devices),
      'memory' (bytes per device; None if unknown, as on a CPU);
    - 'fits': whether all programs fit into the memory; None if it is unknown;
    - 'programs': 'step' and 'evaluation' → the result of `measure`, with these additions. 'share'
      is the ratio of the FLOPs to those on one device; the ideal is 1 / 'parts'. 'one_device' is
      the program that it is compared with. The step's 'updates' is the number of updates per call.

    Args:
      config: a config of any task but 'search'.
      devices: the devices that divide the work.
      one: a device of the same kind to compare with; None for the first device.
      evaluates: whether to include 'evaluation'.

    Raises:
      UserError: if the devices cannot run the config.
    """
    one = devices[0] if one is None else one
    training = memory.make_programs(config, devices)
    single = training
    if training.mesh.size > 1:
        single = memory.make_programs(on_one_device(config), [one])
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
    # Select the programs.
    compilers = {'step': (training.compile, single.compile)}
    if evaluates:
        if training.compile_evaluation is None or single.compile_evaluation is None:
            raise UserError(f'--eval: config.task = {config.task!r} compiles no evaluation here')
        compilers['evaluation'] = training.compile_evaluation, single.compile_evaluation

    # Compile for all devices and for one in two threads; a compiler keeps about one core busy.
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
    # Compare each program with that of one device.
    for name, (divided, undivided) in pending.items():
        measured = divided.result()
        reference = undivided.result() if undivided else measured
        measured['parts'] = training.mesh.size
        measured['one_device'] = {key: reference[key] for key in ('flops', 'peak', 'fits')}
        if name == 'step':
            measured['updates'] = training.updates
            if reference['flops'] is None:  # it does not fit on one device
                update_flops = costs.estimate_costs(config)['flops'] * len(config.seeds)
                measured['one_device']['flops'] = training.updates * update_flops
        flops = measured['one_device']['flops']
        measured['share'] = measured['flops'] / flops if measured['flops'] and flops else None
        result['programs'][name] = measured
    fits = [measured['fits'] for measured in result['programs'].values()]
    result['fits'] = False if False in fits else None if None in fits else True
    return result


def on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config without its options for dividing the work over devices."""
    config = config.copy_and_resolve_references().unlock()
    if 'fsdp' in config.train:
        config.train.fsdp = 1
    if 'mesh' in config.train:
        config.train.mesh = ()
    return config.lock()


def measure(
    compiles: Callable[[], jax.stages.Compiled], device: jax.Device, limit: int | None
) -> dict[str, Any]:
    """Compile a program and return the cost of one call per device.

    - 'flops', 'bytes_accessed', 'kernels', 'bytes_sent', 'unknown_loops', 'uncounted_calls': see
      `program.Program`; 'collectives': a list with 'kind', 'count', 'bytes' of one, 'group' and
      'bytes_sent' by all;
    - 'arguments', 'outputs', 'in_place', 'temporaries', 'peak': bytes, as in `memory.measure`;
    - 'fits': whether peak ≤ limit. If the compiler refuses the program, it is False, 'error' is the
      compiler's message, and all numbers are None;
    - 'seconds': time of the kernels as the compiler of a TPU estimates it, without waiting for
      collectives; None on other devices, whose compilers do not estimate it.

    Args:
      compiles: returns the program.
      device: one of the program's devices.
      limit: bytes of memory per device; None if unknown.
    """
    # Compile; a refusal for want of memory is a result too.
    try:
        compiled = compiles()
        analysis = program.analyze(compiled)
    except jax.errors.JaxRuntimeError as error:
        return _report_refusal(error)

    # Memory, and the clock that turns cycles into seconds.
    bytes_ = memory.measure(compiled) or dict.fromkeys(
        ('arguments', 'outputs', 'in_place', 'temporaries', 'peak')
    )
    peak = bytes_['peak']
    clock = topologies.clock_of(device)
    return {
        'flops': analysis.flops,
        'bytes_accessed': analysis.bytes_accessed,
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
            for collective in analysis.collectives
        ],
        'bytes_sent': analysis.bytes_sent,
        'kernels': analysis.kernels,
        'seconds': analysis.cycles / clock if analysis.cycles and clock else None,
        'unknown_loops': list(analysis.unknown_loops),
        'uncounted_calls': list(analysis.uncounted_calls),
    }


def _report_refusal(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """Return the report on a program that the compiler refused because of its memory."""
    message = str(error)
    if 'Unknown opcode' in message:
        raise UserError(
            f'--topology: expected the libtpu of jax {jax.__version__}; jaxlib cannot read '
            f'the programs of the installed one. Try {suggest_install("tpu")}'
        ) from error
    if OUT_OF_MEMORY not in message:
        raise UserError(f'XLA cannot compile the program: {message.splitlines()[0]}') from error
    names = (
        'flops', 'bytes_accessed', 'arguments', 'outputs', 'in_place', 'temporaries', 'peak',
        'collectives', 'bytes_sent', 'kernels', 'seconds', 'unknown_loops', 'uncounted_calls',
    )  # fmt: skip
    line = re.sub(r'^RESOURCE_EXHAUSTED: ', '', message.splitlines()[0])
    return dict.fromkeys(names) | {'fits': False, 'error': line}

"""Reports on a config's programs per device, for devices that are present or only described.

    devices = topologies.describe('v5e:4x4')
    report(config, devices, single_device=topologies.describe_one('v5e:4x4'))

Each program is compiled twice, for all devices and for a single one. The ratio of their FLOPs shows
how well the program divides its work. Nothing is executed.
"""

import re
from collections.abc import Callable, Mapping, Sequence
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

Report = dict[str, Any]  # a JSON object
Compiler = Callable[[], jax.stages.Compiled]

OUT_OF_MEMORY = 'RESOURCE_EXHAUSTED'


def report(
    config: ml_collections.ConfigDict,
    devices: Sequence[jax.Device],
    single_device: jax.Device | None = None,
    evaluates: bool = False,
) -> Report:
    """Return a report on the training step per device and, optionally, on the evaluation.

    - 'devices': 'kind', 'count', 'hosts', 'idle' (devices without work), 'mesh' (devices per axis),
      'memory' (bytes per device, or None if unknown, as on a CPU).
    - 'fits': whether all programs fit into the memory, or None if unknown.
    - 'programs': results of `measure` for 'step' and 'evaluation', with these additions. 'share' is
      the ratio of the FLOPs to those on one device, ideally 1 / 'parts'. 'one_device' describes the
      program on one device. For 'step', 'updates' is the number of updates per call.

    Args:
      config: a config of any task but 'search'.
      devices: the devices that share the work.
      single_device: a device of the same kind to compare with. Defaults to the first device.
      evaluates: whether to include 'evaluation'.

    Raises:
      UserError: if these devices cannot run the config.
    """
    single_device = devices[0] if single_device is None else single_device
    training = memory.make_programs(config, devices)
    undivided = training
    if training.mesh.size > 1:
        undivided = memory.make_programs(on_one_device(config), [single_device])
    description = _describe_devices(devices, training.mesh)

    # Select the programs.
    compilers = {'step': (training.compile, undivided.compile)}
    if evaluates:
        if training.compile_evaluation is None or undivided.compile_evaluation is None:
            raise UserError(
                f'--eval: config.task = {config.task!r} has no compiled evaluation to measure. '
                'Remove --eval'
            )
        compilers['evaluation'] = training.compile_evaluation, undivided.compile_evaluation

    # Compare each program with that of one device.
    programs = _measure_programs(compilers, devices[0], single_device, description['memory'])
    for program_name, (measured, reference) in programs.items():
        one_device = {field: reference[field] for field in ('flops', 'peak', 'fits')}
        measured |= {'parts': training.mesh.size, 'one_device': one_device}
        if program_name == 'step':
            measured['updates'] = training.updates
            if one_device['flops'] is None:  # it does not fit on one device
                update_flops = costs.estimate_costs(config)['flops'] * len(config.seeds)
                one_device['flops'] = training.updates * update_flops
        flops = one_device['flops']
        measured['share'] = measured['flops'] / flops if measured['flops'] and flops else None
    fits = [measured['fits'] for measured, _ in programs.values()]
    return {
        'devices': description,
        'programs': {name: measured for name, (measured, _) in programs.items()},
        'fits': False if False in fits else None if None in fits else True,
    }


def _measure_programs(
    compilers: Mapping[str, tuple[Compiler, Compiler]],
    device: jax.Device,
    single_device: jax.Device,
    memory_limit: int | None,
) -> dict[str, tuple[Report, Report]]:
    """Measure each program on all devices and on one, compiling it once if both are the same."""
    measurements = {}
    # Two threads, because a compiler keeps about one core busy.
    with futures.ThreadPoolExecutor(2) as threads:
        for program_name, (compile_all, compile_one) in compilers.items():
            divided = threads.submit(measure, compile_all, device, memory_limit)
            undivided = divided
            if compile_one is not compile_all:
                undivided = threads.submit(measure, compile_one, single_device, memory_limit)
            measurements[program_name] = divided, undivided
    return {
        program_name: (divided.result(), undivided.result())
        for program_name, (divided, undivided) in measurements.items()
    }


def _describe_devices(devices: Sequence[jax.Device], mesh: jax.sharding.Mesh) -> Report:
    """Return the entry 'devices' of `report`, where devices outside of the mesh are idle."""
    return {
        'kind': devices[0].device_kind,
        'count': len(devices),
        'hosts': len({device.process_index for device in devices}),
        'idle': len(devices) - mesh.size,
        'mesh': {axis: int(size) for axis, size in mesh.shape.items()},
        'memory': topologies.get_memory(devices[0]),
    }


def on_one_device(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """Return the config without its options for dividing work among devices."""
    config = config.copy_and_resolve_references().unlock()
    if 'fsdp' in config.train:
        config.train.fsdp = 1
    if 'mesh' in config.train:
        config.train.mesh = ()
    return config.lock()


def measure(compile_program: Compiler, device: jax.Device, memory_limit: int | None) -> Report:
    """Compile a program and return the cost of one call per device.

    - 'flops', 'bytes_accessed', 'kernels', 'bytes_sent', 'unknown_loops', 'uncounted_calls': see
      `program.Program`.
    - 'collectives': a list with the 'kind', 'count', 'group' and 'bytes' of each collective, and
      the 'bytes_sent' by all its executions.
    - 'arguments', 'outputs', 'in_place', 'temporaries', 'peak': bytes, as in `memory.measure`.
    - 'fits': whether peak ≤ memory_limit. If the program does not fit, the compiler can refuse it.
      Then 'error' is the compiler's message, and all numbers are None.
    - 'seconds': time of the kernels, as estimated by a TPU's compiler, without waiting for
      collectives. It is None on other devices, whose compilers do not estimate it.

    Args:
      compile_program: function that compiles the program and returns it.
      device: one of the program's devices.
      memory_limit: bytes of memory per device, or None if unknown.
    """
    # Compile; running out of memory is a result too.
    try:
        compiled = compile_program()
        analysis = program.analyze(compiled)
    except jax.errors.JaxRuntimeError as error:
        return _report_refusal(error)

    # Sizes as the compiler reports them, and the clock that turns cycles into seconds.
    memory_bytes = memory.measure(compiled) or dict.fromkeys(
        ('arguments', 'outputs', 'in_place', 'temporaries', 'peak')
    )
    peak_bytes = memory_bytes['peak']
    clock = topologies.get_clock(device)
    return {
        'flops': analysis.flops,
        'bytes_accessed': analysis.bytes_accessed,
        **memory_bytes,
        'fits': None if memory_limit is None or peak_bytes is None else peak_bytes <= memory_limit,
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


def _report_refusal(error: jax.errors.JaxRuntimeError) -> Report:
    """Return the report on a program that does not compile because it needs too much memory.

    Raises:
      UserError: if the program does not compile for another reason.
    """
    message = str(error)
    if 'Unknown opcode' in message:
        raise UserError(
            f'--topology: expected the version of libtpu for jax {jax.__version__}, because '
            'jaxlib cannot read the programs of the installed version. Try '
            f'{suggest_install("tpu")}'
        ) from error
    if OUT_OF_MEMORY not in message:
        # Without a GPU, XLA cannot measure the tilings of a Triton kernel, and guesses one.
        advice = ''
        if 'output tile sizes' in message:
            advice = '. Try XLA_FLAGS=--xla_gpu_enable_triton_gemm=false'
        raise UserError(
            f'XLA cannot compile the program: {message.splitlines()[0]}{advice}'
        ) from error
    field_names = (
        'flops', 'bytes_accessed', 'arguments', 'outputs', 'in_place', 'temporaries', 'peak',
        'collectives', 'bytes_sent', 'kernels', 'seconds', 'unknown_loops', 'uncounted_calls',
    )  # fmt: skip
    first_line = re.sub(r'^RESOURCE_EXHAUSTED: ', '', message.splitlines()[0])
    return dict.fromkeys(field_names) | {'fits': False, 'error': first_line}

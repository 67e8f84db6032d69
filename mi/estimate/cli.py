"""Command line that prints the cost of a config's run before it starts.

    python -m mi.estimate --config=configs/lm.py:quickstart --config.model.hidden=1024
    python -m mi.estimate --config=configs/rl.py --nocompile
    python -m mi.estimate --config=configs/lm_wikitext103.py --topology=v5e:4x4 --eval --json

Exit code 0; 1 if a program does not fit into the memory of a device, and on an error.
"""

import json
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from absl import flags

from mi import overrides
from mi.config import UserError
from mi.estimate import (
    costs,
    deployment,
    memory,
    topologies,
)
from mi.training import progress

PREFIXES = {12: 'T', 9: 'G', 6: 'M', 3: 'k'}
Row = tuple[str, str, str]


def lines(estimate: dict[str, Any]) -> list[str]:
    """Return the costs of a run as a table, one line per cost."""
    unit = next(name for name in ('token', 'step', 'example') if f'flops_per_{name}' in estimate)
    plural = {'token': 'tokens', 'step': 'environment steps', 'example': 'examples'}[unit]
    parameters, forward = estimate['parameters'], estimate[f'flops_per_{unit}']
    seeds = estimate['seeds']
    total_flops = estimate['flops'] * estimate['steps'] * seeds
    rows = [
        ('parameters', f'{parameters["model"]:,}', f'of them the fusion {parameters["fusion"]:,}'),
        ('training steps', f'{estimate["steps"]:,}', f'of {estimate["units"]:,} {plural} each'),
        ('seeds', f'{seeds}', 'trained simultaneously'),
        (
            f'FLOPs per {unit}',
            scaled(forward['model']),
            f'forward; of them the fusion {scaled(forward["fusion"])}',
        ),
        ('FLOPs per training step', scaled(estimate['flops']), 'of one seed, forward and backward'),
        ('FLOPs of the run', scaled(total_flops), 'all steps and seeds, without evaluations'),
    ]
    sizes = estimate['memory']
    for name in ('parameters', 'optimizer', 'other'):
        rows.append((f'{name}, bytes', scaled(sizes[name]) + 'B', 'all seeds'))
    rows.append(('checkpoint, bytes', scaled(sizes['checkpoint']) + 'B', 'before compression'))
    if 'programs' in estimate:
        rows += _deployment_rows(estimate)
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    return [f'{a:<{widths[0]}}  {b:>{widths[1]}}  {c}'.rstrip() for a, b, c in rows]


def _deployment_rows(estimate: dict[str, Any]) -> list[Row]:
    """Return the rows of the programs, per device."""
    devices = estimate['devices']
    mesh = ' × '.join(f'{name} {size}' for name, size in devices['mesh'].items())
    idle = f', {devices["idle"]} of them idle' if devices['idle'] else ''
    rows = [('devices', f'{devices["count"]}', f'{devices["kind"]}: {mesh}{idle}')]
    for name, program in estimate['programs'].items():
        title = {'step': 'training step', 'evaluation': 'evaluation'}[name]
        if program.get('updates', 1) > 1:
            title += f', {program["updates"]} at a time'
        rows += [('', '', ''), (title, '', 'on each device')]
        rows += program_rows(program, devices['memory'])
    return rows


def program_rows(program: dict[str, Any], limit: int | None) -> list[Row]:
    """Return the lines of a program of `deployment.report`, for a memory of `limit` bytes."""
    if program['flops'] is None:
        return [('memory', 'does not fit', program['error'])]

    # Work, and its share of the work on one device.
    share, parts = program['share'], program['parts']
    note = ''
    if share is not None and parts > 1:
        note = f'{share:.3f} of those on one device; 1/{parts} = {1 / parts:.3f} is ideal'
    rows = [('FLOPs of products', scaled(program['flops']), note)]
    rows.append(('bytes accessed', scaled(program['bytes_accessed']) + 'B', 'of main memory'))

    # Memory, if the compiler reports it.
    if program['peak'] is not None:
        verdict = ''
        if limit is not None:
            verdict = f'{"fits" if program["fits"] else "DOES NOT FIT"} into {scaled(limit)}B; '
        note = ', '.join(f'{n} {scaled(program[n])}B' for n in ('arguments', 'temporaries'))
        rows.append(('memory', scaled(program['peak']) + 'B', verdict + note))

    # Communication, kernels and time.
    if parts > 1:
        sends = [
            f'{c["count"]} × {c["kind"]} of {scaled(c["bytes"])}B' for c in program['collectives']
        ]
        if len(sends) > 6:
            sends[6:] = [f'{len(sends) - 6} more']
        rows.append(('sends', scaled(program['bytes_sent']) + 'B', '; '.join(sends) or 'nothing'))
    kernels = sorted(program['kernels'].items(), key=lambda item: -item[1])
    note = ', '.join(f'{count:,} {opcode}' for opcode, count in kernels[:4])
    rows.append(('kernels', f'{sum(program["kernels"].values()):,}', note))
    if program['seconds'] is None:
        rows.append(('time', '?', 'XLA estimates none for this kind of device'))
    else:
        note = "of kernels, as XLA estimates their cycles; without waiting for others' data"
        rows.append(('time', scaled_seconds(program['seconds']), note))
    for loop in program['unknown_loops']:
        rows.append(('counted once', 'loop', f'{loop}: its length depends on data'))
    for target in program['uncounted_calls']:
        rows.append(('not counted', 'call', f'{target}: its products are not in the FLOPs'))
    return rows


def scaled_seconds(value: float) -> str:
    """Format with three significant digits and a unit: 0.0123 → '12.3 ms'."""
    for unit, size in (('s', 1), ('ms', 1e-3)):
        if value >= size:
            return f'{value / size:.3g} {unit}'
    return f'{value / 1e-6:.3g} µs'


def scaled(value: float) -> str:
    """Format with three significant digits and an SI prefix: 2400000 → '2.4 M'."""
    power = next((p for p in PREFIXES if abs(value) >= 10**p), 0)
    return f'{value / 10**power:.3g} {PREFIXES.get(power, "")}'


def main(argv: Sequence[str]) -> None:
    """Print the costs of a config.

    Raises:
      UserError: if the command or the config is invalid.
      SystemExit: with code 1 if a program does not fit into the memory of a device.
    """
    values = flags.FlagValues()
    file = flags.DEFINE_string('config', None, 'Config file.', flag_values=values)
    topology = flags.DEFINE_string(
        'topology', None, 'Devices to compile for, such as v5e:4x4 or h100:8.', flag_values=values
    )
    evaluates = flags.DEFINE_bool('eval', False, 'Compile evaluation too.', flag_values=values)
    compiles = flags.DEFINE_bool('compile', True, 'Compile the step.', flag_values=values)
    as_json = flags.DEFINE_bool('json', False, 'Every number as JSON.', flag_values=values)
    try:
        arguments, changes = overrides.split(argv)
        rest = values(arguments)
        if not file.value or len(rest) > 1:
            raise UserError('expected --config=FILE; the other flags are --config.KEY=VALUE, '
                            '--topology, --eval, --json and --nocompile')  # fmt: skip
        if (topology.value or evaluates.value) and not compiles.value:
            raise UserError('--nocompile: --topology and --eval compile; remove it')
        if topology.value:
            topologies.prepare_process()
        config = overrides.load(file.value, changes)
        with progress.Work('sizing the state'):
            sizes = memory.estimate_memory(config, compiles=False)
        programs: dict[str, Any] = {}
        if compiles.value:
            programs = _deployment(config, topology.value, evaluates.value)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error
    with progress.Work('counting the FLOPs of a training step'):
        estimate = costs.estimate_costs(config) | {'memory': sizes} | programs
    print(json.dumps(estimate, indent=2) if as_json.value else '\n'.join(lines(estimate)))
    if estimate.get('fits') is False:
        raise SystemExit(1)


def _deployment(
    config: ml_collections.ConfigDict, topology: str | None, evaluates: bool
) -> dict[str, Any]:
    one_device = None
    devices: Sequence[jax.Device] = jax.devices()
    if topology:
        devices, one_device = topologies.describe(topology), topologies.describe_one(topology)
    with progress.Work(f'compiling for {len(devices)} {devices[0].device_kind}'):
        return {'topology': topology, **deployment.report(config, devices, one_device, evaluates)}

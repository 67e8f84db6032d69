"""Command line that prints the cost of a config's run before it starts.

    python -m mi.estimate --config=configs/lm.py:quickstart --config.model.hidden=1024
    python -m mi.estimate --config=configs/rl.py --nocompile
    python -m mi.estimate --config=configs/lm_wikitext103.py --topology=v5e:4x4 --eval --json

The exit code is 0, or 1 if a program does not fit into the memory of a device, or on an error.
"""

import json
from collections.abc import Sequence

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
from mi.estimate.costs import Costs
from mi.estimate.deployment import Report
from mi.training import progress

PREFIXES = {12: 'T', 9: 'G', 6: 'M', 3: 'k'}
Row = tuple[str, str, str]


def format_estimate(estimate: Costs) -> list[str]:
    """Format the costs of a run as a table, with one line per cost."""
    unit = next(unit for unit in ('token', 'step', 'example') if f'flops_per_{unit}' in estimate)
    plural = {'token': 'tokens', 'step': 'environment steps', 'example': 'examples'}[unit]
    parameters, forward = estimate['parameters'], estimate[f'flops_per_{unit}']
    seeds = estimate['seeds']
    total_flops = estimate['flops'] * estimate['steps'] * seeds
    table_rows = [
        ('parameters', f'{parameters["model"]:,}', f'of them the fusion {parameters["fusion"]:,}'),
        ('training steps', f'{estimate["steps"]:,}', f'of {estimate["units"]:,} {plural} each'),
        ('seeds', f'{seeds}', 'trained simultaneously'),
        (
            f'FLOPs per {unit}',
            format_scaled(forward['model']),
            f'forward; of them the fusion {format_scaled(forward["fusion"])}',
        ),
        (
            'FLOPs per training step',
            format_scaled(estimate['flops']),
            'of one seed, forward and backward',
        ),
        (
            'FLOPs of the run',
            format_scaled(total_flops),
            'all steps and seeds, without evaluations',
        ),
    ]

    # The state in memory, and the programs if they were compiled.
    memory_sizes = estimate['memory']
    for state_name in ('parameters', 'optimizer', 'other'):
        size = format_bytes(memory_sizes[state_name])
        table_rows.append((f'{state_name}, bytes', size, 'all seeds'))
    checkpoint_size = format_bytes(memory_sizes['checkpoint'])
    table_rows.append(('checkpoint, bytes', checkpoint_size, 'before compression'))
    if 'programs' in estimate:
        table_rows += _make_deployment_rows(estimate)

    # Align the labels on the left and the amounts on the right.
    label_width, amount_width = (max(len(row[column]) for row in table_rows) for column in (0, 1))
    return [
        f'{label:<{label_width}}  {amount:>{amount_width}}  {remark}'.rstrip()
        for label, amount, remark in table_rows
    ]


def _make_deployment_rows(estimate: Costs) -> list[Row]:
    """Return the table rows of the programs, with costs per device."""
    devices = estimate['devices']
    mesh_text = ' × '.join(f'{axis} {size}' for axis, size in devices['mesh'].items())
    idle_note = f', {devices["idle"]} of them idle' if devices['idle'] else ''
    table_rows = [('devices', f'{devices["count"]}', f'{devices["kind"]}: {mesh_text}{idle_note}')]
    for program_name, program in estimate['programs'].items():
        title = {'step': 'training step', 'evaluation': 'evaluation'}[program_name]
        if program.get('updates', 1) > 1:
            title += f', {program["updates"]} at a time'
        table_rows += [('', '', ''), (title, '', 'on each device')]
        table_rows += make_program_rows(program, devices['memory'])
    return table_rows


def make_program_rows(program: Report, memory_limit: int | None) -> list[Row]:
    """Return the table rows of one program in a `deployment.report`."""
    if program['flops'] is None:
        return [('memory', 'does not fit', program['error'])]

    # Work, and its share of the work on one device.
    share, num_parts = program['share'], program['parts']
    remark = ''
    if share is not None and num_parts > 1:
        remark = f'{share:.3f} of those on one device; 1/{num_parts} = {1 / num_parts:.3f} is ideal'
    table_rows = [('FLOPs of products', format_scaled(program['flops']), remark)]
    table_rows.append(('bytes accessed', format_bytes(program['bytes_accessed']), 'of main memory'))

    # Memory, if the compiler reports it.
    if program['peak'] is not None:
        verdict = ''
        if memory_limit is not None:
            fits = 'fits' if program['fits'] else 'DOES NOT FIT'
            verdict = f'{fits} into {format_bytes(memory_limit)}; '
        fields = ('arguments', 'temporaries')
        remark = ', '.join(f'{field} {format_bytes(program[field])}' for field in fields)
        table_rows.append(('memory', format_bytes(program['peak']), verdict + remark))

    # Communication, kernels and time.
    if num_parts > 1:
        transfers = [
            f'{collective["count"]} × {collective["kind"]} of {format_bytes(collective["bytes"])}'
            for collective in program['collectives']
        ]
        if len(transfers) > 6:
            transfers[6:] = [f'{len(transfers) - 6} more']
        bytes_sent = format_bytes(program['bytes_sent'])
        table_rows.append(('sends', bytes_sent, '; '.join(transfers) or 'nothing'))
    kernels = sorted(program['kernels'].items(), key=lambda item: -item[1])
    remark = ', '.join(f'{count:,} {opcode}' for opcode, count in kernels[:4])
    table_rows.append(('kernels', f'{sum(program["kernels"].values()):,}', remark))
    if program['seconds'] is None:
        table_rows.append(('time', '?', 'XLA estimates none for this kind of device'))
    else:
        remark = "of kernels, as XLA estimates their cycles; without waiting for others' data"
        table_rows.append(('time', format_seconds(program['seconds']), remark))
    for loop in program['unknown_loops']:
        table_rows.append(('counted once', 'loop', f'{loop}: its length depends on data'))
    for target in program['uncounted_calls']:
        table_rows.append(('not counted', 'call', f'{target}: its products are not in the FLOPs'))
    return table_rows


def format_seconds(value: float) -> str:
    """Format seconds with three significant digits and a unit: 0.0123 as '12.3 ms'."""
    for unit, unit_seconds in (('s', 1), ('ms', 1e-3)):
        if value >= unit_seconds:
            return f'{value / unit_seconds:.3g} {unit}'
    return f'{value / 1e-6:.3g} µs'


def format_scaled(value: float) -> str:
    """Format a number with three significant digits and an SI prefix: 2400000 as '2.4 M'."""
    exponent = next((power for power in PREFIXES if abs(value) >= 10**power), 0)
    return f'{value / 10**exponent:.3g} {PREFIXES.get(exponent, "")}'


def format_bytes(value: float) -> str:
    return f'{format_scaled(value)}B'


def main(argv: Sequence[str]) -> None:
    """Print the costs of a config.

    Raises:
      UserError: if the command or the config is invalid.
      SystemExit: with code 1 if a program does not fit into the memory of a device.
    """
    # The flags of this command; those of the config are overrides.
    flag_values = flags.FlagValues()
    config_file = flags.DEFINE_string('config', None, 'Config file.', flag_values=flag_values)
    topology = flags.DEFINE_string(
        'topology',
        None,
        'Devices to compile for, such as v5e:4x4 or h100:8.',
        flag_values=flag_values,
    )
    evaluates = flags.DEFINE_bool('eval', False, 'Compile evaluation too.', flag_values=flag_values)
    compiles = flags.DEFINE_bool('compile', True, 'Compile the step.', flag_values=flag_values)
    as_json = flags.DEFINE_bool('json', False, 'Every number as JSON.', flag_values=flag_values)

    # Read the config and compile its programs; what is wrong with either is an error of the user.
    try:
        arguments, changes = overrides.split(argv)
        positional = flag_values(arguments)
        if not config_file.value or len(positional) > 1:
            raise UserError('the command line is invalid: expected --config=FILE, and optionally '
                            '--config.KEY=VALUE, --topology, --eval, --json and '
                            '--nocompile')  # fmt: skip
        if (topology.value or evaluates.value) and not compiles.value:
            raise UserError(
                '--nocompile: expected no --topology or --eval, which require compilation. '
                'Remove --nocompile'
            )
        if topology.value:
            topologies.prepare_process()
        config = overrides.load(config_file.value, changes)
        with progress.Work('sizing the state'):
            memory_sizes = memory.estimate_memory(config, compiles=False)
        programs: Report = {}
        if compiles.value:
            programs = _deployment(config, topology.value, evaluates.value)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(' '.join(str(error).split())) from error

    # Count and print.
    with progress.Work('counting the FLOPs of a training step'):
        estimate = costs.estimate_costs(config) | {'memory': memory_sizes} | programs
    print(json.dumps(estimate, indent=2) if as_json.value else '\n'.join(format_estimate(estimate)))
    if estimate.get('fits') is False:
        raise SystemExit(1)


def _deployment(config: ml_collections.ConfigDict, topology: str | None, evaluates: bool) -> Report:
    one_device = None
    devices: Sequence[jax.Device] = jax.devices()
    if topology:
        devices, one_device = topologies.describe(topology), topologies.describe_one(topology)
    with progress.Work(f'compiling for {len(devices)} {devices[0].device_kind}'):
        return {'topology': topology, **deployment.report(config, devices, one_device, evaluates)}

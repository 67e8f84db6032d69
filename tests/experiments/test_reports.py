"""What experiments report of runs of known numbers, and of sweeps in which nothing has finished."""

import functools
import json
import pathlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import lm_fusion
from experiments.attention_conv import sweep as attention_conv
from experiments.expressivity import inclusion
from experiments.hamiltonian import sweep as hamiltonian
from experiments.hamiltonian import sweep_frames as hamiltonian_frames
from experiments.seq2seq import sweep as seq2seq
from launch import sweep as sweeps
from mi.report import runs
from tests.conftest import ROOT

FILES = sorted((ROOT / 'experiments').glob('*.py'))
DRAWN = [file for file in FILES if 'def report(' in file.read_text()]


@pytest.mark.parametrize('file', DRAWN, ids=lambda file: file.stem)
@pytest.mark.parametrize('state', [None, 'running'])
def test_a_sweep_in_which_nothing_has_finished_is_reported(file, state, tmp_path):
    """Before its first run has begun, and while all are under way."""
    members = sweeps.load(str(file), tmp_path)
    for member in members if state else []:
        run = tmp_path / member.name
        run.mkdir()
        seeds = member.overrides.get('seeds', (0, 1))
        (run / 'config.json').write_text(json.dumps({'seeds': seeds}))
        (run / 'status.json').write_text(json.dumps({'state': state}))
    out = tmp_path / 'report'
    out.mkdir()
    sweeps.report(str(file), tmp_path)
    for written in out.glob('*.md'):
        assert 'nan' not in written.read_text()


class SweepWriter:
    """A sweep directory that is written a run at a time; each has an arm's label and some seeds."""

    def __init__(self, path, experiment):
        self.path, self._experiment, self._members = path, experiment, []

    def run(self, label, finals, config=None, arrays=None, parameters=10, overrides=None):
        """finals: {seed: {metric: value}}, arrays: of these seeds, in their order.

        A metric of another split than SPLIT has the name SPLIT:METRIC.
        """
        name = f'{label}, {len(self._members)}'
        run_dir = self.path / name
        run_dir.mkdir()
        parameter_counts = {'model': parameters, 'fusion': 1}
        cost = {'parameters': parameter_counts, 'flops_per_token': parameter_counts}
        files = {'config': {'seeds': list(finals), **(config or {})}, 'cost': cost}
        for file, value in (files | {'status': {'state': 'done'}}).items():
            (run_dir / f'{file}.json').write_text(json.dumps(value))
        records = []
        for seed, values in finals.items():
            by_split = {}
            for metric, value in values.items():
                split, _, metric = metric.rpartition(':')
                by_split.setdefault(split or self._experiment.SPLIT, {})[metric] = value
            records += [
                {'step': 9, 'seed': seed, 'split': split, **metrics}
                for split, metrics in by_split.items()
            ]
        for file, lines in ('metrics', records), ('timing', [{'step': 9, 'seconds': 8.0}]):
            contents = ''.join(json.dumps(line) + '\n' for line in lines)
            (run_dir / f'{file}.jsonl').write_text(contents)
        if arrays is not None:
            np.savez(run_dir / 'artefacts.npz', **arrays)
        self._members.append({'name': name, 'label': label, 'overrides': overrides or {}})

    def report(self, name):
        """The tables of NAME.md, all cells but those of the lines under the heads."""
        experiment = self._experiment
        description = {'name': 'made', 'metric': experiment.METRIC, 'split': experiment.SPLIT}
        description['baseline'] = experiment.BASELINE
        description['lower_is_better'] = getattr(experiment, 'LOWER_IS_BETTER', True)
        (self.path / 'sweep.json').write_text(json.dumps(description | {'members': self._members}))
        experiment.report(self.path, self.path)
        path = self.path / f'{name}.md'
        lines = path.read_text().splitlines() if path.exists() else []
        cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in lines
                 if line.startswith('|')]  # fmt: skip
        return [line for line in cells if '---' not in line[0]]


TARGETS = ['sort', 'difference', 'farthest', 'reverse']  # not in the order of the table
EQUIVARIANT, ADDITIVE = np.array([0.5, 0.0, 0.0, 0.7]), np.array([0.1, 0.0, 0.3, 0.0])


def write_sequence_run(writer, label, seeds, above, errors, **model):
    """A run whose errors in all orders are `above` + (9 − seed) / 100 above a bound that grows by
    seed, and whose errors are `errors` + seed / 100."""
    usual_model = {'mixer': 'attention', 'fusion': {'name': 'mi_low_rank'}, 'positions': 'learned'}
    usual_model |= {'ends': 'feed_forward', 'heads': 4, 'depth': 2, 'features': 16}
    by_seed = np.array(seeds)[:, None] / 100
    floors = EQUIVARIANT + by_seed * (EQUIVARIANT > 0)
    arrays = {
        'equivariant_floor': floors,
        'additive_floor': np.tile(ADDITIVE, (len(seeds), 1)),
        'error_in_all_orders': floors + above + 0.09 - by_seed,
    }
    finals = {}
    for seed in seeds:
        target_errors = {
            f'mse/{target}': error + seed / 100
            for target, error in zip(TARGETS, errors, strict=True)
        }
        finals[seed] = {'mse': sum(target_errors.values()) / 4} | target_errors
    config = {'model': usual_model | model, 'problem': {'targets': TARGETS}}
    writer.run(label, finals, config, arrays)


def test_bounds_of_sequences_are_subtracted_by_target_and_seed(tmp_path):
    writer = SweepWriter(tmp_path, seq2seq)
    first_draw, second_draw = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
    usual_errors = np.array([0.2, 0.2, 0.2, 0.2])
    for seeds in (first_draw, second_draw):
        write = functools.partial(write_sequence_run, writer, seeds=seeds)
        write_usual = functools.partial(write, errors=usual_errors)
        unordered = {'positions': 'none'}
        write_usual('none', above=np.array([0.02, 0, 0, 0.03]), **unordered)
        write_usual('none, 1', above=np.array([-0.25, 0, 0, 0.5]), depth=1, **unordered)
        write_usual('one head', above=usual_errors - 9, heads=1, **unordered)
        end = {'above': usual_errors, 'mixer': 'fixed', 'ends': 'mixer', 'depth': 1}
        write('end', errors=np.array([0.5, 0.2, 0.31, 0.2]), **end)
        write('end, wide', errors=np.array([0.11, 0.2, 0.9, 0.2]), features=32, **end)
        write('fixed', above=usual_errors, errors=np.array([0.05, 0, 0.1, 0]), mixer='fixed')
    # Its seeds have been counted already.
    write_sequence_run(writer, 'attention', first_draw, np.array([-0.1, 0, 0, -0.4]), usual_errors)
    rows = writer.report('seq2seq')
    errors_start = next(index for index, row in enumerate(rows) if row[0] == 'mixer')
    assert rows[1:errors_start] == [
        ['attention, no positions', 'reverse', '0.745', '0 or above', '+0.0800', '+0.0300'],
        ['attention, no positions', 'sort', '0.545', '0 or above', '−0.2000', '−0.2500'],
        ['attention, positions', 'reverse', '0.745', 'below 0', '−0.3500', '—'],
        ['attention, positions', 'sort', '0.545', 'below 0', '−0.0500', '—'],
        ['one fixed mixing at the end', 'farthest', '0.300', '0 or above', '+0.0100', '+0.0600'],
        ['one fixed mixing at the end', 'sort', '0.100', '0 or above', '+0.0100', '+0.0600'],
        [
            'fixed mixings, a feed-forward layer last', 'farthest', '0.300', 'any',
            '−0.2000', '−0.1500',
        ],
        ['fixed mixings, a feed-forward layer last', 'sort', '0.100', 'any', '−0.0500', '+0.0000'],
    ]  # fmt: skip
    errors = {tuple(row[:4]): row[5:] for row in rows[errors_start + 1 :]}
    means = [cell.split()[0] for cell in errors['fixed mixing', '2', '4', '16']]
    assert means[0] == means[2] == '0.045' and means[3] == '0.095'  # difference, reverse; sort
    assert errors['attention', '2', '4', '16'][1].startswith('0.22 [')  # of seeds 0 to 4
    assert {row[0] for row in rows[errors_start + 1 :]} == {
        'attention', 'attention, no positions', 'fixed mixing', 'fixed mixing, at the end'
    }  # fmt: skip


def test_moved_centers_are_counted_by_head_and_seed(tmp_path):
    """Two runs of a seed each, of two heads in one layer, and a network of convolutions."""
    writer = SweepWriter(tmp_path, attention_conv)
    config = {'problem': {'alphas': [1.0, 2.0]}}
    centers = {  # seed → before and after
        0: ([(0, 0), (3, 3)], [(0, 0), (3, 0)]),
        1: ([(0, 1), (1, 1)], [(1, 1), (1, 1)]),
    }
    for seed, (before, after) in centers.items():
        arrays = {'Delta_before': before, 'Delta': after}
        arrays |= {'alpha_before': [0.5, 0.5] if seed == 0 else [2.0, 2.0], 'alpha': [0.125] * 2}
        arrays = {name: np.array([[array]], float) for name, array in arrays.items()}
        writer.run('attention, 9, learnt', {seed: {'accuracy': 0.9}}, config, arrays)
        layers = np.array([[0.1, 0.3], [1e-3, 1e-3]]) + 0.2 * seed  # [alphas, L]
        accuracy = np.array([0.8, 0.9 - 0.1 * seed])
        arrays = {
            'layer_error': np.stack([layers, 2 * layers]),
            'logit_error': np.stack([layers[:, 0], layers[:, 0]]),
            'accuracy': np.stack([accuracy, accuracy - 0.5]),
            'own_accuracy': np.array(0.9 - 0.1 * seed),
        }
        arrays = {name: array[None] for name, array in arrays.items()}
        writer.run('convolution, 3', {seed: {'accuracy': 0.9}}, config, arrays)
    rows = writer.report('attention_conv')
    cells = {row[0]: row[1:] for row in rows}
    assert cells['3 × 3, 1'] == [
        '3.0e-01 [2.0e-01, 4.0e-01]', '6.0e-01 [4.0e-01, 8.0e-01]', '2.0e-01 [1.0e-01, 3.0e-01]',
        '5.00 [0.00, 10.00]',
    ]  # fmt: skip
    assert cells['3 × 3, 2'][-1] == '0.00 [0.00, 0.00]'
    assert cells['attention, 9, learnt'] == [
        '1',
        '1.00 [0.50, 1.50]',  # half of 3, and half of 1
        '75 [50, 100]', '75 [50, 100]',  # (3, 3) and (3, 0) are near none
        '1.5 [1.0, 2.0]', '1.0 [1.0, 1.0]',  # both heads of seed 1 end at one offset
        '0.75 [0.50, 1.00]', '2.00 [2.00, 2.00]',
    ]  # fmt: skip


@pytest.mark.parametrize('experiment', [hamiltonian, hamiltonian_frames])
def test_laws_are_compared_within_their_system_and_set_of_seeds(experiment, tmp_path):
    """error_long of MI is 1/2 and 2 of that of concat in one system, 4 and 8 times in the other."""
    writer = SweepWriter(tmp_path, experiment)
    frames = experiment is hamiltonian_frames
    shape = (2, 11, 2, 4, 4, 1) if frames else (2, 11, 4, 2)
    paths = np.zeros(shape, np.uint8) if frames else np.random.default_rng(0).normal(size=shape)
    ratios = {'mass_spring': (0.5, 2.0), 'pendulum': (4.0, 8.0)}
    for system, of_system in ratios.items():
        for form, form_ratios in (('joint, concat', (1.0, 1.0)), ('joint, mi', of_system)):
            for seeds, ratio in zip(((0, 1), (2, 3)), form_ratios, strict=True):
                finals = {
                    seed: dict.fromkeys(experiment.SCORES, 0.25)
                    | {'valid': 1 / (1 + ratio), 'error_long': 0.01 * (1 + seed) * ratio}
                    for seed in seeds
                }
                errors = np.full((2, 11, 3), 0.1)
                arrays = {'error': errors, 'drift': errors, 'predicted': paths, 'true': paths}
                config = {'problem': {'horizon': 1}}
                writer.run(f'{system}, {form}', finals, config, arrays, 4500 + len(form))
    rows = writer.report(sweeps.sweep_name(pathlib.Path(experiment.__file__)))
    header_rows = [index for index, row in enumerate(rows) if row[0] == 'law']
    of_system = dict(zip(hamiltonian.SYSTEMS, header_rows, strict=True))
    for system, (first_ratio, second_ratio) in ratios.items():
        header_row = of_system[system]
        header, law_rows = rows[header_row], rows[header_row + 1 : header_row + 3]
        table = {row[0]: dict(zip(header, row, strict=True)) for row in law_rows}
        assert list(table) == ['energy, concat', 'energy, MI']
        mi_cells = table['energy, MI']
        assert mi_cells['parameters'] == '4,509' and mi_cells['error'] == '0.25 [0.25, 0.25]'
        ratio_title = 'error long / that of energy, concat, seeds'
        for seeds, ratio in (('0 to 1', first_ratio), ('2 to 3', second_ratio)):
            column = f'{ratio_title} {seeds}'
            assert mi_cells[column] == f'{ratio:#.2g} [{ratio:#.2g}, {ratio:#.2g}]'
            assert table['energy, concat'][column] == '—'
        ranks = {
            row[0]: row[2::2] for row in rows[header_row + 4 : header_row + 6]
        }  # of valid, the higher the better
        expected_ranks = ['1' if ratio < 1 else '2' for ratio in (first_ratio, second_ratio)]
        assert ranks['energy, MI'] == expected_ranks
        assert ranks['energy, concat'] == [str(3 - int(rank)) for rank in expected_ranks]
    assert of_system['two_body'] == len(rows) - 1  # nothing of it has been run
    assert (tmp_path / 'mass_spring.gif').exists() == frames


def test_the_error_of_a_product_is_drawn_by_its_median_and_range(tmp_path):
    writer = SweepWriter(tmp_path, inclusion)
    surface = {'surface': np.full((3, 5, 5), 1e-3)}
    for width, errors in ((4, (1.0, 2.0, 6.0)), (16, (0.5, 0.25, 0.125))):
        finals = {seed: {'mse': error} for seed, error in enumerate(errors)}
        writer.run(f'concat, 1, {width}', finals, arrays=surface, parameters=10 * width)
    writer.run('mi, 0, 1', {seed: {'mse': 1e-9} for seed in range(3)}, arrays=surface, parameters=4)
    writer.report('inclusion')
    assert (tmp_path / 'inclusion.png').stat().st_size > 0
    arms = runs.read_sweep(tmp_path).arms
    axes = Figure().subplots()
    inclusion._draw_errors(axes, arms[:2], 'concat', 'grey')
    (container,) = axes.containers
    middle, _, (bars,) = container
    assert middle.get_xydata().tolist() == [[40, 2.0], [160, 0.25]]
    ends = [path.vertices[:, 1].tolist() for path in bars.get_paths()]
    assert ends == [[1.0, 6.0], [0.125, 0.5]]


def test_fusions_are_compared_with_concat_of_their_core_and_site_by_seed(tmp_path):
    writer = SweepWriter(tmp_path, lm_fusion)
    concat = {0: 2.0, 1: 3.0, 2: 4.0}
    for core, core_offset in (('transformer', 0.0), ('lstm', 10.0)):
        for site, site_offset in (('encoder', 0.0), ('decoder', 1.0)):
            offset = core_offset + site_offset
            finals = {
                'concat': {seed: offset + value for seed, value in concat.items()},
                # of seeds 1 and 2 alone, and in another order
                'mi': {2: offset + 4.0 - 0.25, 1: offset + 3.0 - 0.5},
            }
            if site == 'encoder':
                finals['none'] = {seed: core_offset + value + 0.5 for seed, value in concat.items()}
            for fusion, values in finals.items():
                run_finals = {seed: {'bits_per_byte': value} for seed, value in values.items()}
                writer.run(f'{core}, {site}, {fusion}', run_finals)
    _, *rows = writer.report('lm_fusion')
    cells = {tuple(row[:3]): row[3:5] for row in rows}
    assert len(rows) == len(cells) == 2 * 2 * 3
    assert cells['lstm', 'decoder', 'concat'] == ['14.0000 [13.0000, 15.0000]', '—']
    for core in ('transformer', 'lstm'):
        for site, gap in (('encoder', '+0.5000'), ('decoder', '−0.5000')):
            assert cells[core, site, 'mi'][1] == '−0.3750 [−0.5000, −0.2500]'
            assert cells[core, site, 'none'][1] == f'{gap} [{gap}, {gap}]'

"""Tables of long predictions with known numbers."""

from experiments.figures import roll_outs
from mi.report.arms import Arm


def make_arm(label, error, drift):
    seeds = range(4)
    records = [
        {'step': 1, 'seed': seed, 'split': 'eval', 'error': error[seed], 'drift': drift[seed]}
        | {'valid': 0.5, 'long': 2.0 * (error[seed] or 0)}
        for seed in seeds
    ]
    cost = {'parameters': {'model': 10}}
    return Arm(label, 'done', None, tuple(seeds), cost=cost, metrics=records)


def test_the_mean_drift_counts_only_seeds_that_move():
    """The mean drift is that of the seeds that move; ratios are of each set of seeds."""
    ours = make_arm('ours', error=[0.1, 0.1, 0.9, 0.4], drift=[4.0, 1.0, 1e-6, 2.0])
    baseline = make_arm('base', error=[0.2, 0.2, 0.3, 0.2], drift=[1.0, 1.0, 1.0, 1.0])
    arms = {'base': baseline, 'ours': ours}
    table = roll_outs.tabulate_scores(
        arms, ('error', 'drift'), 'long', 'eval', 'base', ((0, 1), (2, 3))
    )
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')] for line in table.splitlines()
    ]
    assert header[-2:] == ['long / that of base, seeds 0 to 1', 'long / that of base, seeds 2 to 3']
    cells_by_arm = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert cells_by_arm['ours']['drift'].startswith('2.0 [')  # the geometric mean of 4, 1 and 2
    assert cells_by_arm['ours']['drift'].endswith('(3 of 4)')
    assert '(' not in cells_by_arm['base']['drift']
    assert cells_by_arm['ours'][header[-2]].startswith('0.50 [')  # 0.1 / 0.2
    assert cells_by_arm['ours'][header[-1]].startswith('2.4 [')  # √(3 · 2)
    assert cells_by_arm['base'][header[-1]] == '—'


def test_an_arm_that_diverged_has_no_scores():
    ours = make_arm('ours', error=[0.1, None, 0.9, 0.4], drift=[4.0, 1.0, 1.0, 2.0])
    ours.metrics[1]['long'] = None
    baseline = make_arm('base', error=[0.2, 0.2, 0.3, 0.2], drift=[1.0, 1.0, 1.0, 1.0])
    arms = {'base': baseline, 'ours': ours}
    table = roll_outs.tabulate_scores(
        arms, ('error', 'drift'), 'long', 'eval', 'base', ((0, 1), (2, 3))
    )
    cells = [cell.strip() for cell in table.splitlines()[-1].strip('|').split('|')]
    assert cells[2] == '—' and cells[-2:] == ['—', '—']
    assert cells[3].startswith('2.8 [') and cells[3].endswith('(2 of 4)')  # √(4 · 2)

"""Tables of long predictions with known numbers."""

from experiments.figures import roll_outs
from mi.report.runs import Arm


def arm(label, error, drift):
    seeds = range(4)
    rows = [
        {'step': 1, 'seed': s, 'split': 'eval', 'error': error[s], 'drift': drift[s], 'valid': 0.5}
        | {'long': 2.0 * (error[s] or 0)}
        for s in seeds
    ]
    cost = {'parameters': {'model': 10}}
    return Arm(label, 'done', None, tuple(seeds), cost=cost, metrics=rows)


def test_a_law_that_rests_does_not_count_as_one_that_keeps_its_energy():
    """The mean drift is that of the seeds that move; ratios are of each set of seeds."""
    ours = arm('ours', error=[0.1, 0.1, 0.9, 0.4], drift=[4.0, 1.0, 1e-6, 2.0])
    base = arm('base', error=[0.2, 0.2, 0.3, 0.2], drift=[1.0, 1.0, 1.0, 1.0])
    arms = {'base': base, 'ours': ours}
    text = roll_outs.tabulate_scores(
        arms, ('error', 'drift'), 'long', 'eval', 'base', ((0, 1), (2, 3))
    )
    header, _, *rows = [
        [c.strip() for c in line.strip('|').split('|')] for line in text.splitlines()
    ]
    assert header[-2:] == ['long / that of base, seeds 0 to 1', 'long / that of base, seeds 2 to 3']
    found = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert found['ours']['drift'].startswith('2.0 [')  # the geometric mean of 4, 1 and 2
    assert found['ours']['drift'].endswith('(3 of 4)')
    assert '(' not in found['base']['drift']
    assert found['ours'][header[-2]].startswith('0.50 [')  # 0.1 / 0.2
    assert found['ours'][header[-1]].startswith('2.4 [')  # √(3 · 2)
    assert found['base'][header[-1]] == '—'


def test_an_arm_that_diverged_has_no_scores():
    ours = arm('ours', error=[0.1, None, 0.9, 0.4], drift=[4.0, 1.0, 1.0, 2.0])
    ours.metrics[1]['long'] = None
    base = arm('base', error=[0.2, 0.2, 0.3, 0.2], drift=[1.0, 1.0, 1.0, 1.0])
    arms = {'base': base, 'ours': ours}
    text = roll_outs.tabulate_scores(
        arms, ('error', 'drift'), 'long', 'eval', 'base', ((0, 1), (2, 3))
    )
    cells = [c.strip() for c in text.splitlines()[-1].strip('|').split('|')]
    assert cells[2] == '—' and cells[-2:] == ['—', '—']
    assert cells[3].startswith('2.8 [') and cells[3].endswith('(2 of 4)')  # √(4 · 2)

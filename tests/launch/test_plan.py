"""Dry runs: what members cost, with each shape traced once."""

import json

import pytest

from launch import plan, sweep
from mi.config import UserError
from mi.estimate import costs
from tests.launch.sweep_files import SWEEP


def test_a_dry_run_tells_what_members_cost_and_hours_by_the_rate_of_those_that_ran(
    tmp_path, capsys
):
    values = {'model.width': [16, 32], 'seeds': [(0, 1)], 'train.steps': [100], 'train.batch': [8]}
    file = tmp_path / 'fits.py'
    text = SWEEP.format(overrides=sweep.product(**values), baseline=None)
    text = text.replace("'bits_per_byte', 'test'", "'mse', 'eval'")
    file.write_text(text.replace('configs/lm.py:tiny', 'experiments/expressivity/config.py:fit'))
    runs = tmp_path / 'runs'
    members = sweep.load(str(file), runs)
    member_costs = [costs.estimate_costs(sweep.parse_config(m.command)) for m in members]
    flops = [member_costs[i]['flops'] * 100 * 2 for i in range(2)]
    plan.show(members, runs)
    lines = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in lines if line.split()[:1] == ['width=16'])
    count = f'{member_costs[0]["parameters"]["model"]:,}'
    assert row == ['width=16', 'waiting', count, f'{member_costs[0]["flops"]:.3g}', '100', '2',
                   f'{flops[0]:.3g}']  # fmt: skip
    assert any(line.endswith(f'--workdir={runs}/width=32') for line in lines)
    assert f'{sum(flops):.3g} FLOPs' in lines[-1] and ' h' not in lines[-1]

    (runs / 'width=16').mkdir()
    timing = [{'step': 50, 'seconds': 99.0}, {'step': 100, 'seconds': 36.0}]  # the first compiles
    (runs / 'width=16/timing.jsonl').write_text(''.join(json.dumps(r) + '\n' for r in timing))
    plan.show(members, runs)
    pace = flops[0] / 2 / 36
    hours = f'{sum(flops) / pace / 3600:.2g} h at {pace:.3g} FLOP/s'
    assert hours in capsys.readouterr().out.splitlines()[-1]


def test_members_that_differ_in_rates_and_seeds_alone_are_traced_once(monkeypatch):
    """And what is shown of each is what it costs by itself."""
    count_cost, traced = costs.estimate_costs, []
    monkeypatch.setattr(costs, 'estimate_costs', lambda c: (traced.append(c), count_cost(c))[1])
    widths = sweep.zip_(**{'model.width': [8, 16], 'problem.dimension': [3, 4]})
    rates = {'optim.learning_rate': [0.1, 0.2], 'seeds': [(0,), (1, 2)], 'train.steps': [5, 7]}
    arguments = [
        [
            '--config=experiments/expressivity/config.py:fit',
            *(f'--config.{k}={v}' for k, v in m.items()),
        ]
        for m in sweep.product(widths, **rates)
    ]
    member_costs = plan.count_costs([sweep.parse_config(a) for a in arguments])
    assert len(member_costs) == 16 and len(traced) == 2
    assert member_costs == [count_cost(sweep.parse_config(a)) for a in arguments]
    assert [(t['steps'], t['seeds']) for t in member_costs[:4]] == [(5, 1), (7, 1), (5, 2), (7, 2)]
    for key, value in (('learning_rate', -1.0), ('clip_norm', -1.0)):  # known shapes, bad rate
        bad = sweep.parse_config([*arguments[0], f'--config.optim.{key}={value}'])
        with pytest.raises(UserError, match=f'optim.{key} = {value}'):
            plan.count_costs([sweep.parse_config(arguments[0]), bad])


@pytest.mark.parametrize(
    'config, key, values, traces',
    [
        ('configs/lm.py:tiny', 'optim.learning_rate', [0.1, 0.2], 1),
        ('configs/lm.py:tiny', 'dropout.layer', [0.1, 0.2], 1),
        ('configs/lm.py:tiny', 'dropout.layer', [0.1, 0.0], 2),
        ('configs/lm.py:tiny', 'model.hidden', [24, 32], 2),
        ('configs/lm.py:tiny', 'model.fusion.name', ['mi', 'film'], 2),
        ('configs/lm.py:tiny', 'train.batch', [2, 4], 2),
        ('configs/lm.py:tiny', 'optim.name', ['adam', 'sgd'], 2),
        ('configs/rl.py:tiny,env=catch', 'loss.entropy_cost', [0.1, 0.2], 1),
        ('configs/rl.py:tiny,env=catch', 'model.sites', ["('input',)", '()'], 2),
    ],
)
def test_only_what_shapes_do_not_depend_on_is_left_out(monkeypatch, config, key, values, traces):
    traced = []
    monkeypatch.setattr(costs, 'estimate_costs', lambda config: traced.append(config) or {})
    monkeypatch.setattr(plan, 'validate', lambda config: None)
    arguments = [[f'--config={config}', f'--config.{key}={value}'] for value in values]
    plan.count_costs([sweep.parse_config(a) for a in arguments])
    assert len(traced) == traces

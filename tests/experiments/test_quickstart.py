"""The two sweeps of `make run`: what they can settle, and the whole way at toy size."""

import json
import pathlib
import subprocess
import sys

import pytest

from experiments import quickstart, quickstart_rl
from launch import sweep as sweeps
from mi.config import flatten
from mi.report import analysis, runs, statistics
from tests.conftest import ROOT

SWEEPS = [quickstart, quickstart_rl]
TOY = """
from experiments import quickstart_rl as full

CONFIG = 'configs/rl.py:tiny,env=actuator_inversion/inversions'
TITLE, METRIC, SPLIT, CURVES = full.TITLE, full.METRIC, full.SPLIT, full.CURVES
LOWER_IS_BETTER, BASELINE, NOTES = full.LOWER_IS_BETTER, full.BASELINE, []


def sweep():
    return [member | {'seeds': (0, 1), 'train.steps': 800} for member in full.sweep()]
"""


def load_configs(experiment, path):
    """The config of each member, by its arm."""
    members = sweeps.load(str(pathlib.Path(experiment.__file__)), path, dry=True)
    return {member.label: sweeps.parse_config(member.command) for member in members}


@pytest.mark.parametrize('experiment', SWEEPS)
def test_mi_and_concat_differ_in_the_fusion_alone(experiment, tmp_path):
    configs = {
        label: flatten(config.to_dict())
        for label, config in load_configs(experiment, tmp_path).items()
    }
    assert {'mi', experiment.BASELINE} <= set(configs) and experiment.BASELINE == 'concat'
    differences = {
        key for key in configs['mi'] if configs['mi'][key] != configs['concat'][key]
    }  # fmt: skip
    assert differences == {'model.fusion.name'}


@pytest.mark.parametrize('experiment', SWEEPS)
def test_a_comparison_can_be_settled_even_if_a_seed_disagrees(experiment, tmp_path):
    """By the smallest difference: 2 · 2 of 2ⁿ choices of signs are as far from zero."""
    configs = load_configs(experiment, tmp_path)
    num_tests = len(configs) - 1
    for config in configs.values():
        num_seeds = len(set(config.seeds))
        assert num_seeds >= statistics.count_seeds_needed(num_tests)
        assert num_tests * 2 * 2.0 ** (1 - num_seeds) <= statistics.ALPHA


@pytest.mark.slow
def test_a_sweep_of_agents_runs_to_its_conclusion(tmp_path):
    """Two seeds of 800 steps: it runs to the end, and says that two seeds settle nothing."""
    sweep_file, workdir = tmp_path / 'toy.py', tmp_path / 'runs'
    sweep_file.write_text(TOY)
    command = [sys.executable, '-m', 'launch.local', f'--sweep={sweep_file}']
    done = subprocess.run(
        [*command, f'--workdir={workdir}'],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    by_arm = {
        result.arm.label: result for result in analysis.compute_results(runs.read_sweep(workdir))
    }
    assert list(by_arm) == ['mi', 'concat']
    for result in by_arm.values():
        tasks = result.task_summary.tasks
        assert set(tasks) == {
            'up right down left', 'down right up left', 'up left down right', 'down left up right',
        }  # fmt: skip
        assert 0 <= result.metric.mean <= 1 and result.arm.state == 'done'
    gap = by_arm['mi'].difference
    assert gap.num_seeds == 2 and by_arm['mi'].test.min_p == 0.5
    last_words = ' '.join(done.stdout.split())  # the sentence may need two lines
    last_words = last_words[last_words.index('mi and concat: ') :]
    assert last_words.startswith('mi and concat: not settled, a difference of ')
    assert last_words.endswith(f'Everything else: {workdir}/report/report.html')
    conclusions = (workdir / 'report' / 'conclusions.txt').read_text().splitlines()
    assert conclusions[0] == quickstart_rl.TITLE
    costs = [
        json.loads((workdir / name / 'cost.json').read_text())
        for name in ('fusion=mi', 'fusion=concat')
    ]
    assert costs[0]['parameters']['fusion'] > costs[1]['parameters']['fusion']

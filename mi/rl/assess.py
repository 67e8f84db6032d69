"""Evaluation of a trained agent: sampled and greedy scores for every task, and videos."""

import operator
import pathlib

import jax
import ml_collections
import numpy as np
import rich.console
import rich.table

from mi import precision
from mi.rl import (
    config as rl_config,
)
from mi.rl import (
    factory,
    video,
)
from mi.rl.envs.spec import Spec
from mi.rl.episode_metrics import Record
from mi.rl.evaluate import Evaluation
from mi.rl.play import Watched
from mi.rl.restore import restore_params
from mi.training.io import write_json
from mi.training.run_config import merge_eval_config

OWN = ('eval', 'actors', 'tracker')
FIXED = ('task', 'env', 'model', 'seeds')

Scores = dict[str, dict[str, Record]]  # split and policy, as 'eval_greedy' → seed → record


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluate the newest checkpoint of a run, and write the results to WORKDIR/evaluation.

        scores.json    scores by split and policy (such as 'eval_greedy') and by seed
        TASK.gif       an episode of the first seed's greedy policy

    Raises:
      UserError: if the directory has no complete checkpoint, or belongs to a different config.
    """
    # The config of the run, with the evaluation's own keys.
    rl_config.validate(config)
    run_path = pathlib.Path(workdir)
    config = merge_eval_config(run_path, config, overridable=OWN, fixed=FIXED).unlock()
    config.eval.greedy = True

    # Scores of every split, seed and policy.
    scores: Scores = {}
    for split, config_key in factory.get_environment_keys(config).items():
        with (
            precision.use_config(config),
            factory.name_environment_keys(config_key),
            Evaluation(config, config_key) as evaluation,
        ):
            if split == 'eval':
                agent = factory.build_agent(config, evaluation.spec)
                params, step = restore_params(config, agent, run_path)
            factory.check_held_out(config, agent.spec, evaluation.spec)
            for seed_index, seed in enumerate(config.seeds):
                seed_params = jax.tree.map(operator.itemgetter(seed_index), params)
                for suffix, record in evaluation(agent, seed_params, step, seed).items():
                    scores.setdefault(split + suffix, {})[str(seed)] = record
        _print_scores(evaluation.spec, split, scores)
    output_dir = run_path / 'evaluation'
    output_dir.mkdir(exist_ok=True)
    write_json(output_dir / 'scores.json', {'step': step, **scores})

    # Videos of the first seed's greedy policy.
    first_params = jax.tree.map(operator.itemgetter(0), params)
    batch_size = max(config.actors.batch, len(agent.spec.tasks))
    pool = Watched(factory.make_pool(config, batch_size, config.seeds[0]), config.actors.timeout)
    try:
        action_key = jax.random.key(config.seeds[0])
        with precision.use_config(config), factory.name_environment_keys():
            frames = video.record_episodes(pool, agent, first_params, action_key, greedy=True)
    finally:
        pool.close()
    for task_name, task_frames in frames.items():
        file_stem = task_name.replace(' ', '_').replace('/', '_')
        video.write(output_dir / f'{file_stem}.gif', pool.spec, task_name, task_frames)
    print(f'{output_dir}: scores.json and {len(frames)} videos')


def _print_scores(spec: Spec, split: str, scores: Scores) -> None:
    """Print the mean scores over seeds, with a row for each task.

    The greedy column shows success, or the return if the environment does not define success.
    """
    score_name = 'success' if spec.has_success else 'return'
    columns = ['task', 'return', '± 2 s.e.', *(['success'] if spec.has_success else [])]
    table = rich.table.Table(*columns, f'greedy {score_name}', title=split)

    def mean(policy_suffix: str, metric_name: str) -> float:
        records = scores[split + policy_suffix].values()
        return float(np.array([record[metric_name] for record in records], float).mean())

    def add_row(label: str, task_suffix: str, width: str) -> None:
        success = [f'{mean("", f"success{task_suffix}"):.2f}'] if spec.has_success else []
        greedy_mean = mean('_greedy', f'{score_name}{task_suffix}')
        greedy = f'{greedy_mean:.{2 if spec.has_success else 3}f}'
        table.add_row(label, f'{mean("", f"return{task_suffix}"):.3f}', width, *success, greedy)

    # The seeds are independent, so their squared standard errors add up.
    for task_name in spec.tasks:
        records = scores[split].values()
        metric_name = f'stderr/{task_name}'
        standard_errors = np.array([record.get(metric_name, np.nan) for record in records], float)
        width = 2 * np.sqrt(np.sum(np.square(standard_errors))) / len(standard_errors)
        add_row(task_name, f'/{task_name}', f'{width:.3f}')
    table.add_section()
    add_row('mean', '', '')
    rich.console.Console().print(table)

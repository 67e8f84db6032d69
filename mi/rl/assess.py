"""Evaluation of a trained agent: scores of every task, greedy and sampled, and videos."""

import functools
import pathlib
from typing import Any

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
    envs,
    factory,
    video,
)
from mi.rl.agent import Agent
from mi.rl.envs.spec import Spec
from mi.rl.evaluate import Evaluation
from mi.rl.play import Watched
from mi.training import checkpoint
from mi.training.io import write_json
from mi.training.run_config import merge_eval_config

OWN = ('eval', 'actors', 'tracker')
FIXED = ('task', 'env', 'model', 'seeds')


def assess(config: ml_collections.ConfigDict, workdir: str) -> None:
    """Evaluate the newest checkpoint of a run directory, and write into its evaluation/.

        scores.json    records of metrics.jsonl, by split and policy ('eval_greedy', …) and seed
        TASK.gif       the greedy policy of the first seed

    Raises:
      UserError: if the directory has no complete checkpoint, or belongs to another config.
    """
    # The config of the run, with the evaluation's own keys.
    rl_config.validate(config)
    path = pathlib.Path(workdir)
    config = merge_eval_config(path, config, overridable=OWN, fixed=FIXED).unlock()
    config.eval.greedy = True

    # Scores of every split, seed and policy.
    scores: dict[str, Any] = {}
    keys = {'eval': 'env.name'}
    if config.eval.held_out:
        keys['held_out'] = 'eval.held_out'
    for split, key in keys.items():
        with precision.use_config(config), Evaluation(config, key) as evaluation:
            if split == 'eval':
                agent = factory.build_agent(config, evaluation.spec)
                params, step = _restore_params(config, agent, path)
            factory.check_held_out(config, agent.spec, evaluation.spec)
            for i, seed in enumerate(config.seeds):
                seed_params = jax.tree.map(lambda a, i=i: a[i], params)
                for policy, record in evaluation(agent, seed_params, step, seed).items():
                    scores.setdefault(split + policy, {})[str(seed)] = record
        _print_scores(evaluation.spec, split, scores)
    folder = path / 'evaluation'
    folder.mkdir(exist_ok=True)
    write_json(folder / 'scores.json', {'step': step, **scores})

    # Videos of the first seed's greedy policy.
    first_params = jax.tree.map(lambda a: a[0], params)
    rows = max(config.actors.batch, len(agent.spec.tasks))
    name, options = factory.get_environment_args(config)
    pool = Watched(
        envs.pool(name, rows, config.seeds[0], options),
        config.actors.timeout,
        'config.actors.timeout',
    )
    try:
        action_key = jax.random.key(config.seeds[0])
        with precision.use_config(config):
            frames = video.record_episodes(pool, agent, first_params, action_key, greedy=True)
    finally:
        pool.close()
    for task, task_frames in frames.items():
        name = task.replace(' ', '_').replace('/', '_')
        video.write(folder / f'{name}.gif', pool.spec, task, task_frames)
    print(f'{folder}: scores.json and {len(frames)} videos')


def _restore_params(
    config: ml_collections.ConfigDict, agent: Agent, path: pathlib.Path
) -> tuple[Any, int]:
    """Return the parameters of all seeds, [S, …], from a run of any topology, and their step."""
    saved = checkpoint.Checkpoints(path / 'checkpoints', config.train.keep)
    newest, meta = saved.newest()
    like: Any = jax.eval_shape(functools.partial(factory.init_params, agent), jax.random.key(0))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    has_seeds = config.train.topology == 'fused'
    axes = (len(config.seeds),) if has_seeds else ()
    like = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(axes + a.shape, a.dtype, sharding=device), like
    )
    params = saved.restore_part(newest, 'learner.params' if has_seeds else 'params', like)
    if not has_seeds:
        params = jax.tree.map(lambda a: a[None], params)
    return params, meta['step']


def _print_scores(spec: Spec, split: str, scores: dict[str, Any]) -> None:
    """Print a row for each task: mean return and success over seeds, sampled and greedy.

    If the environment does not define success, the greedy column has the return.
    """
    score_name = 'success' if spec.has_success else 'return'
    columns = ['task', 'return', '± 2 s.e.', *(['success'] if spec.has_success else [])]
    table = rich.table.Table(*columns, f'greedy {score_name}', title=split)

    def mean(policy: str, name: str) -> float:
        return float(np.mean([record[name] for record in scores[split + policy].values()]))

    def add_row(label: str, suffix: str, width: str) -> None:
        success = [f'{mean("", f"success{suffix}"):.2f}'] if spec.has_success else []
        greedy = f'{mean("_greedy", f"{score_name}{suffix}"):.{2 if spec.has_success else 3}f}'
        table.add_row(label, f'{mean("", f"return{suffix}"):.3f}', width, *success, greedy)

    for task in spec.tasks:
        records = scores[split].values()
        errors = [record.get(f'stderr/{task}', float('nan')) for record in records]
        width = 2 * np.sqrt(np.sum(np.square(errors))) / len(errors)
        add_row(task, f'/{task}', f'{width:.3f}')
    table.add_section()
    add_row('mean', '', '')
    rich.console.Console().print(table)

"""WikiText-103 and DMLab-30 on 1, 8, 64 and 512 chips, on paper: the tables of docs/scaling.md.

    python -m benchmarks.scaling
    python -m benchmarks.scaling --chip='TPU v5p' --price=4 --core_price=0.03

What is measured is read from benchmarks/results: of GPUs only where lm_gpu.json and rl_gpu.json are
there, otherwise the products are taken to run at the chip's roofline, which is a bound and says so.
Everything else is a constant with its source, here and in `benchmarks.cluster`.
"""

import collections
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags

from benchmarks import cluster, pipeline
from benchmarks.cluster import CHIPS, Chip, Job, Step, Work
from configs import lm as configs_lm
from configs import lm_wikitext103, rl_dmlab30
from configs import rl as configs_rl
from mi import counting
from mi.lm import factory as lm
from mi.lm import train
from mi.rl import factory as rl
from mi.rl import learner
from mi.rl.envs.host import dmlab30
from mi.rl.envs.spec import Spec
from mi.rl.trajectory import Trajectory
from mi.training import optim

CHIP = flags.DEFINE_enum('chip', 'H100', sorted(CHIPS), 'Of benchmarks.cluster.CHIPS.')
PRICE = flags.DEFINE_float('price', 3.0, 'Of a chip, an hour; an assumption, in any currency.')
CORE_PRICE = flags.DEFINE_float('core_price', 0.04, 'Of a processor core, an hour; likewise.')
WRITE = flags.DEFINE_string('write', None, 'Where to write the tables too, as JSON.')

RESULTS = pathlib.Path(__file__).parent / 'results'
NUMBERS = (1, 8, 64, 512)

# WikiText-103: 20 passes of its training text. The Transformer's batch of 60 does not divide by 8.
WIKITEXT_BATCH = 64
WIKITEXT_TOKENS = 20 * 103_227_021

FRAMES = 10e9  # of DMLab-30, four to a step
# Frames of DMLab a core and second: 49,679 of a machine with 36 cores, simulation alone, an action
# for four frames (Petrenko et al., 2020, Sample Factory, table of peak throughputs; recalled).
CORE_FRAMES = 49_679 / 36
STEP = dmlab30.REPEAT / CORE_FRAMES  # seconds of a core for a step of one engine
# Assumed: how much steps differ, and that a new episode takes half a second with its map in the
# cache, after 1,800 steps (two minutes at 60 frames a second).
SPREAD, RESET, EPISODE = 0.3, 0.5, 1800


def read(name: str) -> dict[str, Any]:
    """A file of benchmarks/results; empty where there is none."""
    path = RESULTS / name
    return dict(json.loads(path.read_text())) if path.exists() else {}


def core_flops() -> float:
    """Of one core, f32: the fastest large product of benchmarks.layers, median, over its cores."""
    layers = read('layers_cpu.json')
    cores = int(layers['machine'].split(', ')[1].split()[0])
    return 1e9 * statistics.median(f['peak_gflops'] for f in layers['figures']) / cores


def policy_call() -> float:
    """Seconds of a host for a step of a group: the policy of Catch computes next to nothing."""
    figures = read('actors_cpu.json')['figures']
    return min(f['seconds']['act'] for f in figures if f['set'] == 'catch')


# Sizes of benchmarks.lm, on a CPU and on a GPU: V, E, H, T, B, and V, H, layers, heads, T, B.
LSTM_CPU = {
    'quickstart': (1024, 64, 256, 64, 32),
    'default': (256, 128, 512, 64, 32),
    'ptb': (10_000, 650, 650, 35, 20),
}
LSTM_GPU = {
    'default': (256, 128, 512, 64, 32),
    'ptb': (10_000, 650, 650, 35, 128),
    'large': (256, 512, 2048, 128, 128),
}
TRANSFORMER_GPU = {
    'default': (256, 512, 8, 8, 256, 64),
    'long': (32_000, 1024, 12, 16, 1024, 16),
}
Seconds = Callable[[Sequence[counting.Product]], float]  # of products, at some bound


def lm_share(
    record: dict[str, Any], name: str, sizes: dict[str, tuple[int, ...]], seconds: Seconds
) -> float:
    """Median share of a bound that training steps reached in a record of benchmarks.lm.

    Args:
      record: the file's content.
      name: of the set, lstm or transformer.
      sizes: its shapes.
      seconds: of products, at the bound.
    """
    shares = []
    for figure in record['figures']:
        if figure.get('set', 'lstm') != name or figure.get('side', 'mi') != 'mi':
            continue
        config = configs_lm.get_config().unlock()
        V, *middle, T, B = sizes[figure['size']]
        config.model.update({'site': 'none', 'tied': False})
        if name == 'lstm':
            config.model.update({'embed': middle[0], 'hidden': middle[1]})
        else:
            H, layers, heads = middle
            config.model.update({'core': 'transformer', 'embed': H, 'hidden': H, 'ffn': 4 * H})
            config.model.update({'layers': layers, 'heads': heads, 'dtype': 'bfloat16'})
        config.train.update({'length': T, 'batch': B})
        rate = figure['mi'] if 'mi' in figure else figure['tokens_per_second']
        shares.append(seconds(lm_work(config, V, B).products) * rate / (T * B))
    return statistics.median(shares)


def lm_job(name: str, config: ml_collections.ConfigDict, total: float) -> Job:
    vocabulary = config.data.vocabulary
    _, _, state = lm_shapes(config, vocabulary, 1)
    return Job(
        name=name,
        parameters=counting.parameters(state.params),
        units=config.train.length,
        total=total,
        work=functools.lru_cache(functools.partial(lm_work, config, vocabulary)),
    )


def lm_shapes(config: ml_collections.ConfigDict, vocabulary: int, rows: int) -> tuple[Any, ...]:
    """Model, optimiser, and the shapes of the state of a training run."""
    model = lm.build(config, vocabulary)
    optimiser = optim.optimiser(config.optim, config.train.steps)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    state = jax.eval_shape(lambda seed: train.init(model, optimiser, seed, rows), number)
    return model, optimiser, state


def lm_work(config: ml_collections.ConfigDict, vocabulary: int, rows: int) -> Work:
    """Of a training step of so many rows; every block of an adaptive softmax is counted."""
    model, optimiser, state = lm_shapes(config, vocabulary, rows)
    number = jax.ShapeDtypeStruct((), jnp.int32)
    tokens = jax.ShapeDtypeStruct((config.train.length + 1, rows), jnp.int32)
    step = functools.partial(train.train_step, model, optimiser, 1)

    def loss(params: Any, carry: Any, tokens: Any) -> Any:
        key = jax.random.key(0)
        rngs = {'dropout': key, 'state': key}
        arguments = carry, tokens[:-1], tokens[1:]
        _, losses = model.apply({'params': params}, *arguments, train=True, rngs=rngs)
        return losses.objective.mean()  # type: ignore[attr-defined]

    products = counting.products(step, state, number, number, tokens, None)
    return Work(products, kept(loss, state.params, state.carry, tokens))


def kept(loss: Callable[..., Any], params: Any, *args: Any) -> int:
    """Bytes that reverse-mode differentiation keeps of loss(params, …), but for the parameters.

    Before XLA, which keeps less where it fuses or makes a thing again.
    """

    def backward(params: Any, *args: Any) -> Any:
        return jax.vjp(lambda params: loss(params, *args), params)[1]

    kinds = collections.Counter((leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(params))
    total = 0
    for leaf in jax.tree.leaves(jax.eval_shape(backward, params, *args)):
        if kinds[leaf.shape, leaf.dtype]:  # the parameter itself
            kinds[leaf.shape, leaf.dtype] -= 1
            continue
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
    return total


def rl_shapes(config: ml_collections.ConfigDict, spec: Spec, rows: int) -> tuple[Any, ...]:
    """Agent, optimiser, and the shapes of the learner's state and of a trajectory."""
    T = config.train.length
    agent = rl.agent(config, spec)
    optimiser = optim.optimiser(config.optim, 1000)

    def of(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct((T, rows), dtype)

    trajectory = Trajectory(
        inputs=rl.example(spec, T + 1, rows),
        action=of(jnp.int32),
        log_prob=of(jnp.float32),
        discount=of(jnp.float32),
        valid=of(jnp.bool_),
        carry=jax.eval_shape(lambda: agent.initial_carry(rows)),
    )

    def start() -> learner.State:
        params = rl.init_params(agent, jax.random.key(0))
        return learner.start(params, optimiser, len(spec.tasks))

    return agent, optimiser, jax.eval_shape(start), trajectory


def rl_work(config: ml_collections.ConfigDict, spec: Spec, rows: int) -> Work:
    """Of an update on so many rows."""
    agent, optimiser, state, trajectory = rl_shapes(config, spec, rows)
    h = rl.hyperparameters(config)
    update = functools.partial(learner.update, agent, optimiser, h)

    def loss(params: Any, trajectory: Any) -> Any:
        _, outputs = learner.forward(agent, params, trajectory.carry, trajectory.inputs)
        return outputs.value.sum() + outputs.logits.sum()

    products = counting.products(update, state, trajectory)
    return Work(products, kept(loss, state.params, trajectory))


def rl_job() -> Job:
    config, spec = rl_dmlab30.get_config(), dmlab30.spec_of()
    costs = rl.costs(rl.agent(config, spec), 1, config.train.length)
    return Job(
        name='DMLab-30',
        parameters=costs['parameters']['model'],
        units=config.train.length,
        total=FRAMES / dmlab30.REPEAT,
        work=functools.lru_cache(functools.partial(rl_work, config, spec)),
    )


def trajectory_bytes() -> float:
    """Of one step of one environment on its way from actor to learner."""
    config = rl_dmlab30.get_config()
    rows = config.actors.batch
    *_, trajectory = rl_shapes(config, dmlab30.spec_of(), rows)
    size = sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(trajectory))
    return size / (rows * config.train.length)


def core_seconds(inference: bool) -> float:
    """Of one core for a step of one environment: its engine, and the policy if it runs there."""
    config, spec = rl_dmlab30.get_config(), dmlab30.spec_of()
    flops = rl.costs(rl.agent(config, spec), 1, 1)['flops_per_step']['model']
    return STEP + RESET / EPISODE + (flops / core_flops() if inference else 0.0)


def shares(chip: Chip) -> dict[str, tuple[float, str]]:
    """Share of the roofline that products reach, by kind of model, and where that is from."""
    bound = 1.0, f'not measured on {chip.name}: datasheet roofline, a bound'
    found = dict.fromkeys(('lstm', 'transformer', 'agent'), bound)

    def seconds(f32: bool, products: Sequence[counting.Product]) -> float:
        return sum(cluster.roofline(products, chip, f32))

    record = read('lm_gpu.json')
    if chip.name in record.get('machine', ''):
        source = f'lm_gpu.json, {record["machine"]}'
        f32, bf16 = (functools.partial(seconds, f32) for f32 in (True, False))
        sets = {figure['set'] for figure in record['figures']}
        if 'lstm' in sets:
            found['lstm'] = lm_share(record, 'lstm', LSTM_GPU, f32), source
        if 'transformer' in sets:
            share = lm_share(record, 'transformer', TRANSFORMER_GPU, bf16)
            found['transformer'] = share, source
    record = read('rl_gpu.json')
    updates = [f for f in record.get('figures', []) if (f['set'], f['side']) == ('conv', 'update')]
    if chip.name in record.get('machine', '') and updates:
        products = rl_work(pong_config(), pong_spec(), 64).products
        share = seconds(True, products) / updates[0]['seconds']
        found['agent'] = share, f'rl_gpu.json, {record["machine"]}'
    return found


def pong_config() -> ml_collections.ConfigDict:
    """Of the set conv of benchmarks.rl."""
    config = configs_rl.get_config().unlock()
    config.model.update({'core': 'none', 'sites': (), 'features': 512})
    return config


def pong_spec() -> Spec:
    pixels = jax.ShapeDtypeStruct((84, 84, 4), jnp.uint8)
    task = jax.ShapeDtypeStruct((), jnp.int32)
    return Spec('atari', {'pixels': pixels, 'task': task}, actions=6, tasks=('Pong',))


Table = list[list[str]]  # the first row is the head


def lm_table(job: Job, chip: Chip, share: float, price: float, weak: bool) -> Table:
    """One row for each number of chips: the same batch on all, or the same rows on each."""
    head = ['chips', 'FSDP', 'rows', 'GB', 'products', 'optimiser', 'MB', 'network', 'step']
    table = [[*head, 'bound by', 'k tokens/s', 'of linear', 'updates', 'hours', 'cost']]
    one = cluster.step(job, chip, 1, WIKITEXT_BATCH, share=share).rate
    for chips in NUMBERS:
        rows = WIKITEXT_BATCH * (chips if weak else 1)
        if rows % chips:
            continue
        for fsdp in (1, 8) if chips > 1 else (1,):
            step = cluster.step(job, chip, chips, rows, fsdp, share)
            table.append(_lm_row(job, step, fsdp, step.rate / (chips * one), price))
    return table


def _lm_row(job: Job, step: Step, fsdp: int, efficiency: float, price: float) -> list[str]:
    hours = cluster.hours(job, step)
    return [
        str(step.chips),
        str(fsdp),
        str(step.rows // step.chips),
        f'{step.memory / 1e9:.1f}',
        f'{1e3 * (step.arithmetic + step.reading):.2f}',
        f'{1e3 * step.optimiser:.2f}',
        f'{step.traffic / 1e6:,.0f}',
        f'{1e3 * step.network:.2f}',
        f'{1e3 * step.seconds:.2f}',
        step.bottleneck,
        f'{step.rate / 1e3:,.0f}',
        f'{efficiency:.2f}',
        f'{job.total / step.units:,.0f}',
        f'{hours:.2f}',
        f'{hours * step.chips * price:,.0f}',
    ]


def rl_table(chip: Chip, share: float, price: float, core_price: float) -> Table:
    """The learner on so many chips, what it needs to be fed, and what the hosts' cores give."""
    head = ['chips', 'GB', 'update', 'network', 'learner steps/s', 'MB/s', 'cores it wants']
    table = [[*head, 'cores', 'bound by', 'steps/s', 'updates', 'hours', 'cost']]
    job, rows, size = rl_job(), rl_dmlab30.get_config().train.batch, trajectory_bytes()
    of_core = core_seconds(inference=True)
    for chips in NUMBERS:
        step = cluster.step(job, chip, chips, rows * chips, share=share)
        for cores in (chips * chip.cores, math.ceil(step.rate * of_core)):
            rates = {
                step.bottleneck: step.rate,
                'network in': chips * chip.network / size,
                'simulators': cores / of_core,
            }
            bound = min(rates, key=lambda name: rates[name])
            hours = job.total / rates[bound] / 3600
            bill = hours * (chips * price + max(0, cores - chips * chip.cores) * core_price)
            table.append(
                [
                    str(chips),
                    f'{step.memory / 1e9:.1f}',
                    f'{1e3 * step.seconds:.1f}',
                    f'{1e3 * step.network:.2f}',
                    f'{step.rate:,.0f}',
                    f'{size * rates[bound] / chips / 1e6:,.0f}',
                    f'{step.rate * of_core:,.0f}',
                    f'{cores:,}',
                    bound,
                    f'{rates[bound]:,.0f}',
                    f'{job.total / step.units:,.0f}',
                    f'{hours:,.1f}',
                    f'{bill:,.0f}',
                ]
            )
    return table


# Topology, rows of a group, cores of a group's engines, rows of an update, actors.
SYSTEMS = (
    *(('threads', 30, 6, 60, actors) for actors in (1, 4, 8, 16)),
    *(('threads', 120, 24, 240, actors) for actors in (1, 4, 8)),
    *(('ray', 30, 6, 60, actors) for actors in (4, 16, 64)),
    *(('ray', 30, 6, 480, actors) for actors in (16, 64, 256)),
)


def actors_table(chip: Chip, share: float) -> Table:
    """Actors of one learner on one chip, in simulated time.

    Threads share the chip, and the interpreter's lock, with the learner; actors of Ray act on the
    cores of their engines, and their learner waits for each update, as it has to send it.
    """
    head = ['topology', 'actors', 'rows of a group', 'of an update', 'cores', 'steps/s']
    table = [[*head, 'learner busy', 'lag', 'largest', 'dropped', 'hours']]
    config, spec, job = rl_dmlab30.get_config(), dmlab30.spec_of(), rl_job()
    flops = rl.costs(rl.agent(config, spec), 1, 1)['flops_per_step']['model']
    for kind, rows, cores, batch, actors in SYSTEMS:
        threads, groups = kind == 'threads', config.actors.groups
        if threads:
            seconds = sum(cluster.roofline(acting(config, spec, rows), chip)) / share
        else:
            seconds = rows * flops / (groups * cores * core_flops())
        topology = pipeline.Topology(
            actors=actors,
            groups=groups,
            rows=rows,
            batch=batch,
            length=config.train.length,
            queue=config.actors.queue,
            max_lag=config.actors.max_lag,
            ahead=32 if threads else 0,
            one_device=threads,
        )
        act = pipeline.constant(policy_call() + seconds)
        stages = pipeline.Stages(
            simulate=pipeline.engines(rows, cores, STEP, SPREAD, RESET, EPISODE),
            act=act,
            first=act,
            pack=pipeline.constant(0.0),
            join=pipeline.constant(0.0),
            update=pipeline.constant(cluster.step(job, chip, 1, batch, share=share).seconds),
        )
        round_ = max(8, actors * groups * rows // batch)  # updates in which every actor is heard
        it = pipeline.simulate(topology, stages, updates=8 * round_, warmup=3 * round_)
        heard = it.dropped + 8 * round_ * batch // rows
        table.append(
            [
                kind,
                str(actors),
                str(rows),
                str(batch),
                f'{actors * groups * cores:,}',
                f'{it.steps_per_second:,.0f}',
                f'{it.utilisation:.2f}',
                f'{it.lag:.1f}',
                str(it.lag_max),
                f'{it.dropped / heard:.0%}',
                f'{job.total / it.steps_per_second / 3600:,.1f}',
            ]
        )
    return table


def acting(config: ml_collections.ConfigDict, spec: Spec, rows: int) -> list[counting.Product]:
    """The products of one step of the policy on so many rows."""
    agent, _, state, _ = rl_shapes(config, spec, rows)
    carry = jax.eval_shape(lambda: agent.initial_carry(rows))
    policy = functools.partial(learner.forward, agent)
    return counting.products(policy, state.params, carry, rl.example(spec, 1, rows))


def check_table() -> Table:
    """The model beside the real topology, from actors_cpu.json."""
    record = read('actors_cpu.json')
    table = [['set', 'actors', '', 'steps/s', 'learner busy', 'lag', 'largest', 'actor waits']]
    for figure in record['figures']:
        for side in ('measured', 'model'):
            it = figure[side]
            table.append(
                [
                    figure['set'] if side == 'measured' else '',
                    str(figure['actors']) if side == 'measured' else '',
                    side,
                    f'{it["steps_per_second"]:,.0f}',
                    f'{it["utilisation"]:.2f}',
                    f'{it["lag"]:.2f}',
                    str(it['lag_max']),
                    f'{1e3 * it["actor_wait"]:.1f}',
                ]
            )
    return table


def lm_jobs() -> dict[str, Job]:
    jobs = {}
    for name, words in (('lstm', 'lstm'), ('transformer', 'transformer')):
        config = lm_wikitext103.get_config(words).unlock()
        config.train.batch = WIKITEXT_BATCH
        jobs[name] = lm_job(f'WikiText-103, {name}', config, WIKITEXT_TOKENS)
    return jobs


def inputs_table(chip: Chip) -> Table:
    """What was measured, and what is made of it."""
    cpu = read('lm_cpu.json')
    cores = int(cpu['machine'].split(', ')[1].split()[0])
    peak = core_flops()

    def seconds(products: Sequence[counting.Product]) -> float:
        return sum(p.flops * p.times for p in products) / (cores * peak)

    found = shares(chip)
    agent = rl.agent(rl_dmlab30.get_config(), dmlab30.spec_of())
    flops = rl.costs(agent, 1, 1)['flops_per_step']['model']
    rows = [
        ('f32 products of one core', f'{peak / 1e9:.0f} GFLOP/s', 'layers_cpu.json'),
        (
            'share of it in LSTM training steps',
            f'{lm_share(cpu, "lstm", LSTM_CPU, seconds):.2f}',
            'lm_cpu.json',
        ),
        ('host, for one call of a policy', f'{1e3 * policy_call():.2f} ms', 'actors_cpu.json'),
        *(
            (f'share of {chip.name}’s roofline, {kind}', f'{share:.2f}', source)
            for kind, (share, source) in found.items()
        ),
        ('DMLab, a core', f'{1 / STEP:.0f} steps/s', 'Petrenko et al. (2020), recalled'),
        ('policy of DMLab-30, forward', f'{flops / 1e6:.0f} MFLOP a step', 'mi.cost'),
        ('the same on a core', f'{1e3 * flops / peak:.1f} ms', 'of the two'),
        ('a step from actor to learner', f'{trajectory_bytes() / 1e3:.1f} kB', 'its shapes'),
    ]
    return [['', 'value', 'from'], *map(list, rows)]


def tables(chip: Chip, price: float, core_price: float) -> Iterator[tuple[str, str, Table]]:
    """Name, heading and rows of every table."""
    found = shares(chip)
    yield 'inputs', 'Inputs', inputs_table(chip)
    for name, job in lm_jobs().items():
        size = f'{job.name}, {job.parameters / 1e6:.0f} M parameters, {chip.name}'
        for weak in (False, True):
            kind = 'rows a chip' if weak else 'rows in all'
            yield (
                f'{name}_{"weak" if weak else "strong"}',
                f'{size}: {WIKITEXT_BATCH} {kind}; rows, GB, MB sent and ms of a chip',
                lm_table(job, chip, found[name][0], price, weak),
            )
    title = f'DMLab-30, {chip.name}; GB, ms and MB received of a chip'
    yield 'dmlab', title, rl_table(chip, found['agent'][0], price, core_price)
    yield 'actors', 'Actors for one learner', actors_table(chip, found['agent'][0])
    yield 'check', 'Model and topology; waits in ms', check_table()


def main(argv: Sequence[str]) -> None:
    del argv
    chip = CHIPS[CHIP.value]
    print(f'{chip.name}: {chip.source}')
    written = {}
    for name, heading, table in tables(chip, PRICE.value, CORE_PRICE.value):
        written[name] = {'heading': heading, 'rows': table}
        print(f'\n{heading}')
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            print('  '.join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)))
    if WRITE.value:
        record = {'chip': chip.name, 'price': PRICE.value, 'core_price': CORE_PRICE.value}
        with open(WRITE.value, 'w') as file:
            json.dump(record | {'tables': written}, file, indent=1, ensure_ascii=False)
            file.write('\n')


if __name__ == '__main__':
    app.run(main)

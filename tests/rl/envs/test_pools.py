import builtins
import re
import threading

import jax
import numpy as np
import pytest
import scipy.stats

from mi.config import UserError, suggest_install
from mi.rl.envs import text
from mi.rl.envs.host import atari, babyai, procgen
from mi.rl.envs.host.envpool import Pools
from mi.rl.envs.spec import Spec

NO_ENVPOOL = 'the extra envpool is not installed'


def fits(environment, step):
    for name, value in step.observation.items():
        expected = environment.spec.observation[name]
        assert value.shape == (environment.batch, *expected.shape), name
        assert value.dtype == expected.dtype, name
    assert set(step.observation) == set(environment.spec.observation)
    for value in (step.reward, step.discount):
        assert (value.shape, value.dtype) == ((environment.batch,), np.float32)
    for value in (step.is_first, step.is_last, step.success):
        assert (value.shape, value.dtype) == ((environment.batch,), bool)


class Script:
    """A pool that plays a script: (observation, reward, terminated, truncated) by step."""

    def __init__(self, rows, steps, hang=None):
        self.config = {'num_envs': rows}
        self.rows, self.steps, self.t, self.sent = rows, steps, 0, []
        self.hang = hang

    def reset(self):
        return np.zeros((self.rows, 1), np.float32), {}

    def send(self, actions):
        self.sent.append(actions.tolist())

    def recv(self):
        if self.hang is not None:
            self.hang.wait(30)
        observation, reward, terminated, truncated = self.steps[self.t]
        self.t += 1
        full = np.full(self.rows, 1)
        return (
            observation * full[:, None].astype(np.float32),
            reward * full.astype(np.float32),
            terminated & full.astype(bool),
            truncated & full.astype(bool),
            {},
        )

    def close(self):
        pass


def scripted(*scripts, timeout=60.0):
    observation = {'features': jax.ShapeDtypeStruct((1,), np.float32)}
    spec = Spec('script', observation, 2, tuple(f'task{i}' for i in range(len(scripts))))
    return Pools(
        spec, scripts, lambda seen, first: {'features': seen}, rewards_success=True, timeout=timeout
    )


def test_the_step_after_the_last_is_the_first_of_the_next_episode():
    steps = [(1, 0, False, False), (2, 0.5, True, False), (3, 0, False, False)]
    steps += [(4, 0, False, True), (5, 0, False, False), (6, 0, True, False)]
    environment = scripted(Script(1, steps))
    played = [environment.reset()]
    for _ in steps:
        environment.send(np.zeros(1))
        played.append(environment.recv())
    columns = {name: [getattr(s, name).item() for s in played] for name in played[0]._fields[1:]}
    assert columns == {
        'reward': [0, 0, 0.5, 0, 0, 0, 0],
        'discount': [1, 1, 0, 1, 1, 1, 0],
        'is_first': [True, False, False, True, False, True, False],
        'is_last': [False, False, True, False, True, False, True],
        'success': [False, False, True, False, False, False, False],
    }
    environment.close()


def test_rows_of_several_pools_stay_with_their_tasks():
    quiet = [(7, 0, False, False)]
    scripts = [Script(2, quiet), Script(1, [(9, 0, False, False)])]
    environment = scripted(*scripts)
    environment.reset()
    environment.send(np.array([3, 4, 5]))
    step = environment.recv()
    assert [script.sent for script in scripts] == [[[3, 4]], [[5]]]
    np.testing.assert_array_equal(step.observation['task'], [0, 0, 1])
    np.testing.assert_array_equal(step.observation['features'], [[7], [7], [9]])
    environment.close()


def test_a_pool_that_hangs_is_named_after_the_timeout():
    quiet, release = [(0, 0, False, False)], threading.Event()
    environment = scripted(Script(1, quiet), Script(1, quiet, hang=release), timeout=0.2)
    environment.reset()
    environment.send(np.zeros(2))
    with pytest.raises(UserError, match=r'script/task1 did not answer in 0.2 s'):
        environment.recv()
    release.set()
    environment.close()


def test_what_a_pool_raises_reaches_the_caller():
    environment = scripted(Script(1, []))
    environment.reset()
    environment.send(np.zeros(1))
    with pytest.raises(IndexError):
        environment.recv()
    environment.close()


def test_every_level_of_babyai_is_in_one_suite():
    envpool = pytest.importorskip('envpool', reason=NO_ENVPOOL)
    levels = [name[7:-3] for name in envpool.list_all_envs() if name.startswith('BabyAI-')]
    assert len(levels) == 96
    for level in levels:
        suites = [s for s, starts in babyai.SUITES.items() if level.startswith(starts)]
        assert len(suites) == 2 and suites[0] == 'all', (level, suites)


def test_all_levels_of_babyai_run_and_speak_in_its_vocabulary():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    environment = babyai.make('all', batch=100, threads=2)
    rng = np.random.default_rng(0)
    step = environment.reset()
    fits(environment, step)
    tasks = step.observation['task']
    assert np.bincount(tasks).tolist() == [2] * 4 + [1] * 92
    for _ in range(100):
        environment.send(rng.integers(0, 7, 100))
        step = environment.recv()  # a word outside the vocabulary would raise
        grid = step.observation['grid']
        assert (grid < np.array(babyai.CATEGORIES)).all()
        np.testing.assert_array_equal(step.observation['task'], tasks)
    fits(environment, step)
    environment.close()


def test_the_instruction_changes_with_the_episode_and_the_step_before_keeps_its_own():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    environment = babyai.make('GoToLocal', batch=4, length=8, threads=1)
    rng = np.random.default_rng(0)
    before = environment.reset()
    kept = before.observation['instruction'].copy()
    changes = 0
    for _ in range(150):
        environment.send(rng.integers(0, 3, 4))
        step = environment.recv()
        np.testing.assert_array_equal(before.observation['instruction'], kept)
        changed = (step.observation['instruction'] != kept).any(1)
        assert not (changed & ~step.is_first).any()
        np.testing.assert_array_equal(step.is_first, before.is_last)
        assert not (step.success & ~step.is_last).any()
        np.testing.assert_array_equal(step.success, step.reward > 0)
        changes += changed.sum()
        before, kept = step, step.observation['instruction'].copy()
    assert changes > 2
    environment.close()


def minigrid_env(level):
    gymnasium = pytest.importorskip('gymnasium', reason='gymnasium is not installed')
    pytest.importorskip('minigrid', reason='minigrid is not installed')
    return gymnasium.make(f'BabyAI-{level}-v0')


@pytest.mark.filterwarnings('ignore')  # minigrid's own
def test_actions_and_observations_mean_what_they_mean_in_minigrid():
    """minigrid's simulator, put in the state that EnvPool shows, goes where EnvPool goes."""
    envpool = pytest.importorskip('envpool', reason=NO_ENVPOOL)
    env = minigrid_env('GoToObj')
    from minigrid.core.constants import COLOR_TO_IDX, OBJECT_TO_IDX
    from minigrid.core.grid import Grid
    from minigrid.core.world_object import WorldObj

    environment = babyai.make('GoToObj', batch=1, seed=3)
    ids = [i for i in envpool.list_all_envs() if i.startswith('BabyAI-GoToObj-')]
    # The same pool again, for the place of the agent, which the environment does not show.
    twin = envpool.make(ids[0], env_type='gymnasium', num_envs=1, batch_size=1, seed=3)
    step = environment.reset()
    _, info = twin.reset()
    env.reset(seed=0)
    sim = env.unwrapped
    compared = 0
    place, carrying = info['agent_pos'][0], False
    rng = np.random.default_rng(1)
    for _ in range(300):
        # The cells that are seen, put into an otherwise empty world around the agent.
        view = step.observation['grid'][0]
        if not carrying and place is not None:
            sim.grid = Grid(31, 31)
            sim.agent_dir = int(step.observation['features'][0].argmax())
            sim.agent_pos = (15, 15)
            sim.carrying = None
            for i in range(7):
                for j in range(7):
                    if view[i, j, 0] not in (OBJECT_TO_IDX['unseen'], OBJECT_TO_IDX['empty']):
                        dx, dy = sim.dir_vec
                        rx, ry = sim.right_vec
                        ahead, right = 6 - j, i - 3
                        x, y = 15 + dx * ahead + rx * right, 15 + dy * ahead + ry * right
                        sim.grid.set(int(x), int(y), WorldObj.decode(*view[i, j].tolist()))
            seen = sim.gen_obs()
            visible = view[..., 0] != OBJECT_TO_IDX['unseen']
            np.testing.assert_array_equal(seen['image'][visible], view[visible])
            assert seen['direction'] == sim.agent_dir
        action = int(rng.choice([0, 1, 2, 2, 3, 5]))
        before = np.array(sim.agent_pos)
        sim.max_steps = 10**9
        sim.step_count = 0
        sim.instrs.verify = lambda action: 'continue'
        sim.step(action)
        moved = np.array(sim.agent_pos) - before
        environment.send(np.array([action]))
        step = environment.recv()
        _, _, _, _, info = twin.step(np.array([action], np.int32))
        if step.is_first[0]:
            carrying = False
        else:
            if not carrying:
                assert step.observation['features'][0].argmax() == sim.agent_dir
                np.testing.assert_array_equal(info['agent_pos'][0] - place, moved)
                front = step.observation['grid'][0, 3, 6]
                held = (1, 0, 0)
                if sim.carrying is not None:
                    held = (OBJECT_TO_IDX[sim.carrying.type], COLOR_TO_IDX[sim.carrying.color], 0)
                np.testing.assert_array_equal(front, held)
                compared += 1
            carrying = carrying or sim.carrying is not None
        place = info['agent_pos'][0]
    assert compared > 100
    environment.close()
    twin.close()
    env.close()


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')  # minigrid's own
@pytest.mark.parametrize('level', ['GoToLocal', 'GoToRedBallGrey', 'OpenDoor', 'PickupLoc'])
def test_a_random_policy_succeeds_as_often_as_in_minigrid(level):
    """Fisher's exact test of 200 episodes each, at 0.1 %; episodes of equal rows count in full."""
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    env = minigrid_env(level)
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    theirs = 0
    for episode in range(200):
        env.reset(seed=episode)
        over = False
        while not over:
            _, reward, terminated, truncated, _ = env.step(int(rng.integers(7)))
            over = terminated or truncated
        theirs += reward > 0
    environment = babyai.make(level, batch=200, threads=2)
    environment.reset()
    done, solved = np.zeros(200, bool), np.zeros(200, bool)
    while not done.all():  # the first episode of every row, so that short ones count no more
        environment.send(rng.integers(0, 7, 200))
        step = environment.recv()
        solved |= step.success & ~done
        done |= step.is_last
    ours = int(solved.sum())
    p = scipy.stats.fisher_exact([[ours, 200 - ours], [theirs, 200 - theirs]]).pvalue
    assert p > 1e-3, (ours, theirs)
    assert 0 < ours < 200
    environment.close()
    env.close()


def test_several_games_have_all_actions_and_one_has_its_own():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    several = atari.make('Pong,Breakout', batch=3, threads=1)
    one = atari.make('Breakout', batch=1)
    assert (several.spec.actions, one.spec.actions) == (18, 4)
    assert several.spec.random == (-20.7, 1.7)
    fits(several, several.reset())
    before = one.reset().observation['pixels']
    one.send(np.array([1]))
    after = one.recv().observation['pixels']
    np.testing.assert_array_equal(after[..., :3], before[..., 1:])  # the newest frame is the last
    several.close()
    one.close()


def test_a_lost_life_ends_no_episode_and_rewards_are_not_clipped():
    envpool = pytest.importorskip('envpool', reason=NO_ENVPOOL)
    environment = atari.make('Seaquest', batch=1, seed=0)
    options = {'full_action_space': False, 'max_episode_steps': 27000}
    twin = envpool.make('Seaquest-v5', env_type='gymnasium', num_envs=1, seed=0, **options)
    environment.reset()
    _, info = twin.reset()
    lives, rewards, lost = info['lives'][0], set(), False
    rng = np.random.default_rng(0)
    for _ in range(400):
        action = rng.integers(0, 18, 1).astype(np.int32)
        environment.send(action)
        step = environment.recv()
        _, reward, _, _, info = twin.step(action)
        np.testing.assert_array_equal(step.reward, reward)
        rewards.add(float(step.reward[0]))
        if 0 < info['lives'][0] < lives:
            lost = True
            assert step.discount[0] == 1 and not step.is_last[0]
        lives = info['lives'][0]
        if step.is_last[0]:
            break
    assert lost and max(rewards) > 1
    environment.close()
    twin.close()


def test_the_score_tables_are_whole_and_in_order():
    assert (len(atari.SCORES), len(procgen.SCORES)) == (57, 16)
    for table in (atari.SCORES, procgen.SCORES):
        assert all(low < high for low, high in table.values())
        assert list(table) == sorted(table)


def test_all_games_of_the_tables_are_in_the_package():
    envpool = pytest.importorskip('envpool', reason=NO_ENVPOOL)
    ids = set(envpool.list_all_envs())
    assert {f'{game}-v5' for game in atari.SCORES} <= ids
    assert {f'{game}Easy-v0' for game in procgen.SCORES} <= ids


def test_procgen_trains_on_two_hundred_levels_and_tests_on_all():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    try:
        train = procgen.make('train/Coinrun', batch=2, threads=1)
    except UserError as error:
        pytest.skip(str(error))
    test = procgen.make('test/Coinrun,Maze', batch=2, threads=1)
    assert train._pools[0].config['num_levels'] == 200
    assert [pool.config['num_levels'] for pool in test._pools] == [0, 0]
    for environment in (train, test):
        fits(environment, environment.reset())
        environment.send(np.zeros(2))
        fits(environment, environment.recv())
        environment.close()


def test_wrong_words_raise_user_errors():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    with pytest.raises(UserError, match="babyai/GoToLocl is unknown; did you mean 'GoToLocal'"):
        babyai.make('GoToLocl', batch=1)
    with pytest.raises(UserError, match="atari/Pongg is unknown; did you mean 'Pong'"):
        atari.make('Pongg', batch=1)
    with pytest.raises(UserError, match='procgen/hard is unknown; known: test, train'):
        procgen.make('hard', batch=1)
    with pytest.raises(UserError, match='babyai has 96 tasks but the batch has only 2'):
        babyai.make('all', batch=2)


def test_a_missing_package_names_the_extra(monkeypatch):
    def without(name, *rest):
        if name == 'envpool':
            raise ImportError(name)
        return real(name, *rest)

    real = builtins.__import__
    monkeypatch.setattr(builtins, '__import__', without)
    for make in (babyai.make, atari.make, procgen.make):
        with pytest.raises(UserError, match=re.escape(f'Try {suggest_install("envpool")}')):
            make('', batch=100)


def test_the_vocabulary_of_the_spec_is_that_of_the_tokens():
    pytest.importorskip('envpool', reason=NO_ENVPOOL)
    environment = babyai.make('Synth,BossLevel', batch=2)
    assert environment.spec.vocabulary == len(text.BABYAI_WORDS) + 1
    assert environment.spec.tasks[-1] == 'BossLevel'
    environment.close()

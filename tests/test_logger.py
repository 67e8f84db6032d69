import contextlib
import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from launch import state, table
from mi.config import UserError
from mi.training import logger


def lines(path):
    return [json.loads(line) for line in (path / 'metrics.jsonl').read_text().splitlines()]


def test_a_continued_file_loses_what_came_after_the_checkpoint(tmp_path):
    log = logger.MetricsWriter(tmp_path)
    log.write(1, 0, 'train', {'nats_per_token': 0.1 + 0.2, 'bits_per_byte': None})
    position = log.position()
    log.write(2, 0, 'train', {'nats_per_token': 9.0})
    log.close()

    log = logger.MetricsWriter(tmp_path, position, 1)
    assert log.position() == position  # of a checkpoint that is saved before another record
    log.write(2, 0, 'train', {'nats_per_token': 0.25, 'over': {'batch': 2}})
    log.write_timing(2, {'seconds': 1.5})
    log.close()
    first = {'step': 1, 'seed': 0, 'split': 'train', 'nats_per_token': 0.1 + 0.2}
    assert lines(tmp_path) == [
        {**first, 'bits_per_byte': None},
        {'step': 2, 'seed': 0, 'split': 'train', 'nats_per_token': 0.25, 'over': {'batch': 2}},
    ]
    assert json.loads((tmp_path / 'timing.jsonl').read_text()) == {'step': 2, 'seconds': 1.5}
    assert list((tmp_path / 'tensorboard').iterdir())


@pytest.mark.parametrize(
    'left, said',
    [
        (None, r'expected at least 27 bytes, .* but found 0'),
        (b'{"step": 1}\n', r'expected at least 27 bytes, .* but found 12'),
        (b'{"step": 1}\n' * 2 + b'{"step": 2', 'expected a line that ends at byte 27'),
    ],
)
def test_a_file_without_the_lines_of_the_checkpoint_is_refused_as_it_is(tmp_path, left, said):
    file = tmp_path / 'metrics.jsonl'
    if left is not None:
        file.write_bytes(left)
    with pytest.raises(UserError, match=rf'{said}.*\. Restore it, or use another --workdir'):
        logger.MetricsWriter(tmp_path, 27, 2)
    assert (file.read_bytes() if file.exists() else None) == left
    assert list(tmp_path.iterdir()) == ([] if left is None else [file])


def test_progress_without_a_terminal_is_a_line_now_and_then(capfd):
    progress = logger.Progress(total=10, done=5, interval=1000)
    for step in range(6, 11):
        progress.update(step, '1.5 nats', '7 tokens/s')
    progress.close()
    assert capfd.readouterr().err.strip() == 'step 10/10  1.5 nats  7 tokens/s  00:00:00 left'


def test_more_than_a_day_is_left(capfd):
    progress = logger.Progress(total=1000, interval=-1)
    progress._start -= 3600 * 100  # two of a thousand steps
    progress.update(2, '', '')
    progress.close()
    assert '  49900:' in capfd.readouterr().err
    row = table.format_row('a', state.MemberState('running', seconds_left=36 * 3600 + 61.9))
    assert '36:01:01' in row
    row = table.format_row('a', state.MemberState('running', seconds_left=59.9))
    assert '00:00:59' in row


def scalars(path, tag):
    """What TensorBoard shows of a tag, {step: value}, by its own rules.

    Files are read in the order of their names. A session that starts at a step hides what was there
    from that step on (tensorboard, event_accumulator._CheckForRestartAndMaybePurge).
    """
    shown = []
    for file in sorted((path / 'tensorboard').iterdir()):
        content = file.read_bytes()
        while content:
            (length,) = struct.unpack('<Q', content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                shown = [(step, value) for step, value in shown if step < event.step]
            shown += [(event.step, v.simple_value) for v in event.summary.value if v.tag == tag]
    assert len(dict(shown)) == len(shown)  # each step once
    return dict(shown)


def write(log, *steps):
    for step in steps:
        log.write(step, 0, 'train', {'loss': float(step)})
        log.write_timing(step, {'seconds': 0.5})


class Recorder:
    """A tracker that keeps the records it receives."""

    def __init__(self, continued):
        self.continued = continued
        self.told = []

    def write(self, step, values):
        self.told += [(step, name) for name in values]

    def close(self):
        pass


def test_tensorboard_shows_each_step_once_after_a_kill_and_after_a_clean_stop(tmp_path):
    log = logger.MetricsWriter(tmp_path)
    write(log, 5, 10)
    position = log.position()  # the checkpoint; all before it is on disk
    assert scalars(tmp_path, 'train/loss/seed0') == {5: 5, 10: 10}
    log.write(10, 0, 'eval', {'return': 1.0})  # after its checkpoint, and again when continued
    write(log, 15, 20)
    log.close()  # the most that a kill -9 can leave
    continued = logger.MetricsWriter(tmp_path, position, 10)
    continued.write(10, 0, 'eval', {'return': 1.0})
    write(continued, 15)
    continued.close()
    once = {5: 5, 10: 10, 15: 15}
    assert scalars(tmp_path, 'train/loss/seed0') == once
    assert scalars(tmp_path, 'eval/return/seed0') == {10: 1}
    assert scalars(tmp_path, 'timing/seconds') == dict.fromkeys(once, 0.5)
    again = logger.MetricsWriter(tmp_path, position, 10)  # stopped before it had another checkpoint
    write(again, 15, 20)
    again.close()
    assert scalars(tmp_path, 'train/loss/seed0') == {**once, 20: 20}


def test_tensorboard_forgets_a_run_that_was_killed_before_its_first_checkpoint(tmp_path):
    for steps in ((0, 5, 10, 15), (0, 5)):
        log = logger.MetricsWriter(tmp_path)
        write(log, *steps)
        log.close()
    assert scalars(tmp_path, 'train/loss/seed0') == {0: 0, 5: 5}


@pytest.mark.parametrize('continued', [True, False], ids=['the same tracker', 'another one'])
def test_a_tracker_is_not_told_twice_what_a_killed_run_wrote_after_its_checkpoint(
    tmp_path, continued
):
    log = logger.MetricsWriter(tmp_path, tracker=Recorder(False))
    write(log, 5, 10)
    position = log.position()
    write(log, 15, 20)
    log.close()
    with open(tmp_path / 'metrics.jsonl', 'ab') as file:
        file.write(b'{"step": 25, "se')  # killed here
    tracker = Recorder(continued)
    log = logger.MetricsWriter(tmp_path, position, 10, tracker)
    write(log, 15, 20, 25)
    log.close()
    steps = [25] if continued else [15, 20, 25]
    names = ('train/loss/seed0', 'timing/seconds')
    assert tracker.told == [(step, name) for step in steps for name in names]
    assert [record['step'] for record in lines(tmp_path)] == [5, 10, 15, 20, 25]


def test_records_of_one_step_are_told_apart_by_their_number(tmp_path):
    """As those of a search, which writes all of them again."""
    for more, told in ((0, 2), (1, 1)):
        tracker = Recorder(bool(more))
        log = logger.MetricsWriter(tmp_path, 0, 0, tracker)
        for i in range(2 + more):
            log.write(0, 0, 'probe', {'width': i})
        log.close()
        assert len(tracker.told) == told


def test_the_seed_that_is_not_finite_is_the_one_named():
    for bad in (np.nan, np.inf, -np.inf):
        with pytest.raises(
            UserError, match='loss of seed 5 is not finite at step 7, so this state is not'
        ):
            logger.refuse_non_finite((3, 5, 9), 7, {'fine': np.ones(3), 'loss': [1.0, bad, 1.0]})
    logger.refuse_non_finite((3, 5), 7, {'loss': np.array([1.0, 1e30])})


@pytest.mark.parametrize('log', ['first process', 'another process'])
def test_a_number_that_json_has_no_word_for_ends_the_run_in_every_process(tmp_path, log):
    made = logger.RunLogger(tmp_path if log == 'first process' else None, 10, 0, 0)
    with (
        made,
        pytest.raises(UserError, match=r'\(eval\) of seed 4 is not finite at step 7'),
    ):
        made.write(7, 4, 'eval', {'success': 1.0, 'return': float('inf')})
    file = tmp_path / 'metrics.jsonl'
    assert not file.exists() or file.read_bytes() == b''


@pytest.mark.parametrize(
    'name, value, broken',
    [
        ('parameters', np.nan, True),
        ('parameters', np.inf, True),
        ('parameters', -1e38, True),  # finite, but their squares are not
        ('parameters', 1e18, False),
        ('moments', 1e38, False),
        ('moments', -np.inf, True),
    ],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_a_state_that_cannot_be_gone_on_from_is_not_saved(name, value, broken, dtype):
    leaves = {'W': jnp.ones((2, 3, 4), dtype).at[1, 2, 3].set(value), 'n': jnp.ones(2, int)}
    said = pytest.raises(
        UserError, match=f'of the {name}.* of seed 5 is not finite at step 7, so this'
    )
    with said if broken else contextlib.nullcontext():
        logger.refuse_broken_state((3, 5), 7, {'empty': jnp.ones((2, 0)), name: leaves})
    one = jax.tree.map(lambda a: a[1], leaves)  # a run of one seed may have no axis of seeds
    said = pytest.raises(UserError, match=f'of the {name}.* of seed 9 is')
    with said if broken else contextlib.nullcontext():
        logger.refuse_broken_state([9], 7, {name: one})

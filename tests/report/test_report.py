"""A report on a small sweep of known numbers, and on directories that are not what they should."""

import contextlib
import csv
import fcntl
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from mi import report
from mi.config import UserError
from mi.report import runs
from tests.conftest import ROOT
from tests.report.synthetic import (
    CONCAT,
    MI,
    SEEDS,
    change_json,
    change_sweep,
    make_run,
    read_table,
    read_text,
    write_lines,
    write_sweep,
)


@pytest.fixture
def sweep(tmp_path):
    path = tmp_path / 'sweep'
    make_run(path / 'fusion=concat', 'concat', CONCAT)
    make_run(path / 'fusion=mi', 'mi', MI)
    make_run(path / 'fusion=film', 'film', {}, 'failed', 'OOM: 5 % & 2_000 bytes')
    members = [{'name': f'fusion={x}', 'label': x, 'overrides': {}} for x in ('concat', 'mi')]
    members.append({'name': 'fusion=film', 'label': '<script>|_', 'overrides': {}})
    write_sweep(path, members)
    return path


@pytest.mark.usefixtures('figure_files')
def test_csv_holds_the_numbers(sweep):
    paths = report.write(sweep)
    figures = {f'{n}.{k}' for n in ('curves', 'finals', 'pareto') for k in ('png', 'pdf', 'svg')}
    tables = {'report.html', 'table.csv', 'table.md', 'table.tex', 'conclusions.txt'}
    assert len(paths) == 14 and {p.name for p in paths} == figures | tables
    assert all(path.stat().st_size > 0 for path in paths)
    rows = read_table(sweep)
    concat, mi = rows['concat'], rows['mi']
    assert [float(concat[key]) for key in ('mean', 'low', 'high')] == [3.0, 2.0, 4.0]
    assert [concat[f'difference_{key}'] for key in ('mean', 'low', 'high')] == ['', '', '']
    assert float(mi['mean']) == pytest.approx(8 / 3)
    assert float(mi['difference_mean']) == pytest.approx(-1 / 3)
    assert [float(mi[f'difference_{key}']) for key in ('low', 'high')] == [-0.5, -0.25]
    assert (concat['verdict'], mi['verdict']) == ('', 'better')
    # All three differences are below zero, as they are in 2 of the 8 choices of signs. Of the 9
    # pairs of seeds, 6 are won.
    assert (concat['p'], float(mi['p']), float(mi['p_holm'])) == ('', 0.25, 0.25)
    assert float(mi['median_mean']) == 2.5 and float(mi['improvement_mean']) == pytest.approx(6 / 9)
    assert float(mi['nats_per_token']) == pytest.approx(4 / 3)
    assert (mi['parameters_model'], mi['parameters_fusion']) == ('412345', '20480')
    assert (mi['flops_per_token_model'], mi['flops_per_token_fusion']) == ('2400000', '40960')
    assert float(mi['train_seconds']) == 8.0
    assert float(mi['tokens_per_second']) == (2 * 100 + 6 * 300) / 8
    assert (mi['seeds'], mi['state']) == ('3', 'done')


def test_a_metric_named_like_a_column_has_a_column_of_its_own(sweep):
    """Each column of the table is a metric of the records too, and one that is words of another."""
    report.write(sweep)
    with open(sweep / 'report' / 'table.csv', newline='') as file:
        columns = csv.DictReader(file).fieldnames
    rows_without = {arm: dict(row) for arm, row in read_table(sweep).items()}
    clashes = [name for name in columns if name not in ('split', 'nats_per_token')]
    file = sweep / 'fusion=mi' / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    values = {name: 100.0 + i for i, name in enumerate(clashes)}
    values |= {'train seconds': 78.0, 'a_b': 79.0, 'a b': 80.0}
    write_lines(
        file, [record | values if record['split'] == 'test' else record for record in records]
    )
    report.write(sweep)
    rows = read_table(sweep)
    shared = {arm: {name: row[name] for name in columns} for arm, row in rows.items()}
    assert shared == rows_without
    for name in clashes:
        assert float(rows['mi'][f'test/{name}']) == values[name], name
    assert float(rows['mi']['train seconds']) == 78.0
    lines = read_text(sweep, 'table.md').splitlines()
    for line in (lines[2], lines[5]):
        assert line.count(' | ') == lines[3].count(' | ')
    heads = [head.strip() for head in lines[2].strip('|').split('|')]
    assert len(heads) == len(set(heads))
    named = re.search('<thead>.*?</thead>', read_text(sweep))[0]
    heads = re.findall('<th[^>]*>(.*?)</th>', named)
    assert len(heads) == len(set(heads)) > len(columns)


def test_higher_is_better_reverses_the_verdict_and_the_best(sweep):
    change_sweep(sweep, lower_is_better=False)
    report.write(sweep)
    assert read_table(sweep)['mi']['verdict'] == 'worse'
    assert '| concat | **3.00** [2.00, 4.00] |' in read_text(sweep, 'table.md')


def test_tables_in_words(sweep, capsys):
    report.write(sweep)
    markdown, latex = read_text(sweep, 'table.md'), read_text(sweep, 'table.tex')
    assert '| mi | **2.67** [1.75, 3.75] | −0.33 [−0.50, −0.25] | better (n = 3) |' in markdown
    assert '| concat | 3.00 [2.00, 4.00] | — | baseline |' in markdown
    assert '412,345 / 20,480 | 2.40 M / 41.0 k | 8.0 | 250 | 3 | done |' in markdown
    assert r'mi & \textbf{2.67} & $-$0.33 & better &' in latex
    printed = capsys.readouterr().out
    assert '2.67' in printed and str(sweep / 'report' / 'report.html') in printed
    for notes in (markdown, latex, read_text(sweep)):
        assert 'treat as descriptive' in ' '.join(notes.split())
        assert 'Too few seeds to call any difference significant' in ' '.join(notes.split())
        assert '3 seeds per arm' in notes


def test_an_arm_that_failed_is_shown_with_its_reason(sweep):
    report.write(sweep)
    row = read_table(sweep)['<script>|_']
    assert (row['state'], row['reason'], row['mean']) == ('failed', 'OOM: 5 % & 2_000 bytes', '')
    assert r'| &lt;script>\|\_ | — | — | — |' in read_text(sweep, 'table.md')
    assert r'OOM: 5 % &amp; 2\_000 bytes' in read_text(sweep, 'table.md')
    assert r'OOM: 5 \% \& 2\_000 bytes' in read_text(sweep, 'table.tex')
    assert 'OOM: 5 % &amp; 2_000 bytes' in read_text(sweep)


def test_the_page_escapes_and_fetches_nothing(sweep):
    report.write(sweep)
    page = read_text(sweep)
    assert '<script>|' not in page and '&lt;script&gt;|_' in page
    assert page.count('<script') == page.count('</script>') == 2  # the numbers, and what draws them
    assert 'a &lt;note&gt;' in page and 'a &lt;machine&gt;' in page and 'A &amp; B' in page
    alone = page.replace('http://www.w3.org/2000/svg', '')  # the name of SVG, which nothing fetches
    assert not re.search(r'https?:|<img|@import|url\((?!#)|src=', alone)
    assert re.findall('<link[^>]*>', page) == ['<link rel="icon" href="data:,">']
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    assert '<th scope="col">model.<wbr>fusion.<wbr>name</th>' in page
    assert '<td>&quot;concat&quot;</td>' in page
    assert '<td class="other">&quot;mi&quot;</td>' in page
    assert 'width</th>' not in page


@pytest.mark.usefixtures('figure_files')
def test_the_same_runs_give_the_same_bytes(sweep, tmp_path):
    first = report.write(sweep, tmp_path / 'first')
    second = report.write(sweep, tmp_path / 'second')
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name
        assert b'CreationDate' not in a.read_bytes()  # equal only within one second


def test_missing_seeds_are_noted_and_only_common_seeds_paired(sweep):
    file = sweep / 'fusion=mi' / 'metrics.jsonl'
    file.write_text(''.join(file.read_text().splitlines(True)[:-1]))  # seed 2 has no record
    report.write(sweep)
    row = read_table(sweep)['mi']
    assert (row['seeds'], row['seeds_total'], row['difference_pairs']) == ('2', '3', '2')
    assert float(row['difference_mean']) == -0.375
    page = read_text(sweep)
    assert '2 of 3 seeds have a final record' in page and 'concat 3, mi 2' in page


@pytest.mark.parametrize('value', ['NaN', 'null'])
def test_a_run_that_diverged_has_no_mean_but_its_row(sweep, value):
    file = sweep / 'fusion=concat' / 'metrics.jsonl'
    file.write_text(file.read_text().replace('"bits_per_byte": 4.0', f'"bits_per_byte": {value}'))
    report.write(sweep)
    rows = read_table(sweep)
    assert rows['concat']['mean'] == '' and 'seed 2 is nan' in rows['concat']['remarks']
    assert rows['mi']['mean'] and rows['mi']['difference_mean'] == ''
    assert rows['mi']['remarks'] == 'mi: no difference, concat has no value to pair'
    assert 'concat: the value of seed 2 is nan' in read_text(sweep)


def test_a_seed_that_diverges_late_is_not_scored_by_its_last_finite_value(sweep):
    """mi is better than concat up to step 10, and seed 2 is not finite at step 20."""
    file = sweep / 'fusion=mi' / 'metrics.jsonl'
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records:
        if record['split'] == 'valid':
            record['bits_per_byte'] -= 4
            record['nats_per_token'] = 1.0
        if (record['split'], record['step'], record['seed']) == ('valid', 20, 2):
            record['bits_per_byte'] = record['nats_per_token'] = None
    write_lines(file, records)
    change_sweep(sweep, split='valid')
    report.write(sweep)
    rows = read_table(sweep)
    assert float(rows['concat']['mean']) == 6.0
    columns = ('mean', 'difference_mean', 'p', 'verdict', 'median_mean', 'improvement_mean')
    assert [rows['mi'][key] for key in columns] == [''] * 6 and 'nats_per_token' not in rows['mi']
    assert 'seed 2 is nan; no mean' in rows['mi']['remarks']
    assert 'its curve omits steps that are not finite' in read_text(sweep)
    read = runs.read_sweep(sweep)
    curve = read.arms[1].curve('bits_per_byte', 'valid')
    assert curve[0].tolist() == [0, 10, 20] and curve[1][2].tolist()[:2] == [7.0, 5.0]
    assert 'Left out, because a seed is not finite: mi.' in read.describe_excluded()


def test_runs_of_different_seeds_form_one_arm(sweep):
    """mi as two runs: one of seeds 0 and 1, and one of seed 2 that takes twice as long."""
    for name, seeds, times in (('mi', [0, 1], 1), ('more', [2], 2)):
        path = sweep / f'fusion={name}'
        shutil.copytree(sweep / 'fusion=concat', path, dirs_exist_ok=True)
        make_run(path / 'made', 'mi', {seed: MI[seed] for seed in seeds})
        for file in (path / 'made').iterdir():
            file.replace(path / file.name)
        change_json(path / 'config.json', seeds=seeds)
        timing = [{'step': 20, 'seconds': 8.0 * times, 'tokens_per_second': 100.0 / times}]
        write_lines(path / 'timing.jsonl', timing)
    labels = {'fusion=concat': 'concat', 'fusion=mi': 'mi', 'fusion=more': 'mi'}
    change_sweep(sweep, members=[{'name': name, 'label': label} for name, label in labels.items()])
    report.write(sweep)
    assert list(read_table(sweep)) == ['concat', 'mi']
    mi = read_table(sweep)['mi']
    assert (mi['seeds'], mi['seeds_total'], float(mi['mean'])) == ('3', '3', sum(MI.values()) / 3)
    assert float(mi['train_seconds']) == 12.0
    change_json(sweep / 'fusion=more' / 'status.json', state='running')
    with locked(sweep / 'fusion=more'):
        report.write(sweep)
    assert read_table(sweep)['mi']['state'] == 'running'


def test_a_member_without_a_run_directory_is_waiting(sweep):
    members = json.loads((sweep / 'sweep.json').read_text())['members']
    change_sweep(
        sweep, members=[*members, {'name': 'fusion=gone', 'label': 'gone', 'overrides': {}}]
    )
    report.write(sweep)
    row = read_table(sweep)['gone']
    assert (row['state'], row['reason']) == ('waiting', 'no folder fusion=gone')


@pytest.mark.parametrize('is_first', [True, False])
def test_an_arm_keeps_the_times_and_costs_of_its_runs_when_another_has_not_started(sweep, is_first):
    members = json.loads((sweep / 'sweep.json').read_text())['members']
    waiting = {'name': 'fusion=more', 'label': 'mi', 'overrides': {}}
    change_sweep(sweep, members=[waiting, *members] if is_first else [*members, waiting])
    report.write(sweep)
    row = read_table(sweep)['mi']
    assert (row['state'], row['reason']) == ('waiting', 'no folder fusion=more')
    assert (float(row['train_seconds']), row['parameters_model']) == (8.0, '412345')


def test_without_a_baseline_there_is_no_difference(sweep):
    change_sweep(sweep, baseline=None)
    report.write(sweep)
    assert 'difference' not in read_text(sweep, 'table.md')
    assert read_table(sweep)['mi']['difference_mean'] == ''


def test_a_single_run_is_a_table_of_one_row(sweep):
    report.write(sweep / 'fusion=mi')
    rows = read_table(sweep / 'fusion=mi')
    assert list(rows) == ['fusion=mi'] and float(rows['fusion=mi']['mean']) == pytest.approx(8 / 3)
    assert 'difference' not in read_text(sweep / 'fusion=mi', 'table.md')


def test_a_single_run_without_bytes_shows_its_first_number(sweep):
    file = sweep / 'fusion=mi' / 'metrics.jsonl'
    file.write_text(re.sub(r'"bits_per_byte": [\d.]+', '"bits_per_byte": null', file.read_text()))
    report.write(sweep / 'fusion=mi')
    assert read_table(sweep / 'fusion=mi')['fusion=mi']['metric'] == 'nats_per_token'


def test_nothing_recorded_yet_is_still_a_report(sweep):
    for name in ('metrics.jsonl', 'timing.jsonl'):
        for arm in ('concat', 'mi', 'film'):
            (sweep / f'fusion={arm}' / name).unlink()
    report.write(sweep)
    assert 'No arm has a final record yet' in read_text(sweep)


@contextlib.contextmanager
def locked(run):
    """Hold the lock, as a running process does."""
    with open(run / 'lock', 'a+') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def test_a_run_that_was_killed_has_died(sweep):
    """Its status is still running, and nobody holds its lock."""
    mi = sweep / 'fusion=mi'
    change_json(mi / 'status.json', state='running')
    with locked(mi):
        assert runs.read_sweep(sweep).arms[1].state == 'running'
    (arm,) = runs.read_sweep(mi).arms
    assert (arm.state, arm.reason) == ('died', 'its process is gone')
    report.write(sweep)
    assert 'died (its process is gone)' in read_text(sweep, 'table.md')


@pytest.mark.parametrize('state', ['preempted', 'running'])
def test_a_run_stopped_by_a_rule_shows_the_reason(sweep, state):
    mi = sweep / 'fusion=mi'
    change_json(mi / 'status.json', state=state)
    (mi / 'stopped.json').write_text('{"reason": "rung 1: 5.2 is not among the best 1 of 3"}')
    report.write(sweep)
    row = read_table(sweep)['mi']
    assert row['state'] == 'stopped' and row['reason'].startswith('rung 1: 5.2 is not')
    with locked(mi):  # it saves, and ends soon
        assert runs.read_sweep(sweep).arms[1].state == 'running'
    change_json(mi / 'status.json', state='done')  # it had ended before it saw that
    assert runs.read_sweep(sweep).arms[1].state == 'done'


def half_write(sweep, state):
    run = sweep / 'fusion=mi'
    status = json.loads((run / 'status.json').read_text()) | {'state': state}
    (run / 'status.json').write_text(json.dumps(status))
    with open(run / 'metrics.jsonl', 'a') as file:
        file.write('{"step": 2')


def test_the_half_written_line_of_a_running_run_is_skipped(sweep, capsys):
    half_write(sweep, 'running')
    with locked(sweep / 'fusion=mi'):
        report.write(sweep)
    assert 'line 13: skipped an incomplete record' in capsys.readouterr().err
    assert 'line 13: skipped' in read_text(sweep)
    assert read_table(sweep)['mi']['state'] == 'running'


def test_only_the_test_record_is_final_before_the_end(sweep):
    half_write(sweep, 'running')
    report.write(sweep)
    assert float(read_table(sweep)['mi']['mean']) == pytest.approx(8 / 3)
    change_sweep(sweep, split='valid')
    report.write(sweep)
    rows = read_table(sweep)
    assert rows['mi']['mean'] == '' and float(rows['concat']['mean']) == 6.0


def test_a_half_written_line_of_a_done_run_is_an_error(sweep):
    half_write(sweep, 'done')
    with pytest.raises(UserError, match=r'mi/metrics\.jsonl, line 13: expected a JSON object'):
        report.write(sweep)


@pytest.mark.parametrize('line', ['{"step": 1, ', '[1]', '{"step": 1, "seed": 0}', '\x00'])
def test_a_corrupted_line_names_file_and_line(sweep, line):
    file = sweep / 'fusion=film' / 'metrics.jsonl'
    records = file.read_text().splitlines()
    file.write_text('\n'.join([*records[:2], line, *records[2:]]) + '\n')
    with pytest.raises(UserError, match=r'fusion=film/metrics\.jsonl, line 3: '):
        report.write(sweep)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'baseline': 'film'}, "baseline = 'film'"),
        ({'metric': None}, 'metric = None'),
        ({'lower_is_better': 'yes'}, "lower_is_better = 'yes'"),
        ({'members': []}, 'at least one member'),
        (
            {'members': [{'name': 'fusion=mi'}, {'name': 'fusion=film', 'label': 'fusion=mi'}]}
            | {'baseline': None},
            'expected members with different labels or different seeds',
        ),
    ],
)
def test_a_malformed_sweep_is_one_line(sweep, changes, message):
    change_sweep(sweep, **changes)
    with pytest.raises(UserError, match=message) as raised:
        report.write(sweep)
    assert '\n' not in str(raised.value)


def test_a_directory_without_sweep_or_run_is_refused(tmp_path):
    with pytest.raises(UserError, match='is not a directory'):
        report.write(tmp_path / 'nowhere')
    with pytest.raises(UserError, match=r'expected a sweep \(sweep\.json\) or a run'):
        report.write(tmp_path)


@pytest.mark.usefixtures('figure_files')
@pytest.mark.parametrize('name', ['table.md', 'finals.pdf'])
def test_a_directory_that_cannot_be_written_to_is_one_line(sweep, tmp_path, name):
    (tmp_path / 'out' / name).mkdir(parents=True)  # root may write to what is read-only
    with pytest.raises(UserError, match=r'--out=.*/out: Is a directory\. Use another') as raised:
        report.write(sweep, tmp_path / 'out')
    assert '\n' not in str(raised.value)
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match=r'--out=.*/file: File exists\. Use another'):
        report.write(sweep, tmp_path / 'file')


def test_a_failure_of_the_command_is_one_line(tmp_path):
    command = [sys.executable, '-m', 'mi.report', f'--workdir={tmp_path}']
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, '')
    assert done.stderr.count('\n') == 1 and 'expected a sweep (sweep.json)' in done.stderr


@pytest.mark.slow
def test_the_command_needs_no_jax(sweep):
    code = "import sys, mi.report.__main__; assert not any('jax' in name for name in sys.modules)"
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, '-W', 'error', '-m', 'mi.report', f'--workdir={sweep}'],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and 'report.html' in done.stdout and 'Traceback' not in done.stderr


@pytest.mark.usefixtures('figure_files')
def test_several_tasks_and_arms_of_unequal_speed(tmp_path):
    """concat needs 10 s for its 20 steps, mi 40 s: at equal time it has its record of step 5."""
    members = []
    for arm, gain, seconds in (('concat', 0.0, 5.0), ('mi', 0.25, 20.0)):
        path = tmp_path / arm
        make_run(path, arm, {})
        records, timing = [], []
        for step in (5, 10, 20):
            timing.append({'step': step, 'seconds': seconds / 2 if step < 20 else seconds})
            timing[-1]['steps_per_second'] = 8.0
            for seed in SEEDS:
                easy, hard = 0.5 + gain + step / 100, step / 100 + seed / 100
                mean = (easy + hard) / 2
                record = {'step': step, 'seed': seed, 'split': 'eval', 'success': mean}
                records.append(record | {'success/easy': easy, 'success/hard': hard})
        write_lines(path / 'metrics.jsonl', records)
        write_lines(path / 'timing.jsonl', timing)
        cost = {'parameters': {'model': 9, 'fusion': 1}, 'flops_per_step': {'model': 8}}
        (path / 'cost.json').write_text(json.dumps(cost))
        members.append({'name': arm, 'label': arm, 'overrides': {}})
    settings = {'metric': 'success', 'split': 'eval', 'curves': 'eval', 'lower_is_better': False}
    write_sweep(tmp_path, members, **settings)
    names = {path.name for path in report.write(tmp_path)}
    assert {'tasks.csv', 'tasks.png', 'tasks.pdf'} <= names
    mi = read_table(tmp_path)['mi']
    # easy: always won; hard: equal seeds tie, so of 9 pairs 3 are won and 3 are ties.
    assert float(mi['improvement_mean']) == pytest.approx((1 + (3 + 1.5) / 9) / 2)
    assert float(mi['iqm_mean']) == pytest.approx((0.95 * 2 + 0.21 + 0.22) / 4)
    assert float(mi['equal_time_mean']) == pytest.approx((0.5 + 0.25 + 0.05 + 0.06) / 2)
    assert float(read_table(tmp_path)['concat']['equal_time_mean']) == pytest.approx(
        (0.7 + 0.21) / 2
    )
    assert mi['steps_per_second'] == '8.0'
    assert read_text(tmp_path, 'tasks.csv').splitlines()[:2] == [
        'arm,task,number,score',
        'concat,easy,0,0.7',
    ]
    page = read_text(tmp_path)
    for words in ('<h2>Tasks</h2>', 'P(improvement)', 'eval after 10.0 s', 'eval split', 'heat'):
        assert words in page
    assert 'success/easy' not in page
    assert 'steps/s' in read_text(tmp_path, 'table.md')

    write_sweep(tmp_path, members, **settings, baseline=None)
    report.write(tmp_path)
    assert 'IQM' in read_text(tmp_path) and 'P(improvement)' not in read_text(tmp_path)


@pytest.mark.usefixtures('svg_files')
def test_forty_arms_of_many_sizes_fit_into_the_figures(tmp_path):
    """Every entry of a legend lies in its figure; axes without width would be a warning."""
    members = []
    for i in range(40):
        name = f'of_a_rather_long_name_{i}'
        make_run(tmp_path / name, name, {})
        scores = [
            {'step': 20, 'seed': seed, 'split': 'test', 'bits_per_byte': 2 + i} for seed in SEEDS
        ]
        tasks = {f'bits_per_byte/{task}': 2 + i for task in ('easy', 'hard')}
        write_lines(tmp_path / name / 'metrics.jsonl', [score | tasks for score in scores])
        cost = {'parameters': {'model': 1000 + 2000 * i, 'fusion': 1}}
        cost['flops_per_token'] = {'model': 9 * (1 + i)}
        (tmp_path / name / 'cost.json').write_text(json.dumps(cost))
        members.append({'name': name, 'label': name, 'overrides': {}})
    write_sweep(tmp_path, members, baseline=None, curves='test')
    report.write(tmp_path)
    for figure in ('pareto', 'curves', 'tasks'):
        drawn = read_text(tmp_path, f'{figure}.svg')
        height = float(re.search(r'<svg [^>]*height="([\d.]+)pt"', drawn)[1])
        ys = re.findall(r'<!-- of_a_rather_[^>]*-->\s*<g [^>]*translate\(\S+ ([-\d.]+)\)', drawn)
        assert len(ys) == 40 and all(0 < float(y) < height for y in ys)
    drawn = read_text(tmp_path, 'pareto.svg')
    assert '<!-- 10k -->' in drawn and 'mathdefault' not in drawn


@pytest.mark.usefixtures('svg_files')
def test_arms_that_differ_in_their_last_word_have_entries_of_their_own(tmp_path):
    labels = [f'transformer, decoder, recurrent context, {word}' for word in ('film', 'gate')]
    for label in labels:
        make_run(tmp_path / label, label, MI)
    write_sweep(tmp_path, [{'name': label} for label in labels], baseline=None)
    report.write(tmp_path)
    for figure in ('curves', 'finals', 'pareto'):
        entries = re.findall('<!-- (transformer.*?) -->', read_text(tmp_path, f'{figure}.svg'))
        entries = [entry for entry in entries if len(entry) <= 34]
        assert sorted(entry[-4:] for entry in entries) == ['film', 'gate']


@pytest.mark.parametrize('kind', ['over_seeds', 'over_runs'])
def test_known_scores_have_the_statistics_of_other_libraries(tmp_path, kind):
    """Ten seeds of eight tasks: learned by one agent, or each by a separate run.

    Then the intervals are those of arch's bootstrap of rows, and of rliable's stratified one.
    """
    golden = json.loads((ROOT / 'tests/golden/statistics.json').read_text())
    members = []
    for arm, scores in golden['scores'].items():
        task_scores = [[f'task {i}', [row[i] for row in scores]] for i in range(len(scores[0]))]
        for task, seed_scores in [[None, None]] if kind == 'over_seeds' else task_scores:
            path = tmp_path / f'{arm}-{task}'
            make_run(path, arm, {})
            change_json(path / 'config.json', seeds=list(range(len(scores))))
            records = []
            for seed, row in enumerate(scores):
                value = sum(row) / len(row) if task is None else seed_scores[seed]
                record = {'step': 20, 'seed': seed, 'split': 'eval', 'success': value}
                if task is None:
                    record |= {f'success/{name}': values[seed] for name, values in task_scores}
                records.append(record)
            write_lines(path / 'metrics.jsonl', records)
            members.append({'name': path.name, 'label': arm} | ({'task': task} if task else {}))
    settings = {'metric': 'success', 'split': 'eval', 'curves': 'eval', 'lower_is_better': False}
    write_sweep(tmp_path, members, baseline='baseline', **settings)
    report.write(tmp_path)
    rows = read_table(tmp_path)
    assert list(rows) == list(golden['scores'])
    for arm, row in rows.items():
        for name in ('mean', 'median', 'iqm'):
            point, low, high = golden[kind][arm][name]
            prefix = '' if name == 'mean' else f'{name}_'
            assert float(row[f'{prefix}mean']) == pytest.approx(point)
            for key, value in (('low', low), ('high', high)):
                assert float(row[prefix + key]) == pytest.approx(value, abs=0.05 * (high - low))
        if arm != 'baseline':
            assert float(row['improvement_mean']) == pytest.approx(golden['improvement'][arm][0])
            if kind == 'over_seeds':
                assert float(row['p']) == pytest.approx(golden['sign_flips'][arm])
    notes = 'learned by separate runs' if kind == 'over_runs' else 'one agent learns all tasks'
    assert notes in read_text(tmp_path, 'table.md')


def test_a_slow_report_names_its_stages(sweep, monkeypatch, capsys):
    """Every stage takes a twentieth of a second here, and reports after a thousandth."""
    monkeypatch.setattr('mi.training.progress.INTERVAL', 0.001)
    stages = {(report.runs, 'read_sweep'): f'reading {sweep}'}
    stages |= {(report.analysis, 'compute_results'): 'intervals of 3 arms'}
    stages |= {(report.figures, 'draw_figures'): 'drawing the figures'}
    stages |= {(report.html, 'render_page'): 'writing the page'}

    def slow(function):
        def call(*args):
            time.sleep(0.05)
            return function(*args)

        return call

    for module, name in stages:
        monkeypatch.setattr(module, name, slow(getattr(module, name)))
    report.write(sweep)
    notes = capsys.readouterr().err
    for stage in stages.values():
        assert stage in notes


def test_p_of_two_arms_is_corrected_in_the_csv_too(sweep):
    shutil.rmtree(sweep / 'fusion=film')
    make_run(sweep / 'fusion=film', 'film', {seed: value + 1 for seed, value in CONCAT.items()})
    report.write(sweep)
    rows = read_table(sweep)
    for arm in ('mi', '<script>|_'):
        assert (float(rows[arm]['p']), float(rows[arm]['p_holm'])) == (0.25, 0.5)

"""The table on screens of several widths: five columns at most, and no number is broken."""

import io
import itertools
import re

import pytest
import rich.console
from rich.cells import cell_len

from mi import report
from mi.report import terminal
from mi.report.tables import Cell, Column, Table, Terminal, make_body
from tests.report import synthetic

TITLES = {'arm': 'arm', 'metric': 'bits per byte ↓', 'difference': 'difference to concat'}
TITLES |= {'verdict': 'verdict', 'p': 'p', 'metric/extra': 'extra', 'parameters': 'parameters'}
TITLES |= {'flops': 'FLOPs per token', 'seconds': 'train seconds', 'state': 'state'}
# From the most important column; `metric/extra` is not shown.
PRIORITY = (
    'arm',
    'metric',
    'difference',
    'p',
    'parameters',
    'seconds',
    'verdict',
    'flops',
    'state',
)


def table(label='mi'):
    cells = [Cell(label), Cell('2.068', '[2.060, 2.077]'), Cell('−0.033', '[−0.038, −0.025]')]
    cells += [Cell('no difference seen', '(n = 3)'), Cell('0.75', 'too few'), Cell('77,777')]
    cells += [Cell('429,720', '/ 137,280'), Cell('859 k', '/ 279 k'), Cell('113'), Cell('done')]
    columns = [
        Column(
            name, title, '[95 %]' if '2' in cell.main else '', lambda row, i=i: row[i],
            terminal=Terminal(
                priority=PRIORITY.index(name) if name in PRIORITY else None,
                wraps=name in ('arm', 'verdict', 'state'),
            ),
        )
        for i, ((name, title), cell) in enumerate(zip(TITLES.items(), cells, strict=True))
    ]  # fmt: skip
    return Table(columns, make_body(columns, [cells, cells]), {0})


def shown(width, **kwargs):
    """Lines of the table."""
    file = io.StringIO()
    console = rich.console.Console(file=file, width=width, force_terminal=True, color_system=None)
    terminal.print_table(console, table(**kwargs), 'a title')
    title, *lines = file.getvalue().splitlines()
    assert title == 'a title'
    return lines


def cells(lines):
    """The text of every cell, one line of it each, without the head."""
    body = lines[next(i for i, line in enumerate(lines) if '━╇━' in line) + 1 :]
    return {cell.strip() for line in body for cell in line.split('│')}


def titles(lines):
    """The title of each shown column, without the detail below it."""
    head = [line.split('┃') for line in itertools.takewhile(lambda line: '┃' in line, lines)]
    texts = [' '.join(part.strip() for part in parts) for parts in zip(*head, strict=True)]
    return [text.replace('[95 %]', '').strip() for text in texts]


@pytest.mark.parametrize('width', range(30, 200, 7))
def test_no_number_and_no_interval_is_broken(width):
    lines = shown(width)
    assert max(map(cell_len, lines)) <= width
    parts = {part for cell in table().body[0] for part in cell[:2]}
    pieces = {'no difference', 'seen', 'no', 'difference', 'difference seen'}
    assert cells(lines) <= parts | pieces


@pytest.mark.parametrize('width', [80, 81, 120, 200])
def test_five_columns_from_80_characters_on(width):
    """The same at every width, whatever would fit."""
    lines = shown(width)
    assert titles(lines) == ['arm', *(TITLES[name] for name in PRIORITY[1:5])]
    assert max(map(cell_len, lines)) <= 80


@pytest.mark.parametrize('width', [80, 200])
def test_what_does_not_fit_80_characters_is_left_out_at_every_width(width):
    """A label of 24 characters leaves space for three more columns."""
    assert titles(shown(width, label='a' * 24)) == [
        'arm',
        *(TITLES[name] for name in PRIORITY[1:4]),
    ]


@pytest.mark.parametrize('width', range(30, 80, 7))
def test_a_narrow_terminal_shows_the_first_columns_that_fit(width):
    names = titles(shown(width))
    assert 2 <= len(names) <= 5 and names[:2] == ['arm', TITLES['metric']]


@pytest.mark.parametrize('width', range(30, 200, 7))
def test_no_word_of_a_head_is_broken(width):
    head = [line for line in shown(width) if '┃' in line]
    known = {word for texts in TITLES.values() for word in texts.split()} | {'[95', '%]'}
    assert {word for line in head for word in line.replace('┃', ' ').split()} <= known


def test_what_matters_most_is_shown_first():
    assert {'2.068', '[2.060, 2.077]'} <= cells(shown(30))
    assert '−0.033' in cells(shown(60)) and '429,720' not in cells(shown(60))
    assert '429,720' in cells(shown(80)) and '859 k' not in cells(shown(200))


def test_a_label_longer_than_a_line_is_broken_and_numbers_are_not():
    label = 'transformer-' * 10
    lines = shown(60, label=label)
    assert {'2.068', '[2.060, 2.077]'} <= cells(lines)
    first = ''.join(line.split('│')[0].strip() for line in lines if '│' in line)
    assert first.count(label) == 2


@pytest.fixture
def sweep(tmp_path):
    """Labels of usual length, and a metric of one word."""
    for label, final in (('concat', synthetic.CONCAT), ('mi', synthetic.MI)):
        synthetic.make_run(tmp_path / label, label, final)
    synthetic.write_sweep(tmp_path, [{'name': label} for label in ('concat', 'mi')])
    return tmp_path


def test_a_state_that_is_not_done_comes_before_costs(sweep, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '80')
    report.write(sweep)
    _, *lines = capsys.readouterr().out.splitlines()
    costs = ['arm', 'bits per byte ↓', 'difference to concat', 'p', 'parameters / fusion']
    assert titles(lines) == costs
    synthetic.change_json(sweep / 'mi' / 'status.json', state='failed')
    report.write(sweep)
    _, *lines = capsys.readouterr().out.splitlines()
    assert titles(lines) == ['arm', 'bits per byte ↓', 'difference to concat', 'p', 'state']
    assert 'failed' in cells(lines)


def test_a_file_has_the_columns_of_a_terminal_in_lines_of_any_length(sweep, capsys, monkeypatch):
    monkeypatch.delenv('COLUMNS', raising=False)
    report.write(sweep)
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == 'A & B' and len(titles(lines)) == 5
    assert lines[-2:] == [
        'mi and concat: not settled, a difference of −0.33 bits per byte, 3 seeds; expected at '
        'least 6.',
        f'Everything else: {sweep / "report" / "report.html"}',
    ]


def test_columns_limits_a_file_too(sweep, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    report.write(sweep)
    framed = [line for line in capsys.readouterr().out.splitlines() if re.search('[┃╇│]', line)]
    assert framed and max(map(cell_len, framed)) <= 60


@pytest.mark.parametrize('width', ['80', '132'])
def test_two_sweeps_and_their_conclusions_fit_a_screen(tmp_path, capsys, monkeypatch, width):
    """The last screen of `make run`: of each sweep its table, conclusion and page."""
    monkeypatch.setenv('COLUMNS', width)
    for name in ('first', 'second'):
        path = tmp_path / name
        for label, shift in (('concat', 0.0), ('mi', -0.5)):
            final = {seed: 2.0 + seed / 8 + shift for seed in range(8)}
            synthetic.make_run(path / label, label, final)
            synthetic.change_json(path / label / 'config.json', seeds=list(range(8)))
        synthetic.write_sweep(path, [{'name': label} for label in ('concat', 'mi')])
        monkeypatch.chdir(tmp_path)
        report.write(name)
    lines = capsys.readouterr().out.splitlines()
    for name in ('first', 'second'):  # again, after both
        lines += (tmp_path / name / 'report' / 'conclusions.txt').read_text().splitlines()
    assert max(map(cell_len, lines)) <= 80 and len(lines) <= 24
    sentence = 'mi beats concat by 0.50 bits per byte, p = 0.008, 8 seeds.'
    assert [line.strip() for line in lines].count(sentence) == 4
    for name in ('first', 'second'):
        assert f'Everything else: {name}/report/report.html' in lines

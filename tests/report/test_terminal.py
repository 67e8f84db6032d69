"""The table on screens of several widths: no number is broken, no column is lost in silence."""

import io
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
# From the most important column; `metric/extra` is only named.
PRIORITY = (
    'arm',
    'metric',
    'difference',
    'verdict',
    'p',
    'parameters',
    'seconds',
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
    """Lines of the table, and the note below it."""
    file = io.StringIO()
    console = rich.console.Console(file=file, width=width, force_terminal=True, color_system=None)
    terminal.print_table(console, table(**kwargs), 'a title', 'table.csv')
    lines = file.getvalue().splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith('└'))
    return lines[: end + 1], ' '.join(lines[end + 1 :])


def cells(lines):
    """The text of every cell, one line of it each, without the head."""
    body = lines[next(i for i, line in enumerate(lines) if line.startswith('┡')) + 1 :]
    return {cell.strip() for line in body for cell in line.split('│')}


@pytest.mark.parametrize('width', range(30, 200, 7))
def test_no_number_and_no_interval_is_broken(width):
    lines, _ = shown(width)
    assert max(map(cell_len, lines)) <= width
    parts = {part for cell in table().body[0] for part in cell[:2]}
    pieces = {'no difference', 'seen', 'no', 'difference', 'difference seen', lines[-1]}
    assert cells(lines) <= parts | pieces


@pytest.mark.parametrize('width', range(30, 200, 7))
def test_a_column_is_shown_or_named(width):
    lines, note = shown(width)
    columns = lines[-2].count('│') - 1
    hidden = note.removeprefix(f'Not shown at {width} columns: ').partition('; see table.csv.')[0]
    assert 'extra' in hidden.split(', ')
    assert columns + len(hidden.split(', ')) == len(TITLES)


@pytest.mark.parametrize('width', range(30, 200, 7))
def test_no_word_of_a_head_is_broken(width):
    lines, _ = shown(width)
    head = [line for line in lines if line.startswith('┃')]
    known = {word for texts in TITLES.values() for word in texts.split()} | {'[95', '%]'}
    assert {word for line in head for word in line.replace('┃', ' ').split()} <= known


def test_what_matters_most_is_shown_first():
    assert {'2.068', '[2.060, 2.077]'} <= cells(shown(30)[0])
    assert '−0.033' in cells(shown(60)[0]) and '859 k' not in cells(shown(60)[0])
    assert '859 k' in cells(shown(140)[0])


def test_a_label_longer_than_a_line_is_broken_and_numbers_are_not():
    label = 'transformer-' * 10
    lines, _ = shown(60, label=label)
    assert {'2.068', '[2.060, 2.077]'} <= cells(lines)
    first = ''.join(line.split('│')[1].strip() for line in lines if line.startswith('│'))
    assert first.count(label) == 2


@pytest.fixture
def sweep(tmp_path):
    """Labels of usual length, and a metric of one word."""
    for label, final in (('concat', synthetic.CONCAT), ('mi', synthetic.MI)):
        synthetic.make_run(tmp_path / label, label, final)
    synthetic.write_sweep(tmp_path, [{'name': label} for label in ('concat', 'mi')])
    return tmp_path


def test_a_state_that_is_not_done_comes_before_costs(sweep, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '70')
    report.write(sweep)
    assert 'state' in hidden_columns(capsys.readouterr().out)
    synthetic.change_json(sweep / 'mi' / 'status.json', state='failed')
    report.write(sweep)
    printed = capsys.readouterr().out
    assert 'failed' in printed and 'parameters' in hidden_columns(printed)


def hidden_columns(printed):
    names = re.search('Not shown at .*? columns: (.*?); see', ' '.join(printed.split()))[1]
    return names.split(', ')


def test_a_file_has_every_column_in_lines_of_any_length(sweep, capsys, monkeypatch):
    monkeypatch.delenv('COLUMNS', raising=False)
    report.write(sweep)
    printed = capsys.readouterr().out
    for title in ('difference to concat', 'FLOPs per token', 'train seconds', 'tokens/s', 'state'):
        assert title in printed
    assert 'Not shown: nats per token; see report.html and table.csv.' in printed


def test_columns_limits_a_file_too(sweep, capsys, monkeypatch):
    monkeypatch.setenv('COLUMNS', '60')
    report.write(sweep)
    printed = capsys.readouterr().out
    framed = [line for line in printed.splitlines() if re.match('[┏┃┡│└]', line)]
    assert framed and max(map(cell_len, framed)) <= 60
    assert 'Not shown at 60 columns' in printed

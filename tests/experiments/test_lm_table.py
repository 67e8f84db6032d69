"""The language-model table: its arms and their sizes, its numbers, and a sweep from end to end."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from configs import lm_wikitext103
from experiments import lm_table, lm_table_enwik8, lm_table_wikitext103
from launch import sweep as sweeps
from mi.lm import config as lm_config
from mi.lm import factory
from mi.report import runs
from mi.training import optim
from tests.conftest import ROOT
from tests.experiments.test_reports import SweepWriter

FILES = {
    'lm_table': (lm_table, 2_000),
    'lm_table_enwik8': (lm_table_enwik8, 256),
    'lm_table_wikitext103': (lm_table_wikitext103, 267_735),
}  # → module and vocabulary


def load_configs(name, tmp_path):
    """The config of every arm, by label; several members of an arm differ in seeds alone."""
    members = sweeps.load(str(ROOT / f'experiments/{name}.py'), tmp_path)
    return {member.label: sweeps.parse_config(member.command) for member in members}


@pytest.mark.parametrize('name', FILES)
def test_every_row_of_the_table_is_an_arm(name, tmp_path):
    arms = load_configs(name, tmp_path)
    places = {
        (config.model.site, config.model.source, config.model.fusion.name)
        for label, config in arms.items()
        if label != 'none'
    }
    assert len(arms) == 13 and arms['none'].model.site == 'none'
    assert places == {
        (site, source, fusion)
        for site in ('encoder', 'decoder', 'both')
        for source in ('recurrent', 'state')
        for fusion in ('concat', 'mi')
    }
    for config in arms.values():
        lm_config.validate(config)
        assert (config.match.by, config.match.baseline) == ('parameters', 'plain')
        assert config.model.core == 'lstm'
    description = json.loads((tmp_path / 'sweep.json').read_text())
    seeds = [tuple(member['overrides'].get('seeds', ())) for member in description['members']]
    assert sum(map(len, set(seeds))) >= 5
    assert len(set(seeds[:13])) == 1  # an interrupted sweep has a table


@pytest.mark.slow
@pytest.mark.parametrize('name', FILES)
def test_all_arms_have_the_parameters_of_the_plain_one(name, tmp_path):
    """Every arm of Austen; of the other texts the baseline and the largest fusions."""
    _, vocabulary = FILES[name]
    arms = load_configs(name, tmp_path)
    target = factory.compute_costs(arms['none'], vocabulary)['parameters']['model']
    for label, config in arms.items():
        if name != 'lm_table' and config.model.site not in ('none', 'both'):
            continue
        matched = factory.match_size(config, vocabulary)
        costs = factory.compute_costs(matched, vocabulary)['parameters']
        assert costs['model'] == pytest.approx(target, rel=0.03), label
        assert matched.model.hidden >= config.model.hidden / 2, label  # the core is still a core


def test_the_optimizer_of_the_known_baseline():
    config = lm_wikitext103.get_config('rae_2018')
    plain = lm_wikitext103.get_config('lstm')
    assert (config.optim.name, config.optim.b1, config.optim.b2) == ('adam', 0.0, 0.999)
    assert config.train.batch == 64
    assert config.model.to_dict() == plain.model.to_dict()
    optim.validate(config.optim, config.train.steps)


PLAIN = {seed: 100.0 + seed for seed in range(5)}
GAPS = {'state': 10.0, 'recurrent': 5.0}
OFFSETS = {  # of concat, not in the order of the table
    (site, source): 1.0 + 3 * source_index + site_index
    for source_index, source in enumerate(GAPS)
    for site_index, site in enumerate(('decoder', 'encoder', 'both'))
}


@pytest.fixture
def rows(tmp_path):
    """A table of known numbers: MI is 5 and 10 below concat, and concat 1 to 6 above the LSTM."""
    writer = SweepWriter(tmp_path, lm_table)

    def write(overrides, offset):
        finals = {
            seed: {
                'perplexity': value + offset,
                'valid_whole:perplexity': 2 * (value + offset),
                **({'bits_per_byte': 1.5} if overrides['model.site'] == 'both' else {}),
            }
            for seed, value in PLAIN.items()
        }
        label = ', '.join(overrides.values())
        writer.run(label, finals, overrides=overrides, parameters=1000 + len(label))

    # Not in the order of the table.
    for (site, source), offset in OFFSETS.items():
        place = {'model.site': site, 'model.source': source}
        write(place | {'model.fusion.name': 'mi'}, offset - GAPS[source])
        write(place | {'model.fusion.name': 'concat'}, offset)
    write({'model.site': 'none'}, 0.0)
    return writer.report('lm_table')


def test_the_table_has_the_rows_and_columns_of_the_paper(rows, tmp_path):
    scores, differences = rows[:14], rows[14:28]
    assert [row[:2] for row in scores[:4]] == [
        ['model', 'context'],
        ['LSTM', '—'],
        ['concatenation, encoder', 'recurrent'],
        ['multiplicative, encoder', 'recurrent'],
    ]
    assert [row[:2] for row in scores] == [row[:2] for row in differences]
    header = scores[0]
    assert header[2:6] == [
        f'{split} {measure} ↓ [95 %]'
        for measure in ('perplexity', 'bits per byte')
        for split in ('validation', 'test')
    ] or header[2:5] == [
        'validation perplexity ↓ [95 %]', 'test perplexity ↓ [95 %]', 'test bits per byte ↓ [95 %]'
    ]  # fmt: skip
    cells = {tuple(row[:2]): dict(zip(header, row, strict=True)) for row in scores[1:]}
    plain = cells['LSTM', '—']
    assert plain['test perplexity ↓ [95 %]'].startswith('102.0')
    assert plain['validation perplexity ↓ [95 %]'].startswith('204.0')
    assert plain['test bits per byte ↓ [95 %]'] == '—'
    both = cells['multiplicative, encoder and decoder', 'state']
    assert both['test bits per byte ↓ [95 %]'].startswith('1.5')
    tex = (tmp_path / 'lm_table.tex').read_text()
    assert tex.count(r'\begin{table}') == 2 and 'multiplicative, encoder and decoder' in tex
    assert (tmp_path / 'lm_table.png').stat().st_size > 0


def test_differences_are_paired_with_the_lstm_and_with_concat_at_the_same_place(rows):
    header, *body = rows[14:28]
    cells = {tuple(row[:2]): dict(zip(header, row, strict=True)) for row in body}

    def mean(row, column):
        return float(row[f'{column} [95 %]'].split(' ')[0].replace('−', '-'))

    for (site, source), offset in OFFSETS.items():
        gap, place = GAPS[source], lm_table.SITES[site]
        mi, concat = (
            cells[f'{fusion}, {place}', source] for fusion in ('multiplicative', 'concatenation')
        )
        assert mean(mi, 'test − concatenation there') == -gap
        assert mean(mi, 'validation − concatenation there') == -2 * gap
        assert mean(mi, 'test − LSTM') == offset - gap
        assert mean(concat, 'test − LSTM') == offset
        assert concat['test − concatenation there [95 %]'] == '—'
        # All five signs agree: 2 · 2⁻⁵, times six places by Holm, which five pairs cannot beat.
        assert mi['p Holm'] == '0.38 too few' and concat['p Holm'] == '—'
    assert set(cells['LSTM', '—'].values()) == {'LSTM', '—'}


TOY = {
    **{'seeds': (0, 1), 'data.vocabulary': 60, 'model.embed': 12, 'model.hidden': 24},
    **{'model.context': 3, 'train.batch': 8, 'train.length': 8, 'train.steps': 200},
    **{'train.log_every': 100, 'train.eval_every': 100, 'train.save_every': 100},
    **{'eval.valid_tokens': 500, 'eval.final_tokens': 3_000, 'optim.learning_rate': 2e-2},
}


def unigram_perplexity(config):
    """Perplexity of the toy's test text, given the frequencies of words in its training text."""
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(TOY)
    corpus = factory.load_corpus(config)
    counts = np.bincount(corpus.tokens['train'], minlength=corpus.vocabulary)
    read = corpus.tokens['test'][1 : TOY['eval.final_tokens']]
    return float(np.exp(-np.log(counts / counts.sum())[read].mean()))


@pytest.mark.slow
def test_the_sweep_runs_from_end_to_end(tmp_path):
    """Five arms, on a toy scale: they learn more than the frequencies of words, at equal size."""
    sweep_file = tmp_path / 'my_table.py'
    sweep_file.write_text(
        'from experiments import lm_table\n'
        'from experiments.lm_table import *\n'
        'from experiments.lm_table import report\n'
        'def sweep():\n'
        f'    return [arm | {TOY!r} for arm in lm_table.list_arms() if is_chosen(arm)]\n'
        'def is_chosen(arm):\n'
        "    place = arm['model.site'], arm.get('model.source')\n"
        "    return place in [('none', None), ('both', 'recurrent'), ('decoder', 'state')]\n"
    )
    command = [sys.executable, '-m', 'launch.local', f'--sweep={sweep_file}', '--parallel=1']
    workdir = tmp_path / 'runs'
    done = subprocess.run(
        [*command, f'--workdir={workdir}'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    sweep = runs.read_sweep(workdir)
    arms = lm_table.select_arms(sweep)
    assert len(arms) == 5
    unigram = unigram_perplexity(sweeps.parse_config(['--config=configs/lm.py:table']))
    plain = arms[lm_table.PLAIN, ''].get_cost('parameters', 'model')
    for (place, fusion), arm in arms.items():
        assert arm.get_cost('parameters', 'model') == pytest.approx(plain, rel=0.03), arm.label
        assert (arm.get_cost('parameters', 'fusion') == 0) == (place == lm_table.PLAIN)
        for split in lm_table.SPLITS:
            perplexity = arm.finite_values('perplexity', split)
            nats = arm.finite_values('nats_per_token', split)
            assert perplexity.keys() == {0, 1}
            for seed, value in perplexity.items():
                assert value == pytest.approx(math.exp(nats[seed]))
                assert 1 < value < unigram, (place, fusion)
    table = (workdir / 'report/lm_table.md').read_text()
    assert table.count('| multiplicative, encoder and decoder |') == 2  # of two tables
    assert 'test perplexity ↓' in table and 'bits per byte ↓' not in table  # <unk> is many words

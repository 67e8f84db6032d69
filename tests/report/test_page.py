"""The page in a real browser: it renders, sorts and toggles, and nothing of a name is markup."""

import json
import subprocess

import pytest

from mi.report import analysis, figures, html, notes, runs
from tests.report import chromium, synthetic

pytestmark = pytest.mark.skipif(
    chromium.PATH is None, reason=f'no browser: none of {", ".join(chromium.NAMES)} is installed'
)
EVIL = '<img src=x onerror="document.title=1">|</script><script>document.title=2</script>'
GAINS = {'concat': 0.0, 'mi': 0.25, EVIL: -0.1}
SEEDS, STEPS = range(3), (0, 25, 50, 75, 100)


def write(workdir):
    """A sweep of three arms with known scores of two tasks, and one arm that has not begun."""
    members = []
    for i, (arm, gain) in enumerate(GAINS.items()):
        path = workdir / str(i)
        synthetic.make_run(path, arm, {})
        records, timing = [], []
        for step in STEPS:
            for seed in SEEDS:
                easy = 0.6 + gain + seed / 100 - (100 - step) / 400
                record = {'success': easy - 0.15, 'success/easy': easy, 'success/hard': easy - 0.3}
                records.append({'step': step, 'seed': seed, 'split': 'eval', **record})
            timing.append({'step': step, 'seconds': (1 + i) * 5.0, 'steps_per_second': 8.0})
        synthetic.write_lines(path / 'metrics.jsonl', records)
        synthetic.write_lines(path / 'timing.jsonl', timing)
        cost = {'parameters': {'model': 1000 * (9 + i), 'fusion': 1}}
        (path / 'cost.json').write_text(json.dumps(cost | {'flops_per_step': {'model': 8}}))
        members.append({'name': path.name, 'label': arm, 'overrides': {}})
    members.append({'name': 'later', 'label': 'later', 'overrides': {'model.width': 16}})
    settings = {'metric': 'success', 'split': 'eval', 'curves': 'eval', 'lower_is_better': False}
    synthetic.write_sweep(workdir, members, title=EVIL, **settings)
    return render(workdir)


def render(workdir):
    sweep = runs.read_sweep(workdir)
    results = analysis.compute_results(sweep)
    curves = figures.make_curves(sweep)
    file = workdir / 'report.html'
    file.write_text(html.render_page(sweep, results, curves, notes.make_notes(sweep, results)))
    return file


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp('sweep'))


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
    if subprocess.run([chromium.PATH, '--version'], capture_output=True).returncode:
        pytest.skip(f'{chromium.PATH} does not start')  # a stub of a package that is not there
    with chromium.page(tmp_path_factory.mktemp('profile')) as page:
        yield page


@pytest.fixture
def page(browser, file):
    browser.errors.clear()
    browser.requests.clear()
    browser.open(file)
    yield browser
    assert not browser.errors
    assert {url.partition(':')[0] for url in browser.requests} <= {'file', 'data'}
    assert [url for url in browser.requests if url.startswith('file')] == [file.as_uri()]


def names(page, table='table.sortable'):
    rows = f"[...document.querySelector('{table}').tBodies[0].rows]"
    return page(f'{rows}.map(row => row.cells[0].textContent)')


def drawn(page, chart):
    return page(f"[...document.querySelectorAll('#{chart} [data-arm]')].map(g => g.dataset.arm)")


def test_names_are_words_and_never_markup(page):
    assert page('document.title') == EVIL == page("document.querySelector('h1').textContent")
    assert page("document.querySelectorAll('img').length") == 0
    assert EVIL in names(page) and EVIL in drawn(page, 'curves')
    legend = page("[...document.querySelectorAll('#legend button')].map(b => b.textContent)")
    assert legend == [*GAINS, 'later (waiting)', 'all', 'none']


def test_every_figure_is_drawn(page):
    for chart in ('curves', 'finals', 'pareto'):
        assert sorted(drawn(page, chart)) == sorted(GAINS), chart
    points = page("document.querySelector('#curves [data-arm=mi] polyline').getAttribute('points')")
    y = [float(point.split(',')[1]) for point in points.split()]
    assert len(y) == len(STEPS) and y == sorted(y, reverse=True) and y[0] > y[-1] + 50
    assert page("document.querySelectorAll('#curves .band').length") == 3
    assert page("document.querySelectorAll('#finals [data-arm=mi] circle').length") == 3


def test_a_click_on_a_head_sorts_and_what_is_missing_comes_last(page):
    heads = page("[...document.querySelectorAll('table.sortable thead')][0].textContent")
    assert 'success' in heads
    click = "document.querySelectorAll('table.sortable th button')[1].click()"
    sort = "document.querySelectorAll('table.sortable th')[1].getAttribute('aria-sort')"
    first = names(page)
    assert first == [*GAINS, 'later'] and page(sort) == 'none'
    page(click)
    assert names(page) == [EVIL, 'concat', 'mi', 'later'] and page(sort) == 'ascending'
    page(click)
    assert names(page) == ['mi', 'concat', EVIL, 'later'] and page(sort) == 'descending'
    page(click)
    assert names(page) == first and page(sort) == 'none'


def test_the_keyboard_sorts_too(page):
    page("document.querySelector('table.sortable th button').focus()")
    page.press('Enter')
    assert names(page)[1:] == ['concat', 'later', 'mi']
    page.press('Tab')
    focus = "document.activeElement.closest('th').cellIndex"
    assert page(focus) == 1
    page.press(' ')
    assert names(page) == [EVIL, 'concat', 'mi', 'later']
    sorts = page(
        "[...document.querySelectorAll('table.sortable')][0].querySelectorAll('th').length"
    )
    headers = "[...document.querySelector('table.sortable').querySelectorAll('thead th')]"
    states = page(f"{headers}.map(th => th.getAttribute('aria-sort'))")
    assert sorts > 5 and states.count('none') == len(states) - 1 and states[1] == 'ascending'


def test_an_arm_is_hidden_and_shown_in_all_figures(page):
    page("document.querySelectorAll('#legend button')[1].focus()")
    page.press(' ')
    for chart in ('curves', 'finals', 'pareto'):
        assert sorted(drawn(page, chart)) == sorted(set(GAINS) - {'mi'}), chart
    pressed = "document.querySelectorAll('#legend button')[1].getAttribute('aria-pressed')"
    assert page(pressed) == 'false'
    page("[...document.querySelectorAll('#legend button')].at(-1).click()")
    assert drawn(page, 'curves') == [] and 'No curve' in page('document.body.textContent')
    page("[...document.querySelectorAll('#legend button')].at(-2).click()")
    assert sorted(drawn(page, 'curves')) == sorted(GAINS) and page(pressed) == 'true'


def axis_texts(page, chart):
    return page(f"[...document.querySelectorAll('#{chart} svg text')].map(t => t.textContent)")


def choose(page, bar, text):
    page(f"[...document.querySelectorAll('#{bar} button')].find(b => b.textContent === '{text}')"
         '.click()')  # fmt: skip


def test_axes_are_chosen(page):
    assert 'training steps' in axis_texts(page, 'curves') and '100' in axis_texts(page, 'curves')
    choose(page, 'curves-bar', 'seconds')
    assert 'training seconds' in axis_texts(page, 'curves')
    assert '75' in axis_texts(page, 'curves') and '100' not in axis_texts(
        page, 'curves'
    )  # 5 × 15 s
    assert '0.1' not in axis_texts(page, 'curves')
    choose(page, 'curves-bar', 'all')
    assert '0.1' in axis_texts(page, 'curves')
    assert 'parameters' in axis_texts(page, 'pareto')
    choose(page, 'pareto-bar', 'training seconds')
    assert 'training seconds' in axis_texts(page, 'pareto')


def test_every_problem_has_a_front_of_its_own(browser, tmp_path):
    synthetic.write_problems(tmp_path)
    browser.open(render(tmp_path))
    fronts = browser(
        "[...document.querySelectorAll('#pareto .front')].map(p => p.points.numberOfItems)"
    )
    assert fronts == [4, 4]  # three points for two arms, and one at the edge
    circles = "[...document.querySelectorAll('#pareto circle')].map(c => c.getAttribute('r'))"
    assert browser(circles) == ['5', '5', '4', '5', '5']
    caption = "document.getElementById('pareto').closest('figure').textContent"
    assert 'the best mean of each problem for that cost' in browser(caption)


def test_the_mouse_reads_the_curves(page):
    page("document.getElementById('curves').scrollIntoView()")
    box = page("document.querySelector('#curves svg').getBoundingClientRect().toJSON()")
    page.mouse(box['x'] + box['width'] - 12, box['y'] + box['height'] / 2)
    assert not page("document.querySelector('.readout').hidden")
    lines = page("[...document.querySelector('.readout').children].map(d => d.textContent)")
    assert lines[0] == 'step 100'
    assert lines[1].startswith('0.710 [0.700, 0.720] mi') and lines[3].endswith(EVIL)
    page.mouse(5, 5)
    assert page("document.querySelector('.readout').hidden")


def test_the_map_of_tasks_shows_scores_or_differences(page):
    cells = "[...document.querySelectorAll('table.heat tbody td')]"
    assert names(page, 'table.heat') == ['easy', 'hard']
    assert page(f'{cells}.map(c => c.textContent)') == [
        '0.61',
        '0.86',
        '0.51',
        '0.31',
        '0.56',
        '0.21',
    ]
    heats = [float(h) for h in page(f"{cells}.map(c => c.style.getPropertyValue('--h'))")]
    assert heats[1] == 1.0 and heats[5] == 0.0 and 0 < heats[0] < 1
    choose(page, 'tasks-bar', 'difference to concat')
    assert page(f'{cells}.map(c => c.textContent)')[:3] == ['0.00', '+0.25', '−0.10']
    assert page(f'{cells}.map(c => c.className)')[:3] == ['', 'good', 'bad']
    choose(page, 'tasks-bar', 'score')
    choose(page, 'tasks-bar', 'within each task')
    heats = [float(h) for h in page(f"{cells}.map(c => c.style.getPropertyValue('--h'))")]
    assert heats[1] == heats[4] == 1.0 and heats[2] == heats[5] == 0.0


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1400, 390])
def test_wide_and_narrow_light_and_dark(page, file, width, scheme):
    page.open(file, width=width, scheme=scheme)
    page.requests.pop()
    assert page('document.documentElement.scrollWidth') == width  # only tables scroll sideways
    colours = page('(s => [s.color, s.backgroundColor])(getComputedStyle(document.body))')
    ink, paper = (sum(map(int, c[4:-1].split(','))) for c in colours)
    assert (ink < 200 and paper > 700) if scheme == 'light' else (ink > 600 and paper < 150)
    svg = page("document.querySelector('#curves svg').getBoundingClientRect().width")
    assert width - 60 < svg < width
    size = "getComputedStyle(document.querySelector('#curves text')).fontSize"
    assert page(size) == '12px'  # letters do not shrink with the window


@pytest.mark.parametrize(
    ('low', 'high'),
    [(429_700, 430_800), (0, 1), (-3, 3), (0, 2e6), (9_000, 12_000), (1e9, 1.0001e9), (1e-6, 3e-6)],
)
def test_ticks_are_distinct_and_show_their_value(page, low, high):
    ticks = page(f'ticks({low}, {high}, 5)')
    labels = ticks['labels']
    assert len(labels) == len(set(labels)) > 2
    scale = {'k': 1e3, 'M': 1e6, 'G': 1e9}
    for value, label in zip(ticks['values'], labels, strict=True):
        number = float(label.rstrip('kMG').replace('−', '-')) * scale.get(label[-1], 1)
        assert number == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_counts_have_whole_ticks_and_decades_fit(page):
    assert page('ticks(429720, 429722, 8, true).labels') == ['429.720k', '429.721k', '429.722k']
    assert len(page('decades(1, 1e12, 6).labels')) <= 7
    assert page('decades(900, 20000, 8).labels') == ['1k', '2k', '5k', '10k', '20k']
    assert page('extent([2.1, 2.1 + 5e-16], 0.1)') == pytest.approx([1.995, 2.205])


def test_the_legend_shows_the_line_of_each_arm(page):
    lines = "[...document.querySelectorAll('#legend .swatch line')]"
    strokes = page(f"{lines}.map(l => l.getAttribute('stroke'))")
    assert len(set(strokes)) == len(strokes) == len(GAINS) + 1
    drawn_line = "document.querySelector('#curves [data-arm=mi] polyline')"
    for name in ('stroke', 'stroke-dasharray'):
        assert page(f"{lines}[1].getAttribute('{name}')") == page(
            f"{drawn_line}.getAttribute('{name}')"
        )

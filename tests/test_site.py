"""The built site: no dead link, titles that tell pages apart, a search that knows parts of keys."""

import collections
import html.parser
import json
import re
import shutil
import subprocess
import sys
import urllib.parse

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def build(tmp_path_factory):
    """The folder of the built site, and what the build printed."""
    for package in ('mkdocs', 'nbclient'):
        pytest.importorskip(package, reason='the extra docs is not installed')
    folder = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, '-m', 'mkdocs', 'build', '--site-dir', str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env={'NO_MKDOCS_2_WARNING': '1', 'PATH': '/usr/bin:/bin'},
    )
    assert done.returncode == 0, done.stderr
    yield folder, done.stderr
    shutil.rmtree(folder)


@pytest.fixture(scope='module')
def site(build):
    return build[0]


def test_it_builds_without_a_warning(build):
    folder, log = build
    assert 'WARNING' not in log and 'not included in the "nav"' not in log
    page = (folder / 'api/mi.layers.html').read_text()
    assert 'zᵀWx' in page and 'LowRankMultiplicativeInteraction' in page
    index = (folder / 'index.html').read_text()
    assert 'figures/concat_and_mi.svg' in index and 'tutorials/fusion.html' in index


class Page(html.parser.HTMLParser):
    """What a page links to and what it can be linked at."""

    def __init__(self, text):
        super().__init__()
        self.links, self.ids = [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.links += [attributes[key] for key in ('href', 'src') if attributes.get(key)]
        self.ids |= {attributes[key] for key in ('id', 'name') if attributes.get(key)}


def test_every_link_of_the_site_leads_somewhere(site):
    """Pages of mkdocs and reports, and the anchors of mkdocs' pages."""
    pages = {path: Page(path.read_text()) for path in sorted(site.rglob('*.html'))}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme or url.netloc or path.name == '404.html':
                continue
            target = (path.parent / urllib.parse.unquote(url.path)).resolve() if url.path else path
            if not target.is_file():
                dead.append(f'{path.relative_to(site)} → {link}')
            elif url.fragment and target in pages:
                known = pages[target].ids | {'', '__top', '__skip'}
                if urllib.parse.unquote(url.fragment) not in known:
                    dead.append(f'{path.relative_to(site)} → {link}')
    assert len(pages) > 50 and sum(len(page.links) for page in pages.values()) > 1000
    assert not dead


def test_no_two_pages_of_the_navigation_have_one_title(site):
    text = (site / 'index.html').read_text()
    pages = re.findall(r'<a href="[^"#]*\.html" class="md-nav__link[^"]*">(.*?)</a>', text, re.S)
    titles = [' '.join(re.sub('<[^>]*>', '', page).split()) for page in pages]
    twice = [title for title, count in collections.Counter(titles).items() if count > 1]
    assert len(titles) > 40 and not twice
    titles = [title for title in titles if not title.startswith('mi.')]  # modules of the API
    assert not [title for title in titles if title.startswith('Results: ') or '_' in title]


def test_the_search_knows_the_parts_of_keys_and_flags(site):
    index = json.loads((site / 'search/search_index.json').read_text())
    separator = re.compile(index['config']['separator'])
    for text in (
        'config.train.fsdp_axes',
        '--retries=3',
        'kill -9',
        'mi/training/run_dir.py',
        '`a.b`',
    ):
        words = set(filter(None, separator.split(text)))
        assert words == set(re.findall(r'[a-z]+|\d', text)), text
    found = {
        doc['location'].partition('#')[0]
        for doc in index['docs']
        if 'fsdp' in separator.split(re.sub('<[^>]*>', ' ', doc['text']).lower())
    }
    assert {'lm.html', 'launch.html', 'scaling.html'} <= found, found

"""Hooks of MkDocs: pages that are no files of docs/, links that leave it, the navigation.

    make docs     or: mkdocs build

index.md            README.md
contributing.md     CONTRIBUTING.md
api/*.md            a page for each module of mi that has something public, from its docstrings
results/index.md    docs/results/README.md, and a card for each page of docs/results
"""

import pathlib
import re
from collections.abc import Iterator
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent

# Section → its pages, in order; pages of docs/ that stand nowhere here are added to 'Guides', or
# to 'Results' if they are there.
SECTIONS: dict[str, list[str]] = {
    'Tutorials': [
        'tutorials/fusion.md',
        'tutorials/cell.md',
        'tutorials/slurm.md',
        'tutorials/eight_gpus.md',
        'tutorials/wikitext103.md',
        'tutorials/dmlab30.md',
    ],
    'Guides': [
        'architecture.md',
        'pod.md',
        'lm.md',
        'rl.md',
        'report.md',
        'data.md',
        'dmlab.md',
        'evaluation.md',
        'performance.md',
        'scaling.md',
    ],
    'Fusions and motifs': ['fusions.md'],
    'Results': ['results/index.md'],
}
PACKAGES = {
    '': 'mi',
    'motifs': 'Motifs',
    'unify': 'As one equation',
    'lm': 'Language models',
    'rl': 'Reinforcement learning',
    'rl.envs': 'Environments',
    'fit': 'Small functions',
    'report': 'Report',
}
MOTIFS = {'forms': 'Forms of the equation', 'dynamic_conv': 'Dynamic convolution'}
FOLDERS = {
    'lm_fusion': 'Fusions in language models',
    'rl_again': 'Thirty tasks again',
    'rl_language': 'Instructions in language',
    'rl_multitask': 'Thirty tasks',
    'rl_time_limits': 'Thirty tasks, time limits',
    'quickstart_rl': 'Quickstart, agents',
}
LINK = re.compile(r'(!?)\[([^\]\n]*)\]\(([^)\s]+)\)')


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that are made."""
    made = {'index.md': readme(), 'results/index.md': gallery()}
    made['contributing.md'] = (ROOT / 'CONTRIBUTING.md').read_text().replace('](docs/', '](')
    made |= {f'api/{name}.md': f'# {name}\n\n::: {name}\n' for name in modules()}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    config.nav = navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links to folders go to the report in them; others, and those out of docs/, become text.

    Tables of results are left out of the search, whose every number would be a hit.
    """
    if page.file.src_uri.endswith('/table.md'):
        page.meta['search'] = {'exclude': True}
    folder = pathlib.PurePosixPath(page.file.src_uri).parent

    def of(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path = target.partition('#')[0]
        if image or not path or re.match(r'[a-z]+:', path):
            return match[0]
        place = (HERE / folder / path).resolve()
        if (place / 'report.html').exists() and place.is_relative_to(HERE):
            return f'[{text}]({path.rstrip("/")}/report.html)'
        inside = place.is_relative_to(HERE) and not place.is_dir()
        return match[0] if inside else text if '`' in text else f'`{text}`'

    return re.sub(LINK, of, markdown)


def readme() -> str:
    """README.md, its links as from within docs/."""
    text = (ROOT / 'README.md').read_text().replace('](docs/', '](')
    text = text.replace('](results/README.md)', '](results/index.md)')
    return text.replace('](CONTRIBUTING.md)', '](contributing.md)')


def modules() -> list[str]:
    """Dotted names of the modules of mi with a docstring, but for packages."""
    paths = sorted((ROOT / 'mi').rglob('*.py'), key=lambda path: (len(path.parts), path))
    names = [path.relative_to(ROOT).with_suffix('').parts for path in paths]
    return ['.'.join(name) for name in names if not name[-1].startswith('__')]


def gallery() -> str:
    """A card for every page of results: its claim, its first figure, how and where it was made."""
    cards = [
        (HERE / 'results/README.md').read_text().strip(),
        '<div class="gallery" markdown>',
    ]
    for path in sorted((HERE / 'results').glob('*.md')):
        if path.name == 'README.md':
            continue
        title, claim, command, measured, figure = _card(path)
        cards += [
            '<figure markdown>',
            f'**[{title[0].upper()}{title[1:]}]({path.name})**',
            claim,
            figure,
            f'<small>{measured}</small>',
            f'```\n{command}\n```',
            '</figure>',
        ]
    return '\n\n'.join([*cards, '</div>']) + '\n'


def _card(path: pathlib.Path) -> list[str]:
    """Title, claim, command, machine and date, and figure of a page of results, as Markdown.

    Raises:
      ValueError: if the page lacks one of them: what.
    """
    text = path.read_text()
    parts = {
        'a title "# Results: …"': r'\A# Results: (.+)',
        'a claim, its first paragraph': r'\A# .+\n\n((?:(?!Measured on)\S.*\n)+)',
        'a command, in ```': r'```\n(.+?)\n```',
        'where it was "Measured on"': r'(?m)^(Measured on (?:.+\n)+)',
        'a figure': r'(!\[[^\]]*\]\([^)]+\))',
    }
    found = {
        what: re.search(pattern, text, flags=re.S if '`' in what else 0)
        for what, pattern in parts.items()
    }
    missing = [what for what, match in found.items() if match is None]
    if missing:
        raise ValueError(f'{path}: it has not {missing[0]}, which the gallery shows')
    return [match[1].strip() for match in found.values() if match is not None]


def navigation(pages: list[str]) -> list[Any]:
    """MkDocs' nav, with every page in it, no two of one title."""
    known = {page for section in SECTIONS.values() for page in section} | {'index.md'}
    sections = {title: [p for p in section if p in pages] for title, section in SECTIONS.items()}
    for page in sorted(pages):
        if page in known or page.startswith('api/'):
            continue
        home = page.partition('/')[0]
        title = {'results': 'Results', 'motifs': 'Fusions and motifs', 'tutorials': 'Tutorials'}
        sections[title.get(home, 'Guides')].append(page)
    nav: list[Any] = [{'Home': 'index.md'}]
    for title, section in sections.items():
        if section:
            nav.append({title: [{name(p): p} if named(p) else p for p in section]})
    return [*nav, {'API': list(_api(pages))}]


def named(page: str) -> bool:
    """Whether the navigation has another title for a page than its own heading."""
    return page.startswith(('results/', 'motifs/')) and page != 'results/index.md'


def name(page: str) -> str:
    """The title of a page of results or motifs in the navigation.

    Pages in a folder of results are named after it, as 'Composition: draws'.
    """
    path = pathlib.PurePosixPath(page)
    if page.startswith('motifs/'):
        return MOTIFS.get(path.stem, path.stem.capitalize())
    if path.parent.name == 'results':
        heading = (HERE / page).read_text().partition('\n')[0].removeprefix('# Results: ')
        return heading[:1].upper() + heading[1:]
    folder = path.parent.name.replace('_', ' ')
    what = 'all arms' if path.stem == path.parent.name else path.stem.replace('_', ' ')
    return f'{FOLDERS.get(path.parent.name, folder.capitalize())}: {what}'


def _api(pages: list[str]) -> Iterator[dict[str, list[str]]]:
    for package, title in PACKAGES.items():
        inside = f'api/mi.{package}.' if package else 'api/mi.'
        own = [
            page
            for page in pages
            if page.startswith(inside) and '.' not in page[len(inside) : -len('.md')]
        ]
        yield {title: own}


class Layout(griffe.Extension):
    """Docstrings as they stand: what is set in columns is code, 'a, b: …' is an entry for each."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(apart(obj.docstring.value))


def apart(text: str) -> str:
    """Entries of several names, as one entry each with the same words."""
    entry = re.compile(r'^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)', flags=re.M)
    section = re.compile(r'^(?:Attributes|Args|Returns):\n(?:(?: .*)?\n?)*', flags=re.M)

    def each(match: re.Match[str]) -> str:
        indent, names, words = match.groups()
        return '\n'.join(f'{indent}{name}{words}' for name in names.split(', '))

    return section.sub(lambda found: entry.sub(each, found[0]), text)


def fenced(text: str) -> str:
    """Paragraphs with two lines or more in columns, as blocks of code."""
    paragraphs = re.split(r'\n{2,}', text)
    return '\n\n'.join(f'```text\n{p}\n```' if _columns(p) else p for p in paragraphs)


def _columns(paragraph: str) -> bool:
    lines = paragraph.split('\n')
    if any(line.startswith((' ', '\t', '- ', '```')) for line in lines[:1]):
        return False
    return sum(bool(re.search(r'\S {3,}\S', line)) for line in lines) >= 2

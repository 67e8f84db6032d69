"""MkDocs hooks for generated pages, links to files outside docs/, and the navigation.

    make docs     or: mkdocs build

index.md            README.md
contributing.md     CONTRIBUTING.md
notebooks/*.md      the notebooks of docs/notebooks, with outputs and figures of a new run
api/*.md            a page for each module of mi, from its docstrings
results/index.md    docs/results/README.md, and a card for each page of docs/results
"""

import os
import pathlib
import re
import tempfile
from collections.abc import Iterator
from typing import Any

import griffe
import nbclient
import nbconvert
import nbformat
from mkdocs.structure.files import File, Files
from traitlets.config import Config

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent

# Section → its pages, in order. Pages of docs/ that are missing here go to 'Guides', or to the
# section of their folder.
SECTIONS: dict[str, list[str]] = {
    'Tutorials': [
        'notebooks/layer.md',
        'notebooks/ablation.md',
        'tutorials/fusion.md',
        'tutorials/find.md',
        'tutorials/cell.md',
        'tutorials/problem.md',
        'tutorials/nnx.md',
        'tutorials/slurm.md',
        'tutorials/eight_gpus.md',
        'tutorials/wikitext103.md',
        'tutorials/dmlab30.md',
    ],
    'Guides': [
        'install.md',
        'architecture.md',
        'paper.md',
        'appendix_b.md',
        'find.md',
        'gallery.md',
        'inspect.md',
        'pod.md',
        'lm.md',
        'rl.md',
        'training.md',
        'export.md',
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
    'kernels': 'Kernels',
    'motifs': 'Motifs',
    'cells': 'Cells',
    'unify': 'As one equation',
    'find': 'Find interactions',
    'inspect': 'Inspect runs',
    'compress': 'Compress layers',
    'training': 'Training',
    'lm': 'Language models',
    'lm.data': 'Corpora',
    'rl': 'Reinforcement learning',
    'rl.fused': 'Topology fused',
    'rl.actors': 'Topologies threads and ray',
    'rl.envs': 'Environments',
    'rl.envs.jax': 'Environments in JAX',
    'rl.envs.host': 'Environments on the host',
    'fit': 'Small problems',
    'estimate': 'Estimates',
    'export': 'Export runs',
    'report': 'Report',
}
MOTIFS = {'forms': 'Forms of the equation', 'dynamic_conv': 'Dynamic convolution'}
FOLDERS = {
    'lm_fusion': 'Fusions in language models',
    'lm_table': 'Encoder and decoder of an LSTM',
    'lm_table_enwik8': 'Encoder and decoder of an LSTM, enwik8',
    'rl_again': 'Thirty tasks again',
    'rl_language': 'Instructions in language',
    'rl_multitask': 'Thirty tasks',
    'rl_time_limits': 'Thirty tasks, time limits',
    'rl_tuned': 'Thirty tasks, tuned',
    'quickstart_rl': 'Quickstart, agents',
}
LINK = re.compile(r'(!?)\[([^\]\n]*)\]\(([^)\s]+)\)')


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages and the navigation."""
    pages = {'index.md': make_index(), 'results/index.md': make_gallery()}
    pages['contributing.md'] = (ROOT / 'CONTRIBUTING.md').read_text().replace('](docs/', '](')
    pages |= {f'api/{name}.md': f'# {name}\n\n::: {name}\n' for name in list_modules()}
    generated: dict[str, str | bytes] = {**pages}
    for notebook in sorted((HERE / 'notebooks').glob('*.ipynb')):
        generated |= make_notebook(notebook)
    for path, content in generated.items():
        files.append(File.generated(config, path, content=content))
    config.nav = make_navigation([file.src_uri for file in files.documentation_pages()])
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrite the links of a page.

    Links to folders with a report point at the report. Links to other folders and to files outside
    docs/ become plain text. Pages with tables of results are excluded from the search, where every
    number would be a hit.
    """
    if page.file.src_uri.endswith('/table.md'):
        page.meta['search'] = {'exclude': True}
    folder = pathlib.PurePosixPath(page.file.src_uri).parent

    def replace_link(match: re.Match[str]) -> str:
        image, text, target = match.groups()
        path = target.partition('#')[0]
        if image or not path or re.match(r'[a-z]+:', path):
            return match[0]
        file = (HERE / folder / path).resolve()
        if file == HERE / 'results/README.md':
            return f'[{text}]({path.replace("README.md", "index.md")})'
        if (file / 'report.html').exists() and file.is_relative_to(HERE):
            return f'[{text}]({path.rstrip("/")}/report.html)'
        is_page = file.is_relative_to(HERE) and not file.is_dir()
        if is_page:
            return match[0]
        return text if '`' in text else f'`{text}`'

    return re.sub(LINK, replace_link, markdown)


def make_index() -> str:
    """Return README.md with links relative to docs/."""
    text = (ROOT / 'README.md').read_text().replace('](docs/', '](')
    return text.replace('](CONTRIBUTING.md)', '](contributing.md)')


def make_notebook(path: pathlib.Path) -> dict[str, str | bytes]:
    """Run a notebook; return path in the site → content, for its Markdown page and figures.

    Raises:
      nbclient.exceptions.CellExecutionError: if a cell raises.
    """
    notebook = run_notebook(path)
    resources = {'unique_key': f'{path.stem}_figures', 'output_files_dir': f'{path.stem}_figures'}
    page, resources = nbconvert.MarkdownExporter().from_notebook_node(notebook, resources)
    page = page.replace('.ipynb)', '.md)').replace('![png](', '![figure](')
    download = f'[Download this notebook]({path.name}).\n'
    figures = {f'notebooks/{name}': figure for name, figure in resources['outputs'].items()}
    return {f'notebooks/{path.stem}.md': f'{page}\n\n{download}', **figures}


def run_notebook(path: pathlib.Path) -> nbformat.NotebookNode:
    """Run a notebook in an empty directory and return it with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    with tempfile.TemporaryDirectory() as folder:
        # Sockets in files: a kernel on TCP warns that anyone on the machine could read it.
        transport = Config({'KernelManager': {'transport': 'ipc', 'ip': f'{folder}/kernel'}})
        client = nbclient.NotebookClient(
            notebook,
            timeout=900,
            coalesce_streams=True,
            resources={'metadata': {'path': folder}},
            config=transport,
        )
        client.execute(env={**os.environ, 'PYTHONPATH': python_path})
    return notebook


def list_modules() -> list[str]:
    """Return the dotted names of mi's modules, without packages."""
    paths = sorted((ROOT / 'mi').rglob('*.py'), key=lambda path: (len(path.parts), path))
    parts = [path.relative_to(ROOT).with_suffix('').parts for path in paths]
    return ['.'.join(name) for name in parts if not name[-1].startswith('__')]


def make_gallery() -> str:
    """Return a card for each page of results, with claim, first figure, machine and command."""
    cards = [
        (HERE / 'results/README.md').read_text().strip(),
        '<div class="gallery" markdown>',
    ]
    for path in sorted((HERE / 'results').glob('*.md')):
        if path.name == 'README.md':
            continue
        title, claim, command, measured, figure = _read_card(path)
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


def _read_card(path: pathlib.Path) -> list[str]:
    """Return the title, claim, command, measurement line and figure of a page of results.

    Raises:
      ValueError: if one of these parts is missing.
    """
    text = path.read_text()
    patterns = {
        'a title "# Results: …"': r'\A# Results: (.+)',
        'a claim in the first paragraph': r'\A# .+\n\n((?:(?!Measured on)\S.*\n)+)',
        'a command, in ```': r'```\n(.+?)\n```',
        'a paragraph "Measured on …"': r'(?m)^(Measured on (?:.+\n)+)',
        'a figure': r'(!\[[^\]]*\]\([^)]+\))',
    }
    texts = []
    for part, pattern in patterns.items():
        match = re.search(pattern, text, flags=re.S if '`' in part else 0)
        if match is None:
            raise ValueError(f'{path}: expected {part} for the gallery')
        texts.append(match[1].strip())
    return texts


def make_navigation(pages: list[str]) -> list[Any]:
    """Return the navigation for MkDocs, with a unique title for each page."""
    known = {page for section in SECTIONS.values() for page in section} | {'index.md'}
    sections = {title: [p for p in section if p in pages] for title, section in SECTIONS.items()}
    for page in sorted(pages):
        if page in known or page.startswith('api/'):
            continue
        folder = page.partition('/')[0]
        titles = {'results': 'Results', 'motifs': 'Fusions and motifs'}
        titles |= {'notebooks': 'Tutorials', 'tutorials': 'Tutorials'}
        sections[titles.get(folder, 'Guides')].append(page)
    nav: list[Any] = [{'Home': 'index.md'}]
    for title, section in sections.items():
        if section:
            nav.append({title: [{make_title(p): p} if has_title(p) else p for p in section]})
    return [*nav, {'API': list(_group_modules(pages))}]


def has_title(page: str) -> bool:
    """Return whether the navigation uses a title other than the heading of the page."""
    return page.startswith(('results/', 'motifs/')) and page != 'results/index.md'


def make_title(page: str) -> str:
    """Return the title of a page of results or motifs in the navigation.

    For pages in a folder of results, the title starts with the folder, as in 'Composition: draws'.
    """
    path = pathlib.PurePosixPath(page)
    if page.startswith('motifs/'):
        return MOTIFS.get(path.stem, path.stem.capitalize())
    if path.parent.name == 'results':
        heading = (HERE / page).read_text().partition('\n')[0].removeprefix('# Results: ')
        return heading[:1].upper() + heading[1:]
    folder = path.parent.name.replace('_', ' ')
    subject = 'all arms' if path.stem == path.parent.name else path.stem.replace('_', ' ')
    return f'{FOLDERS.get(path.parent.name, folder.capitalize())}: {subject}'


def _group_modules(pages: list[str]) -> Iterator[dict[str, list[str]]]:
    for package, title in PACKAGES.items():
        prefix = f'api/mi.{package}.' if package else 'api/mi.'
        members = [
            page
            for page in pages
            if page.startswith(prefix) and '.' not in page[len(prefix) : -len('.md')]
        ]
        yield {title: members}


class Layout(griffe.Extension):
    """A griffe extension for our docstrings.

    Columns become code blocks, and an entry 'a, b: …' becomes one entry for each name.
    """

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fence_columns(split_entries(obj.docstring.value))


def split_entries(text: str) -> str:
    """Split entries with several names into one entry for each name."""
    entry = re.compile(r'^( +)(\w+(?:, \w+)+)(: .*(?:\n\1 +.*)*)', flags=re.M)
    section = re.compile(r'^(?:Attributes|Args|Returns):\n(?:(?: .*)?\n?)*', flags=re.M)

    def split_entry(match: re.Match[str]) -> str:
        indent, names, description = match.groups()
        return '\n'.join(f'{indent}{name}{description}' for name in names.split(', '))

    return section.sub(lambda match: entry.sub(split_entry, match[0]), text)


def fence_columns(text: str) -> str:
    """Turn paragraphs with at least two lines in columns into code blocks."""
    paragraphs = re.split(r'\n{2,}', text)
    return '\n\n'.join(f'```text\n{p}\n```' if _has_columns(p) else p for p in paragraphs)


def _has_columns(paragraph: str) -> bool:
    lines = paragraph.split('\n')
    if any(line.startswith((' ', '\t', '- ', '```')) for line in lines[:1]):
        return False
    return sum(bool(re.search(r'\S {3,}\S', line)) for line in lines) >= 2

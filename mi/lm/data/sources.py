"""Named corpora: standard benchmarks, text files and directories, and the Hugging Face hub."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mi.config import UserError, suggest, suggest_install
from mi.lm.data.archives import (
    PACKED,
    find_first,
    is_data,
    name_os_errors,
    open_text,
    write_atomically,
)
from mi.lm.data.texts import SPLITS, Text, Texts, join_texts, split_at, split_by_lines
from mi.training import progress

HUB = 'hub:'

_SPLIT_PATTERNS = {'train': 'train(ing)?', 'valid': 'valid(ation)?', 'test': 'test(ing)?'}
_HUB_SPLITS = {'train': ('train',), 'valid': ('validation', 'valid', 'dev'), 'test': ('test',)}
_AUSTEN = {  # title line in the file → split
    'EMMA': 'train',
    'MANSFIELD PARK': 'train',
    'NORTHANGER ABBEY': 'valid',
    'Persuasion': 'test',
    'PRIDE AND PREJUDICE': 'train',
    'SENSE AND SENSIBILITY': 'train',
}


@dataclasses.dataclass(frozen=True)
class Source:
    """How a corpus is read, and its known properties.

    Attributes:
      read: (path, splits, cache) → texts, of at least these splits.
      origin: source of the download; '' if unknown.
      is_bundled: whether the corpus is part of the package, so that it needs no path.
      hub: its name as a source on the Hugging Face hub; '' if it has none.
      num_tokens: split → number of tokens of the level 'token', with an <eos> for each line.
      vocabulary: number of different tokens in train; 0 if unknown.
    """

    read: Callable[[pathlib.Path, Collection[str], pathlib.Path], Texts]
    origin: str = ''
    is_bundled: bool = False
    hub: str = ''
    num_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vocabulary: int = 0

    def make_error(self, problem: str) -> UserError:
        """Return the error that states a problem of the files and where to get the right ones."""
        return UserError(f'{problem}; get it from {self.origin}' if self.origin else problem)


def find_source(name: str) -> Source:
    """Return how to read a name of `CORPORA`, a name on the hub, or a text file or directory."""
    if name in CORPORA:
        return CORPORA[name]
    if name.startswith(HUB):
        known = next((s for s in CORPORA.values() if s.hub == name), Source(_read_local))
        return dataclasses.replace(known, read=functools.partial(_read_hub, name), origin='')
    return Source(_read_local)


def load_texts(source: str, path: str, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Return the texts of a corpus; check the known sizes and hashes of its files.

    Args:
      source: a name, see `find_source`.
      path: path of the files for a name of `CORPORA`; '' for $MI_DATA/SOURCE.
      splits: the splits to read; files of other splits may be missing.
      cache: directory for unpacked files and downloads from the hub.

    Raises:
      UserError: which file is missing, ambiguous or wrong, and where to get it.
    """
    # The place of the corpus.
    known = find_source(source)
    location = path or source
    if source in CORPORA and not known.is_bundled:
        root = os.environ.get('MI_DATA', '')
        if not path and not root:
            raise known.make_error(
                f"config.data.path = '': expected the place of {source!r}, or its parent directory "
                f'in $MI_DATA'
            )
        location = path or os.path.join(root, source)
    elif path:
        raise UserError(
            f"config.data.path = {path!r}: expected '', as config.data.source = {source!r} is "
            f"itself a place. Try config.data.path = ''"
        )

    # The texts.
    try:
        with name_os_errors(cache):
            texts = known.read(pathlib.Path(location).expanduser(), splits, cache)
    except UserError as error:
        raise known.make_error(str(error)) from error
    return {split: texts[split] for split in SPLITS if split in splits}


def get_cache_directory(cache: str) -> pathlib.Path:
    """Return the directory of that name; '' for $MI_CACHE or ~/.cache/mi."""
    return pathlib.Path(cache or os.environ.get('MI_CACHE') or '~/.cache/mi').expanduser()


def load_austen() -> dict[str, list[tuple[str, bytes]]]:
    """Return six novels by Jane Austen, which are in the public domain.

    Northanger Abbey is valid, Persuasion is test, and the other four are train.

    Returns:
      Split → one pair of a domain, '', and the bytes of its text.
    """
    texts = load_texts('austen', '', SPLITS, get_cache_directory(''))
    return {s: [('', b''.join(part.array().tobytes() for part in texts[s]))] for s in SPLITS}


def _read_austen(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    texts: Texts = {split: [] for split in SPLITS}
    for split, novel in _find_novels(cache):
        texts[split].append(dataclasses.replace(novel, domain=''))
    return texts


def _read_austen_domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    return join_texts([split_by_lines(novel) for _, novel in _find_novels(cache)])


def _find_novels(cache: pathlib.Path) -> list[tuple[str, Text]]:
    """Return split and text of each novel, in the order of the file, which is alphabetical."""
    file_text = open_text(pathlib.Path(__file__).parents[2] / 'data/austen.txt.xz', cache)
    position, titles = 0, []
    for line in file_text.array().tobytes().splitlines(keepends=True):
        title = line.strip().decode()
        if title in _AUSTEN:
            titles.append((position, title))
        position += len(line)
    ends = [start for start, _ in titles[1:]] + [position]
    return [
        (_AUSTEN[title], Text(file_text.file, start, end, file_text.origin, title.title()))
        for (start, title), end in zip(titles, ends, strict=True)
    ]


def _read_local(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Read a text file, split by lines, or a directory with a file for each split."""
    if path.is_file():
        return split_by_lines(open_text(path, cache))
    if not path.is_dir():
        raise UserError(
            f'config.data.source = {str(path)!r}: no such file or directory, and no known corpus; '
            f'{suggest(str(path), CORPORA)}, {HUB}OWNER/NAME'
        )
    texts = {}
    split_of_file: dict[pathlib.Path, str] = {}
    files = sorted(file for file in path.iterdir() if is_data(file.name) and file.is_file())
    for split in splits:
        # A split as a word of the name wins over one as a part of a word.
        matches = [file for file in files if _has_split(file.name, split)]
        matches = matches or [file for file in files if split in file.name]
        if len(matches) != 1:
            names = ', '.join(file.name for file in matches) or 'none'
            raise UserError(f'{path}: expected one file with {split!r} in its name, found {names}')
        file = matches[0]
        if file in split_of_file:
            raise UserError(
                f'{file}: the name contains both {split_of_file[file]!r} and {split!r}: expected '
                f'one file per split. Rename the file'
            )
        split_of_file[file] = split
        texts[split] = [open_text(file, cache)]
    return texts


def _has_split(name: str, split: str) -> bool:
    """Return whether a name has a split as a word: 'my-test.txt' has 'test', 'latest.txt' not."""
    return bool(re.search(rf'(?<![a-z]){_SPLIT_PATTERNS[split]}(?![a-z])', name.lower()))


def _read_domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Read a directory in which every file or directory is a domain, except hidden and backups."""
    entries: dict[str, pathlib.Path] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if not is_data(entry.name):
            continue
        plain = entry.with_suffix('') if entry.suffix in PACKED else entry
        name = entry.name if entry.is_dir() else plain.stem
        if name in entries:
            raise UserError(f'{path}: {entries[name].name} and {entry.name} are both domain {name}')
        entries[name] = entry
    if not entries:
        raise UserError(f'{path}: expected a directory with a text file or directory for a domain')
    parts = []
    for name, entry in sorted(entries.items()):
        texts = _read_local(entry, splits, cache)
        parts.append({s: [dataclasses.replace(t, domain=name) for t in texts[s]] for s in splits})
    return join_texts(parts)


def _read_split_files(
    stems: tuple[str, ...],
    endings: tuple[str, ...],
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """Read a directory with files STEM.SPLIT.ENDING; the first name that exists is used."""
    texts = {}
    for split in splits:
        files = [path / f'{stem}.{split}{ending}' for stem in stems for ending in endings]
        names = ' or '.join(file.name for file in files)
        texts[split] = [open_text(find_first(files, f'{path}: expected {names}'), cache)]
    return texts


def _read_bytes(
    name: str,
    size: int,
    md5: str,
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """Read a file, or a directory with it; its last tenth is valid and test."""
    file = path / name if path.is_dir() else path
    text = open_text(find_first([file], f'{file.parent}: expected {file.name}'), cache)
    if text.stop != size:
        raise UserError(f'{text.origin}: {text.stop:,} bytes, expected {size:,}')
    digest = hashlib.md5(text.array().data, usedforsecurity=False).hexdigest()
    if digest != md5:
        raise UserError(f'{text.origin}: md5 {digest}, expected {md5}')
    return split_at(text, [size * 90 // 100, size * 95 // 100])


def _read_hub(
    source: str, path: pathlib.Path, splits: Collection[str], cache: pathlib.Path
) -> Texts:
    """Read a dataset of the hub, which is copied to text files on first use."""
    parts = source.removeprefix(HUB).split('/')
    if len(parts) not in (2, 3) or not all(parts):
        raise UserError(
            f'config.data.source = {source!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG'
        )
    copy = cache / 'hub' / '--'.join(parts)
    if not copy.exists():
        _copy_dataset(source, _download_dataset(source, parts), copy)
    return _read_local(copy, splits, cache)


def _download_dataset(source: str, parts: list[str]) -> Any:
    """Return the splits of a dataset of the hub, by their names there."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f'config.data.source = {source!r} needs the package datasets, which is not '
            f'installed. Try {suggest_install("hub")}'
        ) from error
    try:
        return datasets.load_dataset('/'.join(parts[:2]), *parts[2:])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = ' '.join(str(error).split())
        raise UserError(f'config.data.source = {source!r}: {reason}') from error


def _copy_dataset(source: str, dataset: Any, copy: pathlib.Path) -> None:
    """Write the column 'text' of every split to a text file, a line for each row."""
    with write_atomically(copy) as new:
        new.mkdir()
        for split, names in _HUB_SPLITS.items():
            rows = next((dataset[name] for name in names if name in dataset), None)
            if rows is None or 'text' not in rows.column_names:
                columns = {name: part.column_names for name, part in dataset.items()}
                raise UserError(
                    f'config.data.source = {source!r}: expected train, validation and test '
                    f"with a column 'text', found {columns}"
                )
            count = getattr(rows, 'num_rows', 0)
            work = progress.Work(f'copying {split} of {source}', count, 'rows')
            with work, open(new / f'{split}.txt', 'w', encoding='utf-8', newline='') as stream:
                for batch in rows.iter(batch_size=1000):
                    stream.writelines(t if t.endswith('\n') else f'{t}\n' for t in batch['text'])
                    work.done += len(batch['text'])


def _make_wikitext(name: str, vocabulary: int, num_train_tokens: int) -> Source:
    hub = f'{HUB}Salesforce/wikitext/{name}-v1'
    return Source(
        functools.partial(_read_split_files, ('wiki', name), ('.tokens', '.txt', '.raw')),
        origin=f'https://huggingface.co/datasets/Salesforce/wikitext, or let config.data.source = '
        f'{hub!r} do it',
        hub=hub,
        num_tokens={'train': num_train_tokens, 'valid': 217_646, 'test': 245_569},
        vocabulary=vocabulary,
    )


CORPORA: dict[str, Source] = {
    'austen': Source(_read_austen, is_bundled=True),
    'austen-domains': Source(_read_austen_domains, is_bundled=True),
    'domains': Source(_read_domains),
    'wikitext-103': _make_wikitext('wikitext-103', 267_735, 103_227_021),
    'wikitext-2': _make_wikitext('wikitext-2', 33_278, 2_088_628),
    'ptb': Source(
        functools.partial(_read_split_files, ('ptb',), ('.txt',)),
        origin="Mikolov's simple-examples.tgz, http://www.fit.vutbr.cz/~imikolov/rnnlm/",
        num_tokens={'train': 929_589, 'valid': 73_760, 'test': 82_430},
        vocabulary=10_000,
    ),
    'enwik8': Source(
        functools.partial(_read_bytes, 'enwik8', 100_000_000, 'a1fa5ffddb56f4953e226637dabbb36a'),
        origin='http://mattmahoney.net/dc/enwik8.zip',
    ),
    'text8': Source(  # 27 symbols, which the md5 implies
        functools.partial(_read_bytes, 'text8', 100_000_000, '3bea1919949baf155f99411df5fada7e'),
        origin='http://mattmahoney.net/dc/text8.zip',
    ),
}

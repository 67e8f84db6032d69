"""Named corpora: standard benchmarks, text files and directories, and the Hugging Face hub."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from mi.config import suggest, suggest_install
from mi.lm.data.archives import (
    PACKED,
    find_first,
    is_data,
    name_os_errors,
    open_text,
    write_atomically,
)
from mi.lm.data.texts import (
    SPLITS,
    DataError,
    Text,
    Texts,
    check_texts,
    join_texts,
    split_at,
    split_by_lines,
)
from mi.registry import import_object, is_reference
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
    """A reader of a corpus, and the known properties of the corpus.

    Attributes:
      read: function (path, splits, cache) → texts of at least these splits.
      origin: where to download the corpus, or '' if unknown.
      is_bundled: whether the corpus is part of the package, so that it needs no path.
      hub: name of the corpus as a source on the Hugging Face hub, or '' if it is not there.
      num_tokens: split → number of tokens at the level 'token', including an <eos> for each line.
      vocabulary: number of distinct tokens in train, or 0 if unknown.
    """

    read: Callable[[pathlib.Path, Collection[str], pathlib.Path], Texts]
    origin: str = ''
    is_bundled: bool = False
    hub: str = ''
    num_tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vocabulary: int = 0

    def make_error(self, problem: str) -> DataError:
        """Return an error that states the problem and where to download the corpus."""
        return DataError(f'{problem}. Download it from {self.origin}' if self.origin else problem)


def find_source(source: str) -> Source:
    """Return the `Source` that reads a corpus.

    Args:
      source: a name in `CORPORA`, 'hub:OWNER/NAME', a text file or directory, or
        'package.module:corpus', which refers to a `Source` or to a function like `Source.read`.

    Raises:
      DataError: if 'package.module:corpus' cannot be imported.
    """
    if source in CORPORA:
        return CORPORA[source]
    if source.startswith(HUB):
        matches = (corpus for corpus in CORPORA.values() if corpus.hub == source)
        hub_source = next(matches, Source(_read_local))
        return dataclasses.replace(hub_source, read=functools.partial(_read_hub, source), origin='')
    return _import_source(source) if _is_reference(source) else Source(_read_local)


def _is_reference(source: str) -> bool:
    """Return whether a source has the form 'package.module:corpus', and is not on the hub."""
    return is_reference(source) and not source.startswith(HUB)


def _import_source(reference: str) -> Source:
    try:
        corpus = import_object(reference)
    except ValueError as error:
        raise DataError(f'`source` = {error}') from error
    return corpus if isinstance(corpus, Source) else Source(corpus, is_bundled=True)


def load_texts(source: str, path: str, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Load the texts of a corpus, and verify the known sizes and hashes of its files.

    Args:
      source: the corpus, see `find_source`.
      path: path of the files if `source` is a name in `CORPORA`, or '' for $MI_DATA/SOURCE.
      splits: the splits to read. Files of other splits may be missing.
      cache: directory for unpacked files and downloads from the hub.

    Raises:
      DataError: if a file is missing, or the files are ambiguous or not the expected ones.
    """
    # The path of the corpus.
    known_source = find_source(source)
    corpus_path = path if _is_reference(source) else path or source
    if _is_reference(source) and known_source.is_bundled:
        pass  # `path` is up to its function
    elif (source in CORPORA or _is_reference(source)) and not known_source.is_bundled:
        data_root = os.environ.get('MI_DATA', '')
        if not path and not data_root:
            raise known_source.make_error(
                f"`path` = '': expected the path of {source!r}. Try setting `path`, or setting "
                f'$MI_DATA to its parent directory'
            )
        corpus_path = path or os.path.join(data_root, source)
    elif path:
        raise DataError(
            f"`path` = {path!r}: expected '', because `source` = {source!r} already says where the "
            f"text is. Try `path` = ''"
        )

    # The texts.
    try:
        with name_os_errors(cache):
            texts = known_source.read(pathlib.Path(corpus_path).expanduser(), splits, cache)
    except DataError as error:
        raise known_source.make_error(str(error)) from error
    check_texts(source, texts, splits)
    return {split: texts[split] for split in SPLITS if split in splits}


def get_cache_directory(cache: str) -> pathlib.Path:
    """Return the cache directory, where '' means $MI_CACHE, or ~/.cache/mi if that is not set."""
    return pathlib.Path(cache or os.environ.get('MI_CACHE') or '~/.cache/mi').expanduser()


def load_austen() -> dict[str, list[tuple[str, bytes]]]:
    """Load six public-domain novels by Jane Austen.

    Northanger Abbey is the valid split, Persuasion the test split, and the other four novels are
    the train split.

    Returns:
      A dict from split to a list with one pair: the domain '' and the bytes of the text.
    """
    texts = load_texts('austen', '', SPLITS, get_cache_directory(''))
    contents = {
        split: b''.join(text.array().tobytes() for text in split_texts)
        for split, split_texts in texts.items()
    }
    return {split: [('', split_contents)] for split, split_contents in contents.items()}


def _read_austen(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    texts: Texts = {split: [] for split in SPLITS}
    for split, novel in _find_novels(cache):
        texts[split].append(dataclasses.replace(novel, domain=''))
    return texts


def _read_austen_domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    return join_texts([split_by_lines(novel) for _, novel in _find_novels(cache)])


def _find_novels(cache: pathlib.Path) -> list[tuple[str, Text]]:
    """Return the split and the text of each novel in alphabetical order."""
    file_text = open_text(pathlib.Path(__file__).parents[2] / 'data/austen.txt.xz', cache)
    byte_offset, titles = 0, []
    for line in file_text.array().tobytes().splitlines(keepends=True):
        novel_title = line.strip().decode()
        if novel_title in _AUSTEN:
            titles.append((byte_offset, novel_title))
        byte_offset += len(line)
    novel_ends = [start for start, _ in titles[1:]] + [byte_offset]
    return [
        (_AUSTEN[title], Text(file_text.file, start, end, file_text.origin, title.title()))
        for (start, title), end in zip(titles, novel_ends, strict=True)
    ]


def _read_local(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Read a text file, which is split by lines, or a directory with one file for each split."""
    if path.is_file():
        return split_by_lines(open_text(path, cache))
    if not path.is_dir():
        raise DataError(
            f'`source` = {str(path)!r}: no such file or directory, and not the name of a corpus; '
            f'{suggest(str(path), CORPORA)}, {HUB}OWNER/NAME'
        )

    # One file for each split.
    texts = {}
    split_of_file: dict[pathlib.Path, str] = {}
    files = sorted(file for file in path.iterdir() if is_data(file.name) and file.is_file())
    for split in splits:
        # A split as a word of the name wins over one as a part of a word.
        matches = [file for file in files if _has_split(file.name, split)]
        matches = matches or [file for file in files if split in file.name]
        if len(matches) != 1:
            file_names = ', '.join(file.name for file in matches) or 'none'
            raise DataError(
                f'{path}: expected one file with {split!r} in its name, but found {file_names}'
            )
        file = matches[0]
        if file in split_of_file:
            raise DataError(
                f'{file}: expected one split in the file name, but found both '
                f'{split_of_file[file]!r} and {split!r}. Try renaming the file'
            )
        split_of_file[file] = split
        texts[split] = [open_text(file, cache)]
    return texts


def _has_split(file_name: str, split: str) -> bool:
    """Return whether a file name contains a split as a word, as in 'my-test.txt'.

    A split inside a longer word does not count, as in 'latest.txt'.
    """
    return bool(re.search(rf'(?<![a-z]){_SPLIT_PATTERNS[split]}(?![a-z])', file_name.lower()))


def _read_domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """Read a directory in which every file or subdirectory is one domain. See `is_data`."""
    entries: dict[str, pathlib.Path] = {}
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        if not is_data(entry.name):
            continue
        unpacked_name = entry.with_suffix('') if entry.suffix in PACKED else entry
        domain = entry.name if entry.is_dir() else unpacked_name.stem
        if domain in entries:
            raise DataError(
                f'{path}: expected one file or directory for each domain, but '
                f'{entries[domain].name} and {entry.name} both have the domain {domain!r}'
            )
        entries[domain] = entry
    if not entries:
        raise DataError(
            f'{path}: expected a directory with a text file or subdirectory for each domain'
        )
    domain_texts = []
    for domain, entry in sorted(entries.items()):
        texts = _read_local(entry, splits, cache)
        domain_texts.append(
            {
                split: [dataclasses.replace(text, domain=domain) for text in texts[split]]
                for split in splits
            }
        )
    return join_texts(domain_texts)


def _read_split_files(
    stems: tuple[str, ...],
    endings: tuple[str, ...],
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """Read a directory with files STEM.SPLIT.ENDING, and use the first name that exists."""
    texts = {}
    for split in splits:
        files = [path / f'{stem}.{split}{ending}' for stem in stems for ending in endings]
        file_names = ' or '.join(file.name for file in files)
        texts[split] = [open_text(find_first(files, f'{path}: expected {file_names}'), cache)]
    return texts


def _read_bytes(
    name: str,
    size: int,
    md5: str,
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """Read a file of known size and hash, whose last tenth becomes valid and test."""
    file = path / name if path.is_dir() else path
    text = open_text(find_first([file], f'{file.parent}: expected {file.name}'), cache)
    if text.stop != size:
        raise DataError(f'{text.origin}: expected {size:,} bytes, but found {text.stop:,}')
    md5_of_text = hashlib.md5(text.array().data, usedforsecurity=False).hexdigest()
    if md5_of_text != md5:
        raise DataError(f'{text.origin}: expected the MD5 hash {md5}, but found {md5_of_text}')
    return split_at(text, [size * 90 // 100, size * 95 // 100])


def _read_hub(
    source: str, path: pathlib.Path, splits: Collection[str], cache: pathlib.Path
) -> Texts:
    """Read a dataset from the hub, which is downloaded to text files on first use."""
    name_parts = source.removeprefix(HUB).split('/')
    if len(name_parts) not in (2, 3) or not all(name_parts):
        raise DataError(
            f'`source` = {source!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG'
        )
    local_copy = cache / 'hub' / '--'.join(name_parts)
    if not local_copy.exists():
        _copy_dataset(source, _download_dataset(source, name_parts), local_copy)
    return _read_local(local_copy, splits, cache)


def _download_dataset(source: str, name_parts: list[str]) -> Any:
    """Download a dataset from the hub, and return its splits by their names on the hub."""
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f'`source` = {source!r}: expected the package datasets to be installed. Try '
            f'{suggest_install("hub")}'
        ) from error
    try:
        return datasets.load_dataset('/'.join(name_parts[:2]), *name_parts[2:])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = ' '.join(str(error).split())
        raise DataError(f'`source` = {source!r}: {reason}') from error


def _copy_dataset(source: str, dataset: Any, local_copy: pathlib.Path) -> None:
    """Write the column 'text' of every split to a text file, with one row per line."""
    with write_atomically(local_copy) as new_directory:
        new_directory.mkdir()
        for split, split_names in _HUB_SPLITS.items():
            hub_split = next((dataset[name] for name in split_names if name in dataset), None)
            if hub_split is None or 'text' not in hub_split.column_names:
                columns = {name: hub_split.column_names for name, hub_split in dataset.items()}
                raise DataError(
                    f'`source` = {source!r}: expected the splits train, validation and test, each '
                    f"with a column 'text', but found {columns}"
                )
            num_rows = getattr(hub_split, 'num_rows', 0)
            work = progress.Work(f'copying {split} of {source}', num_rows, 'rows')
            file = new_directory / f'{split}.txt'
            with work, open(file, 'w', encoding='utf-8', newline='') as stream:
                for batch in hub_split.iter(batch_size=1000):
                    texts = batch['text']
                    stream.writelines(
                        text if text.endswith('\n') else f'{text}\n' for text in texts
                    )
                    work.done += len(texts)


def _make_wikitext(name: str, vocabulary: int, num_train_tokens: int) -> Source:
    hub = f'{HUB}Salesforce/wikitext/{name}-v1'
    return Source(
        functools.partial(_read_split_files, ('wiki', name), ('.tokens', '.txt', '.raw')),
        origin=f'https://huggingface.co/datasets/Salesforce/wikitext, or try `source` = {hub!r}',
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

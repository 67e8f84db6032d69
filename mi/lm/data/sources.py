"""Names → texts: the corpora of the field, text files and directories, the Hugging Face hub.

A text is a span of a plain file. Packed files (.bz2, .gz, .xz, .zip) are unpacked once, into the
cache.
"""

import bz2
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import lzma
import os
import pathlib
import re
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import IO, cast

import numpy as np

from mi.config import UserError, suggest, suggest_install
from mi.training import progress

SPLITS = ('train', 'valid', 'test')
PACKED = ('.bz2', '.gz', '.xz', '.zip')
_MAGIC = {  # what a packed file begins with
    b'BZh': '.bz2',
    b'\x1f\x8b': '.gz',
    b'\xfd7zXZ\0': '.xz',
    b'PK\x03\x04': '.zip',
}
_NOT_TEXT = {  # what other files begin with
    b'\x28\xb5\x2f\xfd': 'compressed by zstd',
    b'7z\xbc\xaf\x27\x1c': 'a 7z archive',
    b'\x04\x22\x4d\x18': 'compressed by lz4',
    b'Rar!\x1a\x07': 'a rar archive',
    b'LZIP': 'compressed by lzip',
    b'\x1f\x9d': 'compressed by compress',
    b'\x5d\0\0\x80\0': 'compressed by lzma',
    b'%PDF-': 'a PDF',
    b'PAR1': 'a Parquet file',
    b'ARROW1': 'an Arrow file',
    b'\x93NUMPY': 'a NumPy file',
    b'\xff\xfe': 'UTF-16 text',
    b'\xfe\xff': 'UTF-16 text',
    b'\0\0\xfe\xff': 'UTF-32 text',
}
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'  # of UTF-8; no part of the text
_SPLIT_WORDS = {'train': 'train(ing)?', 'valid': 'valid(ation)?', 'test': 'test(ing)?'}
HUB = 'hub:'

_AUSTEN = {  # title line as it stands in the file → split
    'EMMA': 'train',
    'MANSFIELD PARK': 'train',
    'NORTHANGER ABBEY': 'valid',
    'Persuasion': 'test',
    'PRIDE AND PREJUDICE': 'train',
    'SENSE AND SENSIBILITY': 'train',
}
_HUB_SPLITS = {'train': ('train',), 'valid': ('validation', 'valid', 'dev'), 'test': ('test',)}


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes `start` to `stop` of a plain file.

    Attributes:
      file: the plain file.
      start, stop: in bytes.
      given: the file as the user has it, plain or packed, for messages.
      domain: its name; '' where the corpus has none.
    """

    file: pathlib.Path
    start: int
    stop: int
    given: pathlib.Path
    domain: str = ''

    def array(self) -> np.ndarray:
        """The bytes, uint8 [stop − start], memory-mapped."""
        if self.stop == self.start:
            return np.zeros(0, np.uint8)
        return np.memmap(self.file, np.uint8, 'r', self.start, (self.stop - self.start,))

    def pieces(self, size: int = 2**16) -> Iterator[str]:
        """The text in parts of up to `size` bytes, each the longest that ends with a line.

        In a line that is longer, a part ends before a space; a word that is longer stays whole.

        Raises:
          UserError: if it is not UTF-8.
        """
        array, at, reach = self.array(), 0, size
        while at < len(array):
            block = array[at : at + reach].tobytes()
            cut = len(block)
            if at + cut < len(array):
                cut = block.rfind(b'\n') + 1 or block.rfind(b' ', 1)
            if cut < 0:
                reach *= 2
                continue
            try:
                piece = block[:cut].decode()
            except UnicodeDecodeError as error:
                where = self.start + at + error.start
                raise UserError(f'{self.given} is not UTF-8 text (byte {where})') from error
            yield piece
            at, reach = at + cut, size


Texts = dict[str, list[Text]]  # split → its texts, one after another; one a domain, by name


@dataclasses.dataclass(frozen=True)
class Source:
    """How a corpus is read, and what is known of it.

    Attributes:
      read: (path, splits, cache) → texts of at least these splits.
      origin: where it can be had; '' if unknown.
      here: whether it comes with the package, so that it has no path.
      hub: its name as a source on the Hugging Face hub; '' if it is not there.
      tokens: split → words with an <eos> a line, the level 'token'.
      vocabulary: how many different ones train has; 0 if unknown.
    """

    read: Callable[[pathlib.Path, Collection[str], pathlib.Path], Texts]
    origin: str = ''
    here: bool = False
    hub: str = ''
    tokens: Mapping[str, int] = dataclasses.field(default_factory=dict)
    vocabulary: int = 0

    def refuse(self, what: str) -> UserError:
        """The error that says what is wrong with the files, and where right ones are."""
        return UserError(f'{what}; get it from {self.origin}' if self.origin else what)


def find(source: str) -> Source:
    """How to read a word of `CORPORA`, a name on the hub, or a text file or directory."""
    if source in CORPORA:
        return CORPORA[source]
    if source.startswith(HUB):
        known = next((s for s in CORPORA.values() if s.hub == source), Source(_local))
        return dataclasses.replace(known, read=functools.partial(_hub, source), origin='')
    return Source(_local)


def texts(source: str, path: str, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """The texts of a corpus; known sizes and hashes of whole files are checked.

    Args:
      source: see `find`.
      path: where the files of a word of `CORPORA` are; '' for $MI_DATA/SOURCE.
      splits: of `SPLITS`, those wanted; files of others may be missing.
      cache: where packed files, and what the hub has, are unpacked.

    Raises:
      UserError: which file is missing, ambiguous, or not what it should be, and where to get it.
    """
    known = find(source)
    place = path or source
    if source in CORPORA and not known.here:
        root = os.environ.get('MI_DATA', '')
        if not path and not root:
            raise known.refuse(
                f"config.data.path = '': expected the place of {source!r}, or its parent directory "
                f'in $MI_DATA'
            )
        place = path or os.path.join(root, source)
    elif path:
        raise UserError(
            f'config.data.path = {path!r}: the source {source!r} says already where it is; use '
            f"config.data.path = ''"
        )
    try:
        with os_errors_named(cache):
            found = known.read(pathlib.Path(place).expanduser(), splits, cache)
    except UserError as error:
        raise known.refuse(str(error)) from error
    return {split: found[split] for split in SPLITS if split in splits}


def cache_directory(cache: str) -> pathlib.Path:
    """The directory of that name; '' for $MI_CACHE or ~/.cache/mi."""
    return pathlib.Path(cache or os.environ.get('MI_CACHE') or '~/.cache/mi').expanduser()


@contextlib.contextmanager
def os_errors_named(cache: pathlib.Path) -> Iterator[None]:
    """Turn errors of the operating system into a UserError that names the file and the key.

    Args:
      cache: where token files and unpacked files are written.
    """
    try:
        yield
    except OSError as error:
        file = pathlib.Path(os.fsdecode(error.filename or cache))
        is_of_cache = file == cache or cache in file.parents or file in cache.parents
        key, hint = (
            ('config.data.cache', 'another directory')
            if is_of_cache
            else ('config.data.source', 'another file, or change who may read it')
        )
        reason = error.strerror or str(error)
        raise UserError(f'{file}: {reason}. Try {hint} for {key}') from error


@contextlib.contextmanager
def appearing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write a file or directory that is to appear at `path` when it is whole, or never."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=path.parent) as beside:
        new = pathlib.Path(beside) / path.name
        yield new
        try:
            new.rename(path)
        except OSError:
            if not path.exists():  # if it does, another process made the same meanwhile
                raise


def austen() -> dict[str, list[tuple[str, bytes]]]:
    """Six novels by Jane Austen, public domain: four to train, Northanger Abbey, Persuasion.

    Split → one pair of a domain, '', and the bytes of its text.
    """
    found = texts('austen', '', SPLITS, cache_directory(''))
    return {s: [('', b''.join(part.array().tobytes() for part in found[s]))] for s in SPLITS}


def _austen(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    found: Texts = {split: [] for split in SPLITS}
    for split, novel in _novels(cache):
        found[split].append(dataclasses.replace(novel, domain=''))
    return found


def _austen_domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    return _joined([_by_lines(novel) for _, novel in _novels(cache)])


def _novels(cache: pathlib.Path) -> list[tuple[str, Text]]:
    """Split and text of each, in the order of the file, which is that of their names."""
    whole = _whole(pathlib.Path(__file__).parents[2] / 'data/austen.txt.xz', cache)
    at, titles = 0, []
    for line in whole.array().tobytes().splitlines(keepends=True):
        title = line.strip().decode()
        if title in _AUSTEN:
            titles.append((at, title))
        at += len(line)
    ends = [start for start, _ in titles[1:]] + [at]
    return [
        (_AUSTEN[title], Text(whole.file, start, end, whole.given, title.title()))
        for (start, title), end in zip(titles, ends, strict=True)
    ]


def _local(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """A text file, split by lines, or a directory with a file for each split."""
    if path.is_file():
        return _by_lines(_whole(path, cache))
    if not path.is_dir():
        raise UserError(
            f'config.data.source = {str(path)!r}: no such file or directory, and no known corpus; '
            f'{suggest(str(path), CORPORA)}, {HUB}OWNER/NAME'
        )
    found = {}
    split_of: dict[pathlib.Path, str] = {}
    files = sorted(file for file in path.iterdir() if _is_data(file.name) and file.is_file())
    for split in splits:
        named = [file for file in files if _has_word(file.name, split)]
        named = named or [file for file in files if split in file.name]
        if len(named) != 1:
            names = ', '.join(file.name for file in named) or 'none'
            raise UserError(f'{path}: expected one file with {split!r} in its name, found {names}')
        file = named[0]
        if file in split_of:
            raise UserError(
                f'{file}: both {split_of[file]!r} and {split!r} are in its name, expected a file '
                f'for each. Try other names'
            )
        split_of[file] = split
        found[split] = [_whole(file, cache)]
    return found


def _is_data(name: str) -> bool:
    """Whether a file is not what editors, downloads and file managers leave beside data."""
    return not (
        name.startswith(('.', '#', '~'))
        or name.endswith(('~', '.bak', '.orig', '.swo', '.swp', '.tmp', '.part', '.crdownload'))
        or name in ('Thumbs.db', 'desktop.ini')
    )


def _has_word(name: str, split: str) -> bool:
    """Whether a name has that of a split as a word: 'my-test.txt' has, 'latest.txt' has not."""
    return bool(re.search(rf'(?<![a-z]){_SPLIT_WORDS[split]}(?![a-z])', name.lower()))


def _domains(path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """A directory in which every file or directory is a domain, but for hidden and backup files."""
    places: dict[str, pathlib.Path] = {}
    for place in sorted(path.iterdir()) if path.is_dir() else ():
        if not _is_data(place.name):
            continue
        name = place.name if place.is_dir() else _without(place, PACKED).stem
        if name in places:
            raise UserError(f'{path}: {places[name].name} and {place.name} are both domain {name}')
        places[name] = place
    if not places:
        raise UserError(f'{path}: expected a directory with a text file or directory for a domain')
    parts = []
    for name, place in sorted(places.items()):
        own = _local(place, splits, cache)
        parts.append({s: [dataclasses.replace(t, domain=name) for t in own[s]] for s in splits})
    return _joined(parts)


def _of_splits(
    stems: tuple[str, ...],
    endings: tuple[str, ...],
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """A directory with files STEM.SPLIT.ENDING; the first of these names that is there counts."""
    found = {}
    for split in splits:
        files = [path / f'{stem}.{split}{ending}' for stem in stems for ending in endings]
        names = ' or '.join(file.name for file in files)
        found[split] = [_whole(_first(files, f'{path}: expected {names}'), cache)]
    return found


def _of_bytes(
    name: str,
    size: int,
    md5: str,
    path: pathlib.Path,
    splits: Collection[str],
    cache: pathlib.Path,
) -> Texts:
    """A file, or a directory with it, of which the last tenth is valid and test."""
    file = path / name if path.is_dir() else path
    whole = _whole(_first([file], f'{file.parent}: expected {file.name}'), cache)
    if whole.stop != size:
        raise UserError(f'{whole.given}: {whole.stop:,} bytes, expected {size:,}')
    found = hashlib.md5(whole.array().data, usedforsecurity=False).hexdigest()
    if found != md5:
        raise UserError(f'{whole.given}: md5 {found}, expected {md5}')
    return _cut(whole, [size * 90 // 100, size * 95 // 100])


def _hub(source: str, path: pathlib.Path, splits: Collection[str], cache: pathlib.Path) -> Texts:
    """A dataset of the hub, copied to text files when it is first asked for."""
    words = source.removeprefix(HUB).split('/')
    if len(words) not in (2, 3) or not all(words):
        raise UserError(
            f'config.data.source = {source!r}: expected {HUB}OWNER/NAME or {HUB}OWNER/NAME/CONFIG'
        )
    copy = cache / 'hub' / '--'.join(words)
    if not copy.exists():
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f'config.data.source = {source!r} needs the package datasets, which is not '
                f'installed. Try {suggest_install("hub")}'
            ) from error
        try:
            rows = datasets.load_dataset('/'.join(words[:2]), *words[2:])
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = ' '.join(str(error).split())
            raise UserError(f'config.data.source = {source!r}: {reason}') from error
        with appearing(copy) as new:
            new.mkdir()
            for split, names in _HUB_SPLITS.items():
                found = next((rows[name] for name in names if name in rows), None)
                if found is None or 'text' not in found.column_names:
                    has = {name: of.column_names for name, of in rows.items()}
                    raise UserError(
                        f'config.data.source = {source!r}: expected train, validation and test '
                        f"with a column 'text', found {has}"
                    )
                count = getattr(found, 'num_rows', 0)
                work = progress.Work(f'copying {split} of {source}', count, 'rows')
                with work, open(new / f'{split}.txt', 'w', encoding='utf-8', newline='') as stream:
                    for batch in found.iter(batch_size=1000):
                        stream.writelines(
                            t if t.endswith('\n') else f'{t}\n' for t in batch['text']
                        )
                        work.done += len(batch['text'])
    return _local(copy, splits, cache)


def _whole(file: pathlib.Path, cache: pathlib.Path) -> Text:
    """All of a file, unpacked if it is packed.

    Raises:
      UserError: if it is damaged, or nothing that is text.
    """
    plain, packing = file, _packing(file)
    if packing:
        size = file.stat().st_size
        with open(file, 'rb') as stream, progress.Work(f'hashing {file}', size, 'MB', 1e6) as work:
            digest = hashlib.sha256()
            while block := stream.read(2**22):
                digest.update(block)
                work.done += len(block)
        plain = cache / 'unpacked' / f'{digest.hexdigest()[:16]}-{file.stem}'
        if not plain.exists():
            with appearing(plain) as new:
                _unpack(file, packing, new)
                new.chmod(0o444)  # found again by the hash of the packed file, not by its own
    with open(plain, 'rb') as stream:
        head = stream.read(512)
    _refuse_binary(file, head)
    start = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
    return Text(plain, start, plain.stat().st_size, file)


def _packing(file: pathlib.Path) -> str:
    """The entry of `PACKED` that a file is packed as, by its name or its first bytes, or ''."""
    if file.suffix in PACKED:
        return file.suffix
    with open(file, 'rb') as stream:
        head = stream.read(8)
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), '')


def _refuse_binary(file: pathlib.Path, head: bytes) -> None:
    """Refuse a file whose unpacked bytes begin as those of another format do."""
    kinds = _NOT_TEXT | {magic: f'packed as {packing}' for magic, packing in _MAGIC.items()}
    kind = next((kind for magic, kind in kinds.items() if head.startswith(magic)), '')
    if head[257:262] == b'ustar':
        kind = 'a tar archive'
    if kind:
        raise UserError(
            f'{file}: expected text in UTF-8, plain or packed once as {", ".join(PACKED)}, found '
            f'{kind}. Try unpacking or converting it'
        )


def _unpack(file: pathlib.Path, packing: str, to: pathlib.Path) -> None:
    """Write what a packed file holds."""
    size = file.stat().st_size
    try:
        with (
            open(file, 'rb') as raw,
            _opened(file, packing, raw) as packed,
            open(to, 'wb') as plain,
            progress.Work(f'unpacking {file}', size, 'MB', 1e6) as work,
        ):
            while block := packed.read(2**20):
                plain.write(block)
                work.done = raw.tell()
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise UserError(f'{file} is damaged: {error}') from error
    except NotImplementedError as error:  # of zipfile
        raise UserError(f'{file}: {error}. Try unpacking it') from error
    except OSError as error:  # the operating system's have a number, those of gzip and bz2 have not
        if error.errno is not None:
            raise
        raise UserError(f'{file} is damaged: {error}') from error


def _opened(
    file: pathlib.Path, packing: str, raw: IO[bytes]
) -> contextlib.AbstractContextManager[IO[bytes]]:
    """The unpacked bytes of a packed file that is open."""
    if packing == '.gz':
        return cast(IO[bytes], gzip.open(raw))
    if packing == '.xz':
        return cast(IO[bytes], lzma.open(raw))
    if packing == '.bz2':
        return cast(IO[bytes], bz2.open(raw))
    archive = zipfile.ZipFile(raw)
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and _is_data(pathlib.PurePath(member.filename).name)
    ]
    if len(members) != 1:
        names = ', '.join(member.filename for member in members) or 'none'
        raise UserError(f'{file}: expected one file in it, found {names}')
    if members[0].flag_bits & 1:
        raise UserError(f'{file}: expected a zip without password. Try unpacking it')
    return archive.open(members[0])


def _first(files: list[pathlib.Path], expected: str) -> pathlib.Path:
    """The first of the files that is there, plain or packed."""
    for file in files:
        for packed in ('', *PACKED):
            found = file.with_name(file.name + packed)
            if found.is_file():
                return found
    raise UserError(f'{expected} (or one of these as {", ".join(PACKED)}), found none')


def _without(file: pathlib.Path, endings: Collection[str]) -> pathlib.Path:
    return file.with_suffix('') if file.suffix in endings else file


def _by_lines(text: Text) -> Texts:
    """Nine tenths of the lines to train, a twentieth to valid, the rest to test.

    Of a text with too few lines for that, those parts of its bytes, cut after a word.
    """
    array, block = text.array(), 2**24
    ends = [np.flatnonzero(array[i : i + block] == 10) + i for i in range(0, len(array), block)]
    starts = np.concatenate([np.array([-1]), *ends]) + 1
    lines = len(starts) - (starts[-1] == len(array))
    cuts = [int(starts[int(lines * part)]) for part in (0.9, 0.95)]
    if not 1 < cuts[0] < cuts[1] - 1 < len(array) - 2:
        cuts = [_after_word(array, len(array) * part // 100) for part in (90, 95)]
    return _cut(text, cuts)


def _after_word(array: np.ndarray, at: int) -> int:
    """Where the white space ends that is next at or after a byte; a letter begins there at least.

    It is looked for in a fortieth of the text.
    """
    near = array[at : at + len(array) // 40]
    spaces = np.flatnonzero(np.isin(near, np.frombuffer(b'\t\n\r ', np.uint8)))
    if len(spaces):
        return at + int(spaces[0]) + 1
    while at < len(array) and array[at] & 0b1100_0000 == 0b1000_0000:  # within a letter of UTF-8
        at += 1
    return at


def _cut(text: Text, at: list[int]) -> Texts:
    """The three splits of a text, which end at these bytes of it."""
    edges = [text.start, *(text.start + byte for byte in at), text.stop]
    return {
        split: [dataclasses.replace(text, start=start, stop=stop)]
        for split, start, stop in zip(SPLITS, edges, edges[1:], strict=False)
    }


def _joined(parts: list[Texts]) -> Texts:
    return {split: [text for part in parts for text in part[split]] for split in parts[0]}


def _wikitext(name: str, vocabulary: int, train: int) -> Source:
    hub = f'{HUB}Salesforce/wikitext/{name}-v1'
    return Source(
        functools.partial(_of_splits, ('wiki', name), ('.tokens', '.txt', '.raw')),
        origin=f'https://huggingface.co/datasets/Salesforce/wikitext, or let config.data.source = '
        f'{hub!r} do it',
        hub=hub,
        tokens={'train': train, 'valid': 217_646, 'test': 245_569},
        vocabulary=vocabulary,
    )


CORPORA: dict[str, Source] = {
    'austen': Source(_austen, here=True),
    'austen-domains': Source(_austen_domains, here=True),
    'domains': Source(_domains),
    'wikitext-103': _wikitext('wikitext-103', 267_735, 103_227_021),
    'wikitext-2': _wikitext('wikitext-2', 33_278, 2_088_628),
    'ptb': Source(
        functools.partial(_of_splits, ('ptb',), ('.txt',)),
        origin="Mikolov's simple-examples.tgz, http://www.fit.vutbr.cz/~imikolov/rnnlm/",
        tokens={'train': 929_589, 'valid': 73_760, 'test': 82_430},
        vocabulary=10_000,
    ),
    'enwik8': Source(
        functools.partial(_of_bytes, 'enwik8', 100_000_000, 'a1fa5ffddb56f4953e226637dabbb36a'),
        origin='http://mattmahoney.net/dc/enwik8.zip',
    ),
    'text8': Source(  # of 27 symbols, which the md5 implies
        functools.partial(_of_bytes, 'text8', 100_000_000, '3bea1919949baf155f99411df5fada7e'),
        origin='http://mattmahoney.net/dc/text8.zip',
    ),
}

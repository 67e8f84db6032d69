"""Plain and packed text files: packed ones are unpacked once, into the cache."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import pathlib
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from typing import IO, cast

from mi.config import UserError
from mi.lm.data.texts import Text
from mi.training import progress

PACKED = ('.bz2', '.gz', '.xz', '.zip')
_MAGIC = {  # first bytes of a packed file → its ending
    b'BZh': '.bz2',
    b'\x1f\x8b': '.gz',
    b'\xfd7zXZ\0': '.xz',
    b'PK\x03\x04': '.zip',
}
_NOT_TEXT = {  # first bytes of a file that is not text → its format
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
_BYTE_ORDER_MARK = b'\xef\xbb\xbf'  # UTF-8's; not part of the text


def open_text(file: pathlib.Path, cache: pathlib.Path) -> Text:
    """Return the text of a file, which is unpacked into the cache if it is packed.

    Raises:
      UserError: if the file is damaged or is not text.
    """
    plain, packing = file, _detect_packing(file)
    if packing:
        digest = _hash_file(file)
        plain = cache / 'unpacked' / f'{digest[:16]}-{file.stem}'
        if not plain.exists():
            with write_atomically(plain) as new:
                _unpack(file, packing, new)
                # Later runs find it by the hash of the packed file, and do not hash it again.
                new.chmod(0o444)
    with open(plain, 'rb') as stream:
        head = stream.read(512)
    _refuse_binary(file, head)
    start = len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0
    return Text(plain, start, plain.stat().st_size, file)


def find_first(files: list[pathlib.Path], expected: str) -> pathlib.Path:
    """Return the first of the files that exists, plain or packed.

    Args:
      files: plain names, in order of preference.
      expected: start of the error message, up to the names.

    Raises:
      UserError: if none exists.
    """
    for file in files:
        for ending in ('', *PACKED):
            candidate = file.with_name(file.name + ending)
            if candidate.is_file():
                return candidate
    raise UserError(f'{expected} (or one of these as {", ".join(PACKED)}), found none')


def is_data(name: str) -> bool:
    """Return whether a file name is not one of those that editors and downloads leave behind."""
    return not (
        name.startswith(('.', '#', '~'))
        or name.endswith(('~', '.bak', '.orig', '.swo', '.swp', '.tmp', '.part', '.crdownload'))
        or name in ('Thumbs.db', 'desktop.ini')
    )


@contextlib.contextmanager
def write_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a place to write a file or directory, which is moved to `path` when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=path.parent) as directory:
        new = pathlib.Path(directory) / path.name
        yield new
        try:
            new.rename(path)
        except OSError:
            if not path.exists():  # otherwise another process has made the same
                raise


@contextlib.contextmanager
def name_os_errors(cache: pathlib.Path) -> Iterator[None]:
    """Turn errors of the operating system into a UserError that names the file and the key.

    Args:
      cache: directory of token files and unpacked files.
    """
    try:
        yield
    except OSError as error:
        file = pathlib.Path(os.fsdecode(error.filename or cache))
        is_in_cache = file == cache or cache in file.parents or file in cache.parents
        key, hint = (
            ('config.data.cache', 'another directory')
            if is_in_cache
            else ('config.data.source', 'another file, or change who may read it')
        )
        reason = error.strerror or str(error)
        raise UserError(f'{file}: {reason}. Try {hint} for {key}') from error


def _hash_file(file: pathlib.Path) -> str:
    digest, size = hashlib.sha256(), file.stat().st_size
    with open(file, 'rb') as stream, progress.Work(f'hashing {file}', size, 'MB', 1e6) as work:
        while block := stream.read(2**22):
            digest.update(block)
            work.done += len(block)
    return digest.hexdigest()


def _detect_packing(file: pathlib.Path) -> str:
    """Return the entry of `PACKED` that a file's name or first bytes indicate; '' for none."""
    if file.suffix in PACKED:
        return file.suffix
    with open(file, 'rb') as stream:
        head = stream.read(8)
    return next((packing for magic, packing in _MAGIC.items() if head.startswith(magic)), '')


def _refuse_binary(file: pathlib.Path, head: bytes) -> None:
    """Raise UserError if unpacked bytes start like those of another format than text."""
    formats = _NOT_TEXT | {magic: f'packed as {packing}' for magic, packing in _MAGIC.items()}
    kind = next((kind for magic, kind in formats.items() if head.startswith(magic)), '')
    if head[257:262] == b'ustar':
        kind = 'a tar archive'
    if kind:
        raise UserError(
            f'{file}: expected text in UTF-8, plain or packed once as {", ".join(PACKED)}, found '
            f'{kind}. Try unpacking or converting it'
        )


def _unpack(file: pathlib.Path, packing: str, target: pathlib.Path) -> None:
    """Write the contents of a packed file to the target."""
    size = file.stat().st_size
    try:
        with (
            open(file, 'rb') as raw,
            _open_packed(file, packing, raw) as packed,
            open(target, 'wb') as plain,
            progress.Work(f'unpacking {file}', size, 'MB', 1e6) as work,
        ):
            while block := packed.read(2**20):
                plain.write(block)
                work.done = raw.tell()
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise UserError(f'{file} is damaged: {error}') from error
    except NotImplementedError as error:  # from zipfile
        raise UserError(f'{file}: {error}. Try unpacking it') from error
    except OSError as error:
        if error.errno is not None:  # from the operating system; those of gzip and bz2 have none
            raise
        raise UserError(f'{file} is damaged: {error}') from error


def _open_packed(
    file: pathlib.Path, packing: str, raw: IO[bytes]
) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Return the unpacked bytes of an open packed file."""
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
        if not member.is_dir() and is_data(pathlib.PurePath(member.filename).name)
    ]
    if len(members) != 1:
        names = ', '.join(member.filename for member in members) or 'none'
        raise UserError(f'{file}: expected one file in it, found {names}')
    if members[0].flag_bits & 1:
        raise UserError(f'{file}: expected a zip without password. Try unpacking it')
    return archive.open(members[0])

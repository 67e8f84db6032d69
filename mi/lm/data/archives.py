"""Plain text files, and compressed ones that are unpacked once into the cache."""

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

from mi.lm.data.texts import DataError, Text
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
    """Return the text of a file, after unpacking it into the cache if it is compressed.

    Raises:
      DataError: if the file is damaged or is not text.
    """
    plain_file, packing = file, _detect_packing(file)
    if packing:
        packed_sha256 = _hash_file(file)
        plain_file = cache / 'unpacked' / f'{packed_sha256[:16]}-{file.stem}'
        if not plain_file.exists():
            with write_atomically(plain_file) as unpacked_file:
                _unpack(file, packing, unpacked_file)
                # Later runs find it by the hash of the packed file, and do not hash it again.
                unpacked_file.chmod(0o444)
    with open(plain_file, 'rb') as stream:
        first_bytes = stream.read(512)
    _refuse_binary(file, first_bytes)
    text_start = len(_BYTE_ORDER_MARK) if first_bytes.startswith(_BYTE_ORDER_MARK) else 0
    return Text(plain_file, text_start, plain_file.stat().st_size, file)


def find_first(files: list[pathlib.Path], expected: str) -> pathlib.Path:
    """Return the first of the files that exists, plain or compressed.

    Args:
      files: files without a compression suffix, in order of preference.
      expected: beginning of the error message, which states the expected files.

    Raises:
      DataError: if none of the files exists.
    """
    for file in files:
        for packed_suffix in ('', *PACKED):
            candidate = file.with_name(file.name + packed_suffix)
            if candidate.is_file():
                return candidate
    raise DataError(f'{expected}, plain or compressed ({", ".join(PACKED)}), but found none')


def is_data(name: str) -> bool:
    """Return whether a file is data, judged by its name, and not hidden, a backup or temporary."""
    return not (
        name.startswith(('.', '#', '~'))
        or name.endswith(('~', '.bak', '.orig', '.swo', '.swp', '.tmp', '.part', '.crdownload'))
        or name in ('Thumbs.db', 'desktop.ini')
    )


@contextlib.contextmanager
def write_atomically(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a temporary path for a file or directory, and move it to `path` when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix='.building-', dir=path.parent) as directory:
        new_path = pathlib.Path(directory) / path.name
        yield new_path
        try:
            new_path.rename(path)
        except OSError:
            if not path.exists():  # otherwise another process has made the same
                raise


@contextlib.contextmanager
def name_os_errors(cache: pathlib.Path) -> Iterator[None]:
    """Convert an OSError in the context into a DataError that names the file.

    Args:
      cache: directory for token files and unpacked files.
    """
    try:
        yield
    except OSError as error:
        file = pathlib.Path(os.fsdecode(error.filename or cache))
        is_in_cache = file == cache or cache in file.parents or file in cache.parents
        hint = 'another file for `source`, or change its permissions'
        if is_in_cache:
            hint = 'another directory for `cache`'
        reason = error.strerror or str(error)
        raise DataError(f'{file}: {reason}. Try {hint}') from error


def _hash_file(file: pathlib.Path) -> str:
    digest, num_bytes = hashlib.sha256(), file.stat().st_size
    with open(file, 'rb') as stream, progress.Work(f'hashing {file}', num_bytes, 'MB', 1e6) as work:
        while block := stream.read(2**22):
            digest.update(block)
            work.done += len(block)
    return digest.hexdigest()


def _detect_packing(file: pathlib.Path) -> str:
    """Detect a file's compression by its name or first bytes and return a PACKED suffix or ''."""
    if file.suffix in PACKED:
        return file.suffix
    with open(file, 'rb') as stream:
        first_bytes = stream.read(8)
    return next((packing for magic, packing in _MAGIC.items() if first_bytes.startswith(magic)), '')


def _refuse_binary(file: pathlib.Path, first_bytes: bytes) -> None:
    """Raise DataError if the first bytes of an unpacked file belong to a non-text format."""
    format_names = _NOT_TEXT | {
        magic: f'compressed as {packing}' for magic, packing in _MAGIC.items()
    }
    matches = (name for magic, name in format_names.items() if first_bytes.startswith(magic))
    format_name = next(matches, '')
    if first_bytes[257:262] == b'ustar':
        format_name = 'a tar archive'
    if format_name:
        raise DataError(
            f'{file}: expected UTF-8 text, plain or compressed once ({", ".join(PACKED)}), but '
            f'found {format_name}. Try unpacking or converting the file'
        )


def _unpack(file: pathlib.Path, packing: str, target: pathlib.Path) -> None:
    """Unpack a compressed file into the target file."""
    packed_size = file.stat().st_size
    try:
        with (
            open(file, 'rb') as packed_stream,
            _open_packed(file, packing, packed_stream) as unpacked_stream,
            open(target, 'wb') as target_stream,
            progress.Work(f'unpacking {file}', packed_size, 'MB', 1e6) as work,
        ):
            while block := unpacked_stream.read(2**20):
                target_stream.write(block)
                work.done = packed_stream.tell()
    except (EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f'{file} is damaged: {error}') from error
    except NotImplementedError as error:  # from zipfile
        raise DataError(f'{file}: {error}. Try unpacking the file yourself') from error
    except OSError as error:
        if error.errno is not None:  # from the operating system; those of gzip and bz2 have none
            raise
        raise DataError(f'{file} is damaged: {error}') from error


def _open_packed(
    file: pathlib.Path, packing: str, packed_stream: IO[bytes]
) -> contextlib.AbstractContextManager[IO[bytes]]:
    """Return a stream of the unpacked bytes in an open compressed file."""
    if packing == '.gz':
        return cast(IO[bytes], gzip.open(packed_stream))
    if packing == '.xz':
        return cast(IO[bytes], lzma.open(packed_stream))
    if packing == '.bz2':
        return cast(IO[bytes], bz2.open(packed_stream))
    archive = zipfile.ZipFile(packed_stream)
    members = [
        member
        for member in archive.infolist()
        if not member.is_dir() and is_data(pathlib.PurePath(member.filename).name)
    ]
    if len(members) != 1:
        member_names = ', '.join(member.filename for member in members) or 'none'
        raise DataError(f'{file}: expected an archive of one file, but found {member_names}')
    if members[0].flag_bits & 1:
        raise DataError(
            f'{file}: expected a zip file without a password. Try unpacking it yourself'
        )
    return archive.open(members[0])

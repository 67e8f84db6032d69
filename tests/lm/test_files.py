"""Files that are not what was expected: one line that says so, or read as what they are."""

import bz2
import dataclasses
import errno
import functools
import gzip
import hashlib
import lzma
import os
import zipfile

import numpy as np
import pytest

from mi.lm.data import archives, sources, token_store
from mi.lm.data.texts import DataError
from mi.lm.data.token_store import Recipe
from mi.training import progress

LINES = ''.join(f'the line {i}\n' for i in range(40))


def load(source, cache, level='byte'):
    return token_store.load(Recipe(str(source), level, 300), str(cache))


def refusal(source, cache, level='byte'):
    with pytest.raises(DataError) as error:
        load(source, cache, level)
    assert '\n' not in str(error.value)
    return str(error.value)


def joined(corpus):
    return b''.join(bytes(corpus.tokens[split]) for split in sources.SPLITS)


@pytest.mark.parametrize(
    'text',
    [
        'abcdefg hij ' * 9_999,  # on one line
        'one two\r' * 9_999,  # of an old Mac
        ('a b c ' * 5_000 + '\n') * 3,
        'ä' * 5_000,  # no white space at all
        '\n' + 'some words here ' * 50 + '\nlast',
    ],
)
def test_a_text_with_few_lines_is_cut_at_words_and_letters(text, tmp_path):
    (tmp_path / 'text').write_bytes(text.encode())
    corpus = load(tmp_path / 'text', tmp_path / 'cache')
    assert joined(corpus) == text.encode()
    sizes = {split: len(ids) / len(text.encode()) for split, ids in corpus.tokens.items()}
    assert sizes == pytest.approx({'train': 0.9, 'valid': 0.05, 'test': 0.05}, abs=0.03)
    for split in sources.SPLITS:
        part = bytes(corpus.tokens[split]).decode()  # a letter is never cut
        assert split == 'test' or part[-1].isspace() or 'ä' in part


def test_a_text_that_is_too_short_says_what_to_do(tmp_path):
    (tmp_path / 'text').write_text('ab\ncd')
    message = refusal(tmp_path / 'text', tmp_path / 'cache')
    assert (
        'text has fewer than two tokens' in message
        and 'a directory with a file for each split' in message
    )


def test_a_text_without_a_split_is_refused_before_the_vocabulary_is_made(tmp_path, monkeypatch):
    for split in sources.SPLITS:
        (tmp_path / f'{split}.txt').write_text(LINES if split != 'test' else '')
    monkeypatch.setattr(token_store, 'fit_tokenizer', None)
    assert 'test.txt: the test text has fewer than two tokens' in refusal(
        tmp_path, tmp_path / 'cache', 'bpe'
    )


@pytest.mark.parametrize('pack', [bz2.compress, gzip.compress, lzma.compress])
@pytest.mark.parametrize('name', ['text.bz2', 'text.gz', 'text.xz', 'text.txt'])
def test_a_packed_file_is_unpacked_by_its_name_or_its_first_bytes(name, pack, tmp_path):
    (tmp_path / name).write_bytes(pack(LINES.encode()))
    suits = {'text.bz2': bz2.compress, 'text.gz': gzip.compress, 'text.xz': lzma.compress}
    if suits.get(name, pack) is pack:
        assert joined(load(tmp_path / name, tmp_path / 'cache')) == LINES.encode()
    else:
        assert f'{name} is damaged: ' in refusal(tmp_path / name, tmp_path / 'cache')
        assert not list((tmp_path / 'cache').rglob('*text*'))


@pytest.mark.parametrize(
    'name, head, kind',
    [
        ('a.zst', b'\x28\xb5\x2f\xfd', 'zstd'),
        ('a.7z', b'7z\xbc\xaf\x27\x1c', '7z'),
        ('a.txt', b'\x04\x22\x4d\x18', 'lz4'),
        ('a.rar', b'Rar!\x1a\x07\x01', 'rar'),
        ('a.tar', b'a'.ljust(257, b'\0') + b'ustar\x0000', 'tar archive'),
        ('a.tgz', gzip.compress(b'a'.ljust(257, b'\0') + b'ustar  ', mtime=0), 'tar archive'),
        ('a.gz.gz', gzip.compress(gzip.compress(LINES.encode()), mtime=0), 'compressed as .gz'),
        ('a.parquet', b'PAR1', 'Parquet'),
        ('a.pdf', b'%PDF-1.7', 'PDF'),
        ('a.txt', 'text'.encode('utf-16'), 'UTF-16'),
        ('a.txt', b'\xfe\xff' + 'text'.encode('utf-16-be'), 'UTF-16'),
    ],
)
def test_other_formats_are_not_read_as_bytes(name, head, kind, tmp_path):
    packed = name.endswith(('.tgz', '.gz'))
    (tmp_path / name).write_bytes(head if packed else head.ljust(2_000, b'x\n'[:1]))
    message = refusal(tmp_path / name, tmp_path / 'cache')
    assert message.startswith(f'{tmp_path / name}: expected UTF-8 text') and kind in message


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / 'text').write_bytes(LINES.encode('utf-8-sig'))
    assert joined(load(tmp_path / 'text', tmp_path / 'cache')) == LINES.encode()


def zipped(file, members):
    with zipfile.ZipFile(file, 'w') as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return file


def test_a_zip_is_read_without_what_systems_put_into_it(tmp_path):
    members = {'d/': '', 'd/a.txt': LINES, '__MACOSX/d/._a.txt': 'x', 'd/.DS_Store': 'x'}
    file = zipped(tmp_path / 'a.zip', members)
    assert joined(load(file, tmp_path / 'cache')) == LINES.encode()


def test_zips_that_cannot_be_unpacked_are_refused(tmp_path):
    file = zipped(tmp_path / 'a.zip', {'a.txt': LINES})
    whole = bytearray(file.read_bytes())
    for where in (6, whole.rindex(b'PK\x01\x02') + 8):  # the flag 'encrypted', in both headers
        whole[where] |= 1
    file.write_bytes(whole)
    assert 'a.zip: expected a zip file without a password' in refusal(file, tmp_path / 'cache')
    for where in (6, whole.rindex(b'PK\x01\x02') + 8):
        whole[where] &= 0xFE
    for where in (8, whole.rindex(b'PK\x01\x02') + 10):  # the method: one that Python has not
        whole[where] = 9
    file.write_bytes(whole)
    assert 'a.zip: That compression method is not supported' in refusal(file, tmp_path / 'cache')


def directory(path, names):
    path.mkdir()
    for name in names:
        (path / name).write_text(LINES)
    return path


def test_backup_files_are_not_data(tmp_path):
    names = [f'{split}.txt' for split in sources.SPLITS]
    beside = ['train.txt~', '.train.txt.swp', '#valid.txt#', 'test.txt.bak', '.DS_Store',
              '._test.txt', 'test.txt.part', 'valid.txt.orig']  # fmt: skip
    corpus = load(directory(tmp_path / 'texts', names + beside), tmp_path / 'cache')
    assert joined(corpus) == LINES.encode() * 3
    domains = directory(tmp_path / 'domains', ['a.txt', 'a.txt~', 'b.txt', '#b.txt#', '.DS_Store'])
    corpus = token_store.load(
        Recipe('domains', 'byte', 256), str(tmp_path / 'cache'), path=str(domains)
    )
    assert corpus.domains == ('a', 'b')


def test_a_file_of_two_splits_is_refused_and_words_go_before_parts_of_words(tmp_path):
    both = directory(tmp_path / 'both', ['train-test.txt', 'valid.txt'])
    message = refusal(both, tmp_path / 'cache')
    assert (
        "train-test.txt: expected one split in the file name, but found both 'train' and 'test'"
        in message
    )
    names = ['train.txt', 'constrained.txt', 'my_validation.txt', 'invalid.txt', 'latest.txt',
             'Test.txt']  # fmt: skip
    found = sources.load_texts(
        str(directory(tmp_path / 'words', names)), '', sources.SPLITS, tmp_path
    )
    read = {split: texts[0].origin.name for split, texts in found.items()}
    assert read == {'train': 'train.txt', 'valid': 'my_validation.txt', 'test': 'Test.txt'}


def test_errors_of_the_system_name_the_file_and_the_argument(tmp_path, monkeypatch):
    (tmp_path / 'text').write_text(LINES)
    (tmp_path / 'file').write_text('')
    for cache in (tmp_path / 'file', tmp_path / 'file' / 'below'):
        message = refusal(tmp_path / 'text', cache, 'bpe')
        assert message.startswith(f'{tmp_path}/file') and 'for `cache`' in message
    message = refusal(tmp_path / ('long' * 100), tmp_path / 'cache')
    assert 'File name too long' in message and 'for `source`' in message

    def refuse(file, *rest):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))

    with monkeypatch.context() as patched:
        patched.setattr(np, 'memmap', refuse)
        message = refusal(tmp_path / 'text', tmp_path / 'cache')
        assert message.startswith(f'{tmp_path}/text: Permission denied. Try another file')

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / 'text.gz').write_bytes(gzip.compress(LINES.encode()))
    monkeypatch.setattr(archives, '_unpack', full)
    message = refusal(tmp_path / 'text.gz', tmp_path / 'cache')
    assert message.startswith(f'{tmp_path}/cache: No space left on device. Try another directory')


@pytest.mark.parametrize('name, text', [('meta.json', '{}'), ('tokenizer.json', '{"a')])
def test_token_files_that_lack_something_are_damaged(name, text, tmp_path):
    (tmp_path / 'text').write_text(LINES)
    load(tmp_path / 'text', tmp_path / 'cache', 'bpe')
    [file] = (tmp_path / 'cache').rglob(name)
    file.write_text(text)
    assert 'are damaged. Delete that directory' in refusal(
        tmp_path / 'text', tmp_path / 'cache', 'bpe'
    )


def test_long_work_on_a_text_is_reported(tmp_path, monkeypatch):
    reported = []

    class Recorded(progress.Work):
        def __exit__(self, *exception):
            reported.append((self._name, self.done / self._total))
            super().__exit__(*exception)

    monkeypatch.setattr(progress, 'Work', Recorded)
    (tmp_path / 'text.gz').write_bytes(gzip.compress(LINES.encode()))
    load(tmp_path / 'text.gz', tmp_path / 'cache', 'token')
    file = tmp_path / 'text.gz'
    assert reported[:4] == [
        (f'hashing {file}', 1.0),
        (f'unpacking {file}', 1.0),
        ('hashing the text', 1.0),
        ('making the vocabulary of train', 1.0),
    ]
    encoded = dict(reported[4:])
    assert {name for name in encoded if 'tokenizing' in name} == {
        f'tokenizing {split}' for split in sources.SPLITS
    }


def test_the_bytes_of_enwik8_are_split_at_90_and_95_percent(tmp_path, monkeypatch):

    text = bytes(range(250)) * 4
    (tmp_path / 'enwik8').write_bytes(text)
    md5 = hashlib.md5(text, usedforsecurity=False).hexdigest()
    read = functools.partial(sources._read_bytes, 'enwik8', 1_000, md5)
    known = dataclasses.replace(sources.CORPORA['enwik8'], read=read)
    monkeypatch.setitem(sources.CORPORA, 'enwik8', known)
    found = token_store.load(
        Recipe('enwik8', 'byte', 256), str(tmp_path), path=str(tmp_path / 'enwik8')
    )
    parts = [bytes(found.tokens[split]) for split in sources.SPLITS]
    assert parts == [text[:900], text[900:950], text[950:]]


def test_other_counts_of_a_known_corpus_make_its_tokens_again(tmp_path, monkeypatch):

    for split in sources.SPLITS:
        (tmp_path / f'ptb.{split}.txt').write_text('a <unk> N \n b \n')
    known = sources.CORPORA['ptb']

    def load_with(count):
        counts = dict.fromkeys(sources.SPLITS, count)
        entry = dataclasses.replace(known, num_tokens=counts, vocabulary=0)
        monkeypatch.setitem(sources.CORPORA, 'ptb', entry)
        return token_store.load(
            Recipe('ptb', 'token', 100), str(tmp_path / 'cache'), path=str(tmp_path)
        )

    assert len(load_with(6).tokens['train']) == 6
    with pytest.raises(DataError, match='expected 7 tokens including <eos>, but found 6'):
        load_with(7)

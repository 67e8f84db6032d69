"""The real files are read where they are: in $MI_TEST_DATA, or ../shared/data."""

import dataclasses
import gzip
import hashlib
import itertools
import lzma
import os
import pathlib
import re
import shutil
import sys
import types
import zipfile

import numpy as np
import pytest

from mi.config import suggest_install
from mi.lm.data import sources, streams, token_store
from mi.lm.data.texts import DataError
from mi.lm.data.token_store import Recipe
from tests.conftest import ROOT

REAL = pathlib.Path(os.environ.get('MI_TEST_DATA', ROOT / '../shared/data'))
HELD_OUT = ('valid', 'test')
WIKITEXT_2 = 'hub:Salesforce/wikitext/wikitext-2-v1'


def real(name):
    if not (REAL / name).exists():
        pytest.skip(f'{REAL / name} is not there; set MI_TEST_DATA')
    return REAL / name


def write_splits(directory, name, text='a b\n'):
    directory.mkdir(exist_ok=True)
    for split in sources.SPLITS:
        (directory / name.format(split)).write_text(text)
    return str(directory)


def read(source, path='', splits=sources.SPLITS, cache=pathlib.Path('/nonexistent')):
    found = sources.load_texts(source, str(path), splits, cache)
    return {s: [bytes(text.array()).decode() for text in texts] for s, texts in found.items()}


@pytest.mark.parametrize('source', ['wikitext-2', 'wikitext-103'])
def test_the_real_evaluation_texts_of_wikitext_have_the_known_tokens(source, tmp_path, cache):
    for split in HELD_OUT:
        name = f'wikitext-2.{split}.txt.gz'
        shutil.copy(
            real(name), tmp_path / (name if source == 'wikitext-2' else f'wiki.{name[11:]}')
        )
    recipe = Recipe(source, 'token', 50_000, splits=HELD_OUT, fit=HELD_OUT)
    corpus = token_store.load(recipe, cache, path=str(tmp_path))
    assert {s: len(ids) for s, ids in corpus.tokens.items()} == {'valid': 217_646, 'test': 245_569}
    vocabulary = corpus.tokenizer.get_vocab()
    for split, ids in corpus.tokens.items():
        text = gzip.decompress(real(f'wikitext-2.{split}.txt.gz').read_bytes()).decode()
        words = [w for line in text.splitlines() for w in [*line.split(), '<eos>']]
        np.testing.assert_array_equal(ids, [vocabulary[word] for word in words])
        assert corpus.num_bytes[split] == len(text.encode())
    assert corpus.lossless


def test_a_wikitext_that_is_cut_or_has_no_train_is_refused(tmp_path, cache):
    text = gzip.decompress(real('wikitext-2.valid.txt.gz').read_bytes())
    (tmp_path / 'wiki.valid.tokens').write_bytes(text[:-4])  # two lines less
    held_out = {'splits': ('valid',), 'fit': ('valid',)}
    path = str(tmp_path)
    with pytest.raises(DataError) as error:
        token_store.load(Recipe('wikitext-2', 'token', 50_000, **held_out), cache, path=path)
    assert str(error.value).startswith(
        f'{tmp_path}/wiki.valid.tokens: expected 217,646 tokens including <eos>, but found '
        '217,644. Download it from '
        f'https://huggingface.co/datasets/Salesforce/wikitext'
    )
    assert '\n' not in str(error.value)
    with pytest.raises(DataError, match=r'expected wiki\.train\.tokens .* found none\. Download'):
        fits_train = Recipe('wikitext-2', 'token', 50_000, splits=('valid',))
        token_store.load(fits_train, cache, path=path)
    as_bytes = token_store.load(Recipe('wikitext-2', 'byte', 256, **held_out), cache, path=path)
    assert len(as_bytes.tokens['valid']) > 1e6


def test_enwik8_packed_and_plain(tmp_path):
    packed = token_store.load(
        Recipe('enwik8', 'byte', 256), str(tmp_path), path=str(real('enwik8.gz'))
    )
    sizes = {'train': 90_000_000, 'valid': 5_000_000, 'test': 5_000_000}
    assert {s: len(ids) for s, ids in packed.tokens.items()} == packed.num_bytes == sizes
    assert bytes(packed.tokens['train'][:10]) == b'<mediawiki'
    md5 = hashlib.md5(usedforsecurity=False)
    for tokens in packed.tokens.values():
        md5.update(tokens.data)
    assert md5.hexdigest() == 'a1fa5ffddb56f4953e226637dabbb36a'

    (tmp_path / 'enwik8').hardlink_to(packed.tokens['train'].filename)
    options = {'path': str(tmp_path), 'train_tokens': 9_000_000}
    plain = token_store.load(Recipe('enwik8', 'byte', 256), str(tmp_path / 'none'), **options)
    np.testing.assert_array_equal(plain.tokens['train'], packed.tokens['train'][:9_000_000])
    assert plain.tokens['test'].filename == tmp_path / 'enwik8'
    assert not (tmp_path / 'none').exists()
    assert len(plain.tokens['train']) == plain.num_bytes['train'] == 9_000_000


@pytest.mark.parametrize('source', ['enwik8', 'text8'])
def test_bytes_that_are_not_those_of_the_corpus_are_refused(source, tmp_path):
    (tmp_path / source).write_bytes(b'<mediawiki')
    with pytest.raises(DataError) as error:
        read(source, tmp_path)
    assert str(error.value) == (
        f'{tmp_path}/{source}: expected 100,000,000 bytes, but found 10. Download it from '
        f'http://mattmahoney.net/dc/{source}.zip'
    )
    os.truncate(tmp_path / source, 100_000_000)
    with pytest.raises(DataError, match=f'{source}: expected the MD5 hash .*/{source}.zip'):
        read(source, tmp_path)


def test_the_counts_of_ptb_are_those_of_its_words(tmp_path, cache, monkeypatch):
    path = write_splits(tmp_path, 'ptb.{}.txt', ' a <unk> N \n b \n')
    with pytest.raises(DataError, match=r'expected 929,589 tokens .*, but found 6\. Download'):
        token_store.load(Recipe('ptb', 'token', 100), cache, path=path)
    known = dataclasses.replace(sources.CORPORA['ptb'], num_tokens=dict.fromkeys(sources.SPLITS, 6))
    monkeypatch.setitem(sources.CORPORA, 'ptb', known)
    with pytest.raises(DataError, match=r'txt: expected 10,000 .*, but found 5\. Download'):
        token_store.load(Recipe('ptb', 'token', 10_000), cache, path=path)
    assert (
        token_store.load(Recipe('ptb', 'token', 100), cache, path=path).vocabulary == 5
    )  # cut: its counts differ from the known ones
    known = dataclasses.replace(known, vocabulary=5)
    monkeypatch.setitem(sources.CORPORA, 'ptb', known)
    assert token_store.load(Recipe('ptb', 'token', 5), cache, path=path).lossless


@pytest.mark.parametrize('source', ['wikitext-103', 'wikitext-2', 'ptb', 'enwik8', 'text8'])
def test_a_missing_file_is_named_with_where_it_was_expected_and_where_it_is(
    source, tmp_path, monkeypatch
):
    monkeypatch.setenv('MI_DATA', str(tmp_path))
    file = {'ptb': 'ptb/ptb.train.txt', 'enwik8': 'enwik8', 'text8': 'text8'}.get(
        source, f'{source}/wiki.train.tokens'
    )
    place = (tmp_path / file).parent
    with pytest.raises(DataError) as error:
        read(source)
    message = str(error.value)
    assert message.startswith(f'{place}: expected {(tmp_path / file).name}')
    assert '. Download it from ' in message and '://' in message and '\n' not in message
    monkeypatch.delenv('MI_DATA')
    with pytest.raises(DataError, match=r"`path` = '': expected the path.*\. Download it"):
        read(source)


def test_a_path_that_is_not_asked_for_is_refused(tmp_path):
    for source in ('austen', str(tmp_path), WIKITEXT_2):
        with pytest.raises(DataError, match='already says where the text is'):
            read(source, tmp_path)


def test_an_unknown_word_has_a_nearest_one():
    with pytest.raises(DataError, match=r"'enwik9': no such file or directory.*mean 'enwik8'"):
        read('enwik9')


def test_the_lines_of_a_large_file_are_counted_over_its_blocks(tmp_path):
    lines = [b'%09d\n' % i for i in range(2_000_000)]  # 20 MB, more than one block
    (tmp_path / 'large.txt').write_bytes(b''.join(lines))
    texts = sources.load_texts(str(tmp_path / 'large.txt'), '', ('valid',), tmp_path)
    [text] = texts['valid']
    assert bytes(text.array()) == b''.join(lines[1_800_000:1_900_000])


@pytest.mark.parametrize('ending', ['', '.gz', '.xz', '.zip'])
def test_packed_files_are_read_as_plain_ones(ending, tmp_path):
    lines = ''.join(f'{i}\n' for i in range(40))
    file = tmp_path / f'text8{ending}'
    if ending == '.zip':
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('anything', lines)
    else:
        pack = {'': bytes, '.gz': gzip.compress, '.xz': lzma.compress}[ending]
        file.write_bytes(pack(lines.encode()))
    for _ in range(2):
        assert read(str(file), cache=tmp_path / 'cache')['test'] == ['38\n39\n']
    assert (tmp_path / 'cache').exists() == (ending != '')


@pytest.mark.parametrize('ending', ['.gz', '.xz', '.zip'])
def test_a_packed_file_that_is_cut_is_refused_and_leaves_nothing(ending, tmp_path):
    file = tmp_path / f'book.txt{ending}'
    if ending == '.zip':
        with zipfile.ZipFile(file, 'w') as archive:
            archive.writestr('book', 'a b\n' * 1000)
    else:
        pack = gzip.compress if ending == '.gz' else lzma.compress
        file.write_bytes(pack(b'a b\n' * 1000))
    os.truncate(file, file.stat().st_size - 9)
    with pytest.raises(DataError, match=rf'book\.txt\{ending} is damaged: '):
        read(str(file), cache=tmp_path / 'cache')
    assert list((tmp_path / 'cache').rglob('*.txt')) == []
    with zipfile.ZipFile(tmp_path / 'two.zip', 'w') as archive:
        archive.writestr('a', '')
        archive.writestr('b', '')
    with pytest.raises(DataError, match=r'zip: expected an archive of one file, but found a, b'):
        read(str(tmp_path / 'two.zip'), cache=tmp_path / 'cache')


def test_the_tokenized_text_of_wikitext_goes_before_the_raw_one(tmp_path):
    write_splits(tmp_path, 'wiki.{}.raw', 'raw\n')
    assert read('wikitext-2', tmp_path)['valid'] == ['raw\n']
    write_splits(tmp_path, 'wiki.{}.tokens', 'tokens\n')
    assert read('wikitext-2', tmp_path)['valid'] == ['tokens\n']


@pytest.mark.parametrize('size', [4, 7, 16, 1000])
def test_pieces_are_whole_lines_or_words_and_together_the_text(size, tmp_path):
    words = 'naïve — a\n\nb c d e f g h i j\n extraordinarily, k l m n o p q r s t u\n …end'
    (tmp_path / 'text').write_text(words)
    num_bytes = len(words.encode())
    text = sources.Text(tmp_path / 'text', 0, num_bytes, tmp_path)
    pieces = list(text.pieces(size))
    assert ''.join(pieces) == words
    for piece, following in itertools.pairwise(pieces):
        assert piece.endswith('\n') or following.startswith(' ')
    assert len(pieces) == 1 if size > num_bytes else len(pieces) > 2
    assert all(len(piece.encode()) <= 16 for piece in pieces if size == 16 and 'extra' not in piece)
    middle = dataclasses.replace(text, start=7, stop=num_bytes - 6)
    assert ''.join(middle.pieces(size)).encode() == words.encode()[7:-6]


def test_directories_and_files_as_domains(tmp_path, cache):
    (tmp_path / 'news.txt').write_text(''.join(f'news {i % 3}\n' for i in range(20)))
    write_splits(tmp_path / 'poems', '{}.txt', 'a poem\n')
    packed = gzip.compress(b''.join(b'law %d\n' % (i % 3) for i in range(20)))
    (tmp_path / 'law.txt.gz').write_bytes(packed)
    (tmp_path / '.hidden').write_text('')
    corpus = token_store.load(Recipe('domains', 'token', 99), cache, path=str(tmp_path))
    assert corpus.domains == ('law', 'news', 'poems') and corpus.sizes[1] == 3
    assert corpus.decode(corpus.tokens['valid']) == 'law 0\nnews 0\na poem\n'
    positions = np.array([[0, 2, 3], [5, 6, 8]])
    np.testing.assert_array_equal(corpus.get_domains('valid', positions), [[0, 0, 1], [1, 2, 2]])
    assert corpus.get_domains('train', np.array([18 * 3 - 1, 18 * 3])).tolist() == [0, 1]

    stream = streams.Stream(corpus.tokens['train'], 2, 7, seed=0)
    law, news = (corpus.tokenizer.token_to_id(word) for word in ('law', 'news'))
    domains = corpus.get_domains('train', stream.get_positions(3))
    assert (domains[stream[3] == law] == 0).all() and (domains[stream[3] == news] == 1).all()


def test_domains_that_cannot_be(tmp_path, cache):
    with pytest.raises(DataError, match='a directory with a text file or subdirectory for each'):
        read('domains', tmp_path)
    write_splits(tmp_path / 'poems', '{}.txt')
    (tmp_path / 'poems' / 'valid.txt').write_text('')
    with pytest.raises(
        DataError, match=r'poems/valid\.txt: the valid text has fewer than two tokens'
    ):
        token_store.load(Recipe('domains', 'byte', 256), cache, path=str(tmp_path))
    (tmp_path / 'poems.txt').write_text('a\n')
    with pytest.raises(DataError, match=r'poems and poems\.txt both have the domain '):
        read('domains', tmp_path)


def test_the_hub_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'datasets', None)
    with pytest.raises(DataError, match=re.escape(f'Try {suggest_install("hub")}')):
        read(WIKITEXT_2, cache=tmp_path)
    with pytest.raises(DataError, match='expected hub:OWNER/NAME or hub:OWNER/NAME/CONFIG'):
        read('hub:wikitext', cache=tmp_path)


class Rows:
    """The interface of datasets.Dataset, as documented, as far as it is used."""

    column_names = ('text',)

    def __init__(self, rows):
        self.rows = rows

    def iter(self, batch_size):
        for i in range(0, len(self.rows), batch_size):
            yield {'text': self.rows[i : i + batch_size]}


def hub(monkeypatch, splits):
    calls = []

    def load_dataset(*names):
        calls.append(names)
        return splits

    package = types.SimpleNamespace(
        load_dataset=load_dataset, exceptions=types.SimpleNamespace(DatasetsError=LookupError)
    )
    monkeypatch.setitem(sys.modules, 'datasets', package)
    return calls


def test_rows_of_the_hub_are_lines_and_copied_once(tmp_path, cache, monkeypatch):
    rows = Rows(['', ' = Title = \n', 'a\nb', ''])
    calls = hub(monkeypatch, dict.fromkeys(('train', 'validation', 'test'), rows))
    for _ in range(2):
        assert read(WIKITEXT_2, cache=tmp_path)['valid'] == ['\n = Title = \na\nb\n\n']
    assert calls == [('Salesforce/wikitext', 'wikitext-2-v1')]
    with pytest.raises(DataError, match='expected 2,088,628 tokens including <eos>, but found 10'):
        token_store.load(Recipe(WIKITEXT_2, 'token', 100), str(tmp_path))
    with pytest.raises(
        DataError, match=r"expected the splits train, validation and test.*\{'train'"
    ):
        hub(monkeypatch, {'train': rows})
        read('hub:some/thing', cache=tmp_path)
    assert sorted(f.name for f in (tmp_path / 'hub').iterdir()) == [
        'Salesforce--wikitext--wikitext-2-v1'
    ]


def test_a_directory_by_the_package_of_the_hub_itself(tmp_path, monkeypatch):
    pytest.importorskip('datasets', reason='the extra hub is not installed')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'home'))
    (tmp_path / 'owner' / 'name').mkdir(parents=True)
    for split in ('train', 'validation', 'test'):
        (tmp_path / 'owner' / 'name' / f'{split}.txt').write_text(f' {split} \n\nnaïve\n')
    texts = read('hub:owner/name', cache=tmp_path / 'cache')
    assert texts == {
        split: [f' {name} \n\nnaïve\n']
        for split, name in zip(sources.SPLITS, ('train', 'validation', 'test'), strict=True)
    }
    with pytest.raises(DataError, match="'hub:owner/nothing': "):
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        read('hub:owner/nothing', cache=tmp_path / 'cache')

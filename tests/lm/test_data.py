import pathlib
import re

import numpy as np
import pytest

from mi.lm.data import sources, streams, token_store
from mi.lm.data.texts import DataError
from mi.lm.data.token_store import Recipe


def write(directory, **texts):
    for split in token_store.SPLITS:
        (directory / f'{split}.txt').write_text(texts.get(split, 'some text\n'))
    return str(directory)


def test_austen_is_split_by_novel():
    texts = {split: text.decode() for split, [(_, text)] in sources.load_austen().items()}
    sizes = {split: len(text.encode()) for split, text in texts.items()}
    assert sizes == {'train': 3_124_769, 'valid': 433_413, 'test': 466_856}
    assert sum(sizes.values()) == 4_025_038
    assert texts['valid'].startswith('NORTHANGER ABBEY\n')
    assert texts['test'].startswith('Persuasion\n')
    assert texts['train'].count('By Jane Austen') + texts['train'].count('by Jane Austen') == 4


@pytest.mark.parametrize(
    'level, size', [('byte', 256), pytest.param('bpe', 400, marks=pytest.mark.slow)]
)
def test_lossless_levels_give_the_text_back(level, size, cache):
    corpus = token_store.load(Recipe('austen', level, size), cache)
    assert corpus.lossless and corpus.vocabulary == size and corpus.sizes == (size, 0)
    [(_, text)] = sources.load_austen()['test']
    assert corpus.decode(corpus.tokens['test']) == text.decode()
    some = 'No one who had ever seen Catherine Morland … naïve\n'
    assert corpus.decode(corpus.encode(some)) == some


def test_words_of_a_long_text_are_those_of_a_regular_expression(cache):
    corpus = token_store.load(Recipe('austen', 'word', 500), cache)
    [(_, text)] = sources.load_austen()['train']  # longer than one batch of the tokenizer
    lines = text.decode().split('\n')  # the last one has no end
    words = [word for line in lines for word in [*re.findall(r"[\w']+|[^\w\s]", line), '<eos>']]
    vocabulary = corpus.tokenizer.get_vocab()
    expected = [vocabulary.get(word, vocabulary['<unk>']) for word in words]
    np.testing.assert_array_equal(corpus.tokens['train'], expected)
    counts = np.bincount(expected, minlength=500)[: vocabulary['<unk>']]
    assert (np.diff(counts) <= 0).all() and vocabulary['<unk>'] == 499  # the most frequent first


def test_word_levels(tmp_path, cache):
    train = "a cat, a dog\nthe cat's a <unk> cat\n" * 3
    write(tmp_path, train=train, valid='a bird\n', test='a  cat\n\n')
    words = token_store.load(Recipe(str(tmp_path), 'word', 100), cache)
    # the first line: a · cat · , · a · dog · <eos>
    assert len(words.tokens['train']) == 3 * (6 + 6)
    tokens = token_store.load(Recipe(str(tmp_path), 'token', 100), cache)
    assert len(tokens.tokens['train']) == 3 * (5 + 6)
    assert len(tokens.tokens['test']) == 2 + 1 + 1  # an empty line is an <eos>
    assert not tokens.lossless  # bird is not in the training text …
    unknown = tokens.tokens['train'][8]  # … so it becomes the token of <unk>
    assert tokens.tokens['valid'][1] == unknown
    for corpus in (words, tokens):
        ids = set(np.concatenate(list(corpus.tokens.values())).tolist())
        assert ids == set(range(corpus.vocabulary))
    assert not words.lossless
    assert tokens.decode(tokens.tokens['test']) == 'a cat\n\n'
    np.testing.assert_array_equal(tokens.encode(train), tokens.tokens['train'])
    np.testing.assert_array_equal(tokens.encode('a cat'), tokens.tokens['test'][:2])


@pytest.mark.parametrize(
    ('level', 'joined'), [('byte', 'a textof words'), ('token', 'a text of words')]
)
def test_a_continuation_of_words_is_separate_from_its_prompt(level, joined, tmp_path, cache):
    corpus = token_store.load(Recipe(write(tmp_path), level, 300), cache)
    assert corpus.join('a text', 'of words') == joined
    assert corpus.join('a text ', 'of words') == 'a text of words'
    assert corpus.join('a text\n', 'of words') == 'a text\nof words'
    assert corpus.join('a text', '\nof words') == 'a text\nof words'


def test_a_corpus_is_described_by_its_tokens_and_their_division(tmp_path, cache):
    corpus = token_store.load(Recipe(write(tmp_path), 'byte', 256), cache)
    assert corpus.is_described_by({'step': 3, **corpus.fingerprint})
    assert corpus.is_described_by({'data': corpus.sha256})  # an older checkpoint
    assert not corpus.is_described_by({'data': corpus.sha256[::-1]})
    sizes = corpus.fingerprint['num_tokens'] | {'train': 1}
    assert not corpus.is_described_by({'data': corpus.sha256, 'num_tokens': sizes})


def test_a_last_line_without_an_end_has_an_eos_too(tmp_path, cache):
    with_end = token_store.load(Recipe(write(tmp_path, train='a b\r\nc\n'), 'token', 100), cache)
    without = token_store.load(Recipe(write(tmp_path, train='a b\nc'), 'token', 100), cache)
    assert with_end.tokens['train'].tolist() == without.tokens['train'].tolist()
    assert len(without.tokens['train']) == 5


def test_a_small_vocabulary_keeps_the_frequent_words_and_unk(tmp_path, cache):
    for split in token_store.SPLITS:
        (tmp_path / f'{split}.txt').write_text('c b c a b c\n')
    corpus = token_store.load(Recipe(str(tmp_path), 'token', 3), cache)
    c, b, c2, a, b2, c3, end = corpus.tokens['train'].tolist()
    assert corpus.vocabulary == 3 and c == c2 == c3 and b == b2 and a == end == 2


def test_an_unk_of_the_text_that_is_too_rare_takes_the_place_of_the_rarest_word(tmp_path, cache):
    corpus = token_store.load(
        Recipe(write(tmp_path, train='c b c <unk> b c c c\n' * 3), 'token', 3), cache
    )
    c, b, _, unknown, *_, end = corpus.tokens['train'].tolist()[:9]
    assert corpus.vocabulary == 3 and (c, unknown, end) == (0, 2, 2) and b == 1


def test_unknown_words_of_the_text_itself_lose_nothing(tmp_path, cache):
    for split in token_store.SPLITS:
        (tmp_path / f'{split}.txt').write_text('a <unk> cat\n')
    assert token_store.load(Recipe(str(tmp_path), 'token', 100), cache).lossless


def test_tokens_are_kept_and_checked(tmp_path):
    cache = str(tmp_path)
    first = token_store.load(Recipe('austen', 'byte', 256), cache)
    again = token_store.load(Recipe('austen', 'byte', 256), cache)
    assert isinstance(again.tokens['train'], np.memmap)
    assert first.sha256 == again.sha256
    file = again.tokens['train'].filename
    with open(file, 'r+b') as stream:
        stream.seek(1000)
        stream.write(b'\xff')
    with pytest.raises(DataError, match=r'damaged\. Delete that directory'):
        token_store.load(Recipe('austen', 'byte', 256), cache)


def test_texts_that_differ_in_a_word_or_in_where_they_end_have_tokens_of_their_own(tmp_path, cache):
    first = token_store.load(
        Recipe(write(tmp_path, train='a b\na b\n', valid='b a\n'), 'token', 9), cache
    )
    word = token_store.load(
        Recipe(write(tmp_path, train='a b\nb b\n', valid='b a\n'), 'token', 9), cache
    )
    end = token_store.load(
        Recipe(write(tmp_path, train='a b\n', valid='a b\nb a\n'), 'token', 9), cache
    )
    assert len(first.tokens['train']) == len(word.tokens['train']) == 6
    assert first.sha256 != word.sha256
    assert len(end.tokens['train']) == 3 and len(end.tokens['valid']) == 6


def test_the_same_texts_in_other_splits_have_tokens_of_their_own(tmp_path, cache, monkeypatch):
    """The bytes and the lengths of all four are the same, in the same order."""
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text(f'{i} a b\n')
    corpora = {}
    for larger, division in {'train': (2, 3), 'valid': (1, 3)}.items():

        def read(path, splits, cache, division=division):
            texts = [sources.open_text(file, cache) for file in sorted(path.iterdir())]
            start, stop = division
            return {'train': texts[:start], 'valid': texts[start:stop], 'test': texts[stop:]}

        monkeypatch.setitem(sources.CORPORA, 'divided', sources.Source(read))
        recipe = Recipe('divided', 'token', 50)
        corpora[larger] = token_store.load(recipe, cache, path=str(tmp_path))
    for larger, corpus in corpora.items():
        for split, ids in corpus.tokens.items():
            assert len(ids) == 4 * (1 + (split == larger))


def test_large_token_files_are_hashed_when_asked_and_always_measured(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(token_store, 'HASHED', 10)
    source = write(tmp_path, train='a few words of training text\n')
    file = pathlib.Path(
        token_store.load(Recipe(source, 'token', 9), cache).tokens['train'].filename
    )
    whole = file.read_bytes()
    file.write_bytes(whole[:-2] + b'\1\1')
    token_store.load(Recipe(source, 'token', 9), cache)
    with pytest.raises(DataError, match='damaged'):
        token_store.load(Recipe(source, 'token', 9), cache, verify=True)
    file.write_bytes(whole[:-2])
    with pytest.raises(DataError, match='damaged'):
        token_store.load(Recipe(source, 'token', 9), cache)


def test_a_build_that_fails_leaves_nothing(tmp_path):
    cache = tmp_path / 'cache'
    (tmp_path / 'texts').mkdir()
    source = write(tmp_path / 'texts', test='')
    with pytest.raises(DataError, match=r'test\.txt: the test text has fewer than two tokens'):
        token_store.load(Recipe(source, 'bpe', 300), str(cache))
    assert list(cache.rglob('*')) == []


@pytest.mark.parametrize('count, end', [(100, '\n'), (40, ''), (21, ''), (39, '\n')])
def test_a_single_file_is_split_by_lines_and_mapped_where_it_is(count, end, tmp_path):
    file = tmp_path / 'book.txt'
    lines = [f'line {i}\n' for i in range(count - 1)] + [f'last{end}']
    file.write_text(''.join(lines))
    corpus = token_store.load(Recipe(str(file), 'byte', 256))
    a, b = int(count * 0.9), int(count * 0.95)
    for split, part in zip(token_store.SPLITS, (lines[:a], lines[a:b], lines[b:]), strict=True):
        assert bytes(corpus.tokens[split]).decode() == ''.join(part)
    assert all(tokens.filename == file for tokens in corpus.tokens.values())
    assert corpus.num_bytes == {split: len(tokens) for split, tokens in corpus.tokens.items()}


def test_what_is_missing_is_named(tmp_path, cache):
    with pytest.raises(DataError, match='no such file or directory'):
        token_store.load(Recipe(str(tmp_path / 'nothing'), 'byte', 256))
    (tmp_path / 'train.txt').write_text('some text')
    with pytest.raises(DataError, match="one file with 'valid' in its name, but found none"):
        token_store.load(Recipe(str(tmp_path), 'byte', 256))
    (tmp_path / 'valid.txt').write_text('')
    (tmp_path / 'test.txt').write_text('some text')
    with pytest.raises(DataError, match='the valid text has fewer than two tokens'):
        token_store.load(Recipe(str(tmp_path), 'byte', 256))
    (tmp_path / 'valid.txt').write_bytes(b'caf\xe9 au lait')
    with pytest.raises(DataError, match=r'valid\.txt: expected UTF-8 text, but byte 3 is invalid'):
        token_store.load(Recipe(str(tmp_path), 'bpe', 300), cache)
    assert (
        token_store.load(Recipe(str(tmp_path), 'byte', 256)).tokens['valid'][3] == 0xE9
    )  # bytes are bytes


def test_without_train_the_vocabulary_is_made_of_what_one_says(tmp_path, cache):
    (tmp_path / 'valid.txt').write_text('a b\n')
    (tmp_path / 'test.txt').write_text('c\n')
    held_out = ('test', 'valid')
    with pytest.raises(DataError, match="'train' in its name, but found none"):
        token_store.load(Recipe(str(tmp_path), 'token', 9, splits=held_out), cache)
    corpus = token_store.load(
        Recipe(str(tmp_path), 'token', 9, splits=held_out, fit=('valid',)), cache
    )
    assert list(corpus.tokens) == ['valid', 'test'] and corpus.vocabulary == 4
    assert corpus.tokens['test'][0] == corpus.tokenizer.token_to_id('<unk>')
    assert list(token_store.load(Recipe(str(tmp_path), 'byte', 256, splits=held_out)).tokens) == [
        'valid',
        'test',
    ]
    with pytest.raises(ValueError, match="unknown split 'tests'; did you mean 'test'"):
        token_store.load(Recipe(str(tmp_path), 'byte', 256, splits=('tests',)))


def test_novels_as_domains(cache):
    corpus = token_store.load(Recipe('austen-domains', 'byte', 256), cache)
    assert corpus.domains[0] == 'Emma' and corpus.sizes == (256, 6)
    [(_, train)] = sources.load_austen()['train']
    found = ''
    for split in token_store.SPLITS:
        ids = corpus.tokens[split]
        numbers = corpus.get_domains(split, np.arange(len(ids)))
        assert numbers.dtype == np.int32 and (np.diff(numbers) >= 0).all()
        found += corpus.decode(ids[numbers == 5])
    assert found == train.decode()[train.decode().index('SENSE AND SENSIBILITY\n') :]
    assert corpus.get_domains('valid', np.zeros((3, 2), int)).shape == (3, 2)


def test_only_the_first_tokens_to_train_on(cache):
    some = token_store.load(Recipe('austen', 'byte', 256), cache, train_tokens=1000)
    whole = token_store.load(Recipe('austen', 'byte', 256), cache)
    np.testing.assert_array_equal(some.tokens['train'], whole.tokens['train'][:1000])
    assert len(some.tokens['valid']) == len(whole.tokens['valid'])
    assert some.sha256 != whole.sha256 and some.num_bytes['train'] == 1000
    other = token_store.load(Recipe('austen', 'byte', 256), cache, train_tokens=1001)
    assert other.sha256 != some.sha256
    with pytest.raises(DataError, match=r'= 4000000: expected 0 .* at most 3,124,769'):
        token_store.load(Recipe('austen', 'byte', 256), cache, train_tokens=4_000_000)
    with pytest.raises(DataError, match=r'more than 3,\d+,\d+, so that every domain is included'):
        token_store.load(Recipe('austen-domains', 'byte', 256), cache, train_tokens=1000)
    with pytest.raises(ValueError, match="expected 'train' in splits"):
        token_store.load(Recipe('austen', 'byte', 256, splits=('test',)), cache, train_tokens=9)


def test_readers_go_on_where_they_stopped_and_cover_the_text():
    N, B, T = 60, 3, 5
    stream = streams.Stream(np.arange(N), B, T, seed=0)
    assert len(stream) == N // (B * T)
    for step in range(9):
        batch, following = stream[step], stream[step + 1]
        assert batch.shape == (T + 1, B)
        np.testing.assert_array_equal(batch[1:], (batch[:-1] + 1) % N)  # targets are the next ids
        np.testing.assert_array_equal(following[0], batch[-1])
        np.testing.assert_array_equal(stream.get_positions(step), batch)
    epoch = np.concatenate([stream[step][:-1] for step in range(len(stream))])
    assert sorted(epoch.ravel()) == list(range(N))


def test_seeds_read_in_different_order_and_each_the_same_again():
    tokens = np.arange(1000)
    a, again, b = (streams.Stream(tokens, 4, 5, seed)[7] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


def test_the_readers_of_all_devices_are_those_of_one():
    tokens = np.arange(500)
    stream = streams.Stream(tokens, 6, 5, seed=1)
    for step in (0, 3, 40):
        parts = [stream.get_positions(step, slice(i, i + 2)) for i in (0, 2, 4)]
        np.testing.assert_array_equal(tokens[np.hstack(parts)], stream[step])


@pytest.mark.parametrize('N, B, T', [(100, 4, 7), (101, 4, 25), (9, 4, 16), (2, 1, 3), (65, 8, 8)])
def test_evaluation_predicts_every_token_but_the_first_once(N, B, T):
    seen = []
    for inputs, targets, mask, positions in streams.segments(np.arange(N), B, T):
        assert inputs.shape == targets.shape == mask.shape == (T, B)
        inside = mask == 1
        np.testing.assert_array_equal(inputs, positions)
        np.testing.assert_array_equal(inputs[inside] + 1, targets[inside])
        seen += targets[inside].tolist()
    assert sorted(seen) == list(range(1, N))


def test_evaluation_parts_are_contiguous():
    columns = [inputs for inputs, *_ in streams.segments(np.arange(101), 4, 5)]
    np.testing.assert_array_equal(np.concatenate(columns)[:, 1], np.arange(25, 50))


def test_too_short_a_text():
    with pytest.raises(ValueError, match='`batch` = 4: expected less than 3, the number of tokens'):
        streams.Stream(np.arange(3), 4, 5, seed=0)


@pytest.mark.parametrize(
    'N, B, T, stride',
    [(100, 3, 10, 4), (41, 4, 10, 10), (7, 2, 20, 5), (30, 1, 8, 1), (11, 2, 10, 3)],
)
def test_windows_predict_every_token_once_with_enough_before_it(N, B, T, stride):
    seen, before = [], []
    for inputs, targets, mask, positions in streams.windows(np.arange(N), B, T, stride):
        assert inputs.shape == (min(T, N - 1), B)
        np.testing.assert_array_equal(inputs, positions)
        rows, columns = np.nonzero(mask)
        seen += targets[rows, columns].tolist()
        np.testing.assert_array_equal(inputs[0][columns] + rows + 1, targets[rows, columns])
        before += list(zip(targets[rows, columns], rows + 1, strict=True))
    assert sorted(seen) == list(range(1, N))
    assert all(count > T - stride or count == target for target, count in before)


@pytest.mark.parametrize('stride', [0, 11])
def test_windows_do_not_leave_tokens_out(stride):
    with pytest.raises(ValueError, match=f'stride = {stride}: expected 1 to 10'):
        next(streams.windows(np.arange(50), 2, 10, stride))

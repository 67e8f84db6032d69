import pathlib

import numpy as np
import pytest
import tokenizers

from mi.config import UserError
from mi.lm import data


def test_austen_is_split_by_novel():
    texts = data.austen()
    sizes = {split: len(text.encode()) for split, text in texts.items()}
    assert sizes == {'train': 3_124_769, 'valid': 433_413, 'test': 466_856}
    assert sum(sizes.values()) == 4_025_038
    assert texts['valid'].startswith('NORTHANGER ABBEY\n')
    assert texts['test'].startswith('Persuasion\n')
    assert texts['train'].count('By Jane Austen') + texts['train'].count('by Jane Austen') == 4


@pytest.mark.parametrize('level, size', [('byte', 256), ('bpe', 400)])
def test_lossless_levels_give_the_text_back(level, size, cache):
    corpus = data.load('austen', level, size, cache)
    assert corpus.lossless and corpus.vocabulary == size
    ids = corpus.tokens['test']
    if level == 'byte':
        text = bytes(ids).decode()
    else:
        (folder,) = (f for f in pathlib.Path(cache).iterdir() if '-bpe-' in f.name)
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
        text = tokenizer.decode(ids.tolist())
    assert text == data.austen()['test']


def test_word_levels(tmp_path, cache):
    train = "a cat, a dog\nthe cat's a <unk> cat\n" * 3
    for split, text in {'train': train, 'valid': 'a bird\n', 'test': 'a  cat\n\n'}.items():
        (tmp_path / f'wiki.{split}.tokens').write_text(text)
    words = data.load(str(tmp_path), 'word', 100, cache)
    # the first line: a · cat · , · a · dog · <eos>
    assert len(words.tokens['train']) == 3 * (6 + 6)
    tokens = data.load(str(tmp_path), 'token', 100, cache)
    assert len(tokens.tokens['train']) == 3 * (5 + 6)
    assert len(tokens.tokens['test']) == 2 + 1 + 1  # an empty line is an <eos>
    assert not tokens.lossless  # bird is not in the training text …
    unknown = tokens.tokens['train'][8]  # … so it becomes what stands for <unk> there
    assert tokens.tokens['valid'][1] == unknown
    for corpus in (words, tokens):
        ids = set(np.concatenate(list(corpus.tokens.values())).tolist())
        assert ids == set(range(corpus.vocabulary))
    assert not words.lossless


def test_a_small_vocabulary_keeps_the_frequent_words_and_unk(tmp_path, cache):
    for split in data.SPLITS:
        (tmp_path / f'{split}.txt').write_text('c b c a b c\n')
    corpus = data.load(str(tmp_path), 'token', 3, cache)
    c, b, c2, a, b2, c3, end = corpus.tokens['train'].tolist()
    assert corpus.vocabulary == 3 and c == c2 == c3 and b == b2 and a == end == 2


def test_unknown_words_of_the_text_itself_lose_nothing(tmp_path, cache):
    for split in data.SPLITS:
        (tmp_path / f'{split}.txt').write_text('a <unk> cat\n')
    assert data.load(str(tmp_path), 'token', 100, cache).lossless


def test_tokens_are_kept_and_checked(cache):
    first = data.load('austen', 'bpe', 300, cache)
    again = data.load('austen', 'bpe', 300, cache)
    assert isinstance(again.tokens['train'], np.memmap)
    assert first.sha256 == again.sha256
    file = again.tokens['train'].filename
    with open(file, 'r+b') as stream:
        stream.seek(1000)
        stream.write(b'\xff')
    with pytest.raises(UserError, match='damaged; delete that directory'):
        data.load('austen', 'bpe', 300, cache)


def test_a_single_file_is_split_by_lines(tmp_path):
    file = tmp_path / 'book.txt'
    file.write_text(''.join(f'line {i}\n' for i in range(100)))
    corpus = data.load(str(file), 'byte', 256)
    assert bytes(corpus.tokens['valid']).decode() == ''.join(f'line {i}\n' for i in range(90, 95))
    assert bytes(corpus.tokens['test']).decode() == ''.join(f'line {i}\n' for i in range(95, 100))


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(UserError, match='no such file or directory'):
        data.load(str(tmp_path / 'nothing'), 'byte', 256)
    (tmp_path / 'train.txt').write_text('some text')
    with pytest.raises(UserError, match="one file with 'valid' in its name, found none"):
        data.load(str(tmp_path), 'byte', 256)
    (tmp_path / 'valid.txt').write_text('')
    (tmp_path / 'test.txt').write_text('some text')
    with pytest.raises(UserError, match='the valid text is empty'):
        data.load(str(tmp_path), 'byte', 256)
    (tmp_path / 'valid.txt').write_bytes(b'caf\xe9 au lait')
    with pytest.raises(UserError, match='not UTF-8 text'):
        data.load(str(tmp_path), 'byte', 256)


def test_readers_go_on_where_they_stopped_and_cover_the_text():
    N, B, T = 60, 3, 5
    stream = data.Stream(np.arange(N), B, T, seed=0)
    for step in range(9):
        batch, following = stream[step], stream[step + 1]
        assert batch.shape == (T + 1, B)
        np.testing.assert_array_equal(batch[1:], (batch[:-1] + 1) % N)  # targets are the next ids
        np.testing.assert_array_equal(following[0], batch[-1])
    epoch = np.concatenate([stream[step][:-1] for step in range(N // (B * T))])
    assert sorted(epoch.ravel()) == list(range(N))


def test_seeds_read_in_different_order_and_each_the_same_again():
    tokens = np.arange(1000)
    a, again, b = (data.Stream(tokens, 4, 5, seed)[7] for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, again)
    assert (a != b).any()


@pytest.mark.parametrize('N, B, T', [(100, 4, 7), (101, 4, 25), (9, 4, 16), (2, 1, 3), (65, 8, 8)])
def test_evaluation_predicts_every_token_but_the_first_once(N, B, T):
    seen = []
    for inputs, targets, mask in data.segments(np.arange(N), B, T):
        assert inputs.shape == targets.shape == mask.shape == (T, B)
        inside = mask == 1
        np.testing.assert_array_equal(inputs[inside] + 1, targets[inside])
        seen += targets[inside].tolist()
    assert sorted(seen) == list(range(1, N))


def test_evaluation_parts_are_contiguous():
    columns = [inputs for inputs, _, _ in data.segments(np.arange(101), 4, 5)]
    np.testing.assert_array_equal(np.concatenate(columns)[:, 1], np.arange(25, 50))


def test_too_short_a_text():
    with pytest.raises(UserError, match='has 3 tokens, fewer than the batch of 4'):
        data.Stream(np.arange(3), 4, 5, seed=0)

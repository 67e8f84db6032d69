"""From text to token ids: bytes, byte pairs, words."""

import itertools
import re
from collections.abc import Collection, Iterator
from typing import Literal, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mi.lm.data.sources import Text, Texts
from mi.training import progress

Level = Literal['byte', 'bpe', 'word', 'token']


LEVELS = get_args(Level)


EOS = ' <eos>'  # before the end of each line, of words


UNKNOWN = re.compile(r'(?<!\S)<unk>(?!\S)')


def fit_tokenizer(
    texts: Texts, level: Level, size: int, fit: Collection[str]
) -> tuple[tokenizers.Tokenizer | None, int]:
    """The tokeniser made of the splits `fit`, None for bytes, and how many words they have."""
    if level == 'byte':
        return None, 0
    total = sum(text.stop - text.start for split in fit for text in texts[split])
    with progress.Work(f'making the vocabulary of {" and ".join(fit)}', total, 'MB', 1e6) as work:
        pieces = (
            p for split in fit for text in texts[split] for p in split_pieces(text, level, work)
        )
        return (_bpe(size, pieces), 0) if level == 'bpe' else _words(level, size, pieces)


def _bpe(size: int, pieces: Iterator[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        pieces,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _words(level: Level, size: int, pieces: Iterator[str]) -> tuple[tokenizers.Tokenizer, int]:
    """The `size` most frequent words; <unk> is one of them, or takes the place of the rarest."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({}, unk_token='<unk>'))
    if level == 'token':
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        words = tokenizers.Regex(r"<unk>|<eos>|[\w']+|[^\w\s]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, 'removed', invert=True)
    # Not as a special token: where the text has the word <unk> too, the trainer would give it a
    # second id and leave a hole in the numbering.
    trainer = trainers.WordLevelTrainer(vocab_size=2**31, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(pieces, trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if vocabulary.get('<unk>', size) >= size:
        kept = {word: i for word, i in vocabulary.items() if i < size - 1}
        kept['<unk>'] = len(kept)
    else:
        kept = {word: i for word, i in vocabulary.items() if i < size}
    tokenizer.model = models.WordLevel(kept, unk_token='<unk>')
    return tokenizer, len(vocabulary)


def encode(
    text: Text, level: Level, tokenizer: tokenizers.Tokenizer | None, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Pieces of a text and their ids; of bytes the ids alone."""
    if tokenizer is None:
        array, block = text.array(), 2**24
        yield from (('', array[at : at + block]) for at in range(0, len(array), block))
        return
    size = text.stop - text.start
    with progress.Work(f'tokenizing {split}', size, 'MB', 1e6) as work:
        pieces = split_pieces(text, level, work)
        while batch := list(itertools.islice(pieces, 32)):  # tokenized in parallel
            encoded = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            for piece, encoding in zip(batch, encoded, strict=True):
                yield piece, np.asarray(encoding.ids, np.int32)


def split_pieces(text: Text, level: Level, work: progress.Work | None = None) -> Iterator[str]:
    """Parts that are tokenized apart; those of words with an <eos> a line, also the last one."""
    piece = ''
    for piece in text.pieces():
        yield piece if level == 'bpe' else mark_unknown(piece)
        if work:
            work.done += len(piece.encode())
    if level != 'bpe' and piece and not piece.endswith('\n'):
        yield EOS.strip()


def mark_unknown(text: str) -> str:
    return text.replace('\n', f'{EOS}\n')


def unmark_unknown(piece: str) -> str:
    """The text of a piece of words, or of the start of one: without the <eos> of its lines."""
    return '' if piece == EOS.strip() else piece.replace(f'{EOS}\n', '\n')


def count_bytes(piece: str, end: int) -> int:
    """Bytes of text in a piece of words up to a word that ends there; <eos> is the line's end."""
    if piece[:end].endswith(EOS) and piece[end : end + 1] == '\n':
        end += 1
    return len(unmark_unknown(piece[:end]).encode())

"""Tokenizers for bytes, byte pairs and words, and tokenizers loaded from a file."""

import itertools
import json
import pathlib
import re
from collections.abc import Collection, Iterator
from typing import Literal, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mi.lm.data.texts import DataError, Text, Texts
from mi.training import progress

Level = Literal['byte', 'bpe', 'word', 'token', 'file']
LEVELS = get_args(Level)
UNMARKED = ('byte', 'bpe', 'file')  # levels without an <eos> for each line

EOS = ' <eos>'  # before the end of each line, at the levels of words
UNKNOWN = re.compile(r'(?<!\S)<unk>(?!\S)')


def fit_tokenizer(
    texts: Texts, level: Level, vocab_size: int, fit: Collection[str]
) -> tuple[tokenizers.Tokenizer | None, int]:
    """Fit a tokenizer to the splits `fit`.

    Returns:
      The tokenizer, or None for bytes, and the number of distinct words, or 0 at levels other than
      'word' and 'token'.
    """
    if level == 'byte':
        return None, 0
    num_bytes = sum(text.size for split in fit for text in texts[split])
    label = f'making the vocabulary of {" and ".join(fit)}'
    with progress.Work(label, num_bytes, 'MB', 1e6) as work:
        pieces = (
            piece
            for split in fit
            for text in texts[split]
            for piece in split_pieces(text, level, work)
        )
        if level == 'bpe':
            return _fit_bpe(vocab_size, pieces), 0
        return _fit_words(level, vocab_size, pieces)


def _fit_bpe(vocab_size: int, pieces: Iterator[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        pieces,
        trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _fit_words(
    level: Level, vocab_size: int, pieces: Iterator[str]
) -> tuple[tokenizers.Tokenizer, int]:
    """Fit a vocabulary of the `vocab_size` most frequent words, which always includes <unk>."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({}, unk_token='<unk>'))
    if level == 'token':
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        word_pattern = tokenizers.Regex(r"<unk>|<eos>|[\w']+|[^\w\s]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(word_pattern, 'removed', invert=True)
    # <unk> is not a special token: if the text has the word <unk> too, the trainer would give it a
    # second id and skip a number.
    trainer = trainers.WordLevelTrainer(vocab_size=2**31, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(pieces, trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if vocabulary.get('<unk>', vocab_size) >= vocab_size:
        frequent_words = {word: i for word, i in vocabulary.items() if i < vocab_size - 1}
        frequent_words['<unk>'] = len(frequent_words)
    else:
        frequent_words = {word: i for word, i in vocabulary.items() if i < vocab_size}
    tokenizer.model = models.WordLevel(frequent_words, unk_token='<unk>')
    return tokenizer, len(vocabulary)


def read_tokenizer(file: str) -> tokenizers.Tokenizer:
    """Read a tokenizer.json of the tokenizers library, and disable truncation and padding.

    Raises:
      DataError: if the file is missing, is not a tokenizer, or has fewer than two ids.
    """
    path = pathlib.Path(file)
    setting = f'`tokenizer` = {file!r}'
    if not path.is_file():
        raise DataError(f'{setting}: expected the path of a tokenizer.json, but found no file')
    try:
        description = path.read_text(encoding='utf-8')
        json.loads(description)
    except ValueError as error:
        raise DataError(f'{setting}: expected a JSON file, but parsing failed: {error}') from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the library raises nothing narrower
        raise DataError(
            f'{setting}: expected a file written by tokenizers.Tokenizer.save, but loading failed: '
            f'{error}'
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if count_ids(tokenizer) < 2:
        raise DataError(f'{setting}: expected at least 2 ids, but found {count_ids(tokenizer)}')
    return tokenizer


def count_ids(tokenizer: tokenizers.Tokenizer) -> int:
    """Return the largest id plus one, including added tokens and unused ids."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def count_id_bytes(tokenizer: tokenizers.Tokenizer) -> np.ndarray | None:
    """Return the number of bytes of text that each id represents, [V].

    Only byte-level BPE defines these numbers, so None is returned for any other tokenizer. Each
    character of a token's name represents one byte. The name of an added token is its text.
    """
    is_byte_level = isinstance(tokenizer.model, models.BPE) and isinstance(
        tokenizer.decoder, decoders.ByteLevel
    )
    if not is_byte_level or tokenizer.normalizer is not None:
        return None
    added_ids = tokenizer.get_added_tokens_decoder()
    id_bytes = np.zeros(count_ids(tokenizer), np.int64)
    for name, i in tokenizer.get_vocab(with_added_tokens=True).items():
        id_bytes[i] = len(name.encode()) if i in added_ids else len(name)
    return id_bytes


def encode(
    text: Text, level: Level, tokenizer: tokenizers.Tokenizer | None, split: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield pieces of a text with their ids. At the level 'byte', the pieces are ''."""
    if tokenizer is None:
        text_bytes, block_size = text.array(), 2**24
        for block_start in range(0, len(text_bytes), block_size):
            yield '', text_bytes[block_start : block_start + block_size]
        return
    with progress.Work(f'tokenizing {split}', text.size, 'MB', 1e6) as work:
        pieces = split_pieces(text, level, work)
        while piece_batch := list(itertools.islice(pieces, 32)):  # tokenized in parallel
            try:
                encodings = tokenizer.encode_batch_fast(piece_batch, add_special_tokens=False)
            except Exception as error:  # the library raises nothing narrower
                raise DataError(
                    f'`tokenizer`: expected a tokenizer for the {split} text, but encoding failed: '
                    f'{error}'
                ) from error
            for piece, encoding in zip(piece_batch, encodings, strict=True):
                yield piece, np.asarray(encoding.ids, np.int32)


def split_pieces(text: Text, level: Level, work: progress.Work | None = None) -> Iterator[str]:
    """Yield pieces to tokenize separately. At the levels 'word' and 'token', lines get an <eos>."""
    piece = ''
    for piece in text.pieces():
        yield piece if level in UNMARKED else mark_line_ends(piece)
        if work:
            work.done += len(piece.encode())
    if level not in UNMARKED and piece and not piece.endswith('\n'):
        yield EOS.strip()


def mark_line_ends(text: str) -> str:
    """Return the text with an <eos> before the end of each line."""
    return text.replace('\n', f'{EOS}\n')


def remove_line_ends(piece: str) -> str:
    """Undo `mark_line_ends` in a piece or a prefix of a piece. A lone <eos> becomes ''."""
    return '' if piece == EOS.strip() else piece.replace(f'{EOS}\n', '\n')


def count_bytes(piece: str, word_end: int) -> int:
    """Count the bytes of text in a piece, up to and including the word that ends at `word_end`.

    The newline at the end of a line counts as part of its <eos>.
    """
    if piece[:word_end].endswith(EOS) and piece[word_end : word_end + 1] == '\n':
        word_end += 1
    return len(remove_line_ends(piece[:word_end]).encode())

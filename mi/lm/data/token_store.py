"""Text → token ids → contiguous streams.

A corpus is three texts, train, valid and test, see `mi.lm.data.sources`. Levels: 'byte'; 'bpe',
byte-level and lossless; 'word', words and punctuation marks of raw text; 'token', whatever stands
between white space, for corpora that come tokenised (WikiText, PTB). The last two end each line
with <eos> and write <unk> for what the training text does not hold often enough.

Shapes: N tokens of a text, T steps, B readers.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Collection
from importlib import metadata
from typing import IO

import numpy as np
import tokenizers
from tokenizers import models

from mi.config import UserError, suggest
from mi.lm.data import sources
from mi.lm.data.sources import SPLITS, Text, Texts
from mi.lm.data.tokenizers import (
    UNKNOWN,
    Level,
    count_bytes,
    encode,
    fit_tokenizer,
    mark_unknown,
    split_pieces,
    unmark_unknown,
)
from mi.training import progress

HASHED = 64 * 2**20  # bytes of the token files up to which every load looks at all of them


_FORMAT = 2  # of token files; another number and they are made anew


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
      name: for messages.
      vocabulary: number of token ids; those of words are sorted, the most frequent first, but for
        an <unk> that the text itself has not, which is the last.
      tokens: split → ids [N].
      bytes: split → length of its text in UTF-8; without train where `train_tokens` cuts it at
        another level than 'byte'.
      lossless: whether the tokens determine the text, so that bits per byte mean something.
      sha256: of the tokens of all splits; a run continues on the same tokens or not at all.
      domains: their names, sorted; () where there are none.
      starts: split → the position at which each domain starts, [domains]; [0] without.
      tokenizer: makes ids of text; None for bytes.
      texts: split → its texts, as they are read.
    """

    name: str
    vocabulary: int
    tokens: dict[str, np.ndarray]
    bytes: dict[str, int]
    lossless: bool
    sha256: str
    domains: tuple[str, ...]
    starts: dict[str, np.ndarray]
    tokenizer: tokenizers.Tokenizer | None
    texts: Texts

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of token ids and of domains."""
        return self.vocabulary, len(self.domains)

    def domain(self, split: str, positions: np.ndarray) -> np.ndarray:
        """The number in `domains` of the tokens at these positions, int32 of the same shape."""
        return (np.searchsorted(self.starts[split], positions, 'right') - 1).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text that does not end its last line, [N]."""
        if self.tokenizer is None:
            return np.frombuffer(text.encode(), np.uint8)
        if not self._bpe:
            text = mark_unknown(text)
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of ids [N]; of words, with a space between all of them."""
        if self.tokenizer is None:
            return np.asarray(tokens, np.uint8).tobytes().decode(errors='replace')
        text = self.tokenizer.decode(np.asarray(tokens).tolist())
        return text if self._bpe else re.sub(' ?<eos> ?', '\n', text)

    def predicted_bytes(self, split: str, predictions: int) -> int:
        """Return how many bytes of the text are in the tokens after the first one of a split.

        White space before a word, and of the level 'bpe' what the ids say, is of the word.

        Args:
          split: 'train', 'valid' or 'test'.
          predictions: how many tokens after the first.

        Raises:
          ValueError: if the tokens do not determine the text.
        """
        if not self.lossless:
            raise ValueError(f'{self.name}: the tokens do not determine the text')
        if self.tokenizer is None:
            return predictions
        if self._bpe:
            counts = np.bincount(self.tokens[split][1 : predictions + 1], minlength=self.vocabulary)
            return int(counts @ self._bytes_of_ids)
        for count in (1, predictions + 1):
            if (split, count) not in self._word_ends:
                self._word_ends[split, count] = self._end_of_words(split, count)
        return self._word_ends[split, predictions + 1] - self._word_ends[split, 1]

    @functools.cached_property
    def _bytes_of_ids(self) -> np.ndarray:
        """Of the level 'bpe', [V]: each character of an id's name is a byte."""
        assert self.tokenizer is not None
        names = (self.tokenizer.id_to_token(i) or '' for i in range(self.vocabulary))
        return np.array([len(name) for name in names], np.int64)

    @functools.cached_property
    def _word_ends(self) -> dict[tuple[str, int], int]:
        """Split and count → what `_end_of_words` found, which every evaluation asks for."""
        return {}

    def _end_of_words(self, split: str, count: int) -> int:
        """Where the first `count` tokens of the level 'token' end, in bytes."""
        assert self.tokenizer is not None
        if count == len(self.tokens[split]):
            return self.bytes[split]
        end = 0
        for text in self.texts[split]:
            for piece in split_pieces(text, 'token'):
                words = self.tokenizer.encode(piece, add_special_tokens=False).offsets
                if count <= len(words):
                    return end + count_bytes(piece, words[count - 1][1])
                count -= len(words)
                end += len(unmark_unknown(piece).encode())
        raise ValueError(f'{self.name}: {split} has fewer tokens')

    @property
    def _bpe(self) -> bool:
        return self.tokenizer is not None and isinstance(self.tokenizer.model, models.BPE)


def load(
    source: str,
    level: Level,
    vocabulary: int,
    cache: str = '',
    *,
    path: str = '',
    splits: Collection[str] = SPLITS,
    fit: Collection[str] = ('train',),
    train_tokens: int = 0,
    verify: bool = False,
) -> Corpus:
    """Reads and tokenises a corpus; the tokens are kept on disk and mapped from there next time.

    Bytes of a plain file are mapped where they are.

    Args:
      source: a word of `mi.lm.data.sources.CORPORA`; 'hub:OWNER/NAME/CONFIG'; a text file, of which
        the last tenth of the lines becomes valid and test; or a directory with one file for each of
        *train*, *valid* and *test*. Files may be packed: .bz2, .gz, .xz, .zip.
      level: see above.
      vocabulary: at most so many ids, for 'bpe', 'word' and 'token'.
      cache: directory for the tokens; '' for $MI_CACHE or ~/.cache/mi.
      path: where the files of a word of `CORPORA` are; '' for $MI_DATA/SOURCE.
      splits: those that are wanted; files of others may be missing.
      fit: the splits that the vocabulary is made of. With another than train, for want of it, no
        figure compares with those of the literature.
      train_tokens: the first so many of train; 0 for all. The vocabulary is that of all.
      verify: whether to look at all of the token files also where they are larger than `HASHED`.

    Raises:
      UserError: if a file is missing, empty, ambiguous, damaged or not UTF-8, or if the counts of
        a known corpus are not those that are known.
    """
    if not splits:
        raise ValueError(f'splits = (): expected some of {SPLITS}')
    for split in (*splits, *fit):
        if split not in SPLITS:
            raise ValueError(f'{split!r} is no split; {suggest(split, SPLITS)}')
    if train_tokens and 'train' not in splits:
        raise ValueError(
            f'train_tokens = {train_tokens}, but splits = {tuple(splits)} has no train'
        )
    root = sources.cache_directory(cache)
    with sources.os_errors_named(root):
        return _load(source, level, vocabulary, root, path, splits, fit, train_tokens, verify)


def _load(
    source: str,
    level: Level,
    vocabulary: int,
    root: pathlib.Path,
    path: str,
    splits: Collection[str],
    fit: Collection[str],
    train_tokens: int,
    verify: bool,
) -> Corpus:
    read = splits if level == 'byte' else {*splits, *fit}
    texts = sources.texts(source, path, read, root)
    fit = () if level == 'byte' else tuple(split for split in SPLITS if split in fit)
    splits = tuple(split for split in SPLITS if split in splits)
    domains = tuple(text.domain for text in texts[splits[0]] if text.domain)
    sizes = {split: sum(text.stop - text.start for text in texts[split]) for split in splits}
    name = pathlib.Path(source).name
    for split in splits:
        for text in texts[split]:
            _check_length(source, split, text, 2 * (text.stop - text.start))

    if level == 'byte' and all(len(texts[split]) == 1 for split in splits):
        tokens = {split: texts[split][0].array() for split in splits}
        for split in splits:
            _check_length(source, split, texts[split][0], len(tokens[split]))
        sha256 = _sha256(*tokens.values())
        starts = {split: np.zeros(1, np.int64) for split in splits}
        corpus = Corpus(name, 256, tokens, sizes, True, sha256, domains, starts, None, texts)
    else:
        known = sources.find(source)
        checks = [dict(known.tokens), known.vocabulary]
        versions = [_FORMAT, metadata.version('tokenizers')]
        recipe = json.dumps([level, vocabulary, splits, fit, checks, *versions]).encode()
        spans = [text.array() for parts in texts.values() for text in parts]
        edges = np.array([len(span) for span in spans])
        key = _sha256(recipe, edges, *spans)[:16]
        directory = root / f'{name}-{level}-{key}'
        if not directory.exists():
            _build(directory, texts, source, level, vocabulary, splits, fit)
        corpus = _stored(directory, name, sizes, domains, texts, verify)
    return _shortened(corpus, train_tokens, level) if train_tokens else corpus


def _build(
    directory: pathlib.Path,
    texts: Texts,
    source: str,
    level: Level,
    size: int,
    splits: Collection[str],
    fit: Collection[str],
) -> None:
    """Makes the vocabulary and writes ids, some pieces at a time; the directory appears last."""
    known = sources.find(source) if level == 'token' else None
    tokenizer, types = fit_tokenizer(texts, level, size, fit)
    counted = known and known.vocabulary and fit == ('train',) and size >= known.vocabulary
    if known and counted and types != known.vocabulary:
        raise known.refuse(
            f'{texts["train"][0].given}: {types:,} different tokens with <eos>, expected '
            f'{known.vocabulary:,}'
        )
    ids = 256 if tokenizer is None else tokenizer.get_vocab_size()
    dtype = np.dtype(np.uint8 if ids <= 2**8 else np.uint16 if ids <= 2**16 else np.int32)
    lossless, sha256 = level != 'word', hashlib.sha256()
    counts: dict[str, int] = {}
    starts: dict[str, list[int]] = {}
    with sources.appearing(directory) as new:
        new.mkdir()
        for split in splits:
            counts[split], starts[split] = 0, []
            with open(new / f'{split}.npy', 'wb') as stream:
                _write_header(stream, dtype, 0)
                for text in texts[split]:
                    starts[split].append(counts[split])
                    for piece, numbers in encode(text, level, tokenizer, split):
                        if level == 'token' and tokenizer and lossless:
                            unknown = numbers == tokenizer.token_to_id('<unk>')
                            lossless = int(unknown.sum()) == len(UNKNOWN.findall(piece))
                        written = numbers.astype(dtype)
                        stream.write(written.data)
                        sha256.update(written.data)
                        counts[split] += len(written)
                    _check_length(source, split, text, counts[split] - starts[split][-1])
                stream.seek(0)
                _write_header(stream, dtype, counts[split])
            if known and counts[split] != known.tokens.get(split, counts[split]):
                raise known.refuse(
                    f'{texts[split][0].given}: {counts[split]:,} tokens with <eos>, expected '
                    f'{known.tokens[split]:,}'
                )
        if tokenizer:
            (new / 'tokenizer.json').write_text(tokenizer.to_str(pretty=True))
        meta = {
            'vocabulary': ids,
            'lossless': lossless,
            'sha256': sha256.hexdigest(),
            'tokens': counts,
            'starts': starts,
        }
        (new / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')


def _write_header(stream: IO[bytes], dtype: np.dtype, length: int) -> None:
    """The head of an .npy file, padded by numpy so that it can be written anew when it grows."""
    head = {'descr': dtype.str, 'fortran_order': False, 'shape': (length,)}
    np.lib.format.write_array_header_1_0(stream, head)


def _stored(
    directory: pathlib.Path,
    name: str,
    sizes: dict[str, int],
    domains: tuple[str, ...],
    texts: Texts,
    verify: bool,
) -> Corpus:
    """What `_build` wrote.

    Files that are cut are always noticed, others by the hash, which is made of small files or if
    asked for: the directory appeared when it was whole, and after that only a failing disk or a
    hand changes it; to read all of it at every start, on every host, takes as long as to read the
    text itself.
    """
    try:
        meta = json.loads((directory / 'meta.json').read_text())
        tokens = {split: np.load(directory / f'{split}.npy', mmap_mode='r') for split in sizes}
        keys = {'vocabulary', 'lossless', 'sha256', 'starts'}
        if not isinstance(meta, dict) or keys - meta.keys():
            raise ValueError('meta.json lacks keys')
        file, tokenizer = directory / 'tokenizer.json', None
        if file.exists():
            description = file.read_text()
            json.loads(description)  # where tokenizers raises a bare Exception
            tokenizer = tokenizers.Tokenizer.from_str(description)
    except PermissionError:
        raise
    except (OSError, ValueError) as error:
        raise _damaged(directory) from error
    small = sum(ids.nbytes for ids in tokens.values()) <= HASHED
    if (small or verify) and _sha256(*tokens.values()) != meta['sha256']:
        raise _damaged(directory)
    return Corpus(
        name,
        meta['vocabulary'],
        tokens,
        sizes,
        meta['lossless'],
        meta['sha256'],
        domains,
        {s: np.array(at if domains else [0]) for s, at in meta['starts'].items()},
        tokenizer,
        texts,
    )


def _damaged(directory: pathlib.Path) -> UserError:
    return UserError(f'the token files in {directory} are damaged; delete that directory')


def _shortened(corpus: Corpus, count: int, level: Level) -> Corpus:
    """With the first `count` tokens of train."""
    train, starts = corpus.tokens['train'], corpus.starts['train']
    if not starts[-1] < count <= len(train):
        least = f'more than {starts[-1]:,}, so that no domain is left out, and '
        raise UserError(
            f'config.data.train_tokens = {count}: expected 0 for all, or '
            f'{least if corpus.domains else ""}at most {len(train):,}, the tokens of train'
        )
    sizes = {split: size for split, size in corpus.bytes.items() if split != 'train'}
    if level == 'byte':
        sizes['train'] = count
    return dataclasses.replace(
        corpus,
        tokens=corpus.tokens | {'train': train[:count]},
        bytes=sizes,
        sha256=_sha256(f'{corpus.sha256} {count}'.encode()),
    )


def _check_length(source: str, split: str, text: Text, count: int) -> None:
    if count < 2:
        raise sources.find(source).refuse(
            f'{text.given}: the {split} text is empty or too short, expected at least two tokens. '
            f'Try a longer text, or a directory with a file for each split'
        )


def _sha256(*parts: bytes | np.ndarray) -> str:
    total, block = hashlib.sha256(), 2**22
    views = [
        np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        if isinstance(part, np.ndarray)
        else memoryview(part)
        for part in parts
    ]
    size = sum(len(view) for view in views)
    with progress.Work('hashing the text', size, 'MB', 1e6) as work:
        for view in views:
            for at in range(0, len(view), block):
                total.update(view[at : at + block])
                work.done += len(view[at : at + block])
    return total.hexdigest()

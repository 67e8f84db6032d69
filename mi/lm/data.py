"""Text → token ids → contiguous streams.

A corpus is three texts, train, valid and test. Levels: 'byte'; 'bpe', byte-level and lossless;
'word', words and punctuation marks of raw text; 'token', whatever stands between white space, for
corpora that come tokenised (WikiText, PTB). The last two end each line with <eos> and write
<unk> for what the training text does not hold often enough.
"""

import dataclasses
import hashlib
import json
import lzma
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata, resources
from typing import Literal, get_args

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from mi.config import UserError

Level = Literal['byte', 'bpe', 'word', 'token']
LEVELS = get_args(Level)
SPLITS = ('train', 'valid', 'test')

_AUSTEN = {  # title line as it stands in the file → split
    'EMMA': 'train',
    'MANSFIELD PARK': 'train',
    'NORTHANGER ABBEY': 'valid',
    'Persuasion': 'test',
    'PRIDE AND PREJUDICE': 'train',
    'SENSE AND SENSIBILITY': 'train',
}


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A tokenised corpus.

    Attributes:
      name: for messages.
      vocabulary: number of token ids.
      tokens: split → ids [N].
      bytes: split → length of its text in UTF-8.
      lossless: whether the tokens determine the text, so that bits per byte mean something.
      sha256: of the tokens of all splits; a run continues on the same tokens or not at all.
    """

    name: str
    vocabulary: int
    tokens: dict[str, np.ndarray]
    bytes: dict[str, int]
    lossless: bool
    sha256: str


def load(source: str, level: Level, vocabulary: int, cache: str = '') -> Corpus:
    """Reads and tokenises a corpus; the tokens are kept on disk and read from there next time.

    Args:
      source: 'austen', which comes with the package; a text file, of which the last tenth becomes
        valid and test; or a directory with one file for each of *train*, *valid* and *test*.
      level: see above.
      vocabulary: at most so many ids, for 'bpe', 'word' and 'token'.
      cache: directory for the tokens; '' for $MI_CACHE or ~/.cache/mi.

    Raises:
      UserError: if a file is missing, empty, ambiguous, or not UTF-8.
    """
    texts = austen() if source == 'austen' else _read(pathlib.Path(source).expanduser())
    for split, text in texts.items():
        if len(text.split()) < 2:
            raise UserError(f'config.data.source = {source!r}: the {split} text is empty')
    name = pathlib.Path(source).name
    sizes = {split: len(text.encode()) for split, text in texts.items()}
    if level == 'byte':
        tokens = {s: np.frombuffer(text.encode(), np.uint8) for s, text in texts.items()}
        return Corpus(name, 256, tokens, sizes, True, _sha256(*tokens.values()))

    recipe = json.dumps([level, vocabulary, metadata.version('tokenizers'), 1]).encode()
    key = _sha256(recipe, *(text.encode() for text in texts.values()))[:16]
    root = cache or os.environ.get('MI_CACHE') or '~/.cache/mi'
    directory = pathlib.Path(root).expanduser() / f'{name}-{level}-{key}'
    if not directory.exists():
        _build(directory, texts, level, vocabulary)
    meta = json.loads((directory / 'meta.json').read_text())
    tokens = {s: np.load(directory / f'{s}.npy', mmap_mode='r') for s in SPLITS}
    if _sha256(*tokens.values()) != meta['sha256']:
        raise UserError(f'the token files in {directory} are damaged; delete that directory')
    return Corpus(name, meta['vocabulary'], tokens, sizes, meta['lossless'], meta['sha256'])


def austen() -> dict[str, str]:
    """Six novels by Jane Austen, public domain: four to train, Northanger Abbey, Persuasion."""
    packed = resources.files('mi').joinpath('data/austen.txt.xz').read_bytes()
    lines = lzma.decompress(packed).decode().splitlines(keepends=True)
    titles = [(i, line.strip()) for i, line in enumerate(lines) if line.strip() in _AUSTEN]
    texts = dict.fromkeys(SPLITS, '')
    for (start, title), (end, _) in zip(titles, [*titles[1:], (len(lines), '')], strict=True):
        texts[_AUSTEN[title]] += ''.join(lines[start:end])
    return texts


class Stream:
    """Batches of a contiguous text, a pure function of the step: nothing to save, exact resume.

    B readers start evenly spaced in the text and each reads on, T tokens a step, around the whole
    text: a carried recurrent state always continues the text that it has read. N / (B·T) steps
    are an epoch, in which every token is read once.

    Args:
      tokens: [N].
      batch: B.
      length: T.
      seed: where in the text the first reader starts, so that seeds read in different order.
    """

    def __init__(self, tokens: np.ndarray, batch: int, length: int, seed: int):
        if len(tokens) < batch + 1:
            raise UserError(
                f'the training text has {len(tokens)} tokens, fewer than the batch of {batch}'
            )
        self._tokens, self._length = tokens, length
        first = np.random.default_rng(seed).integers(len(tokens))
        self._starts = first + np.arange(batch) * (len(tokens) // batch)

    def __getitem__(self, step: int) -> np.ndarray:
        """[T + 1, B]: rows 0…T−1 are the inputs, rows 1…T the targets."""
        rows = step * self._length + np.arange(self._length + 1)
        window = (self._starts[None, :] + rows[:, None]) % len(self._tokens)
        return self._tokens[window].astype(np.int32)


def segments(
    tokens: np.ndarray, batch: int, length: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The whole text once: inputs, targets and mask, each [T, B], of consecutive segments.

    The N − 1 predictions are split into B contiguous parts; parts are padded, masked with 0, to
    the same number of segments. State is to be carried from segment to segment.
    """
    predictions = len(tokens) - 1
    part = -(-predictions // batch)
    steps = -(-part // length)
    index = np.arange(batch)[None, :] * part + np.arange(steps * length)[:, None]  # [steps·T, B]
    inside = (index < predictions) & (np.arange(steps * length)[:, None] < part)
    index = np.where(inside, index, 0)
    for i in range(steps):
        rows = slice(i * length, (i + 1) * length)
        at = index[rows]
        yield (
            tokens[at].astype(np.int32),
            tokens[at + 1].astype(np.int32),
            inside[rows].astype(np.float32),
        )


def _read(path: pathlib.Path) -> dict[str, str]:
    if path.is_file():
        lines = _text(path).splitlines(keepends=True)
        a, b = int(len(lines) * 0.9), int(len(lines) * 0.95)
        parts = (lines[:a], lines[a:b], lines[b:])
        return {split: ''.join(part) for split, part in zip(SPLITS, parts, strict=True)}
    if not path.is_dir():
        raise UserError(
            f'config.data.source = {str(path)!r}: no such file or directory; give a text file, a '
            f"directory with train, valid and test files, or 'austen'"
        )
    texts = {}
    for split in SPLITS:
        found = sorted(f for f in path.iterdir() if split in f.name and f.is_file())
        if len(found) != 1:
            names = ', '.join(f.name for f in found) or 'none'
            raise UserError(f'{path}: expected one file with {split!r} in its name, found {names}')
        texts[split] = _text(found[0])
    return texts


def _text(file: pathlib.Path) -> str:
    try:
        with open(file, encoding='utf-8', newline='') as stream:
            return stream.read()
    except UnicodeDecodeError as error:
        raise UserError(f'{file} is not UTF-8 text (byte {error.start})') from error


def _build(directory: pathlib.Path, texts: dict[str, str], level: Level, size: int) -> None:
    """Trains the tokeniser on the training text and writes ids; the directory appears last."""
    pieces = {split: _pieces(text, level) for split, text in texts.items()}
    tokenizer = (_bpe if level == 'bpe' else _words)(level, size, pieces['train'])
    vocabulary = tokenizer.get_vocab_size()
    dtype = np.uint16 if vocabulary <= 2**16 else np.int32
    tokens, unknown = {}, 0
    for split, part in pieces.items():
        encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
        tokens[split] = np.concatenate([np.asarray(e.ids, dtype) for e in encoded])
        if level != 'bpe':
            known = sum(piece.split().count('<unk>') for piece in part)
            unknown += int((tokens[split] == tokenizer.token_to_id('<unk>')).sum()) - known
    meta = {
        'vocabulary': vocabulary,
        'lossless': level == 'bpe' or (level == 'token' and unknown == 0),
        'sha256': _sha256(*tokens.values()),
        'tokens': {split: len(ids) for split, ids in tokens.items()},
    }
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = pathlib.Path(tempfile.mkdtemp(prefix='.building-', dir=directory.parent))
    for split, ids in tokens.items():
        np.save(beside / f'{split}.npy', ids)
    tokenizer.save(str(beside / 'tokenizer.json'))
    (beside / 'meta.json').write_text(json.dumps(meta, indent=2) + '\n')
    try:
        os.rename(beside, directory)
    except OSError:  # another process built the same tokens meanwhile
        shutil.rmtree(beside)


def _bpe(level: Level, size: int, pieces: list[str]) -> tokenizers.Tokenizer:
    del level
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        pieces,
        trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _words(level: Level, size: int, pieces: list[str]) -> tokenizers.Tokenizer:
    """The `size` most frequent words; <unk> is one of them, or takes the place of the rarest."""
    tokenizer = tokenizers.Tokenizer(models.WordLevel({}, unk_token='<unk>'))
    if level == 'token':
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        words = tokenizers.Regex(r"<unk>|<eos>|[\w']+|[^\w\s]")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(words, 'removed', invert=True)
    # Not as a special token: where the text has the word <unk> too, the trainer would give it a
    # second id and leave a hole in the numbering.
    trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(pieces, trainer)
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    if '<unk>' not in vocabulary:
        kept = {word: i for word, i in vocabulary.items() if i < size - 1}
        tokenizer.model = models.WordLevel({**kept, '<unk>': len(kept)}, unk_token='<unk>')
    return tokenizer


def _pieces(text: str, level: Level) -> list[str]:
    """Parts that are tokenised apart, in parallel; each ends with a line."""
    lines = text.splitlines(keepends=True)
    if level != 'bpe':
        lines = [line.rstrip('\r\n') + ' <eos>\n' for line in lines]
    return [''.join(lines[i : i + 100]) for i in range(0, len(lines), 100)]


def _sha256(*parts: bytes | np.ndarray) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return total.hexdigest()

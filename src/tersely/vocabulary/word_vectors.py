"""Static vectors of words and tokens, learnt from a text in seconds and without a network, or read from a file.

Shapes: W words (or tokens), E coordinates, K pairs that stand together, V tokens of a vocabulary, T tokens of a text.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from tersely.checkpoint import read_header, read_tensor
from tersely.errors import DataError, UsageError
from tersely.vocabulary.initialise.protocol import Vectors
from tersely.vocabulary.pieces import Pieces

_WORD = re.compile(r"\w+|[^\w\s]+")
Array = NDArray[Any]
_CHUNK_TOKENS = 1 << 20
_MOST_TOKENS = 1 << 22
_HEADER = re.compile(rb"\d+ \d+\s*")


@dataclass(frozen=True, eq=False)
class Words:
    """Words and their vectors."""

    words: tuple[str, ...]
    vector_WE: Tensor
    """float32."""


def learn(
    sequences: Sequence[Tensor], count: int, *, dimensions: int = 100, window: int = 2, least: int = 3, seed: int = 0
) -> Tensor:
    """Vectors (count, E), float32, of ids from what stands near them; zeros for ids that come fewer than `least` times.

        PPMI(a, b) = max(0, log(n_ab N / (n_a n_b^0.75)) with n^0.75 scaled to a sum of N);  vectors = U_E sqrt(Sigma_E)

    of its truncated SVD (Levy, Goldberg and Dagan, TACL 2015), pairs at distance d counted (window - d + 1) / window
    times. With a small window tokens are alike that can stand in for one another, with a large one those of one theme.
    Of more than 4 million tokens every n-th sequence is read. Uses up to 24 bytes for each pair of ids that stand
    together, and 12 E bytes for each id. UsageError: a setting below 1; DataError: nothing stands together.
    """
    if dimensions < 1 or window < 1 or least < 1:
        raise UsageError(f"dimensions={dimensions}, window={window}, least={least}: expected 1 or more")
    read = sequences[:: max(1, -(-sum(map(len, sequences)) // _MOST_TOKENS))]
    key_K, together_K = _pairs(read, count, window)
    times = np.bincount(torch.cat([torch.empty(0, dtype=torch.int64), *read]).numpy(), minlength=count)
    frequent = times >= least
    kept = frequent[key_K // count] & frequent[key_K % count]
    key_K, together_K = key_K[kept], together_K[kept]
    if not len(key_K):
        raise DataError(
            f"no two of the tokens that come {least} times or more stand together in the text; give more text"
        )
    first_K, second_K = key_K // count, key_K % count
    first, second = (np.bincount(own, together_K, count) for own in (first_K, second_K))
    second = second**0.75 * (second.sum() / (second**0.75).sum())
    weight_K = np.log(together_K * first.sum() / (first[first_K] * second[second_K]))
    above = weight_K > 0
    places = torch.from_numpy(np.stack([first_K[above], second_K[above]]))
    weight = torch.from_numpy(weight_K[above]).float()
    matrix = torch.sparse_coo_tensor(places, weight, (count, count), check_invariants=True)
    return _leading(matrix.coalesce(), min(dimensions, int(frequent.sum())), seed)


def learn_words(texts: Sequence[str], *, dimensions: int = 100, least: int = 3, seed: int = 0) -> Words:
    """Vectors of the words of texts (runs of letters and digits, runs of other signs). DataError: too little text."""
    counted = Counter(word for text in texts for word in _WORD.findall(text))
    words = tuple(word for word, times in counted.items() if times >= least)
    number = {word: n for n, word in enumerate(words)}
    ids = (torch.tensor([number[w] for w in _WORD.findall(text) if w in number], dtype=torch.int64) for text in texts)
    return Words(words, learn(list(ids), len(words), dimensions=dimensions, least=least, seed=seed))


def read_words(path: Path) -> Words:
    """Vectors from a file: text of one word and its numbers a line (.vec, .txt; fastText's first line is skipped), or
    .safetensors with a tensor "vectors" and metadata "words", a JSON list.

    DataError: it cannot be read so, or holds what is no number.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file of word vectors; give a .vec or .safetensors")
    found = _from_safetensors(path) if path.suffix == ".safetensors" else _from_lines(path)
    if not bool(found.vector_WE.isfinite().all()):
        raise DataError(f"{path}: a vector is not finite; give another file")
    return found


def token_vectors(words: Words, pieces: Pieces) -> Vectors:
    """For each token the mean of the unit vectors of the words in whose cut it stands, in four writings: with and
    without a space before it, as it is and with a capital. Tokens in no word have none."""
    line: list[int] = []
    token: list[int] = []
    for n, word in enumerate(words.words):
        written = dict.fromkeys((word, word[:1].upper() + word[1:]))
        cuts = [set(pieces.cut((space + own).encode("utf-8"))) for own in written for space in ("", " ")]
        for cut in cuts:
            token.extend(cut)
            line.extend([n] * len(cut))
    sum_VE = torch.zeros((pieces.rows, words.vector_WE.shape[1]))
    unit_WE = normalize(words.vector_WE)
    step = _CHUNK_TOKENS // 4
    for first in range(0, len(token), step):
        part = slice(first, first + step)
        sum_VE.index_add_(0, torch.tensor(token[part]), unit_WE[line[part]])
    return Vectors(normalize(sum_VE))


def _pairs(sequences: Sequence[Tensor], count: int, window: int) -> tuple[Array, Array]:
    """first * count + second, rising, and how often the two stand together, both ways round."""
    keys: Array = np.empty(0, dtype=np.int64)
    times: Array = np.empty(0)
    for ids, line in _chunks(sequences):
        own: list[Array] = [keys]
        weight: list[Array] = [times]
        for distance in range(1, window + 1):
            same = line[:-distance] == line[distance:]
            key = ids[:-distance][same] * count + ids[distance:][same]
            distinct, many = np.unique(key, return_counts=True)
            own.append(distinct)
            weight.append(many * ((window - distance + 1) / window))
        keys, place = np.unique(np.concatenate(own), return_inverse=True)
        times = np.bincount(place, np.concatenate(weight), len(keys))
    back = keys % count * count + keys // count
    all_keys, place = np.unique(np.concatenate([keys, back]), return_inverse=True)
    return all_keys, np.bincount(place, np.concatenate([times, times]), len(all_keys))


def _chunks(sequences: Sequence[Tensor]) -> Iterator[tuple[Array, Array]]:
    """Ids, and which sequence each is of, of about a million tokens at a time."""
    waiting: list[Tensor] = []
    size = 0
    for n, ids in enumerate(sequences):
        waiting.append(ids)
        size += len(ids)
        if size >= _CHUNK_TOKENS or n == len(sequences) - 1:
            line = np.repeat(np.arange(len(waiting)), [len(each) for each in waiting])
            yield torch.cat(waiting).numpy(), line
            waiting, size = [], 0


def _leading(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """U sqrt(Sigma) of the largest singular values, by subspace iteration from a drawn start; (W, rank)."""
    drawn = torch.randn((matrix.shape[1], rank + 10), generator=torch.Generator().manual_seed(seed))
    other, basis = matrix.t().coalesce(), torch.linalg.qr(torch.sparse.mm(matrix, drawn)).Q
    for _ in range(3):
        across = torch.linalg.qr(torch.sparse.mm(other, basis)).Q
        basis = torch.linalg.qr(torch.sparse.mm(matrix, across)).Q
    small = torch.sparse.mm(other, basis)
    values, vectors = torch.linalg.eigh(small.t() @ small)
    leading: Tensor = basis @ vectors[:, -rank:].flip(1) * values[-rank:].flip(0).clamp(min=0).pow(0.25)
    return leading


def _from_lines(path: Path) -> Words:
    words: list[str] = []
    rows: list[Array] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and _HEADER.fullmatch(line):
                continue
            parts = line.rstrip().split(b" ")
            try:
                words.append(parts[0].decode("utf-8"))
                rows.append(np.array(parts[1:], dtype=np.float32))
            except (UnicodeDecodeError, ValueError) as error:
                raise DataError(f"{path}, line {number}: expected a word and numbers; give such a file") from error
            if not len(rows[-1]) or len(rows[-1]) != len(rows[0]):
                raise DataError(f"{path}, line {number}: {len(rows[-1])} numbers, but {len(rows[0])} in the first line")
    if not rows:
        raise DataError(f"{path}: no word vectors in it; give another file")
    return Words(tuple(words), torch.from_numpy(np.stack(rows)))


def _from_safetensors(path: Path) -> Words:
    specs, metadata = read_header(path)
    words = json.loads(metadata.get("words", "null"))
    if "vectors" not in specs or not isinstance(words, list):
        raise DataError(f'{path}: expected a tensor "vectors" and metadata "words", a JSON list')
    vector_WE = read_tensor(path, specs["vectors"]).float()
    if vector_WE.dim() != 2 or len(vector_WE) != len(words):
        raise DataError(f"{path}: {len(words)} words for vectors of shape {list(vector_WE.shape)}")
    return Words(tuple(map(str, words)), vector_WE)

"""Static vectors of words and tokens, learnt or read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tersely.errors import DataError, UsageError
from tersely.vocabulary.transplant import find_gap
from tersely.vocabulary.word_vectors import learn, learn_words, read_words, token_vectors
from tests.gaps import NEW, bpe, drawn, other, pieces


def test_words_in_the_same_places_are_alike() -> None:
    frames = [
        f"the {{}} {verb} the {place} ." for verb in ("ate", "saw", "took") for place in ("house", "road", "hill")
    ]
    texts = [frame.format(animal) for animal in ("cat", "dog") for frame in frames]
    texts += [f"we sing a {song} in {month} ." for song in ("song", "hymn") for month in ("may", "june", "july")]
    words = learn_words(texts * 3, dimensions=8, least=2)
    unit = torch.nn.functional.normalize(words.vector_WE)
    at = {word: unit[n] for n, word in enumerate(words.words)}
    assert at["cat"] @ at["dog"] > 0.8
    assert at["cat"] @ at["dog"] > at["cat"] @ at["hymn"] + 0.3
    assert at["song"] @ at["hymn"] > 0.8


def test_vectors_are_the_same_for_a_seed_and_zero_for_rare_ids() -> None:
    ids = [torch.randint(0, 30, (200,), generator=torch.Generator().manual_seed(n)) for n in range(4)]
    one, again = (learn([*ids, torch.tensor([30, 31])], 32, dimensions=6) for _ in range(2))
    assert torch.equal(one, again)
    assert one.shape == (32, 6)
    assert not bool(one[30:].any())
    assert bool(one[:30].any(1).all())


def test_a_token_has_the_mean_of_the_words_that_it_stands_in(tmp_path: Path) -> None:
    file = tmp_path / "words.vec"
    file.write_text("3 2\nab 1 0\nac 0 2\nzz 1 1\n")
    own = bpe(["a", "b", "c", "ab", "q"], [("a", "b")])
    found = token_vectors(read_words(file), own)
    torch.testing.assert_close(found.unit_VE[own.id_of("ab")], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(found.unit_VE[own.id_of("c")], torch.tensor([0.0, 1.0]))
    assert not bool(found.known_V[own.id_of("q")])


def test_vectors_come_from_safetensors_too(tmp_path: Path) -> None:
    file = tmp_path / "words.safetensors"
    save_file({"vectors": drawn(0, 2, 3)}, file, metadata={"words": json.dumps(["ab", "ac"])})
    found = read_words(file)
    assert found.words == ("ab", "ac")
    assert torch.equal(found.vector_WE, drawn(0, 2, 3))
    own = find_gap(pieces("byte-level"), other(), {"word_vectors"}, vectors=file)
    assert own.word_vectors is not None
    with pytest.raises(UsageError, match="uses no word vectors"):
        find_gap(pieces("byte-level"), other(), {"alignments"}, texts=NEW, vectors=file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no word vectors"),
        ("a 1 2\nb 1\n", "line 2"),
        ("a x y\n", "line 1"),
        ("a nan 1\n", "finite"),
        (None, "no such"),
    ],
)
def test_files_that_are_no_vectors_are_refused(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "words.vec"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        read_words(file)


def test_safetensors_without_words_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "words.safetensors"
    save_file({"vectors": drawn(0, 2, 3)}, file)
    with pytest.raises(DataError, match="metadata"):
        read_words(file)
    save_file({"vectors": drawn(0, 2, 3)}, file, metadata={"words": '["one"]'})
    with pytest.raises(DataError, match="1 words"):
        read_words(file)

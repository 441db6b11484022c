"""Text to sequences to micro-batches."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tersely.calibrate import (
    DOCUMENT_SEPARATOR,
    Sequences,
    documents,
    micro_batches,
    read_text,
    select,
    sequences,
)
from tersely.errors import DataError, UsageError


class Words:
    """A word is a token (its length is its id); with `bos`, id 99 comes first, and with `eos`, 98 last."""

    is_fast = True

    def __init__(self, bos: bool = True, eos: bool = False) -> None:
        self.bos, self.eos = bos, eos

    def __call__(self, text: str, *, return_offsets_mapping: bool, verbose: bool) -> dict[str, Any]:
        assert return_offsets_mapping
        assert not verbose
        words = list(re.finditer(r"\S+", text))
        ids = [99] * self.bos + [len(word.group()) for word in words] + [98] * self.eos
        offsets = [(0, 0)] * self.bos + [word.span() for word in words] + [(0, 0)] * self.eos
        return {"input_ids": ids, "offset_mapping": offsets}


class Counted(Words):
    """Counts the characters that it is asked to tokenize."""

    characters = 0

    def __call__(self, text: str, **named: bool) -> dict[str, Any]:
        self.characters += len(text)
        return super().__call__(text, **named)


class Slow(Words):
    """Cannot say where its tokens stand."""

    is_fast = False


def stories(*texts: str) -> str:
    return f"\n{DOCUMENT_SEPARATOR}\n".join(texts)


def of_lengths(lengths: list[int]) -> Sequences:
    ids = tuple(torch.arange(1, n + 1) for n in lengths)
    return Sequences(ids, "documents", tuple(lengths), "")


def test_documents_are_stripped_and_empty_ones_dropped() -> None:
    assert documents(stories("\n a b \n", "", "  ", "c")) == ("a b", "c")


def test_each_document_is_tokenized_alone_and_cut_at_the_context() -> None:
    data = sequences(stories("a bb ccc", "d", "ee ff gg hh"), Words(), context=4)
    assert data.kind == "documents"
    assert [ids.tolist() for ids in data.ids] == [[99, 1, 2, 3], [99, 1], [99, 2, 2, 2]]
    assert data.tokens == 10


def test_documents_of_one_token_are_dropped() -> None:
    assert len(sequences(stories("a", "b c"), Words(bos=False), context=4).ids) == 1


def test_samples_take_the_first_documents() -> None:
    text = stories("a b", "cc dd", "ee ff")
    taken = sequences(text, Words(), context=4, samples=2)
    assert [ids.tolist() for ids in taken.ids] == [[99, 1, 1], [99, 2, 2]]
    assert taken.sha256 == sequences(select(text, ":2"), Words(), context=4).sha256


def test_bytes_are_those_of_the_predicted_tokens() -> None:
    text = stories("éa bb c", "x")
    assert sequences(text, Words(), context=9).nbytes == (8, 1)
    assert sequences(text, Words(eos=True), context=9).nbytes == (8, 1)
    assert sequences(text, Words(bos=False), context=9).nbytes == (5,)
    assert sequences(text, Words(), context=3).nbytes == (6, 1)


def test_windows_are_consecutive_and_the_partial_one_is_dropped() -> None:
    data = sequences("a bb ccc dddd eeeee", Words(bos=False), context=2)
    assert data.kind == "windows"
    assert [ids.tolist() for ids in data.ids] == [[1, 2], [3, 4]]
    assert data.nbytes == (3, 5)


def test_a_text_shorter_than_one_window_is_one_window() -> None:
    assert [ids.tolist() for ids in sequences("a bb", Words(), context=100).ids] == [[99, 1, 2]]


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 5))
def test_sampled_windows_are_distinct_in_order_and_spread_evenly(count: int, samples: int, seed: int) -> None:
    text = " ".join("x" * (1 + i // 3) for i in range(3 * count))
    if samples > count:
        with pytest.raises(DataError, match=f"only {count} windows"):
            sequences(text, Words(bos=False), context=3, samples=samples, seed=seed)
        return
    taken = sequences(text, Words(bos=False), context=3, samples=samples, seed=seed)
    again = sequences(text, Words(bos=False), context=3, samples=samples, seed=seed)
    windows = [int(ids[0]) - 1 for ids in taken.ids]
    assert all(i * count // samples <= w < (i + 1) * count // samples for i, w in enumerate(windows))
    assert [ids.tolist() for ids in taken.ids] == [ids.tolist() for ids in again.ids]
    assert taken.sha256 == again.sha256


def test_of_a_very_long_text_only_the_windows_that_are_taken_are_tokenized() -> None:
    words = ["x" * (1 + i % 7) for i in range(700_000)]
    tokenizer = Counted()
    taken = sequences(" ".join(words), tokenizer, context=50, samples=8, seed=1)
    assert [len(ids) for ids in taken.ids] == [50] * 8
    assert tokenizer.characters < 20_000
    assert taken.sha256 == sequences(" ".join(words), Words(), context=50, samples=8, seed=1).sha256
    assert taken.sha256 != sequences(" ".join(words), Words(), context=50, samples=8, seed=2).sha256
    for ids, nbytes in zip(taken.ids, taken.nbytes, strict=True):
        assert int(ids[0]) == 99  # each window begins as a text of its own
        assert nbytes == sum(ids[1:].tolist()) + 49


def test_another_text_context_or_window_has_another_hash() -> None:
    text = "a bb ccc dddd eeeee ffffff"
    names = {
        sequences(text, Words(bos=False), context=2).sha256,
        sequences(text + " g", Words(bos=False), context=2).sha256,
        sequences(text, Words(bos=False), context=3).sha256,
        sequences(text, Words(bos=False), context=2, samples=2).sha256,
        sequences(text + DOCUMENT_SEPARATOR, Words(bos=False), context=2).sha256,
    }
    assert len(names) == 5


@pytest.mark.parametrize(("context", "samples"), [(1, None), (4, 0)])
def test_impossible_numbers_are_refused(context: int, samples: int | None) -> None:
    with pytest.raises(UsageError):
        sequences("a b c d e", Words(), context=context, samples=samples)


@pytest.mark.parametrize("text", [stories("a b", "c d"), "a b c d"], ids=["documents", "windows"])
def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"use a fast tokenizer \(a tokenizer\.json\)"):
        sequences(text, Slow(), context=4)


def test_too_few_documents_say_how_many_there_are_and_what_to_do() -> None:
    with pytest.raises(DataError, match=r"calibration asks for 5 samples, but there are only 2 .*samples=2"):
        sequences(stories("a b", "c d"), Words(), context=4, samples=5, purpose="calibration")


@pytest.mark.parametrize(
    ("part", "expected"), [(":1", "a"), ("-1:", "c"), ("1:3", "b c"), ("-2:-1", "b"), (":", "a b c")]
)
def test_a_slice_selects_documents_as_python_does(tmp_path: Path, part: str, expected: str) -> None:
    file = tmp_path / "text.txt"
    file.write_text(stories("a", "b", "c"))
    text = read_text(f"{file}[{part}]")
    assert documents(text) == tuple(expected.split())
    assert sequences(text, Words(), context=4).kind == "documents"


@pytest.mark.parametrize(
    ("content", "suffix", "error", "message"),
    [
        ("plain", "[:2]", DataError, "no <|endoftext|>"),
        (stories("a", "b"), "[5:]", DataError, "none of the 2 documents"),
        (stories("a", "b"), "[1]", UsageError, "not a slice"),
        (" \n", "", DataError, "holds no text"),
        (stories("", ""), "", DataError, "holds no text"),
    ],
)
def test_a_text_that_cannot_serve_says_why(
    tmp_path: Path, content: str, suffix: str, error: type[Exception], message: str
) -> None:
    file = tmp_path / "text.txt"
    file.write_text(content)
    with pytest.raises(error, match=re.escape(message)):
        read_text(f"{file}{suffix}")


def test_a_missing_file_and_one_that_is_not_utf8_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such text file"):
        read_text(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="byte 0 is not UTF-8"):
        read_text(tmp_path / "latin.txt")


@given(st.lists(st.integers(2, 12), min_size=1, max_size=30), st.integers(1, 40), st.booleans())
def test_micro_batches_hold_every_sequence_once_and_no_more_tokens_than_allowed(
    lengths: list[int], tokens: int, pad: bool
) -> None:
    data = of_lengths(lengths)
    batches = micro_batches(data, tokens=tokens, pad=pad, pad_id=77)
    assert sorted(i for batch in batches for i in batch.index) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch.index) == 1 or batch.ids_BL.numel() <= tokens
        assert pad or len({lengths[i] for i in batch.index}) == 1
        assert (batch.keep_BL is None) == (len({lengths[i] for i in batch.index}) == 1)
        for row, i in enumerate(batch.index):
            assert batch.ids_BL[row, : lengths[i]].tolist() == data.ids[i].tolist()
            assert batch.ids_BL[row, lengths[i] :].tolist() == [77] * (batch.ids_BL.shape[1] - lengths[i])
            if batch.keep_BL is not None:
                assert int(batch.keep_BL[row].sum()) == lengths[i]


def test_a_micro_batch_of_no_tokens_is_refused() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        micro_batches(of_lengths([2]), tokens=0, pad=True)


def test_the_standard_split_has_256_and_200_documents(assets: Path) -> None:
    sample = assets / "data/tinystories/sample.txt"
    assert len(documents(read_text(f"{sample}[:256]"))) == 256
    assert len(documents(read_text(f"{sample}[-200:]"))) == 200

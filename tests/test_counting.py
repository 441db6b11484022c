"""Counting tokens over files, and what the counts say."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tersely.errors import CheckpointError, DataError, OutputError, UsageError
from tersely.results.vocabulary import VocabularyChange, VocabularyUse
from tersely.vocabulary.corpus import identity, open_texts, read, units
from tersely.vocabulary.counting import Counted, count_texts, count_tokens, load
from tersely.vocabulary.fertility import compare, kinds, measure, renyi_efficiency
from tersely.vocabulary.training import METASPACE, pipeline
from tersely.vocabulary.training.bpe import BPE
from tests.vocabularies import TEXTS

PARAGRAPHS = [f"{text}\n" for text in TEXTS] * 3


@cache
def byte_level() -> Tokenizer:
    return BPE(min_frequency=1)(TEXTS, 400, special=("<s>",))


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    return file


@pytest.fixture
def groups(tmp_path: Path) -> dict[str, Sequence[Path]]:
    """Two groups: a large file and two small ones."""
    draw = random.Random(0)
    files = [tmp_path / name for name in ("large.txt", "small.jsonl", "small.json")]
    files[0].write_text("".join(draw.choices(PARAGRAPHS, k=200)), "utf-8")
    files[1].write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), "utf-8")
    files[2].write_text(json.dumps([TEXTS[0], {"text": TEXTS[1]}]), "utf-8")
    return {"large": files[:1], "small": files[1:]}


def plain(found: dict[str, Counted]) -> dict[str, tuple[list[int], int, int, int, int]]:
    return {
        group: (own.tokens_V.tolist(), own.bytes, own.characters, own.words, own.whole) for group, own in found.items()
    }


def test_the_counts_are_those_of_the_texts_whole(tokenizer: Path, groups: dict[str, Sequence[Path]]) -> None:
    found = count_tokens(tokenizer, groups)
    text = groups["large"][0].read_text("utf-8")
    ids = byte_level().encode(text).ids
    own = found["large"]
    assert own.tokens_V.dtype == np.int64
    assert own.tokens_V.tolist() == np.bincount(ids, minlength=len(own.tokens_V)).tolist()
    assert (own.bytes, own.characters) == (len(text.encode()), len(text))
    assert own.words == len(text.split())
    assert own.tokens == len(ids)
    small = [*TEXTS, *TEXTS[:2]]
    assert found["small"].tokens == sum(len(byte_level().encode(each).ids) for each in small)
    assert found["small"].texts == len(small)


@pytest.mark.parametrize("unit", [1000, 7001, 1 << 20])
def test_the_counts_do_not_depend_on_the_units(tokenizer: Path, groups: dict[str, Sequence[Path]], unit: int) -> None:
    assert plain(count_tokens(tokenizer, groups, unit=unit)) == plain(count_tokens(tokenizer, groups))


def test_the_counts_do_not_depend_on_the_processes(tokenizer: Path, groups: dict[str, Sequence[Path]]) -> None:
    told: list[float] = []
    found = count_tokens(tokenizer, groups, unit=20_000, processes=2, say=lambda _what, share: told.append(share))
    assert plain(found) == plain(count_tokens(tokenizer, groups))
    assert told == sorted(told)
    assert told[-1] == 1


@pytest.mark.parametrize("after", [1, 4])
def test_a_killed_count_goes_on_and_ends_with_the_same_counts(
    tokenizer: Path, groups: dict[str, Sequence[Path]], tmp_path: Path, after: int
) -> None:
    state, told = tmp_path / "count.npz", 0

    def kill(_what: str, _share: float) -> None:
        nonlocal told
        told += 1
        if told == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        count_tokens(tokenizer, groups, state=state, unit=5000, say=kill)
    found = count_tokens(tokenizer, groups, state=state, unit=5000, say=kill)
    assert plain(found) == plain(count_tokens(tokenizer, groups, unit=5000))
    assert told == sum(len(list(units(path, 5000))) for paths in groups.values() for path in paths)
    again = count_tokens(tokenizer, groups, state=state, unit=5000, say=kill)
    assert plain(again) == plain(found)
    assert told == sum(len(list(units(path, 5000))) for paths in groups.values() for path in paths)
    assert [path.name for path in tmp_path.glob("count*")] == ["count.npz"]


def test_a_state_of_something_else_is_refused(
    tokenizer: Path, groups: dict[str, Sequence[Path]], tmp_path: Path
) -> None:
    state = tmp_path / "count.npz"
    count_tokens(tokenizer, groups, state=state)
    with pytest.raises(OutputError, match="another size of unit"):
        count_tokens(tokenizer, groups, state=state, unit=5000)
    with pytest.raises(OutputError, match="other files or groups"):
        count_tokens(tokenizer, {"large": groups["large"]}, state=state)
    other = tmp_path / "other.json"
    BPE(min_frequency=1)(TEXTS, 401).save(str(other))
    with pytest.raises(OutputError, match="another tokenizer"):
        count_tokens(other, groups, state=state)
    groups["large"][0].write_text("another text", "utf-8")
    with pytest.raises(OutputError, match="other files or groups"):
        count_tokens(tokenizer, groups, state=state)
    for content in (b"", b"no state", b"PK\x03\x04 cut short"):
        state.write_bytes(content)
        with pytest.raises(OutputError, match="not the state of a count"):
            count_tokens(tokenizer, groups, state=state)
    with pytest.raises(OutputError, match="cannot be written"):
        count_tokens(tokenizer, groups, state=tmp_path / "none" / "count.npz")


def test_settings_of_a_count_that_cannot_be_are_refused(tokenizer: Path, groups: dict[str, Sequence[Path]]) -> None:
    with pytest.raises(UsageError, match="processes=0"):
        count_tokens(tokenizer, groups, processes=0)
    with pytest.raises(UsageError, match="unit=0"):
        count_tokens(tokenizer, groups, unit=0)
    with pytest.raises(UsageError, match="nothing to count"):
        count_tokens(tokenizer, {})
    with pytest.raises(UsageError, match="nothing to count"):
        count_tokens(tokenizer, {"large": []})
    with pytest.raises(CheckpointError, match=r"not a tokenizer\.json"):
        count_tokens(groups["small"][1], groups)


def test_texts_are_counted_whole_by_a_tokenizer_that_cuts_and_pads() -> None:
    cutting = Tokenizer.from_str(byte_level().to_str())
    cutting.enable_truncation(4)
    cutting.enable_padding(length=900)
    assert plain({"a": count_texts(cutting, TEXTS)}) == plain({"a": count_texts(byte_level(), TEXTS)})
    assert len(cutting.encode(TEXTS[0]).ids) == 900


# Files


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from(["word", "é日", " ", "\t", "\n", "\n\n", "\n  ", "longer line of text"])).map(
        "".join
    ),
    unit=st.integers(1, 60),
)
def test_the_units_of_a_text_are_the_text(tmp_path_factory: pytest.TempPathFactory, text: str, unit: int) -> None:
    file = tmp_path_factory.getbasetemp() / "units.txt"
    file.write_text(text + "x", "utf-8")
    parts = [list(read(each)) for each in units(file, unit)]
    assert "".join(each for part in parts for each in part) == text + "x"
    for before, after in pairwise(part for part in parts if part):
        assert before[-1].endswith("\n")
        assert not re.match(r"[\t\n]|  | \n", after[0])


@settings(max_examples=60, deadline=None)
@given(records=st.lists(st.text(min_size=1), min_size=1, max_size=8), unit=st.integers(1, 60))
def test_the_units_of_records_are_the_records(
    tmp_path_factory: pytest.TempPathFactory, records: list[str], unit: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "units.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in records), "utf-8")
    assert [text for each in units(file, unit) for text in read(each)] == records


def test_every_form_gives_the_same_texts(tmp_path: Path) -> None:
    texts = ["One text.", "Another\r\nof two lines é", "A third"]
    expected = [text.replace("\r\n", "\n") for text in texts]
    squad = {"data": [{"paragraphs": [{"context": texts[0], "qas": [{"question": text} for text in texts[1:]]}]}]}
    contents = {
        "documents.txt": "\n<|endoftext|>\n".join(texts),
        "records.jsonl": "\n".join(json.dumps({"text": text, "other": 1}) for text in expected),
        "list.json": json.dumps(expected),
        "squad.json": json.dumps(squad).replace("\\r\\n", "\\n"),
    }
    for name, content in contents.items():
        file, packed = tmp_path / name, tmp_path / f"{name}.gz"
        file.write_bytes(content.encode())
        packed.write_bytes(gzip.compress(content.encode()))
        assert list(open_texts([file])) == list(open_texts([packed])) == expected, name
    both = open_texts([tmp_path / "list.json", tmp_path / "records.jsonl"])
    assert list(both) == list(both) == 2 * expected


def test_a_large_text_is_read_in_blocks_and_a_mark_in_front_of_it_is_none(tmp_path: Path) -> None:
    file = tmp_path / "large.txt"
    text = "".join(f"line {n} of the text\n" for n in range(20_000))
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    blocks = list(open_texts([file]))
    assert "".join(blocks) == text
    assert 2 < len(blocks) < 20
    assert all(block.endswith("\n") for block in blocks)


def test_a_text_of_indented_lines_is_cut_too(tmp_path: Path) -> None:
    file = tmp_path / "indented.txt"
    text = "".join(f"\tline {n} of the text\n" for n in range(150_000))
    file.write_text(text, "utf-8")
    parts = [list(read(unit)) for unit in units(file, 1_000_000)]
    assert "".join(block for part in parts for block in part) == text
    assert len(parts) == 4
    assert all(parts)
    assert max(len(block) for part in parts for block in part) < 1_100_000


@pytest.mark.parametrize("packed", [False, True])
def test_bytes_that_are_no_text_are_named_with_file_and_place(tmp_path: Path, packed: bool) -> None:
    good = "".join(f"line {n} of the text\n" for n in range(20_000)).encode()
    for name, content, place in (
        ("early.txt", b"good \xff bad", 5),
        ("late.txt", good + b"ab\xc3(", len(good) + 2),
        ("record.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', 24),
        ("list.json", b'["a", "\xff"]', 7),
    ):
        file = tmp_path / (name + ".gz" * packed)
        file.write_bytes(gzip.compress(content) if packed else content)
        with pytest.raises(DataError, match=rf"{name}.*byte {place} is not UTF-8"):
            [text for unit in units(file, 5000) for text in read(unit)]


def test_files_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    def read_all(name: str, content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        list(open_texts([tmp_path / name]))

    for name, content, message in (
        ("a.csv", b"text", "unknown form"),
        ("a", b"text", "unknown form"),
        ("a.gz", b"text", "unknown form"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": "a"}\n{"word": "b"}\n', "line at byte 14"),
        ("a.jsonl", b'{"text": 3}\n', "line at byte 0"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line at byte 0"),
        ("a.json", b'{"rows": []}', "SQuAD"),
        ("a.json", b"[1]", "SQuAD"),
        ("a.json", b"{", "SQuAD"),
        ("a.txt.gz", b"not packed", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"text" * 100)[:20], "cannot be read"),
    ):
        with pytest.raises(DataError, match=message):
            read_all(name, content)
    with pytest.raises(DataError, match="no such text file"):
        open_texts([tmp_path / "none.txt"])
    with pytest.raises(DataError, match="no texts"):
        open_texts([])


def test_a_file_is_known_by_its_size_and_its_ends(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    found = set()
    for content in ("abc", "abcd", "xbcd", "abcx"):
        file.write_text(content)
        found.add(identity(file))
    assert len(found) == 4


# Measures


def words_that_are_tokens(text: str) -> int:
    """By definition: the words around which no token goes on, and within which there is one."""
    encoding, found, here = byte_level().encode(text, add_special_tokens=False), 0, 0
    for word in text.split():
        begin = text.index(word, here)
        here = begin + len(word)
        own = [span for span in encoding.offsets if span[0] < here and span[1] > begin]
        found += len(own) == 1 and own[0][1] == here and text[own[0][0] : begin].strip() == ""
    return found


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*TEXTS[0].split(), "é", "日", ".", "two", "newest", "\n"])).map(" ".join))
def test_words_that_are_one_token_are_counted(text: str) -> None:
    found = count_texts(byte_level(), [text])
    assert found.words == len(text.split())
    assert found.whole == words_that_are_tokens(text)


def test_measures_are_the_ratios_of_the_counts(tokenizer: Path, groups: dict[str, Sequence[Path]]) -> None:
    found = count_tokens(tokenizer, groups)
    use = measure("own", load(str(tokenizer)), found)
    assert [own.group for own in use.groups] == ["large", "small"]
    for name, own in zip((*found, "all"), (*use.groups, use.total), strict=True):
        counted = found["large"] + found["small"] if name == "all" else found[name]
        assert own.tokens == counted.tokens
        assert own.tokens_per_word == counted.tokens / counted.words
        assert own.bytes_per_token == counted.bytes / counted.tokens
        assert own.characters_per_token == counted.characters / counted.tokens
        assert own.whole_words == counted.whole / counted.words
        assert own.unknown == 0
        assert own.rows == np.count_nonzero(counted.tokens_V)
        assert 0 < own.renyi_efficiency < 1
    shared = np.count_nonzero(found["large"].tokens_V * found["small"].tokens_V)
    assert [own.rows - own.own_rows for own in use.groups] == [shared, shared]
    assert VocabularyUse.from_json(use.to_json()) == use


def test_bytes_and_unknown_words_are_told_apart() -> None:
    text = "日本 abc"
    found = measure("bytes", byte_level(), {"a": count_texts(byte_level(), [text])}).total
    partial = [i for i in byte_level().encode(text).ids if "\ufffd" in byte_level().decode([i])]
    assert found.byte_tokens == len(partial) / found.tokens > 0
    fallback = BPE(min_frequency=1)(["abc abd"], 266, around=pipeline(METASPACE))
    found = measure("fallback", fallback, {"a": count_texts(fallback, ["abc日"])}).total
    assert found.byte_tokens == 3 / found.tokens
    words = Tokenizer(models.WordLevel({"<unk>": 0, "abc": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    assert kinds(words)[0].tolist() == [True, False]
    # An unknown token that is known by the model alone.
    found = measure("words", words, {"a": count_texts(words, ["abc abd abe abc"])}).total
    assert found.unknown == 0.5
    assert found.whole_words == 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=40).filter(any))
def test_renyi_efficiency_is_a_share_that_falls_with_the_order(counts: list[int]) -> None:
    tokens_V = np.array(counts)
    found = [renyi_efficiency(tokens_V, order) for order in (0.5, 1, 1.0001, 2.5, 10)]
    assert all(-1e-9 <= each <= 1 + 1e-9 for each in found)
    assert all(after <= before + 1e-9 for before, after in pairwise(found))
    assert found[1] == pytest.approx(found[2], abs=1e-3)


def test_renyi_efficiency_is_its_formula() -> None:
    assert renyi_efficiency(np.full(7, 3)) == pytest.approx(1)
    assert renyi_efficiency(np.array([5, 0, 0])) == pytest.approx(0)
    assert renyi_efficiency(np.array([5])) == 0
    p = (0.5, 0.25, 0.25)
    expected = math.log(sum(each**2.5 for each in p)) / -1.5 / math.log(3)
    assert renyi_efficiency(np.array([2, 1, 1])) == pytest.approx(expected)
    with pytest.raises(UsageError, match="order=0"):
        renyi_efficiency(np.array([1, 2]), 0)
    with pytest.raises(DataError, match="no tokens"):
        renyi_efficiency(np.zeros(4, np.int64))


def test_two_tokenizers_are_compared_on_the_same_texts() -> None:
    small = BPE(min_frequency=1)(TEXTS, 300)
    uses = [
        measure(name, own, {"one": count_texts(own, TEXTS[:2]), "two": count_texts(own, TEXTS[2:])})
        for name, own in (("large", byte_level()), ("small", small))
    ]
    change = compare(*uses)
    assert change.tokens["one"] == uses[1].groups[0].tokens / uses[0].groups[0].tokens > 1
    assert set(change.tokens) == {"one", "two", "all"}
    assert VocabularyChange.from_json(change.to_json()) == change
    other = measure("small", small, {"one": count_texts(small, TEXTS[:1])})
    with pytest.raises(UsageError, match="the same texts"):
        compare(uses[0], other)
    with pytest.raises(UsageError, match="counts of 300 rows"):
        measure("large", byte_level(), {"one": count_texts(small, TEXTS)})
    with pytest.raises(DataError, match="no tokens"):
        measure("large", byte_level(), {"one": count_texts(byte_level(), [])})
    with pytest.raises(UsageError, match='"all"'):
        measure("large", byte_level(), {"all": count_texts(byte_level(), TEXTS)})


def test_the_languages_of_xquad_are_counted(assets: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    byte_level().save(str(file))
    found = count_tokens(file, {name: [assets / f"data/xquad/xquad.{name}.json"] for name in ("en", "th")})
    use = measure("small", load(str(file)), found)
    assert all(own.texts == 1430 for own in found.values())
    assert use.groups[0].byte_tokens < 0.01 < 0.5 < use.groups[1].byte_tokens

"""What tokens need to be made, and which are chosen: laws for tokenizers of every kind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tersely.errors import UsageError
from tersely.vocabulary.closure import Closure
from tersely.vocabulary.selection import Choice, choose, curve
from tersely.vocabulary.tokenizer import Vocabulary
from tests.vocabularies import KINDS, SPECIAL, TEXTS, counted, read, text_of

MERGED = [kind for kind in KINDS if kind not in ("unigram", "unigram with bytes", "wordpiece")]
FEW = settings(max_examples=12, deadline=None)


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Vocabulary]:
    return {kind: read(tmp_path_factory.mktemp("of-a-kind"), text_of(kind)) for kind in KINDS}.__getitem__


def counts_of(vocabulary: Vocabulary, texts: Iterable[str] = TEXTS) -> torch.Tensor:
    tokenizer = Tokenizer.from_str(json.dumps(vocabulary.plain["tokenizer.json"]))
    return counted(vocabulary, (i for text in texts for i in tokenizer.encode(text).ids))


def bpe(vocab: list[str], merges: list[tuple[str, str]], **rest: Any) -> str:
    return str(Tokenizer(models.BPE({token: i for i, token in enumerate(vocab)}, merges, **rest)).to_str())


def names(vocabulary: Vocabulary, ids: Iterable[int] | None) -> set[str]:
    return {str(vocabulary.tokens[i]) for i in ids or ()}


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=st.integers(0, 2**32))
def test_a_closure_is_closed_grows_with_its_tokens_and_leaves_out_only_what_nothing_makes(
    kind: str, of_kind: Callable[[str], Vocabulary], seed: int
) -> None:
    vocabulary, draw = of_kind(kind), random.Random(seed)
    closure = Closure(vocabulary)
    more = draw.sample(sorted(vocabulary.ids.values()), 60)
    closed = closure.closed(more)
    assert closure.closed(closed) == closed
    assert closure.closed(more[:30]) <= closed
    assert closure.closed(reversed(more)) == closed
    assert set(more) - closed == {i for i in more if closure.parts(i) is None}


@pytest.mark.parametrize("kind", MERGED)
def test_every_token_that_merges_make_is_given_for_some_text(kind: str, of_kind: Callable[[str], Vocabulary]) -> None:
    """And what no merges make is given for none: the model alone, on the token's own string, says so."""
    vocabulary = of_kind(kind)
    closure = Closure(vocabulary)
    model = Tokenizer.from_str(json.dumps(vocabulary.plain["tokenizer.json"])).model
    for token, i in vocabulary.model_ids.items():
        if vocabulary.prefix or vocabulary.suffix or i in vocabulary.atoms | vocabulary.added_ids:
            continue
        found = [piece.id for piece in model.tokenize(token)] == [i]
        assert found == (closure.parts(i) is not None), token


def test_the_parts_of_a_token_are_those_that_its_merges_pass_through(tmp_path: Path) -> None:
    merges = [("l", "l"), ("h", "e"), ("ll", "o"), ("he", "l"), ("he", "llo"), ("hel", "lo"), ("o", "o")]
    vocabulary = read(tmp_path, bpe([*"helo", "ll", "he", "llo", "hel", "hello", "lo", "oo"], merges))
    parts = Closure(vocabulary).parts(vocabulary.ids["hello"])
    assert names(vocabulary, parts) == {*"helo", "ll", "he", "llo", "hello"}
    assert Closure(vocabulary).parts(vocabulary.ids["lo"]) is None, "no merge makes it"


def test_of_a_merge_that_is_there_twice_the_later_place_counts_as_the_loader_has_it(tmp_path: Path) -> None:
    merges = [("a", "b"), ("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    text = bpe([*"abc", "ab", "bc", "abc"], merges)
    vocabulary = read(tmp_path, text)
    assert names(vocabulary, Closure(vocabulary).parts(5)) == {*"abc", "bc", "abc"}
    plain = json.loads(text)
    plain["model"]["vocab"], plain["model"]["merges"] = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4}, merges[:3]
    assert Tokenizer.from_str(json.dumps(plain)).encode("abc").tokens == ["a", "bc"]


def test_marks_of_a_words_inside_and_end_are_read_as_the_model_puts_them(tmp_path: Path) -> None:
    merges = [("l", "##o"), ("##w", "##s@"), ("lo", "##ws@")]
    vocab = ["l", "##o", "##w", "##s@", "lo", "##ws@", "lows@", "##lo", "s@"]
    text = bpe(vocab, merges, continuing_subword_prefix="##", end_of_word_suffix="@")
    vocabulary = read(tmp_path, text)
    assert Tokenizer.from_str(text).encode("lows").tokens == ["lows@"]
    closure = Closure(vocabulary)
    assert names(vocabulary, closure.parts(6)) == {"l", "##o", "##w", "##s@", "lo", "##ws@", "lows@"}
    assert closure.parts(7) is None
    assert names(vocabulary, closure.parts(8)) == {"s@"}


def test_a_whole_word_that_no_merges_make_needs_nothing_else(of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind("whole words")
    word = vocabulary.ids["Ġslowest"]
    assert Closure(vocabulary).closed([word]) == {word}


def test_a_long_token_needs_all_that_it_is_made_of(tmp_path: Path) -> None:
    vocab = ["=" * n for n in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    vocabulary = read(tmp_path, bpe(vocab, [(half, half) for half in vocab[:-1]]))
    assert Closure(vocabulary).closed([9]) == set(range(10))


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(seed=st.integers(0, 2**32), share=st.floats(0, 1), multiple=st.sampled_from([1, 8, 16]))
def test_a_budget_is_counted_after_the_closure_and_filled_with_real_tokens(
    kind: str, of_kind: Callable[[str], Vocabulary], seed: int, share: float, multiple: int
) -> None:
    vocabulary = of_kind(kind)
    draw = random.Random(seed)
    words = " ".join(TEXTS).split()
    counts = counts_of(vocabulary, [" ".join(draw.choices(words, k=30))])
    smallest = smallest_of(vocabulary, counts, multiple)
    reachable = len(Closure(vocabulary).closed(vocabulary.ids.values()))
    rows = smallest + int(share * (reachable - smallest))
    choice = choose(vocabulary, counts, rows=rows, multiple=multiple)
    assert choice.rows == rows // multiple * multiple
    kept = choice.kept_old_ids_K.tolist()
    assert kept == sorted(Closure(vocabulary).closed(kept))
    assert {*vocabulary.added_ids, *vocabulary.atoms} <= set(kept)
    assert choice.coverage == pytest.approx(int(counts[kept].sum()) / int(counts.sum()))


def smallest_of(vocabulary: Vocabulary, counts: torch.Tensor, multiple: int = 1) -> int:
    with pytest.raises(UsageError, match=r"rows=1: at least \d+ must stay") as error:
        choose(vocabulary, counts, rows=1, multiple=multiple)
    return int(str(error.value).split("at least ")[1].split()[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_smallest_number_of_rows_that_is_named_can_be_had(kind: str, of_kind: Callable[[str], Vocabulary]) -> None:
    counts = counts_of(of_kind(kind))
    smallest = smallest_of(of_kind(kind), counts)
    choice = choose(of_kind(kind), counts, rows=smallest)
    assert choice.rows == choice.mandatory == smallest
    with pytest.raises(UsageError, match=f"at least {smallest} "):
        choose(of_kind(kind), counts, rows=smallest - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_rises_to_all_and_its_points_are_the_choices(kind: str, of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind(kind)
    counts = counts_of(vocabulary)
    found = curve(vocabulary, counts)
    assert bool((found.rows_P.diff() > 0).all())
    assert bool((found.coverage_P.diff() >= 0).all())
    assert found.coverage_P[-1] == 1
    for point in range(0, len(found.rows_P), 25):
        share = float(found.coverage_P[point])
        assert choose(vocabulary, counts, coverage=share).rows <= int(found.rows_P[point])
        assert choose(vocabulary, counts, rows=int(found.rows_P[point])).coverage == pytest.approx(share)


@pytest.mark.parametrize("kind", KINDS)
def test_a_coverage_is_reached_and_a_minimum_count_keeps_all_that_have_it(
    kind: str, of_kind: Callable[[str], Vocabulary]
) -> None:
    vocabulary = of_kind(kind)
    counts = counts_of(vocabulary)
    choices = [choose(vocabulary, counts, coverage=share) for share in (0.5, 0.9, 0.99, 1.0)]
    assert all(c.coverage >= share for c, share in zip(choices, (0.5, 0.9, 0.99, 1.0), strict=True))
    assert [c.rows for c in choices] == sorted(c.rows for c in choices)
    often = choose(vocabulary, counts, minimum_count=2)
    assert {i for i, count in enumerate(counts.tolist()) if count >= 2} <= set(often.kept_old_ids_K.tolist())
    rounded = choose(vocabulary, counts, minimum_count=2, multiple=16)
    assert rounded.rows == often.rows + -often.rows % 16
    assert set(often.kept_old_ids_K.tolist()) <= set(rounded.kept_old_ids_K.tolist())


def test_tokens_are_taken_by_what_each_row_that_they_add_brings(tmp_path: Path) -> None:
    """abcd occurs 5 times, but needs ab and cd, which do not occur: 5/3 a row; ef occurs twice: 2 a row."""
    merges = [("a", "b"), ("c", "d"), ("ab", "cd"), ("e", "f")]
    vocabulary = read(tmp_path, bpe([*"abcdef", "ab", "cd", "abcd", "ef"], merges))
    counts = torch.tensor([1, 1, 1, 1, 1, 1, 0, 0, 5, 2])

    def more(rows: int) -> set[str]:
        kept = choose(vocabulary, counts, rows=rows).kept_old_ids_K.tolist()
        return names(vocabulary, kept) - set("abcdef")

    assert more(7) == {"ef"}
    assert more(9) == {"ef", "ab", "cd"}, "abcd does not fit: two more are filled in"
    assert more(10) == {"ef", "ab", "cd", "abcd"}


def test_what_a_token_shares_with_others_counts_once(tmp_path: Path) -> None:
    """abc brings ab with it, 10 for two rows; once ab is there, it brings 1, less than de."""
    merges = [("a", "b"), ("ab", "c"), ("d", "e")]
    vocabulary = read(tmp_path, bpe([*"abcde", "ab", "abc", "de"], merges))
    counts = torch.tensor([1, 1, 1, 1, 1, 9, 1, 4])
    kept = choose(vocabulary, counts, rows=7).kept_old_ids_K.tolist()
    assert names(vocabulary, kept) - set("abcde") == {"ab", "de"}


def test_tokens_that_nothing_makes_are_left_out_and_named(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, bpe([*"ab", "ab", "ba"], [("a", "b")]))
    choice = choose(vocabulary, torch.tensor([4, 4, 2, 3]), rows=3, keep=["ba"])
    assert choice.unreachable == ("ba",)
    assert choice.kept_old_ids_K.tolist() == [0, 1, 2]
    with pytest.raises(UsageError, match=r"coverage=1\.0 cannot be reached: all tokens that can stay hold 0\.769"):
        choose(vocabulary, torch.tensor([4, 4, 2, 3]), coverage=1.0)


def test_single_characters_of_the_text_stay_where_there_are_no_bytes(of_kind: Callable[[str], Vocabulary]) -> None:
    for kind in ("suffix", "prefix", "prefix and suffix", "unigram", "wordpiece"):
        vocabulary = of_kind(kind)
        text = "lowest river"
        kept = names(
            vocabulary, choose(vocabulary, counts_of(vocabulary, [text]), coverage=0.01).kept_old_ids_K.tolist()
        )
        forms = {f + c + b for c in "lowestriv" for f in ("", vocabulary.prefix) for b in ("", vocabulary.suffix)}
        assert forms & vocabulary.model_ids.keys() <= kept
        assert "q" not in kept


def test_added_tokens_go_where_that_is_asked_for_and_nothing_names_them(of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind("byte-level")
    counts = counts_of(vocabulary)
    rows = smallest_of(vocabulary, counts)
    choice = choose(vocabulary, counts, rows=rows - 4, drop=["<|*|>", "lowest"])
    assert choice.rows == rows - 4
    assert names(vocabulary, vocabulary.ids.values()) - names(vocabulary, choice.kept_old_ids_K.tolist()) >= {
        "<|a|>",
        "<|b|>",
        "<|c|>",
        "lowest",
    }


def test_a_token_that_a_file_names_stays_even_if_nothing_makes_it(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, bpe([*"ab", "ab", "ba"], [("a", "b")]), config={"eos_token_id": 3})
    assert choose(vocabulary, torch.tensor([4, 4, 2, 0]), rows=3).kept_old_ids_K.tolist() == [0, 1, 3]


def test_an_added_token_that_others_are_made_of_goes_only_with_them(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_str(bpe([*"abc", "ab", "abc", "bc"], [("a", "b"), ("ab", "c"), ("b", "c")]))
    tokenizer.add_special_tokens(["ab"])
    vocabulary = read(tmp_path, str(tokenizer.to_str()))
    counts = torch.ones(6, dtype=torch.int64)
    assert choose(vocabulary, counts, minimum_count=1, drop=["ab"]).kept_old_ids_K.tolist() == [0, 1, 2, 5]
    with pytest.raises(UsageError, match="drop: ab cannot go: tokens that stay are made of it"):
        choose(vocabulary, counts, rows=5, drop=["ab"], keep=["abc"])


def test_what_was_asked_to_stay_does(of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind("all splits")
    counts = counts_of(vocabulary, ["a"])
    word = "\u2581quick"
    assert vocabulary.ids[word] not in choose(vocabulary, counts, coverage=1.0).kept_old_ids_K
    assert vocabulary.ids[word] in choose(vocabulary, counts, coverage=1.0, keep=[word]).kept_old_ids_K


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give one of rows, coverage and minimum_count"),
        ({"rows": 400, "coverage": 0.5}, "give one of rows, coverage and minimum_count"),
        ({"coverage": 1.5}, "coverage=1.5: expected a share"),
        ({"minimum_count": 0}, "minimum_count=0: expected 1 or more"),
        ({"rows": 400, "multiple": 0}, "multiple=0: expected 1 or more"),
        ({"rows": 100_000}, r"rows=100000: the tokenizer has only \d+ tokens that can stay"),
        ({"rows": 400, "keep": ["no such"]}, "keep: 'no such' is no token"),
        ({"rows": 400, "drop": ["the"]}, "drop: 'the' is no added token"),
        ({"rows": 400, "drop": ["<s>"]}, r"drop: '<s>' cannot go: tokenizer.json: post_processor \(<s>\) names it"),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused(
    given: dict[str, Any], message: str, of_kind: Callable[[str], Vocabulary]
) -> None:
    vocabulary = of_kind("byte-level")
    with pytest.raises(UsageError, match=message):
        choose(vocabulary, counts_of(vocabulary), **given)


@pytest.mark.parametrize("kind", ["all splits", "unigram", "wordpiece", "suffix"])
def test_the_unknown_token_stays(kind: str, of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind(kind)
    assert vocabulary.unknown in choose(vocabulary, counts_of(vocabulary, ["a"]), coverage=0.1).kept_old_ids_K
    with pytest.raises(UsageError, match=r"drop: '<unk>' cannot go: tokenizer\.json: the model names it"):
        choose(vocabulary, counts_of(vocabulary), coverage=0.1, drop=["<unk>"])


def test_without_counts_nothing_is_chosen(of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind("byte-level")
    with pytest.raises(UsageError, match="no token was counted"):
        choose(vocabulary, torch.zeros(vocabulary.rows, dtype=torch.int64), rows=300)
    with pytest.raises(ValueError, match="counts of 489 tokens"):
        choose(vocabulary, torch.zeros(3, dtype=torch.int64), rows=300)


def test_one_piece_with_the_lowest_score_stays(of_kind: Callable[[str], Vocabulary]) -> None:
    vocabulary = of_kind("unigram")
    choice: Choice = choose(vocabulary, counts_of(vocabulary, ["a"]), coverage=0.1)
    assert min(vocabulary.scores) in {vocabulary.scores[i] for i in choice.kept_old_ids_K.tolist()}
    assert set(SPECIAL) <= names(vocabulary, choice.kept_old_ids_K.tolist())

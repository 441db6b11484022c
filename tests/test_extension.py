"""New tokens for a tokenizer: what it has keeps its ids, and texts without new tokens their cuts."""

from __future__ import annotations

import json
from functools import cache
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

from tersely.calibrate import documents, read_text
from tersely.errors import CheckpointError, DataError, UsageError
from tersely.vocabulary.extension import Extension, extend, recut
from tests.vocabularies import KINDS, TEXTS, text_of

NEW = (
    "der schnelle braune Fuchs springt über den faulen Hund, und der langsamste der neuen breiten Flüsse fließt",
    "żółta łódź płynie; żółta łódź płynie 2024 2024 razy, żółta łódź",
    "der Fuchs und der Hund und der Fluss und die Schnelle und die Faulen",
)
WORDS = [*(word for text in (*TEXTS, *NEW) for word in text.split()), "lowest", "<|a|>", "  ", "żó", "fuchsbau", "7"]


def loaded(plain: Any) -> Tokenizer:
    return Tokenizer.from_str(plain if isinstance(plain, str) else json.dumps(plain))


@cache
def extended(kind: str) -> Extension:
    return extend(json.loads(text_of(kind)), NEW, 40)


def spans(tokenizer: Tokenizer, text: str) -> list[tuple[int, int]]:
    return list(tokenizer.encode(text, add_special_tokens=False).offsets)


@pytest.mark.parametrize("kind", KINDS)
def test_no_id_changes_and_new_ones_follow(kind: str) -> None:
    old, found = loaded(text_of(kind)), extended(kind)
    new, before = loaded(found.plain), old.get_vocab()
    after = new.get_vocab()
    assert {token: after[token] for token in before} == before
    assert [after[token] for token in found.tokens] == [*range(found.first, found.first + len(found.tokens))]
    assert after.keys() == before.keys() | set(found.tokens)
    assert len(after) == new.get_vocab_size() == max(after.values()) + 1
    assert 10 < len(found.tokens) <= 40
    text = " ".join(NEW)
    assert new.encode(text).ids[0] == old.encode(text).ids[0]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_like_those_it_learnt_from_get_shorter(kind: str) -> None:
    found = extended(kind)
    counted = recut(loaded(text_of(kind)), loaded(found.plain), NEW)
    assert counted.changed == counted.texts == 3
    assert (counted.tokens_before, counted.tokens_after) == (found.tokens_before, found.tokens_after)
    # Where words were unknown as a whole, knowing them takes more tokens.
    if kind not in ("wordpiece", "suffix", "prefix", "prefix and suffix"):
        assert found.tokens_after < 0.8 * found.tokens_before
    tokenizers = [loaded(plain) for plain in (text_of(kind), found.plain)]
    unknown = [each.encode(" ".join(NEW)).ids.count(each.get_vocab()["<unk>"]) for each in tokenizers]
    assert unknown[1] <= unknown[0]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS) | st.text("abdeornstu łü12,", max_size=8), max_size=6))
def test_a_text_without_new_tokens_is_cut_as_before(kind: str, words: list[str]) -> None:
    old, found = loaded(text_of(kind)), extended(kind)
    new, text = loaded(found.plain), " ".join(words)
    one, other = (tokenizer.encode(text) for tokenizer in (old, new))
    if not set(other.tokens) & set(found.tokens):
        assert one.ids == other.ids


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("wordpiece", "byte-level, some bytes")])
@settings(max_examples=60, deadline=None)
@given(words=st.lists(st.sampled_from(WORDS) | st.text("abdeornstu12,", max_size=8), max_size=6))
def test_old_tokens_are_only_joined(kind: str, words: list[str]) -> None:
    """Every border between new tokens was one between old ones, but where a character was unknown."""
    text = " ".join(words)
    old, new = loaded(text_of(kind)), loaded(extended(kind).plain)
    whole = old.encode(text, add_special_tokens=False)
    if old.token_to_id("<unk>") not in whole.ids and not any(token.startswith("<0x") for token in whole.tokens):
        assert set(spans(new, text)) <= {(a, b) for a, _ in whole.offsets for _, b in whole.offsets}
        assert len(spans(new, text)) <= len(whole.offsets)


@settings(max_examples=200, deadline=None)
@given(word=st.text("abdefghilnorstuwż", min_size=1, max_size=9))
def test_no_known_word_becomes_unknown_to_a_wordpiece(word: str) -> None:
    old, new = loaded(text_of("wordpiece")), loaded(extended("wordpiece").plain)
    if "<unk>" not in old.encode(word).tokens:
        assert "<unk>" not in new.encode(word).tokens


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_can_be_made(kind: str) -> None:
    found = extended(kind)
    model = found.plain["model"]
    if model["type"] == "BPE":
        old = json.loads(text_of(kind))["model"]["merges"]
        assert model["merges"][: len(old)] == old
        inner = model["continuing_subword_prefix"] or ""
        added = model["merges"][len(old) :]
        made = {a + b.removeprefix(inner) for a, b in added}
        letters = {token for token in found.tokens if len(token.removeprefix(inner).removesuffix("</w>")) == 1}
        assert made | letters == set(found.tokens)
        assert all(part in model["vocab"] for merge in added for part in merge)
    else:
        tokens = loaded(found.plain).encode_batch(NEW)
        stand = {token for each in tokens for token in each.tokens}
        inner = model.get("continuing_subword_prefix") or ""
        assert {token for token in found.tokens if len(token.removeprefix(inner)) > 1} <= stand


def test_the_most_frequent_pair_comes_first_and_all_its_joins_are_counted() -> None:
    """Against a recount of everything for each merge."""
    plain = json.loads(text_of("byte-level"))
    found = extend(plain, NEW, 12)
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model = loaded(plain).model
    words = [
        [token.value for token in model.tokenize(word)] for text in NEW for word, _ in signs.pre_tokenize_str(text)
    ]
    for token in found.tokens:
        pairs: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in pairwise(word):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        assert "".join(best) == token
        for word in words:
            for at in range(len(word) - 1):
                if tuple(word[at : at + 2]) == best:
                    word[at : at + 2] = [token]


def test_the_same_texts_give_the_same_tokens_and_leave_the_tokenizer_alone() -> None:
    plain = json.loads(text_of("unigram"))
    first, second = extend(plain, NEW, 30), extend(plain, NEW, 30)
    assert first.plain == second.plain
    assert plain == json.loads(text_of("unigram"))


@pytest.mark.parametrize("kind", ["all splits", "unigram", "suffix"])
def test_characters_that_it_lacks_come_first_and_are_at_most_half(kind: str) -> None:
    found = extend(json.loads(text_of(kind)), NEW, 8)
    letters = [token for token in found.tokens if len(token.removesuffix("</w>")) == 1]
    assert letters
    assert list(found.tokens[: len(letters)]) == letters
    assert len(letters) <= 4
    assert any("characters" in note for note in found.notes)
    assert set(letters) & set(loaded(found.plain).encode("ż ó ł ą " + " ".join(NEW)).tokens)


def test_digits_stay_apart_where_the_tokenizer_keeps_them_apart() -> None:
    plain = json.loads(text_of("all splits"))
    plain["model"]["merges"] = [m for m in plain["model"]["merges"] if not any(c.isdigit() for c in "".join(m))]
    kept = {
        t: None for t in plain["model"]["vocab"] if t.startswith("<0x") or len(t) == 1 or not any(map(str.isdigit, t))
    }
    plain["model"]["vocab"] = {token: n for n, token in enumerate(kept)}
    found = extend(plain, ["2024 2024 2024 2025 der der der"] * 3, 10)
    assert not any(any(map(str.isdigit, token)) for token in found.tokens)


def test_sentencepiece_joins_no_words_and_no_words_with_signs() -> None:
    found = extend(json.loads(text_of("all splits")), ["der, der, der, und, und, der und der und"] * 3, 20)
    assert all("\u2581" not in token[1:] and not {",", "d"} <= set(token) for token in found.tokens)


def test_texts_without_pairs_give_none() -> None:
    with pytest.raises(DataError, match="give more text"):
        extend(json.loads(text_of("byte-level")), ["", " "], 10)


def test_text_that_stays_unknown_is_joined_with_nothing() -> None:
    found = extend(json.loads(text_of("unigram")), ["ab \u2603\u2604 \u2605cd"] * 9, 4)
    assert all(token.isascii() or len(token) == 1 for token in (t.strip("\u2581") for t in found.tokens) if token)
    loaded(found.plain)


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(count: int) -> None:
    with pytest.raises(UsageError, match="count="):
        extend(json.loads(text_of("byte-level")), NEW, count)


def test_models_of_whole_words_are_refused() -> None:
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    with pytest.raises(UsageError, match="WordLevel"):
        extend(json.loads(tokenizer.to_str()), NEW, 5)


def test_a_broken_tokenizer_is_refused() -> None:
    plain = json.loads(text_of("byte-level"))
    plain["model"]["merges"].append(["no", "such parts"])
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        extend(plain, NEW, 5)


def test_an_added_token_that_only_stands_alone_is_refused_where_it_would_be_found_within_words() -> None:
    plain = json.loads(text_of("wordpiece"))
    own = {"single_word": True, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
    plain["added_tokens"].append({"id": 400, "content": "fuchs", **own})
    with pytest.raises(CheckpointError, match="single_word"):
        extend(plain, NEW, 5)


def test_a_wordpiece_without_the_letters_that_it_needs_says_how_many() -> None:
    plain = json.loads(text_of("wordpiece"))
    kept = [token for token in plain["model"]["vocab"] if not (token.startswith("##") and len(token) == 3)]
    plain["model"]["vocab"] = {token: n for n, token in enumerate(kept)}
    with pytest.raises(UsageError, match="letters inside words"):
        extend(plain, NEW, 2)
    found = extend(plain, NEW, 80)
    assert {"##a", "##e"} <= set(found.tokens)


def test_progress_rises() -> None:
    said: list[float] = []
    extend(json.loads(text_of("byte-level")), NEW, 20, say=lambda _, share: said.append(share))
    assert list(accumulate(said, max)) == said
    assert said[-1] <= 1


def test_a_published_tokenizer_is_extended_for_another_language(assets: Path) -> None:
    plain = json.loads((assets / "data" / "tokenizers" / "llama2-hf" / "tokenizer.json").read_text("utf-8"))
    thai = json.loads((assets / "data" / "xquad" / "xquad.th.json").read_text("utf-8"))
    texts = [paragraph["context"] for article in thai["data"][:6] for paragraph in article["paragraphs"]]
    found = extend(plain, texts, 100)
    assert (found.first, len(found.tokens)) == (32000, 100)
    assert found.tokens_after < 0.7 * found.tokens_before
    stories = documents(read_text(assets / "data" / "tinystories" / "sample.txt"))[:40]
    assert recut(loaded(plain), loaded(found.plain), stories).changed == 0

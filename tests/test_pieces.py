"""Tokens as the bytes that they stand for, whatever tokenizer writes them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tersely.errors import CheckpointError
from tersely.vocabulary.pieces import match, read_pieces, special_roles
from tests.gaps import COMPARED, other, pieces
from tests.vocabularies import KINDS, TEXTS, text_of


@pytest.mark.parametrize("kind", COMPARED)
def test_a_tokenizer_matches_itself_token_by_token(kind: str) -> None:
    own = pieces(kind)
    assert match(own, own) == {i: i for i in own.by_id}


@pytest.mark.parametrize("kind", ["byte-level", "whole words", "all splits"])
@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=12) | st.sampled_from(TEXTS).map(str.encode))
def test_any_bytes_are_cut_into_tokens_that_stand_for_them(kind: str, data: bytes) -> None:
    own = pieces(kind)
    assert b"".join(own.by_id[i].data for i in own.cut(data)) == data


@pytest.mark.parametrize("kind", COMPARED)
def test_a_text_is_the_bytes_of_its_tokens(kind: str) -> None:
    own = pieces(kind)
    text = "the quick brown fox"
    ids = own.tokenizer.encode(text, add_special_tokens=False).ids
    assert b"".join(own.by_id[i].data for i in ids).strip().decode() == text
    for word in text.split():
        alone = f" {word}" if own.writing == "bytes" else word
        ids = own.tokenizer.encode(alone, add_special_tokens=False).ids
        assert own.cut(f" {word}".encode()) == tuple(ids)


@pytest.mark.parametrize("kind", [kind for kind in COMPARED if not kind.startswith("byte-level")])
def test_words_match_across_ways_of_writing_them(kind: str) -> None:
    own, theirs = pieces(kind), pieces("byte-level")
    found = match(own, theirs)
    same = [(own.by_id[old], theirs.by_id[new]) for new, old in found.items()]
    assert all(a.data == b.data and a.special == b.special for a, b in same)
    words = {piece.data for piece, _ in same if piece.data.startswith(b" ") and len(piece.data) > 3}
    assert len(words) >= 3


def test_bytes_by_number_match_bytes_by_sign_but_signs_come_first() -> None:
    spaced, signs = pieces("all splits"), pieces("byte-level")
    ids, back = spaced.tokenizer.get_vocab(), match(signs, spaced)
    assert signs.by_id[back[ids["<0xC3>"]]].data == b"\xc3"
    assert signs.by_id[back[ids["<0x65>"]]].token == signs.by_id[back[ids["e"]]].token == "e"
    assert spaced.by_id[match(spaced, signs)[signs.tokenizer.get_vocab()["e"]]].token == "e"


def test_special_tokens_match_by_role_then_by_name_and_never_by_text() -> None:
    found = match(pieces("byte-level"), other())
    assert pieces("byte-level").by_id[found[0]].token == "<s>"
    assert pieces("byte-level").by_id[found[1]].token == "</s>"
    assert 2 not in found
    no_roles = read_pieces(Tokenizer.from_str(text_of("unigram")))
    back = match(pieces("byte-level"), no_roles)
    assert back[no_roles.tokenizer.get_vocab()["<pad>"]] == pieces("byte-level").tokenizer.get_vocab()["<pad>"]


def test_roles_are_read_in_either_form() -> None:
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": None, "mask_token": "[none]"}
    assert special_roles(config, {"<s>": 3, "</s>": 4}) == {"bos": 3, "eos": 4}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "fix" in kind])
def test_a_bpe_that_marks_words_is_refused(kind: str) -> None:
    with pytest.raises(CheckpointError, match="cannot be compared"):
        pieces(kind)

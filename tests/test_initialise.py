"""Rows for tokens that a model has none for: what each way must give, and what all of them must leave alone."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from tersely.errors import CheckpointError, DataError, UsageError
from tersely.vocabulary.extension import extend
from tersely.vocabulary.initialise import INITIALISERS, Gap, Initialiser, Tables, Vectors, Weights
from tersely.vocabulary.initialise.align import Align
from tersely.vocabulary.initialise.cw2v import CW2V, Mixture
from tersely.vocabulary.initialise.focus import Focus, sparsemax
from tersely.vocabulary.initialise.mean import Mean
from tersely.vocabulary.initialise.merge import Merge
from tersely.vocabulary.initialise.multivariate import Multivariate
from tersely.vocabulary.initialise.ofa import OFA, factors, primitives
from tersely.vocabulary.initialise.omp import OMP, pursue
from tersely.vocabulary.initialise.random_normal import RandomNormal
from tersely.vocabulary.initialise.token_adapt import TokenAdapt
from tersely.vocabulary.pieces import Pieces, match, read_pieces, special_roles
from tersely.vocabulary.transplant import Transplant, find_gap, transplant
from tersely.vocabulary.word_vectors import learn, learn_words, read_words, token_vectors
from tests.vocabularies import KINDS, TEXTS, text_of

D = 12
NEW = (
    "the quicker rivers flow wider than the slowest of the newer dogs, and the others gather their feathers together",
    "brown foxes jump quickly over the lazy rivers; newer rivers flow slowly over wider lands and lower hills",
    "quicker feathers and wider lands and quickly slowest foxes gather lower hills over the newer others",
)
COMPARED = [kind for kind in KINDS if "fix" not in kind]
SMALL: dict[type[Initialiser], Initialiser] = {
    CW2V: CW2V(rank=16, steps=4, batch=32),
    OMP: OMP(atoms=8),
}
METHODS = [SMALL.get(method, method()) for method in INITIALISERS]
CONVEX = [method for method in METHODS if method.convex]
named = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@cache
def pieces(kind: str) -> Pieces:
    tokenizer = Tokenizer.from_str(text_of(kind))
    ids = tokenizer.get_vocab()
    return read_pieces(tokenizer, {"bos": ids["<s>"], "eos": ids["</s>"]})


@cache
def other(count: int = 420) -> Pieces:
    """A byte-level BPE of other texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=count,
        special_tokens=["[BOS]", "[EOS]", "[NEW]"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*NEW] * 3, trainer)
    return read_pieces(tokenizer, {"bos": 0, "eos": 1})


@cache
def gap(kind: str = "byte-level") -> Gap:
    needs = {need for method in METHODS for need in method.needs}
    return find_gap(pieces(kind), other(), needs, texts=[*NEW] * 4)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tables(kind: str = "byte-level", *, tied: bool = False, dtype: torch.dtype = torch.float32) -> Tables:
    rows = pieces(kind).rows
    return Tables((drawn(0, rows, D) + 0.2).to(dtype), None if tied else drawn(1, rows, D).to(dtype))


def donor() -> Tables:
    return Tables(drawn(2, other().rows, 20), drawn(3, other().rows, 20))


def moved(method: Initialiser, own: Gap | None = None, given: Tables | None = None, **rest: Any) -> Transplant:
    if "donor" in method.needs:
        rest.setdefault("donor", donor())
    return transplant(own or gap(), given or tables(), method, **rest)


# Tokens as bytes.


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


# All methods.


@named
def test_shared_tokens_keep_their_rows_bit_for_bit_and_others_get_finite_ones(method: Initialiser) -> None:
    given = tables(dtype=torch.bfloat16)
    found = moved(method, given=given, bias_V=drawn(5, len(given.embedding_VD)).bfloat16())
    assert found.head_MD is not None
    assert found.bias_M is not None
    assert given.head_VD is not None
    assert found.embedding_MD.shape == found.head_MD.shape == (other().rows, D)
    assert found.embedding_MD.dtype == found.head_MD.dtype == found.bias_M.dtype == torch.bfloat16
    new = (found.copied_M >= 0).nonzero()[:, 0]
    old = found.copied_M[new]
    assert len(new) == found.copied == len(gap().match) > 200
    assert torch.equal(found.embedding_MD[new], given.embedding_VD[old])
    assert torch.equal(found.head_MD[new], given.head_VD[old])
    assert all(bool(own.isfinite().all()) for own in (found.embedding_MD, found.head_MD, found.bias_M))
    assert found.copied + found.initialised + len(found.fallen) + found.empty == other().rows
    assert found.initialised > 10
    assert bool((found.embedding_MD[gap().missing_N] != 0).any(1).all())


@named
def test_the_same_tokenizer_changes_nothing(method: Initialiser) -> None:
    needs = method.needs
    own = find_gap(pieces("byte-level"), pieces("byte-level"), needs, texts=TEXTS * 4)
    given = tables()
    found = transplant(own, given, method, donor=given if "donor" in needs else None)
    assert torch.equal(found.embedding_MD, given.embedding_VD)
    assert found.head_MD is not None
    assert given.head_VD is not None
    assert torch.equal(found.head_MD, given.head_VD)
    assert (found.initialised, found.fallen, found.empty) == (0, (), 0)


@named
def test_a_seed_gives_the_same_rows_again(method: Initialiser) -> None:
    one, again, another = (moved(method, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(one.embedding_MD, again.embedding_MD)
    if method.name in ("random_normal", "multivariate", "cw2v"):
        assert not torch.equal(one.embedding_MD, another.embedding_MD)
        assert one.head_MD is not None
        assert not torch.equal(one.embedding_MD, one.head_MD)


@named
def test_a_tied_head_stays_tied(method: Initialiser) -> None:
    assert moved(method, given=tables(tied=True)).head_MD is None


@pytest.mark.parametrize("method", CONVEX, ids=lambda method: method.name)
def test_no_new_token_wins_over_all_old_ones(method: Initialiser) -> None:
    """Rows within the hull of old rows, with the bias that belongs to them: greedy decoding stays as it was."""
    bias_V, given = drawn(5, pieces("byte-level").rows), tables()
    found = moved(method, given=given, bias_V=bias_V, fallback=Multivariate(scale=0.0))
    hidden_TD = 3 * drawn(9, 500, D)
    for new, old, more, before in (
        (found.embedding_MD, given.embedding_VD, None, None),
        (found.head_MD, given.head_VD, found.bias_M, bias_V),
    ):
        assert new is not None
        assert old is not None
        old_TV, new_TM = hidden_TD @ old.t(), hidden_TD @ new.t()
        if more is not None and before is not None:
            old_TV, new_TM = old_TV + before, new_TM + more
        assert bool((new_TM[:, gap().missing_N].amax(1) <= old_TV.amax(1) + 1e-4).all())


@pytest.mark.parametrize("method", CONVEX, ids=lambda method: method.name)
def test_weights_of_a_convex_method_are_shares(method: Initialiser) -> None:
    rule = moved(method).rules.head
    if isinstance(rule, Mixture):
        share_NV = rule.share_NV(0, len(rule.covered_N))
        assert bool((share_NV >= 0).all())
        torch.testing.assert_close(share_NV.sum(1), torch.ones(len(share_NV)))
        return
    assert isinstance(rule, Weights)
    assert bool((rule.weight_P >= 0).all())
    total_N = rule(torch.ones(pieces("byte-level").rows, 1))[:, 0]
    torch.testing.assert_close(total_N, rule.covered_N.float())
    assert int(rule.covered_N.sum()) > 10


@pytest.mark.parametrize("method", [m for m in CONVEX if m.name != "cw2v"], ids=lambda method: method.name)
def test_weights_serve_every_table_by_token(method: Initialiser) -> None:
    found, given = moved(method), tables()
    rule = found.rules.embedding
    dense_NV = rule(torch.eye(pieces("byte-level").rows))
    covered = rule.covered_N
    rows_ND = found.embedding_MD[gap().missing_N]
    torch.testing.assert_close(rows_ND[covered], (dense_NV @ given.embedding_VD)[covered], rtol=1e-4, atol=1e-5)


def test_weights_in_pieces_are_weights_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rule, matrix_VD = moved(Mean()).rules.embedding, tables().embedding_VD
    whole = rule(matrix_VD)
    monkeypatch.setattr("tersely.vocabulary.initialise.protocol.CHUNK_BYTES", 4 * D * 7)
    torch.testing.assert_close(rule(matrix_VD), whole, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(0.1, 20))
def test_rows_at_the_mean_add_no_more_than_their_number_to_the_sum(seed: int, size: float) -> None:
    """0 <= log Z' - log Z <= log(1 + N / V), by Jensen."""
    given = tables()
    rule = Multivariate(scale=0.0)(gap(), given, None, 0).head
    assert given.head_VD is not None
    hidden_TD = size * drawn(seed, 20, D).double()
    old_TV = hidden_TD @ given.head_VD.double().t()
    new_TN = hidden_TD @ rule(given.head_VD).double().t()
    more = torch.cat([old_TV, new_TN], 1).logsumexp(1) - old_TV.logsumexp(1)
    assert bool((more >= 0).all())
    assert bool((more <= torch.tensor(1 + new_TN.shape[1] / old_TV.shape[1]).double().log() + 1e-5).all())


def test_what_a_method_has_no_answer_for_falls_back_and_is_named() -> None:
    own = find_gap(pieces("byte-level"), other(), {"alignments"}, texts=NEW[:1])
    found = moved(Align(), own, fallback=Mean())
    assert found.fallen
    assert found.initialised + len(found.fallen) == len(own.missing_N)
    means = moved(Mean(), own, fallback=Multivariate(scale=0.0))
    assert torch.equal(found.embedding_MD[list(found.fallen)], means.embedding_MD[list(found.fallen)])
    # A special token has no pieces either.
    torch.testing.assert_close(found.embedding_MD[2], tables().embedding_VD.mean(0))
    assert not torch.equal(moved(Align(), own).embedding_MD, found.embedding_MD)


def test_padding_is_the_mean_row() -> None:
    found, given = moved(Mean(), rows=448), tables()
    assert found.empty == 448 - other().rows
    torch.testing.assert_close(found.embedding_MD[-found.empty :], given.embedding_VD.mean(0).expand(found.empty, -1))
    with pytest.raises(UsageError, match="rows=100"):
        moved(Mean(), rows=100)


@pytest.mark.parametrize("kind", COMPARED)
def test_an_extended_tokenizer_keeps_every_row_in_its_place(kind: str) -> None:
    found = extend(json.loads(text_of(kind)), NEW, 20)
    own = find_gap(pieces(kind), read_pieces(Tokenizer.from_str(json.dumps(found.plain)), pieces(kind).roles), ())
    given, before = tables(kind), pieces(kind).rows
    made = transplant(own, given, Mean())
    assert torch.equal(made.copied_M[:before], torch.arange(before))
    assert torch.equal(made.embedding_MD[:before], given.embedding_VD)
    assert made.missing_N.tolist() == [*range(found.first, found.first + len(found.tokens))]
    merges = own.new.merges[len(own.old.merges or ()) :] if own.new.merges else ()
    for first, second in merges:
        made_id, parts = own.new.id_of(first + second), [own.old.id_of(part) for part in (first, second)]
        if made_id is not None and None not in parts:
            row = given.embedding_VD[torch.tensor(parts)].mean(0)
            torch.testing.assert_close(made.embedding_MD[made_id], row, rtol=1e-4, atol=1e-5)


# Each method.


def test_the_mean_is_that_of_the_pieces_that_the_old_tokenizer_has() -> None:
    found, given = moved(Mean()), tables()
    for i in gap().missing_N.tolist()[3:40]:
        text = other().tokenizer.decode([i])
        ids = pieces("byte-level").tokenizer.encode(text, add_special_tokens=False).ids
        if pieces("byte-level").by_id[ids[0]].data and not other().by_id[i].special:
            torch.testing.assert_close(found.embedding_MD[i], given.embedding_VD[ids].mean(0))


def bpe(vocabulary: list[str], merges: list[tuple[str, str]]) -> Pieces:
    tokenizer = Tokenizer(models.BPE({token: n for n, token in enumerate(vocabulary)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return read_pieces(tokenizer)


def shares(method: Initialiser, own: Gap, token: str) -> dict[str, float]:
    """Old token -> weight in the row of a new one."""
    rule = method(own, Tables(torch.eye(own.old.rows)), None, 0).embedding
    n = own.missing_N.tolist().index(own.new.id_of(token))
    row = rule(torch.eye(own.old.rows))[n]
    return {own.old.by_id[i].token: round(float(row[i]), 5) for i in row.nonzero()[:, 0].tolist()}


def test_merging_halves_the_weight_at_each_merge_and_averages_over_ways_to_make_a_token() -> None:
    old = bpe(["a", "b", "c", "d"], [])
    own = find_gap(old, bpe(["a", "b", "c", "d", "ab", "abc", "abcd"], [("a", "b"), ("ab", "c"), ("abc", "d")]), ())
    assert shares(Merge(), own, "abcd") == {"a": 0.125, "b": 0.125, "c": 0.25, "d": 0.5}
    ways = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    own = find_gap(old, bpe(["a", "b", "c", "d", "ab", "bc", "abc"], ways), ())
    assert shares(Merge(), own, "abc") == {"a": 0.375, "b": 0.25, "c": 0.375}
    own = find_gap(bpe(["a", "b"], []), bpe(["a", "b", "x", "ax", "ab"], [("a", "x"), ("a", "b")]), ())
    assert transplant(own, Tables(drawn(0, 2, 3)), Merge()).fallen == (2, 3)


def test_merging_needs_merges() -> None:
    with pytest.raises(UsageError, match="merges of a BPE"):
        moved(Merge(), find_gap(pieces("byte-level"), pieces("unigram"), ()))


def test_aligning_counts_what_stood_in_a_tokens_place() -> None:
    old = bpe(["a", "b", "c", "ab", "bc"], [("b", "c"), ("a", "b")])
    new = bpe(["a", "b", "c", "ab", "abc"], [("a", "b"), ("ab", "c")])
    own = find_gap(old, new, {"alignments"}, texts=["abc", "abc"])
    assert own.alignments == ({(0, 4): 2},)
    assert shares(Align(), own, "abc") == {"a": 0.5, "bc": 0.5}
    given = replace(own, alignments=({(0, 4): 3, (3, 2): 1},), cuts=((3, 2),))
    assert shares(Align(), given, "abc") == {"a": 0.375, "bc": 0.375, "c": 0.125, "ab": 0.125}
    assert shares(Align(with_mean=True), given, "abc")["ab"] == pytest.approx(4 / 14, abs=1e-4)
    within = find_gap(bpe(["a", "b", "ab"], [("a", "b")]), bpe(["a", "b", "c"], []), {"alignments"}, texts=["ab"])
    assert within.alignments == ({},)


def test_a_token_within_an_old_one_is_aligned_with_it() -> None:
    old, new = bpe(["a", "b", "c", "abc", "bc"], [("b", "c"), ("a", "bc")]), bpe(["a", "b", "c", "ab"], [("a", "b")])
    own = find_gap(old, new, {"alignments"}, texts=["abc"])
    assert own.alignments == ({(3,): 1},)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 300), scale=st.floats(0.01, 10))
def test_sparsemax_is_the_nearest_point_of_the_simplex(seed: int, size: int, scale: float) -> None:
    score = scale * drawn(seed, 3, size).double()
    top, place = sparsemax(score)
    share = torch.zeros_like(score).scatter(1, place, top)
    torch.testing.assert_close(share.sum(1), torch.ones(3).double())
    assert bool((share >= 0).all())
    # The score is above tau by the share where that is positive, and not above tau elsewhere.
    tau = (score - share).masked_fill(share <= 0, -torch.inf).amax(1, keepdim=True)
    torch.testing.assert_close(share, (score - tau).clamp(min=0), rtol=0, atol=1e-8)


def test_sparsemax_has_its_limits() -> None:
    equal, _ = sparsemax(torch.zeros(1, 200))
    torch.testing.assert_close(equal, torch.full((1, 200), 1 / 200))
    apart, place = sparsemax(100 * torch.arange(8.0)[None])
    assert (apart > 0).sum() == 1
    assert place[0, 0] == 7


def vectors_of(rows: dict[int, list[float]], count: int) -> Vectors:
    made = torch.zeros(count, 2)
    for i, row in rows.items():
        made[i] = torch.tensor(row) / torch.tensor(row).norm()
    return Vectors(made)


def small_gap() -> Gap:
    """a, b, c shared; ab new, which is like b, less like c."""
    old, new = bpe(["a", "b", "c"], []), bpe(["a", "b", "c", "ab"], [("a", "b")])
    known = {0: [1.0, 0.0], 1: [0.0, 1.0], 2: [-1.0, 0.2]}
    theirs = vectors_of({**known, 3: [0.1, 1.0]}, 4)
    return replace(find_gap(old, new, ()), token_vectors=theirs, word_vectors=(vectors_of(known, 3), theirs))


def test_focus_mixes_few_similar_tokens() -> None:
    own = small_gap()
    cosines = own.token_vectors.unit_VE[:3] @ own.token_vectors.unit_VE[3]  # type: ignore[union-attr]
    tau = (float(cosines[1] + cosines[0] + cosines[2]) - 1) / 3
    if tau > float(cosines.min()):
        tau = (float(cosines[1] + cosines[0]) - 1) / 2
    expected = {name: round(max(float(c) - tau, 0), 5) for name, c in zip("abc", cosines, strict=True)}
    assert shares(Focus(), own, "ab") == pytest.approx({k: v for k, v in expected.items() if v}, abs=1e-4)


@pytest.mark.parametrize("method", [OFA(temperature=1e-4), TokenAdapt(share=1.0, temperature=1e-4)])
def test_a_temperature_near_zero_takes_the_nearest_token(method: Initialiser) -> None:
    assert shares(method, small_gap(), "ab") == {"b": 1.0}


def test_a_high_temperature_takes_all_neighbours_alike() -> None:
    assert shares(OFA(neighbours=2, temperature=1e6), small_gap(), "ab") == {"a": 0.5, "b": 0.5}


def test_token_adapt_is_its_pieces_or_its_neighbours_or_both() -> None:
    own = small_gap()
    local, around, both = (shares(TokenAdapt(share=share), own, "ab") for share in (0.0, 1.0, 0.3))
    assert local.keys() == {"a", "b"}
    assert around.keys() == {"a", "b", "c"}
    assert local["b"] > local["a"]
    for token in both:
        assert both[token] == pytest.approx(0.7 * local.get(token, 0) + 0.3 * around.get(token, 0), abs=1e-4)
    assert shares(TokenAdapt(share=1.0, threshold=0.5), own, "ab") == {"b": 1.0}
    assert shares(TokenAdapt(share=0.0, temperature=1e-3), own, "ab")["b"] > 0.99


def test_token_adapt_takes_what_there_is() -> None:
    own = small_gap()
    assert shares(TokenAdapt(), replace(own, cuts=((),)), "ab") == shares(TokenAdapt(share=1.0), own, "ab")
    old, new = own.word_vectors  # type: ignore[misc]
    unknown = replace(own, word_vectors=(old, Vectors(new.unit_VE * torch.tensor([1.0, 1, 1, 0])[:, None])))
    assert shares(TokenAdapt(), unknown, "ab") == {"a": 0.5, "b": 0.5}


@pytest.mark.parametrize("rank", [1, 5, D])
def test_primitives_lose_what_lies_beyond_their_rank(rank: int) -> None:
    rows_VD = drawn(4, 60, D)
    coordinates_VR, primitives_RD = primitives(rows_VD, rank)
    assert (coordinates_VR.shape, primitives_RD.shape) == ((60, rank), (rank, D))
    lost = (rows_VD - coordinates_VR @ primitives_RD).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(rows_VD)[rank:].square().sum(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(coordinates_VR.t() @ coordinates_VR, torch.eye(rank), rtol=0, atol=1e-4)
    torch.testing.assert_close(factors(rows_VD, rank).decode(), coordinates_VR @ primitives_RD, rtol=0, atol=1e-4)


def test_new_tokens_have_the_same_sums_of_coordinates_as_of_rows() -> None:
    given, rule = tables(), moved(OFA()).rules.embedding
    coordinates_VR, primitives_RD = primitives(given.embedding_VD, D)
    torch.testing.assert_close(rule(coordinates_VR) @ primitives_RD, rule(given.embedding_VD), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [0, D + 1])
def test_ranks_that_rows_do_not_have_are_refused(rank: int) -> None:
    with pytest.raises(UsageError, match="rank="):
        primitives(drawn(0, 40, D), rank)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), atoms=st.integers(1, 12))
def test_pursuit_fits_best_on_what_it_took(seed: int, atoms: int) -> None:
    wanted, have = drawn(seed, 6, 16), drawn(seed + 1, 40, 16) * torch.linspace(0.3, 3, 40)[:, None]
    place, weight = pursue(wanted, have, atoms)
    assert all(len(set(row)) == atoms for row in place.tolist())
    for own, taken, found in zip(wanted, place, weight, strict=True):
        best = torch.linalg.lstsq(have[taken].t().double(), own.double()[:, None]).solution[:, 0]
        torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-4)
    first = (wanted @ have.t()).abs().argmax(1)
    assert torch.equal(place[:, 0], first)


def test_more_atoms_never_fit_worse() -> None:
    wanted, have = drawn(0, 10, 16), drawn(1, 60, 16)
    left = []
    for atoms in (1, 2, 4, 8, 16):
        place, weight = pursue(wanted, have, atoms)
        left.append((wanted - torch.einsum("nk,nkd->nd", weight, have[place])).norm(dim=1))
    assert all(bool((after <= before + 1e-4).all()) for before, after in pairwise(left))
    assert bool((left[-1] < 1e-3).all())


def test_pursuit_recovers_sums_of_few_orthogonal_atoms_and_takes_no_more() -> None:
    have = torch.linalg.qr(drawn(0, 24, 24)).Q * torch.linspace(1, 3, 24)[:, None]
    true = torch.zeros(5, 24)
    for n in range(5):
        true[n, torch.randperm(24, generator=torch.Generator().manual_seed(n))[:4]] = drawn(n, 4) + 3
    place, weight = pursue(true @ have, have, 9)
    torch.testing.assert_close(torch.zeros(5, 24).scatter_add(1, place, weight), true, rtol=1e-4, atol=1e-4)


def test_more_atoms_than_coordinates_stay_finite() -> None:
    place, weight = pursue(drawn(0, 4, 6), torch.cat([drawn(1, 10, 6)] * 3), 20)
    assert bool(weight.isfinite().all())
    assert place.shape == (4, 20)


def test_omp_gives_what_a_linear_map_from_donor_to_model_would() -> None:
    map_ED = drawn(7, 20, D)
    theirs = donor()
    given = tables()
    rows = given.embedding_VD.clone()
    for new, old in gap().match.items():
        rows[old] = theirs.embedding_VD[new] @ map_ED
    found = moved(OMP(atoms=20), given=Tables(rows), donor=theirs)
    missing = gap().missing_N
    torch.testing.assert_close(found.embedding_MD[missing], theirs.embedding_VD[missing] @ map_ED, rtol=1e-2, atol=1e-2)


def test_omp_uses_the_donors_head_for_the_head_and_covers_only_what_the_donor_has() -> None:
    theirs = donor()
    found = moved(OMP(atoms=8), donor=theirs)
    assert found.rules.embedding is not found.rules.head
    cut = Tables(theirs.embedding_VD[:-10])
    assert moved(OMP(atoms=8), donor=cut).fallen == tuple(i for i in gap().missing_N.tolist() if i >= other().rows - 10)


def test_a_mixture_begins_with_the_mean_and_trains_within_the_hull() -> None:
    given = tables()
    begun = moved(CW2V(rank=8, steps=0, start=0.0))
    expected = given.embedding_VD.mean(0).expand(len(gap().missing_N), -1)
    covered = begun.rules.embedding.covered_N
    torch.testing.assert_close(begun.embedding_MD[gap().missing_N][covered], expected[covered], rtol=1e-4, atol=1e-5)
    trained = moved(CW2V(rank=8, steps=30, start=0.0, learning_rate=0.05))
    assert not torch.allclose(trained.embedding_MD, begun.embedding_MD)
    assert isinstance(trained.rules.embedding, Mixture)


def test_training_a_mixture_makes_neighbours_fit() -> None:
    """A new token that only ever stands beside `a` comes to fit what fits `a`, more than what fits `b`."""
    old, new = bpe(["a", "b", "c", "d"], []), bpe(["a", "b", "c", "d", "cd"], [("c", "d")])
    own = find_gap(old, new, {"sequences"}, texts=["acdacdacd", "bbbb"] * 5)
    given = Tables(torch.eye(4) * 2, torch.eye(4) * 2)
    method = CW2V(rank=4, steps=150, batch=64, window=1, negatives=1, start=0.0, learning_rate=0.05)
    row = transplant(own, given, method).embedding_MD[4]
    assert row[0] > row[1] + 0.2


def test_drawn_rows_have_the_moments_of_the_old_ones() -> None:
    wide = replace(gap(), missing_N=torch.arange(20_000), cuts=((),) * 20_000)
    matrix = drawn(0, 300, D) @ drawn(1, D, D) + drawn(2, D)
    alone = RandomNormal()(wide, Tables(matrix), None, 0).embedding(matrix)
    together = Multivariate(scale=0.5)(wide, Tables(matrix), None, 0).embedding(matrix)
    for rows in (alone, together):
        torch.testing.assert_close(rows.mean(0), matrix.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(alone.std(0), matrix.std(0), rtol=0.05, atol=0)
    torch.testing.assert_close(together.t().cov(), 0.5 * matrix.t().cov(), rtol=0.1, atol=0.4)
    few = Multivariate()(wide, Tables(matrix[:3]), None, 0).embedding(matrix[:3])
    assert bool(few.isfinite().all())


# Vectors.


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


# What cannot be.


@pytest.mark.parametrize("method", [m for m in METHODS if m.needs - {"donor"}], ids=lambda method: method.name)
def test_a_method_that_learns_asks_for_text(method: Initialiser) -> None:
    with pytest.raises(UsageError, match="text"):
        find_gap(pieces("byte-level"), other(), method.needs)
    with pytest.raises(UsageError, match="text"):
        moved(method, find_gap(pieces("byte-level"), other(), ()))


def test_too_little_text_is_said() -> None:
    with pytest.raises(DataError, match="more text"):
        find_gap(pieces("byte-level"), other(), {"word_vectors"}, texts=["one word"])
    own = find_gap(pieces("byte-level"), other(), {"sequences"}, texts=["a"])
    with pytest.raises(DataError, match="more text"):
        moved(CW2V(rank=2, steps=1), own)


def test_a_donor_is_asked_for_where_it_is_needed_and_refused_where_not() -> None:
    with pytest.raises(UsageError, match="omp needs the model"):
        transplant(gap(), tables(), OMP())
    with pytest.raises(UsageError, match="omp needs the model"):
        transplant(gap(), tables(), Mean(), fallback=OMP())
    with pytest.raises(UsageError, match="does not look at a donor"):
        transplant(gap(), tables(), Mean(), donor=donor())


def test_more_atoms_than_shared_tokens_are_refused() -> None:
    own = find_gap(bpe(["a", "b", "c"], []), bpe(["a", "b", "ab"], [("a", "b")]), ())
    with pytest.raises(UsageError, match="share only 2 tokens"):
        transplant(own, Tables(drawn(0, 3, 4)), OMP(atoms=3), donor=Tables(drawn(1, 3, 4)))


def test_without_a_shared_token_what_mixes_shared_tokens_says_so() -> None:
    own = find_gap(bpe(["a"], []), bpe(["b", "c", "bc"], [("b", "c")]), {"token_vectors"}, texts=["bc bc b c b c"] * 9)
    with pytest.raises(UsageError, match="both vocabularies have"):
        transplant(own, Tables(drawn(0, 1, 4)), Focus())
    assert transplant(own, Tables(drawn(0, 1, 4)), Mean(), fallback=Multivariate()).fallen == (0, 1, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Tables(drawn(0, 10, D)), "only 10 rows"),
        (Tables(drawn(0, 900, D), drawn(0, 800, D)), "800 rows"),
        (Tables(drawn(0, 900, D) / 0), "not finite"),
        (Tables(drawn(0, 900, D), torch.full((900, D), torch.nan)), "the head holds"),
        (Tables(drawn(0, 900)), "shape"),
    ],
)
def test_tables_that_cannot_be_are_refused(given: Tables, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        moved(Mean(), given=given)


def test_a_bias_of_another_length_is_refused() -> None:
    with pytest.raises(CheckpointError, match="bias of the head has 3 rows"):
        moved(Mean(), bias_V=drawn(0, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Multivariate(scale=-1),
        lambda: OFA(neighbours=0),
        lambda: OFA(temperature=0),
        lambda: TokenAdapt(share=1.1),
        lambda: TokenAdapt(temperature=-1),
        lambda: CW2V(rank=0),
        lambda: CW2V(start=float("nan")),
        lambda: OMP(atoms=0),
    ],
)
def test_settings_that_do_not_exist_are_refused(make: Any) -> None:
    with pytest.raises(UsageError, match="expected"):
        make()

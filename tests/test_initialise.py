"""Rows for tokens that a model has none for: each way to make them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tersely.errors import UsageError
from tersely.vocabulary.initialise import Gap, Initialiser, Tables, Vectors
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
from tersely.vocabulary.transplant import find_gap, transplant
from tests.gaps import D, bpe, donor, drawn, gap, moved, other, pieces, tables


def test_the_mean_is_that_of_the_pieces_that_the_old_tokenizer_has() -> None:
    found, given = moved(Mean()), tables()
    for i in gap().missing_N.tolist()[3:40]:
        text = other().tokenizer.decode([i])
        ids = pieces("byte-level").tokenizer.encode(text, add_special_tokens=False).ids
        if pieces("byte-level").by_id[ids[0]].data and not other().by_id[i].special:
            torch.testing.assert_close(found.embedding_MD[i], given.embedding_VD[ids].mean(0))


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

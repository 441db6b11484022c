"""Tables of a new vocabulary: what every way to make rows must give and leave alone, and what cannot be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from tersely.errors import CheckpointError, DataError, UsageError
from tersely.vocabulary.extension import extend
from tersely.vocabulary.initialise import Initialiser, Tables, Weights
from tersely.vocabulary.initialise.align import Align
from tersely.vocabulary.initialise.cw2v import CW2V, Mixture
from tersely.vocabulary.initialise.focus import Focus
from tersely.vocabulary.initialise.mean import Mean
from tersely.vocabulary.initialise.multivariate import Multivariate
from tersely.vocabulary.initialise.ofa import OFA
from tersely.vocabulary.initialise.omp import OMP
from tersely.vocabulary.initialise.random_normal import RandomNormal
from tersely.vocabulary.initialise.token_adapt import TokenAdapt
from tersely.vocabulary.pieces import read_pieces
from tersely.vocabulary.transplant import find_gap, transplant
from tests.gaps import COMPARED, CONVEX, METHODS, NEW, D, bpe, donor, drawn, gap, moved, named, other, pieces, tables
from tests.vocabularies import TEXTS, text_of


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
    found = moved(method, given=given, bias_V=bias_V)
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
    found = moved(Align(), own)
    assert found.fallen
    assert found.initialised + len(found.fallen) == len(own.missing_N)
    means = moved(Mean(), own)
    assert torch.equal(found.embedding_MD[list(found.fallen)], means.embedding_MD[list(found.fallen)])
    # A special token has no pieces either.
    torch.testing.assert_close(found.embedding_MD[2], tables().embedding_VD.mean(0))
    drawn_rows = moved(Align(), own, fallback=RandomNormal()).embedding_MD
    assert not torch.equal(drawn_rows[list(found.fallen)], found.embedding_MD[list(found.fallen)])
    assert torch.equal(drawn_rows[found.copied_M >= 0], found.embedding_MD[found.copied_M >= 0])


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

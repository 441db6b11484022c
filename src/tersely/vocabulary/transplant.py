"""The tables of a new vocabulary out of those of an old one.

Shapes: V rows of the old vocabulary, M of the new one, D coordinates, N tokens that only the new one has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tersely.errors import CheckpointError, UsageError
from tersely.vocabulary.initialise import Gap, Initialiser, Need, Rule, Rules, Tables, Vectors
from tersely.vocabulary.initialise.align import aligned
from tersely.vocabulary.initialise.mean import Mean
from tersely.vocabulary.initialise.protocol import moments
from tersely.vocabulary.pieces import Pieces, match
from tersely.vocabulary.word_vectors import learn, learn_words, read_words, token_vectors

Say = Callable[[str, float], None]
_ROWS = 8192
_TEXT_NEEDS: tuple[Need, ...] = ("token_vectors", "word_vectors", "alignments", "sequences")


@dataclass(frozen=True, eq=False)
class Transplant:
    """Tables of the new vocabulary, in the dtype of the old ones, and where each row is from."""

    embedding_MD: Tensor
    head_MD: Tensor | None
    """None where the head is the embedding, as before."""
    bias_M: Tensor | None
    copied_M: Tensor
    """int64: the old id whose row it is, bit for bit; -1 for other rows."""
    missing_N: Tensor
    """Ids of the tokens that only the new vocabulary has."""
    rules: Rules
    """How their rows came from the old ones; a linear one (`Weights`) can be applied to any other table by token."""
    fallen: tuple[int, ...]
    """Ids of those that the method had no answer for, so that the fallback gave their rows."""
    empty: int
    """Rows without a token (padding, holes): the mean row, which no model can prefer to all tokens."""

    @property
    def copied(self) -> int:
        return int((self.copied_M >= 0).sum())

    @property
    def initialised(self) -> int:
        """Rows that the method gave."""
        return len(self.missing_N) - len(self.fallen)


def find_gap(
    old: Pieces,
    new: Pieces,
    needs: Collection[Need],
    *,
    texts: Sequence[str] = (),
    vectors: Path | None = None,
    seed: int = 0,
    say: Say = lambda *_: None,
) -> Gap:
    """What the new vocabulary has that the old one lacks, with what an initialiser's `needs` name.

    texts: documents to learn from. vectors: of words, from a file, instead of learning them; token vectors are then
    the means over words too. UsageError: a need without texts; DataError: too little text, unreadable vectors.
    """
    found = match(old, new)
    missing = sorted(i for i in new.by_id if i not in found)
    wanted = [need for need in _TEXT_NEEDS if need in needs]
    if vectors is not None:
        unlearnt = [need for need in wanted if need not in ("token_vectors", "word_vectors")]
        if wanted == unlearnt:
            raise UsageError(f"{vectors}: this method uses no word vectors; leave them out")
    else:
        unlearnt = wanted
    if unlearnt and not any(text.strip() for text in texts):
        raise UsageError(f"this method learns from text ({', '.join(unlearnt)}), and none was given; give some")
    own: Vectors | None = None
    pair: tuple[Vectors, Vectors] | None = None
    sequences: tuple[Tensor, ...] | None = None
    alignments = None
    if {"sequences", "token_vectors"} & set(unlearnt):
        say("cutting the text into new tokens", 0.0)
        encoded = new.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        sequences = tuple(torch.tensor(each.ids, dtype=torch.int64) for each in encoded)
    if "word_vectors" in wanted or (vectors is not None and "token_vectors" in wanted):
        say("word vectors", 0.2)
        words = learn_words(texts, seed=seed) if vectors is None else read_words(vectors)
        pair = token_vectors(words, old), token_vectors(words, new)
        own = pair[1]
    if "token_vectors" in unlearnt:
        say("token vectors", 0.4)
        assert sequences is not None
        own = Vectors(torch.nn.functional.normalize(learn(sequences, new.rows, seed=seed)))
    if "alignments" in wanted:
        say("aligning the text", 0.6)
        alignments = aligned(texts, old, new, missing)
    say("cutting new tokens into old ones", 0.9)
    cuts = tuple(old.cut(new.by_id[i].data) for i in missing)
    return Gap(old, new, found, torch.tensor(missing, dtype=torch.int64), cuts, own, pair, alignments, sequences)


def transplant(
    gap: Gap,
    tables: Tables,
    initialiser: Initialiser,
    *,
    bias_V: Tensor | None = None,
    donor: Tables | None = None,
    fallback: Initialiser | None = None,
    rows: int | None = None,
    seed: int = 0,
) -> Transplant:
    """The tables of the new vocabulary: shared tokens keep their rows, others get theirs from the initialiser.

    bias_V: of the head; new entries come by the head's rule. fallback: for tokens that the initialiser has no answer
    for; if None the mean of their pieces, which serves much better than a normal distribution, as authors have it, and
    keeps a convex method convex. What that has none for, special tokens above all, gets the mean row. rows: of the
    result, to pad it; the largest id and one if None. Beside tables and result, two float32 copies of the new
    rows and 128 MB are in use, and what the initialiser says.

    UsageError: something that the initialiser needs is missing; CheckpointError: tables that do not belong to the old
    tokenizer or hold what is no number.
    """
    spare_method = fallback or Mean()
    _check_needs(gap, donor, (initialiser, spare_method))
    _check(gap, tables, bias_V, donor)
    count = gap.new.rows if rows is None else rows
    if count < gap.new.rows:
        raise UsageError(f"rows={count}, but the new vocabulary has ids up to {gap.new.rows - 1}; leave rows out")
    copied_M = torch.full((count,), -1, dtype=torch.int64)
    if gap.match:
        copied_M[list(gap.match)] = torch.tensor(list(gap.match.values()))
    rules = initialiser(gap, tables, donor, seed)
    spare = spare_method(gap, tables, donor, seed)
    covered_N = rules.embedding.covered_N
    outside_M = copied_M < 0
    outside_M[gap.missing_N] = False

    def filled(table_VD: Tensor, rule: Rule, other: Rule) -> Tensor:
        made_MD = table_VD[copied_M.clamp(min=0)]
        mean_D = moments(table_VD)[0]
        made_MD[outside_M] = mean_D.to(table_VD.dtype)
        if len(gap.missing_N):
            rows_ND = rule(table_VD)
            if not bool(covered_N.all()):
                spare_ND = other(table_VD)
                spare_ND[~other.covered_N] = mean_D.float()
                rows_ND[~covered_N] = spare_ND[~covered_N]
            made_MD[gap.missing_N] = rows_ND.to(table_VD.dtype)
        return made_MD

    return Transplant(
        embedding_MD=filled(tables.embedding_VD, rules.embedding, spare.embedding),
        head_MD=None if tables.head_VD is None else filled(tables.head_VD, rules.head, spare.head),
        bias_M=None if bias_V is None else filled(bias_V[:, None], rules.head, spare.head)[:, 0],
        copied_M=copied_M,
        missing_N=gap.missing_N,
        rules=rules,
        fallen=tuple(gap.missing_N[~covered_N].tolist()),
        empty=int(outside_M.sum()),
    )


def _check_needs(gap: Gap, donor: Tables | None, methods: Sequence[Initialiser]) -> None:
    for method in methods:
        for need in method.needs:
            if need == "donor":
                if donor is None:
                    raise UsageError(f"{method.name} needs the model that the new tokenizer is from: give the donor")
            elif getattr(gap, need) is None:
                raise UsageError(f"{method.name} learns from text ({need}), and none was read; give some")
    if donor is not None and not any("donor" in method.needs for method in methods):
        raise UsageError(f"{methods[0].name} does not look at a donor; leave it out, or use omp")


def _check(gap: Gap, tables: Tables, bias_V: Tensor | None, donor: Tables | None) -> None:
    own = {"the embedding": tables.embedding_VD, "the head": tables.head_VD, "the bias of the head": bias_V}
    theirs = {} if donor is None else {"the donor's embedding": donor.embedding_VD, "its head": donor.head_VD}
    for what, table in (own | theirs).items():
        if table is None:
            continue
        if table.dim() != (1 if table is bias_V else 2):
            raise CheckpointError(f"{what} has shape {list(table.shape)}; expected a row for each token")
        if not all(bool(part.isfinite().all()) for part in torch.split(table, _ROWS)):
            raise CheckpointError(f"{what} holds values that are not finite; no row can be made of it")
        if what in own and len(table) != len(tables.embedding_VD):
            raise CheckpointError(f"{what} has {len(table)} rows, the embedding {len(tables.embedding_VD)}")
    if len(tables.embedding_VD) < gap.old.rows:
        raise CheckpointError(
            f"the tokenizer has ids up to {gap.old.rows - 1}, but the embedding only {len(tables.embedding_VD)} rows; "
            "give the tokenizer of this model"
        )

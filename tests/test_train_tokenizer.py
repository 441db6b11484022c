"""Tokenizers that are trained here: laws of all methods, and each method's own."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from tersely.errors import CheckpointError, DataError, UsageError
from tersely.vocabulary.pieces import SIGNS, SPACE, read_pieces
from tersely.vocabulary.training import (
    TRAININGS,
    CompoundPiece,
    KnownWords,
    SuperBPE,
    Training,
    encode_parts,
    pipeline,
    read_parts,
)
from tersely.vocabulary.training.bpe import BPE, bpe_model, words_of
from tersely.vocabulary.training.compound import split_word
from tersely.vocabulary.training.decompounding import surface_parts
from tersely.vocabulary.training.lib import Chunks, LiB, wordpiece
from tersely.vocabulary.training.merging import EDGE, Merging
from tersely.vocabulary.training.pipeline import METASPACE, PATTERNS, assemble, byte_level
from tersely.vocabulary.training.protocol import Order, silent
from tersely.vocabulary.training.superbpe import ACROSS_WORDS, SPACE_SIGN, encoded_lines
from tersely.vocabulary.training.unigram import Unigram

QUICK: tuple[Training, ...] = (
    BPE(),
    SuperBPE(transition=0.6),
    Unigram(),
    CompoundPiece(min_count=2, resolution=1),
    LiB(epochs=60, sentences=60),
)
SIZE = 700
SPECIAL = ("<s>", "</s>")
OVER_BYTES = ("bpe", "superbpe", "lib")
each_method = pytest.mark.parametrize("method", QUICK, ids=lambda method: method.name)


@cache
def texts() -> tuple[str, ...]:
    """Sentences of words that follow Zipf's law, some of them compound."""
    draw = random.Random(0)
    sounds = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ai")]
    stems = ["".join(draw.choices(sounds, k=draw.choice((1, 2, 2, 3)))) for _ in range(300)]
    words = [*stems, *("".join(draw.sample(stems, 2)) for _ in range(100)), "naïve", "Größe", "don't", "1995"]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    found = []
    for _ in range(60):
        sentences = []
        for _ in range(20):
            chosen = draw.choices(words, weights, k=draw.randrange(4, 14))
            sentences.append(" ".join(chosen).capitalize() + draw.choice((".", ".", "?", "; so: yes!", ' "--"')))
        found.append(" ".join(sentences[:10]) + "\n" + " ".join(sentences[10:]) + "\n")
    return tuple(found)


def trained(method: Training) -> Tokenizer:
    return _trained(QUICK.index(method))


@cache
def _trained(number: int) -> Tokenizer:
    return QUICK[number](texts(), SIZE, special=SPECIAL, around=None, say=silent)


def model_of(tokenizer: Tokenizer) -> Any:
    return json.loads(tokenizer.to_str())["model"]


def tokens_of(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def merge(symbols: Sequence[str], merges: Sequence[Sequence[str]]) -> list[str]:
    """BPE by its definition: the pair of the lowest rank, the leftmost first."""
    rank = {tuple(pair): number for number, pair in enumerate(merges)}
    found = list(symbols)
    while True:
        pairs = [(rank[pair], n) for n, pair in enumerate(pairwise(found)) if pair in rank]
        if not pairs:
            return found
        _, n = min(pairs)
        found[n : n + 2] = [found[n] + found[n + 1]]


def test_all_methods_are_tried_here() -> None:
    assert {type(method) for method in QUICK} == set(TRAININGS)
    assert len({method.name for method in TRAININGS}) == len(TRAININGS)


@each_method
def test_a_tokenizer_has_the_size_that_was_asked_and_special_tokens_first(method: Training) -> None:
    tokens = tokens_of(trained(method))
    assert len(tokens) == SIZE == len(set(tokens))
    assert tuple(tokens[: len(SPECIAL)]) == SPECIAL
    assert trained(method).encode("<s>").ids == [0]


@each_method
@settings(max_examples=60, deadline=None)
@given(st.text(max_size=80) | st.text("aeb. \n1é日-:", max_size=300))
def test_any_text_comes_back(method: Training, text: str) -> None:
    text = text.replace(SPACE, " ")
    tokenizer = trained(method)
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.token_to_id("<unk>") not in ids


@each_method
def test_tokens_stand_for_the_bytes_of_the_text(method: Training) -> None:
    pieces = read_pieces(trained(method)).by_id
    for text in (*texts()[:5], "日本 straße\t🦙"):
        assert b"".join(pieces[i].data for i in trained(method).encode(text).ids) == text.encode()


@each_method
def test_a_tokenizer_is_read_again_by_transformers(method: Training, tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    file = tmp_path / "tokenizer.json"
    trained(method).save(str(file))
    wrap: Any = PreTrainedTokenizerFast  # untyped in transformers
    read, again = wrap(tokenizer_file=str(file)), Tokenizer.from_file(str(file))
    text = texts()[0] + " straße 日本\n"
    ids = trained(method).encode(text).ids
    assert read(text)["input_ids"] == ids == again.encode(text).ids
    assert read.decode(ids) == text


@each_method
def test_the_same_text_gives_the_same_tokenizer_in_another_process(method: Training) -> None:
    script = (
        "import sys; from tests.test_train_tokenizer import QUICK, trained;"
        f"sys.stdout.write(trained(QUICK[{QUICK.index(method)}]).to_str())"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script]
    other = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=root, check=True).stdout
    if method.name in OVER_BYTES:
        assert other == trained(method).to_str()
    else:
        own, found = dict(model_of(trained(method))["vocab"]), dict(json.loads(other)["model"]["vocab"])
        assert len(own.keys() & found.keys()) > 0.99 * SIZE
        assert max(abs(own[piece] - found[piece]) for piece in own.keys() & found.keys()) < 0.1


@each_method
def test_texts_may_come_from_anything_that_begins_anew(method: Training) -> None:
    class Lines:
        def __iter__(self) -> Iterator[str]:
            for text in texts():
                yield ""
                yield text

    found = method(Lines(), SIZE, special=SPECIAL, around=None, say=silent)
    if method.name in OVER_BYTES:
        assert found.to_str() == trained(method).to_str()
    else:
        assert len(set(tokens_of(found)) & set(tokens_of(trained(method)))) > 0.99 * SIZE


@each_method
def test_what_cannot_be_is_refused(method: Training) -> None:
    def train(given: Any, size: int = SIZE, special: tuple[str, ...] = SPECIAL) -> Tokenizer:
        return method(given, size, special=special, around=None, say=silent)

    with pytest.raises(UsageError, match="only once"):
        train(iter(texts()))
    with pytest.raises(DataError, match="no text"):
        train([])
    with pytest.raises(DataError, match="no text"):
        train(["", " \n"])
    with pytest.raises(UsageError, match="size=100 is less than the alphabet"):
        train(texts(), size=100)
    with pytest.raises(UsageError, match="special tokens"):
        train(texts(), special=("<s>", "<s>"))
    with pytest.raises(DataError, match="the text yields only"):
        train(["a short text. a short text."] * 5, size=5000)


@each_method
def test_progress_is_told_from_nothing_to_all(method: Training) -> None:
    told: list[tuple[str, float]] = []
    method(texts(), SIZE, special=(), around=None, say=lambda what, share: told.append((what, share)))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 1


@pytest.mark.parametrize("name", [*PATTERNS, METASPACE])
@pytest.mark.parametrize("method", [BPE(), Unigram()], ids=lambda method: method.name)
def test_every_pre_tokenizer_serves_and_loses_nothing(name: str, method: Training) -> None:
    tokenizer = method(texts(), 600, special=(), around=pipeline(name), say=silent)
    for text in (*texts()[:3], "  two\n\n\tlines 12345 'tis I'LL\r\n日本 "):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_the_pre_tokenizer_of_a_file_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for name in (*PATTERNS, METASPACE):
        BPE()(texts(), 600, around=pipeline(name)).save(str(file))
        assert pipeline(file) == pipeline(tmp_path) == pipeline(name)
    with pytest.raises(UsageError, match="gpt-2, gpt-4"):
        pipeline("gpt-5")
    file.write_text("{}", "utf-8")
    with pytest.raises(CheckpointError, match="not a tokenizer"):
        pipeline(file)
    Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]")).save(str(file))
    with pytest.raises(UsageError, match="'##' marks its tokens"):
        pipeline(file)


def test_a_file_that_leaves_texts_whole_is_trained_in_words(tmp_path: Path) -> None:
    made = json.loads(BPE()(texts(), 600, around=pipeline(METASPACE)).to_str())
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    before = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace]}
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(made | {"normalizer": before, "pre_tokenizer": None}), "utf-8")
    tokens = tokens_of(BPE()(texts(), 600, around=pipeline(file)))
    assert not [token for token in tokens if SPACE in token[1:]]


# SuperBPE


@cache
def first_stage() -> Tokenizer:
    return BPE()(texts(), round(0.6 * SIZE), special=SPECIAL, around=pipeline("gpt-4o"))


def test_the_first_merges_of_superbpe_are_those_of_bpe() -> None:
    merges = model_of(first_stage())["merges"]
    assert model_of(trained(QUICK[1]))["merges"][: len(merges)] == merges
    assert tokens_of(trained(QUICK[1]))[: round(0.6 * SIZE)] == tokens_of(first_stage())


def test_superbpe_that_never_leaves_words_has_the_vocabulary_of_bpe() -> None:
    whole = SuperBPE(transition=1.0)(texts(), SIZE)
    assert model_of(whole)["vocab"] == model_of(BPE()(texts(), SIZE, around=pipeline("gpt-4o")))["vocab"]


def test_superbpe_normalizes_as_its_pre_tokenizer_does() -> None:
    around = replace(pipeline("gpt-4"), normalizer={"type": "Lowercase"})
    tokenizer = SuperBPE(transition=0.6)(texts(), 600, around=around)
    text = texts()[3]
    assert tokenizer.decode(tokenizer.encode(text).ids) == text.lower()
    assert not [token for token in tokens_of(tokenizer)[256:] if any("A" <= letter <= "Z" for letter in token)]


def test_superbpe_goes_across_words_and_keeps_its_rules() -> None:
    tokens = tokens_of(trained(QUICK[1]))
    assert max(token.count(SPACE_SIGN) for token in tokens) > 1
    for words in (1, 2):
        method = SuperBPE(transition=0.6, words=words)
        for token in tokens_of(method(texts(), SIZE))[256:]:
            assert f":{SPACE_SIGN}" not in token
            assert len([word for word in token.split(SPACE_SIGN) if word]) <= words
    assert SuperBPE(words=4).allows("aĠbĠcĠd")
    assert not SuperBPE(words=4).allows("ĠaĠbĠcĠdĠe")
    assert not SuperBPE().allows("a:Ġ")


@settings(max_examples=25, deadline=None)
@given(
    st.text("abo e\n.,:12", max_size=120)
    | st.lists(st.integers(0, 59), max_size=2).map(lambda n: "".join(texts()[i] for i in n))
)
def test_superbpe_encodes_as_its_definition_says(text: str) -> None:
    tokenizer = trained(QUICK[1])
    before = tokenizer.pre_tokenizer
    chunks = before.pre_tokenize_str(text) if text else []
    expected = [token for chunk, _ in chunks for token in merge(chunk, model_of(tokenizer)["merges"])]
    assert tokenizer.encode(text).tokens == expected


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([word for word in texts()[0].split() if word.isalpha()]), min_size=1, max_size=30))
def test_superbpe_takes_no_more_tokens_than_the_merges_that_it_begins_with(words: list[str]) -> None:
    text = " ".join(words)
    assert len(trained(QUICK[1]).encode(text).ids) <= len(first_stage().encode(text).ids)


@pytest.mark.parametrize("first", [256, 300, 420])
def test_merges_learned_on_are_those_that_bpe_learns_at_once(first: int) -> None:
    around = byte_level(PATTERNS["gpt-4o"])
    whole = model_of(BPE()(texts(), SIZE, around=around))["merges"]
    merging = begun(texts(), whole[: first - 256], PATTERNS["gpt-4o"])
    merging.extend(SIZE, lambda _token: True, lambda _share: None)
    assert [[merging.tokens[a], merging.tokens[b]] for a, b in merging.merges] == whole


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.text("ab ", min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(0, 4),
    st.integers(1, 3),
)
def test_the_text_while_merging_is_what_encoding_makes_of_it(given: list[str], first: int, frequency: int) -> None:
    start = begun(given, (), ACROSS_WORDS, frequency)
    start.extend(256 + first, lambda _token: True, lambda _share: None)
    merges = [(start.tokens[a], start.tokens[b]) for a, b in start.merges]
    merging = begun(given, merges, ACROSS_WORDS, frequency)
    merging.extend(270, lambda token: "bb" not in token, lambda _share: None)
    learned = [(merging.tokens[a], merging.tokens[b]) for a, b in merging.merges]
    assert learned[: len(merges)] == merges
    assert len(set(learned)) == len(learned)
    around = byte_level(ACROSS_WORDS)
    tokenizer = assemble(bpe_model(merging.tokens, learned, around), around)
    assert merging.text == encoded_lines(given, tokenizer).tolist()


def begun(given: Sequence[str], merges: Sequence[Sequence[str]], pattern: str, frequency: int = 2) -> Merging:
    """Merging on from these merges."""
    around = byte_level(pattern)
    tokens = list(dict.fromkeys([*sorted(SIGNS.values()), *(a + b for a, b in merges)]))
    ids = {token: i for i, token in enumerate(tokens)}
    cells = encoded_lines(given, assemble(bpe_model(tokens, merges, around), around))
    return Merging(cells, tokens, {(ids[a], ids[b]): ids[a + b] for a, b in merges}, frequency)


def test_a_pair_that_comes_up_anew_is_merged_at_once() -> None:
    # "abc" is spelled by a+bc; then ab+c spells it too, and what was merged with it before is merged again.
    tokens = ["a", "b", "c", "d", "bc", "ab", "abc", "abcd"]
    merged = {(1, 2): 4, (0, 4): 6, (6, 3): 7, (0, 1): 5}
    cells = np.array([EDGE, 5, 2, 3, EDGE, 5, 2, 3, EDGE, 5, 2, EDGE], np.int32)
    merging = Merging(cells, tokens, merged, 2)
    merging.extend(9, lambda _token: True, lambda _share: None)
    assert merging.merges == [*merged, (5, 2)]
    assert merging.text == [EDGE, 7, EDGE, 7, EDGE, 6, EDGE]


@pytest.mark.parametrize("wrong", [{"transition": 0.0}, {"transition": 1.2}, {"words": 0}])
def test_settings_of_superbpe_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        SuperBPE(**wrong)(texts(), SIZE)


def test_superbpe_and_compounds_say_which_pre_tokenizers_they_take() -> None:
    with pytest.raises(UsageError, match="byte-level"):
        SuperBPE()(texts(), SIZE, around=pipeline(METASPACE))
    with pytest.raises(UsageError, match="metaspace"):
        CompoundPiece()(texts(), SIZE, around=pipeline("gpt-2"))
    with pytest.raises(UsageError, match="takes no pre-tokenizer"):
        LiB()(texts(), SIZE, around=pipeline("gpt-2"))


# Less-is-Better


def test_lib_encodes_by_greedy_longest_match() -> None:
    tokenizer = trained(QUICK[-1])
    known = set(tokens_of(tokenizer)[len(SPECIAL) :])
    text = texts()[1] + "日本 Größe"
    expected = []
    for chunk, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        while chunk:
            length = next(n for n in range(len(chunk), 0, -1) if chunk[:n] in known)
            expected.append(chunk[:length])
            chunk = chunk[length:]
    assert tokenizer.encode(text).tokens == expected


@pytest.mark.parametrize("character", ["x", ".", "é", "日", "🦙", " ", "\n"])
def test_lib_writes_however_long_a_sentence_is(character: str) -> None:
    text = character * 5000
    encoding = trained(QUICK[-1]).encode(text)
    assert trained(QUICK[-1]).decode(encoding.ids) == text


def test_lib_keeps_characters_and_reads_longer_chunks_with_time() -> None:
    article = ["the cat sat on the mat", "the cat saw the mat", "on the mat the cat sat"] * 8
    characters = sorted({character for sentence in article for character in sentence})
    chunks, draw, lengths = Chunks(LiB(), characters), random.Random(0), []
    total = sum(len(sentence) for sentence in article)
    for _ in range(40):
        chunks.read(article, draw)
        assert set(characters) <= set(chunks.order)
        assert len(set(chunks.order)) == len(chunks.order)
        assert max(map(len, chunks.order)) <= LiB.max_length
        tokenizer = wordpiece(chunks.order, ())
        lengths.append(total / sum(len(tokenizer.encode(sentence).ids) for sentence in article))
    assert lengths[0] < np.mean(lengths[1:10]) < np.mean(lengths[-10:])
    assert lengths[-1] > 5


def test_a_chunk_that_others_do_without_moves_back_and_they_move_forward() -> None:
    # "abcd" is read as abc|d, or from the shorter match as ab|cd: as many chunks, which stand further in front.
    filler = [chr(i) for i in range(0x400, 0x420)]
    order = ["cd", "a", "b", "c", "d", *filler[:8], "ab", *filler[8:20], "abc", *filler[20:]]
    chunks = Chunks(LiB(memorise=0.0), order)
    chunks.read(["abcd"], random.Random(0))
    assert chunks.order.index("abc") > order.index("abc")
    assert chunks.order.index("ab") < order.index("ab")
    # Behind "d" it is worth its place: a shorter one would take more chunks.
    chunks = Chunks(LiB(memorise=0.0), order)
    chunks.read(["abc"], random.Random(0))
    assert chunks.order.index("abc") < order.index("abc")
    assert chunks.order.index("ab") >= order.index("ab")


def test_a_chunk_that_moves_behind_the_end_is_forgotten() -> None:
    chunks = Chunks(LiB(memorise=0.0), ["ab", "cd", "a", "b", "c", "d", "abc"])
    chunks.read(["abcd"], random.Random(0))
    assert "abc" not in chunks.order


def test_what_is_never_read_is_forgotten_from_the_tail() -> None:
    chunks = Chunks(LiB(memorise=0.0, life=3), ["a", "b", "c", "ab", "bc"])
    for _ in range(10):
        chunks.read(["ab", "ab"], random.Random(0))
    assert chunks.order.count("ab") == 1
    assert "bc" not in chunks.order


def test_the_seed_of_lib_decides() -> None:
    own = [LiB(epochs=20, sentences=40, seed=seed)(texts(), 500).to_str() for seed in (0, 0, 1)]
    assert own[0] == own[1] != own[2]


@pytest.mark.parametrize("wrong", [{"rate": 1.5}, {"memorise": -0.1}, {"epochs": 0}, {"max_length": 0}])
def test_settings_of_lib_that_cannot_be_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        LiB(**wrong)(texts(), SIZE)


# CompoundPiece


def halves(word: str) -> tuple[str, ...]:
    return (word[: len(word) // 2], word[len(word) // 2 :]) if len(word) > 5 else (word,)


def whole(word: str) -> tuple[str, ...]:
    return (word,)


def test_words_that_are_not_split_give_a_plain_unigram() -> None:
    method = CompoundPiece(min_count=1, resolution=1, max_bytes=10_000)
    assert set(tokens_of(method.train(whole, Order(texts(), SIZE)))) == set(tokens_of(Unigram()(texts(), SIZE)))


def test_no_piece_crosses_from_one_part_to_the_next() -> None:
    method = CompoundPiece(min_count=1, resolution=1)
    tokenizer = method.train(halves, Order(texts(), 600, special=SPECIAL))
    parts = method.parts(words_of(texts(), pipeline(METASPACE)), halves)
    for token in tokens_of(tokenizer)[len(SPECIAL) + 257 :]:
        assert len(token) == 1 or any(token in part for part in parts), token
    text = texts()[2]
    ids = encode_parts(tokenizer, text, halves)
    assert tokenizer.decode(ids) == text
    ends = {0}
    for word, (begin, _) in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        for part in split_word(word, halves):
            begin += len(part)
            ends.add(begin)
    here = 0
    for i in ids:
        token = tokens_of(tokenizer)[i]
        assert not any(here < end < here + len(token) for end in ends)
        here += len(token)


letters = st.text("abcdeéß", min_size=1, max_size=14)


@settings(max_examples=200, deadline=None)
@given(letters, st.lists(letters, min_size=1, max_size=4))
def test_parts_spell_the_word_whatever_a_decompounder_says(word: str, parts: list[str]) -> None:
    found = surface_parts(word, parts)
    assert "".join(found) == word
    assert all(found)
    assert surface_parts("".join(parts), parts) == tuple(parts)


@settings(max_examples=200, deadline=None)
@given(letters, st.dictionaries(st.text("abcde", min_size=1, max_size=5), st.integers(1, 100), max_size=12))
def test_known_words_are_split_by_the_highest_geometric_mean(word: str, counts: Mapping[str, int]) -> None:
    split = KnownWords(counts, links=(), shortest=2, parts=3)

    def cuts(rest: str, left: int) -> Iterator[tuple[str, ...]]:
        if rest in counts:
            yield (rest,)
        if left > 1:
            for end in range(2, len(rest) - 1):
                if rest[:end] in counts:
                    yield from ((rest[:end], *more) for more in cuts(rest[end:], left - 1))

    def mean(parts: Sequence[str]) -> float:
        return float(np.exp(np.mean([np.log(counts[part]) for part in parts])))

    found = split(word)
    assert "".join(found) == word
    several = [parts for parts in cuts(word, 3) if len(parts) > 1]
    best = max((mean(parts) for parts in several), default=0.0)
    own = counts.get(word, 0)
    if len(found) > 1:
        assert mean(found) == pytest.approx(best)
        assert best > own or np.isclose(best, own)
    else:
        assert best <= own or np.isclose(best, own)


def test_known_words_see_linking_letters_and_case() -> None:
    split = KnownWords({"hemd": 20, "kragen": 9, "hemdskragen": 1, "wort": 50})
    assert split("Hemdskragen") == ("Hemds", "kragen")
    assert split("Wort") == ("Wort",)
    assert split("unbekannt") == ("unbekannt",)


def test_parts_are_found_in_a_word_that_spells_them_otherwise() -> None:
    assert surface_parts("Kindergarten", ("Kind", "Garten")) == ("Kinder", "garten")
    assert surface_parts("bücherregal", ("buch", "regal")) == ("bücher", "regal")
    assert surface_parts("abc", ("xyz", "w")) == ("abc",)
    assert split_word(f"{SPACE}Bücherregal", lambda _word: ("Buch", "Regal")) == (f"{SPACE}Bücher", "regal")
    assert split_word(f"{SPACE}12345678", halves) == (f"{SPACE}12345678",)


def test_a_table_of_parts_says_how_words_are_split(tmp_path: Path) -> None:
    file = tmp_path / "parts.tsv"
    words = {word for text in texts() for word in text.split() if word.isalpha()}
    file.write_text("".join(f"{word}\t{' '.join(halves(word))}\n" for word in sorted(words)), "utf-8")
    by_table = CompoundPiece(table=str(file), min_count=1, resolution=1)(texts(), 600)
    by_function = CompoundPiece(min_count=1, resolution=1).train(read_parts(file), Order(texts(), 600))
    assert set(tokens_of(by_table)) == set(tokens_of(by_function))
    assert set(tokens_of(by_table)) != set(tokens_of(CompoundPiece(min_count=1, resolution=1)(texts(), 600)))
    with pytest.raises(DataError, match="cannot be read"):
        CompoundPiece(table=str(tmp_path / "none.tsv"))(texts(), 600)


def test_a_table_of_parts_is_read_in_both_forms(tmp_path: Path) -> None:
    file = tmp_path / "parts.tsv"
    file.write_text('sunflower\tsun flower\n\n{"word": "bookshelf", "parts": ["book", "shelf"]}\n', "utf-8")
    table = read_parts(file)
    assert [tuple(table(word)) for word in ("sunflower", "bookshelf", "cat")] == [
        ("sun", "flower"),
        ("book", "shelf"),
        ("cat",),
    ]
    for line in ("sunflower sun flower", '{"word": "a"}', '{"word": "a", "parts": [1]}', "a\t"):
        file.write_text("a\tb\n" + line + "\n", "utf-8")
        with pytest.raises(DataError, match="line 2"):
            read_parts(file)
    file.write_bytes(b"a\tb \xff\n")
    with pytest.raises(DataError, match="byte 4"):
        read_parts(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_parts(tmp_path / "none.tsv")


def test_too_little_text_for_the_least_count_is_told() -> None:
    with pytest.raises(DataError, match="stands 16 times"):
        CompoundPiece()(["one two three four"], SIZE)
    with pytest.raises(UsageError, match="resolution=0"):
        CompoundPiece(resolution=0)(texts(), SIZE)

"""A trimmed tokenizer: it cuts what it can as before, and every file of the model has the new ids."""

from __future__ import annotations

import base64
import json
import random
import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer

from tersely.errors import CheckpointError, UsageError
from tersely.export.gguf.tokenizer import read_tokens
from tersely.vocabulary.closure import Closure
from tersely.vocabulary.references import replaced_config
from tersely.vocabulary.selection import choose
from tersely.vocabulary.surgery import MAP, Trimmed, trimmed
from tersely.vocabulary.tokenizer import Vocabulary, read_tokenizer, read_tokenizer_folder
from tests.vocabularies import (
    KINDS,
    LOSSLESS,
    TEXTS,
    block,
    counted,
    folder_of,
    gpt2_json,
    read,
    text_of,
    tiktoken_json,
    varint,
    write_trimmed,
)

THEIRS: Any = AutoTokenizer  # untyped in transformers
WORDS = sorted({word for text in TEXTS for word in text.split(" ")})
ANY_TEXT = st.lists(
    st.one_of(
        st.sampled_from(WORDS),
        st.text(max_size=6),
        st.sampled_from(
            ["\x00", "\u200d", "👩‍👩‍👧", "\U0010ffff", "<s>", "<|b|>", "lowest", "    ", "\r\n", "e\u0301", "Ġ", "</w>"]
        ),
    ),
    max_size=12,
).map(" ".join)
FEW = settings(max_examples=20, deadline=None)


@pytest.fixture(scope="module")
def of_kind(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Vocabulary]:
    return {kind: read(tmp_path_factory.mktemp("of-a-kind"), text_of(kind)) for kind in KINDS}.__getitem__


def loaded(plain: Any) -> Tokenizer:
    return Tokenizer.from_str(plain if isinstance(plain, str) else json.dumps(plain))


def of_texts(vocabulary: Vocabulary, texts: Iterable[str], **given: Any) -> Trimmed:
    old = loaded(vocabulary.plain["tokenizer.json"])
    counts = counted(vocabulary, (i for text in texts for i in old.encode(text).ids))
    return trimmed(vocabulary, choose(vocabulary, counts, **given).kept_old_ids_K)


def cut_alike(old: Tokenizer, new: Tokenizer, kept: list[int], text: str) -> bool:
    """Whether all tokens of the text stay; then the new tokenizer must give them."""
    before = old.encode(text)
    if not set(before.ids) <= set(kept):
        return False
    after = new.encode(text)
    place = {i: row for row, i in enumerate(kept)}
    assert after.tokens == before.tokens
    assert after.ids == [place[i] for i in before.ids]
    assert after.offsets == before.offsets
    return True


@pytest.mark.parametrize("kind", KINDS)
@FEW
@given(text=ANY_TEXT, other=ANY_TEXT)
def test_a_text_whose_tokens_stay_is_cut_into_them_and_no_text_is_lost(
    kind: str, of_kind: Callable[[str], Vocabulary], text: str, other: str
) -> None:
    vocabulary = of_kind(kind)
    old = loaded(vocabulary.plain["tokenizer.json"])
    counts = counted(vocabulary, old.encode(text).ids)
    result = trimmed(vocabulary, choose(vocabulary, counts, coverage=1.0).kept_old_ids_K)
    new, kept = loaded(result.tokenizer), result.kept_old_ids_K.tolist()
    assert new.get_vocab_size() == result.rows == result.config["vocab_size"] == len(kept)
    unknown = kind == "wordpiece" and vocabulary.unknown in old.encode(text).ids
    assert unknown or cut_alike(old, new, kept, text)
    if not (kind == "wordpiece" and vocabulary.unknown in old.encode(other).ids):
        cut_alike(old, new, kept, other)
    assert max(new.encode(other).ids) < result.rows
    if kind in LOSSLESS:
        ids, before = (t.encode(other, add_special_tokens=False).ids for t in (new, old))
        found = new.decode(ids, skip_special_tokens=False)
        assert found == old.decode(before, skip_special_tokens=False)
        assert kind == "all splits" or found == other


@pytest.mark.parametrize("kind", ["suffix", "prefix", "prefix and suffix", "unigram", "wordpiece"])
@pytest.mark.parametrize("word", ["newest", "together", "lowest"])
def test_a_word_in_the_letters_of_the_text_never_becomes_unknown(
    kind: str, word: str, of_kind: Callable[[str], Vocabulary]
) -> None:
    vocabulary, draw = of_kind(kind), random.Random(word)
    old = loaded(vocabulary.plain["tokenizer.json"])
    new = loaded(of_texts(vocabulary, [word], coverage=0.01).tokenizer)
    others = [" ".join("".join(draw.choices(word, k=draw.randint(1, 20))) for _ in range(4)) for _ in range(20)]
    known = [other for other in others if "<unk>" not in old.encode(other).tokens]
    assert known
    assert not any("<unk>" in new.encode(other).tokens for other in known)


@pytest.mark.parametrize("kind", KINDS)
def test_with_all_tokens_no_file_changes(kind: str, tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<pad>"]}
    foreign = {"tokenizer_config.json": names, "tekken.json": {}, "merges.txt": "#version: 0.2\n\n", "vocab.txt": "x\n"}
    vocabulary = read(tmp_path, text_of(kind), files=foreign)
    result = trimmed(vocabulary, torch.tensor(sorted(vocabulary.ids.values())))
    assert not result.files
    assert not result.removed
    assert result.tokenizer == vocabulary.plain["tokenizer.json"]
    assert list(result.tokenizer["model"]["vocab"]) == list(vocabulary.plain["tokenizer.json"]["model"]["vocab"])
    assert result.config == vocabulary.config
    assert result.notes == ()


def test_rows_of_no_token_go(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, text_of("byte-level"), rows=512)
    result = trimmed(vocabulary, torch.tensor(sorted(vocabulary.ids.values())))
    assert result.rows == result.config["vocab_size"] == 489
    assert not result.files


@pytest.mark.parametrize("kind", KINDS)
def test_trimmed_again_to_the_same_tokens_nothing_changes(kind: str, tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path / "old", text_of(kind))
    first = of_texts(read_tokenizer(checkpoint), TEXTS[:1], coverage=0.9)
    again = read_tokenizer(write_trimmed(checkpoint.path, tmp_path / "new", first))
    assert again.rows == first.rows
    assert again.ids == loaded(first.tokenizer).get_vocab()
    second = of_texts(again, TEXTS[:1], rows=again.rows)
    assert second.kept_old_ids_K.tolist() == list(range(again.rows))
    assert second.files == {}
    closure = Closure(again)
    assert closure.closed(again.ids.values()) == set(again.ids.values())


@pytest.mark.parametrize("kind", KINDS)
def test_every_retained_merge_has_its_parts_and_tokens_keep_their_order_and_scores(
    kind: str, of_kind: Callable[[str], Vocabulary]
) -> None:
    vocabulary = of_kind(kind)
    result = of_texts(vocabulary, TEXTS[2:3], coverage=0.8)
    kept = result.kept_old_ids_K.tolist()
    old, new = vocabulary.plain["tokenizer.json"], result.tokenizer
    assert {**new, "model": 0, "added_tokens": 0, "post_processor": 0} == {
        **old, "model": 0, "added_tokens": 0, "post_processor": 0
    }  # fmt: skip
    if vocabulary.scores:
        assert new["model"]["vocab"] == [old["model"]["vocab"][i] for i in kept if i < len(old["model"]["vocab"])]
        assert new["model"]["vocab"][new["model"]["unk_id"]][0] == "<unk>"
        return
    vocab = new["model"]["vocab"]
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert all(vocabulary.tokens[kept[i]] == token for token, i in vocab.items())
    merges = [tuple(merge) for merge in new["model"].get("merges", ())]
    made = [(a, b, a + b[len(vocabulary.prefix) :]) for a, b in merges]
    assert all(part in vocab for merge in made for part in merge)
    places = [vocabulary.merges.index(merge) for merge in merges]
    assert places == sorted(places)
    assert len(merges) < len(vocabulary.merges) or vocabulary.kind != "bpe"


def test_without_the_lowest_score_unigram_would_cut_otherwise() -> None:
    pieces = [("<unk>", 0.0), ("ab", -12.0), ("cd", -12.0), ("ef", -12.0), ("bcdef", -5.0), ("zz", -25.0)]
    whole = Tokenizer(models.Unigram(pieces, unk_id=0))
    assert whole.encode("abcdef").tokens == ["ab", "cd", "ef"]
    assert Tokenizer(models.Unigram(pieces[:-1], unk_id=0)).encode("abcdef").tokens == ["a", "bcdef"]


def test_a_piece_with_the_lowest_score_stays_so_that_unigram_cuts_alike(tmp_path: Path) -> None:
    pieces = [
        ("<unk>", 0.0),
        ("ab", -12.0),
        ("cd", -12.0),
        ("ef", -12.0),
        ("bcdef", -5.0),
        ("zz", -25.0),
        ("yy", -25.0),
    ]
    vocabulary = read(tmp_path, str(Tokenizer(models.Unigram(pieces, unk_id=0)).to_str()))
    result = of_texts(vocabulary, ["abcdef"], coverage=1.0)
    assert result.kept_old_ids_K.tolist() == [0, 1, 2, 3, 5]
    assert loaded(result.tokenizer).encode("abcdef").tokens == ["ab", "cd", "ef"]


def test_the_unknown_piece_is_renumbered(tmp_path: Path) -> None:
    pieces = [("a", -1.0), ("b", -1.0), ("c", -1.0), ("<unk>", 0.0), ("zz", -9.0)]
    vocabulary = read(tmp_path, str(Tokenizer(models.Unigram(pieces, unk_id=3)).to_str()))
    result = trimmed(vocabulary, torch.tensor([0, 3, 4]))
    assert result.tokenizer["model"]["unk_id"] == 1
    assert loaded(result.tokenizer).encode("aba").ids == [0, 1, 0]
    with pytest.raises(UsageError, match="unk_id names the token '<unk>'"):
        trimmed(vocabulary, torch.tensor([0, 4]))


def test_wordpiece_without_a_letter_has_dead_ends() -> None:
    """Which is why single letters stay."""
    vocab = {"<unk>": 0, "ab": 1, "abc": 2, "##c": 3, "##cd": 4, "##d": 5}
    assert Tokenizer(models.WordPiece(vocab, unk_token="<unk>")).encode("abcd").tokens == ["abc", "##d"]
    del vocab["##d"]
    assert Tokenizer(models.WordPiece(vocab, unk_token="<unk>")).encode("abcd").tokens == ["<unk>"]


def plain_bpe(vocab: dict[str, int], added: dict[str, int], merges: Iterable[Any] = (), **rest: Any) -> str:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = [{"id": i, "content": token, **flags, "special": True} for token, i in added.items()]
    nothing: dict[str, Any] = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer"))
    model = {"type": "BPE", "vocab": vocab, "merges": [*merges]}
    return json.dumps(
        {
            "version": "1.0",
            **nothing,
            "post_processor": None,
            "decoder": None,
            **rest,
            "added_tokens": tokens,
            "model": model,
        }
    )


def test_added_tokens_between_others_stay_where_they_are(tmp_path: Path) -> None:
    """The loader puts tokens outside of the vocabulary behind it, whatever id they are said to have."""
    vocab = {"a": 0, "<X>": 1, "b": 2, "c": 3, "ab": 4, "<Y>": 5}
    text = plain_bpe(vocab, {"<X>": 1, "<Y>": 5, "<Z>": 6}, [["a", "b"]])
    vocabulary = read(tmp_path, text, rows=8)
    result = trimmed(vocabulary, torch.tensor([0, 1, 3, 5, 6]))
    assert loaded(result.tokenizer).get_vocab() == {"a": 0, "<X>": 1, "c": 2, "<Y>": 3, "<Z>": 4}
    assert [token["id"] for token in result.tokenizer["added_tokens"]] == [1, 3, 4]
    assert json.loads(result.files[MAP]) == {"rows_before": 8, "old_ids": [0, 1, 3, 5, 6]}


def test_a_hole_in_the_vocabulary_closes_and_a_token_that_lay_in_it_keeps_its_place(tmp_path: Path) -> None:
    vocabulary = read(tmp_path, plain_bpe({"a": 0, "b": 1, "c": 4}, {"<X>": 3}), rows=6)
    result = trimmed(vocabulary, torch.tensor([0, 3, 4]))
    assert loaded(result.tokenizer).get_vocab() == {"a": 0, "<X>": 1, "c": 2}
    assert trimmed(vocabulary, torch.tensor([0, 1, 3, 4])).rows == 4


@pytest.mark.parametrize(
    ("text", "files", "message"),
    [
        (plain_bpe({"a": 0, "b": 1, "c": 3}, {"<X>": 4}), {}, "the id 3 for two tokens, '<X>' and 'c'"),
        (plain_bpe({"a": 0, "b": 1}, {"<Y>": 3, "<X>": 2}), {}, "'<Y>' as 3, but tokenizer.json loads with '<Y>' as 2"),
        (plain_bpe({"a": 0, "b": 9}, {}), {}, "gives 'b' the id 9, but the embedding has only 8 rows"),
        (plain_bpe({"a": 0}, {}, [["a", "b"]]), {}, "tokenizer.json cannot be loaded"),
        (
            plain_bpe({"a": 0}, {"<s>": 1}),
            {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<s>"}}}},
            "tokenizer_config.json: added_tokens_decoder has '<s>' as 2, but tokenizer.json loads with '<s>' as 1",
        ),
        (
            plain_bpe({"a": 0}, {"<s>": 1}),
            {"tokenizer_config.json": {"added_tokens_decoder": {"2": {"content": "<pad>"}}}},
            "added_tokens_decoder has '<pad>' as 2, but no token of tokenizer.json is that",
        ),
        (plain_bpe({"a": 0}, {}), {"added_tokens.json": {"a": 5}}, "added_tokens.json has 'a' as 5"),
        (plain_bpe({"a": 0}, {}), {"special_tokens_map.json": {"pad_token": "<p>"}}, "pad_token is '<p>', which"),
        (
            plain_bpe({"a": 0}, {}),
            {"tokenizer_config.json": {"additional_special_tokens": ["<p>"]}},
            "additional_special_tokens is '<p>', which tokenizer.json lacks",
        ),
        (plain_bpe({"a": 0}, {}), {"generation_config.json": {"eos_token_id": [0, 7]}}, "eos_token_id is 7, which is"),
        (
            plain_bpe(
                {"a": 0},
                {"<s>": 1},
                post_processor={
                    "type": "RobertaProcessing",
                    "sep": ["<s>", 0],
                    "cls": ["<s>", 1],
                    "trim_offsets": True,
                    "add_prefix_space": True,
                },
            ),
            {},
            "post_processor has '<s>' as 0, but tokenizer.json loads with '<s>' as 1",
        ),
        (
            str(Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("a", -2.0)], unk_id=0)).to_str()),
            {},
            "has the piece 'a' twice",
        ),
        (
            str(Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()),
            {},
            "a model of type 'WordLevel'; its vocabulary can be changed where that is BPE, Unigram, WordPiece",
        ),
    ],
)
def test_files_that_disagree_are_refused(text: str, files: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, text, rows=8, files=files)


def test_a_folder_without_a_model_has_a_row_for_each_token(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, text_of("byte-level"), rows=512)
    assert read_tokenizer_folder(tmp_path).tokens == read_tokenizer(checkpoint).tokens
    (tmp_path / "config.json").unlink()
    alone = read_tokenizer_folder(tmp_path)
    assert alone.rows == len(alone.ids) == 489
    assert alone.config == {}
    with pytest.raises(CheckpointError, match="no folder"):
        read_tokenizer_folder(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config.json": {"added_tokens_decoder": ["<s>"]}},
        {"tokenizer_config.json": {"added_tokens_decoder": {"first": {"content": "a"}}}},
        {"tokenizer_config.json": {"chat_template": [{"name": "default"}]}},
        {"generation_config.json": {"forced_decoder_ids": [1]}},
        {"added_tokens.json": {"a": [0]}},
        {"tokenizer_config.json": []},
    ],
)
def test_files_of_another_form_are_refused(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        read(tmp_path, plain_bpe({"a": 0}, {}), files=files)


def test_loaders_put_stale_ids_into_texts_without_a_word() -> None:
    """Which is why the post-processor is checked and renumbered."""
    processor = {"type": "RobertaProcessing", "sep": ["<s>", 5999], "cls": ["<s>", 1]}
    flags = {"trim_offsets": True, "add_prefix_space": False}
    text = plain_bpe({"a": 0}, {"<s>": 1}, post_processor={**processor, **flags})
    assert loaded(text).encode("a").ids == [1, 0, 5999]


def test_a_character_without_all_its_bytes_is_lost() -> None:
    """Which is why the tokens for bytes stay."""
    vocab = {"<unk>": 0, "a": 1, "<0xC3>": 2, "<0xA9>": 3}
    whole = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    assert whole.encode("a\u00e9").tokens == ["a", "<0xC3>", "<0xA9>"]
    del vocab["<0xA9>"]
    assert Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>")).encode("\u00e9").tokens == ["<unk>"]
    assert Tokenizer(models.BPE({"a": 0}, [])).encode("a\u00e9").tokens == ["a"]


def test_a_slow_tokenizer_is_refused_with_how_to_convert_it(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, text_of("byte-level"), files={"vocab.json": {}, "merges.txt": ""})
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer.json; .*\.save_pretrained"):
        read_tokenizer(type(checkpoint)(**{**_facts(checkpoint), "companions": ("vocab.json", "merges.txt")}))


def _facts(checkpoint: Any) -> dict[str, Any]:
    names = ("path", "source", "config", "weight_files", "left_behind")
    return {"specs": {}, **{name: getattr(checkpoint, name) for name in names}}


CONFIG = {
    "model_type": "llama",
    "eos_token_id": [2, 3],
    "text_config": {"vocab_size": 0, "pad_token_id": -1, "image_token_index": 300, "bos_token_id": None},
    "vision": [{"vocab_size": 77, "boi_token_id": 310}],
    "bos_index": 1,
    "max_position_embeddings": 5,
    "id2label": {"0": "a"},
    "num_image_tokens": 5,
    "pad_token_type_id": 0,
}
GENERATION = {
    "suppress_tokens": [300, 310],
    "begin_suppress_tokens": None,
    "bad_words_ids": [[300, 310], [3]],
    "forced_decoder_ids": [[1, 300], [2, None]],
    "lang_to_id": {"<|en|>": 310},
    "sequence_bias": [[[300, 310], -1.5]],
    "max_new_tokens": 6,
    "top_k": 3,
}


def test_every_id_of_the_configs_is_that_of_the_same_token() -> None:
    def tenfold(_: str, i: int) -> int:
        return 10 * i

    changed = replaced_config(CONFIG, tenfold, "config.json")
    assert changed == CONFIG | {
        "eos_token_id": [20, 30],
        "text_config": {"vocab_size": 0, "pad_token_id": -1, "image_token_index": 3000, "bos_token_id": None},
        "vision": [{"vocab_size": 77, "boi_token_id": 3100}],
        "bos_index": 10,
    }
    assert replaced_config(GENERATION, tenfold, "") == GENERATION | {
        "suppress_tokens": [3000, 3100],
        "bad_words_ids": [[3000, 3100], [30]],
        "forced_decoder_ids": [[1, 3000], [2, None]],
        "lang_to_id": {"<|en|>": 3100},
        "sequence_bias": [[[3000, 3100], -1.5]],
    }


def test_tokens_that_configs_name_stay_and_sizes_follow(tmp_path: Path) -> None:
    text = text_of("byte-level")
    config = {**CONFIG, "text_config": {**CONFIG["text_config"], "vocab_size": 489}}  # type: ignore[dict-item]
    vocabulary = read(tmp_path, text, config=config, files={"generation_config.json": GENERATION})
    assert {1, 2, 3, 300, 310} <= vocabulary.named.keys()
    result = of_texts(vocabulary, ["a"], coverage=0.5)
    assert result.config["vocab_size"] == result.config["text_config"]["vocab_size"] == result.rows
    assert result.config["vision"][0]["vocab_size"] == 77
    assert result.notes == ("config.json: vision: vocab_size is 77, which was not the number of rows, and stays",)
    kept = result.kept_old_ids_K.tolist()
    generation = json.loads(result.files["generation_config.json"])
    assert [kept[i] for i in generation["suppress_tokens"]] == [300, 310]
    assert (
        result.files["generation_config.json"] == (json.dumps(generation, indent=2, ensure_ascii=False) + "\n").encode()
    )
    with pytest.raises(UsageError, match=r"image_token_index names the token '.*' \(300\), which is not among those"):
        trimmed(vocabulary, torch.tensor([i for i in kept if i != 300]))


def test_an_id_beyond_all_rows_named_nothing_and_becomes_null(tmp_path: Path) -> None:
    vocabulary = read(
        tmp_path,
        text_of("byte-level"),
        config={"bos_token_id": 50256},
        files={"generation_config.json": {"eos_token_id": [1, 50256]}},
    )
    result = of_texts(vocabulary, ["a"], coverage=0.5)
    assert result.config["bos_token_id"] is None
    assert len(json.loads(result.files["generation_config.json"])["eos_token_id"]) == 1
    assert "config.json: bos_token_id was 50256, but the embedding has only 489 rows: it named no token" in result.notes


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|a|>{{ m['role'] }}<|b|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
)


def chat_files(**rest: Any) -> dict[str, Any]:
    decoder = {"480": {"content": "<unk>", "special": True}, "486": {"content": "<|c|>", "special": True}}
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    own = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "added_tokens_decoder": decoder}
    extra = {"additional_special_tokens": ["<|a|>", "<|c|>"]}
    return {"tokenizer_config.json": {**names, **own, **extra, **rest}, "special_tokens_map.json": {**names, **extra}}


def test_transformers_loads_it_with_every_special_token_in_its_place(tmp_path: Path) -> None:
    """Added tokens are one id, the same in all files, and chats are written in the same tokens."""
    ids = {"bos_token_id": 481, "eos_token_id": 482, "pad_token_id": 483}
    files = {**chat_files(), "generation_config.json": ids, "added_tokens.json": {"<|a|>": 484}}
    checkpoint = folder_of(tmp_path / "old", text_of("byte-level"), config={"model_type": "llama", **ids}, files=files)
    vocabulary = read_tokenizer(checkpoint)
    result = of_texts(vocabulary, TEXTS[:1], coverage=1.0)
    folder = write_trimmed(checkpoint.path, tmp_path / "new", result).path
    before, after = THEIRS.from_pretrained(tmp_path / "old"), THEIRS.from_pretrained(folder)
    assert len(after) == result.rows < len(before)
    for i in vocabulary.added_ids:
        assert len(after.encode(vocabulary.tokens[i], add_special_tokens=False)) == 1
    generation = json.loads((folder / "generation_config.json").read_text())
    for role in ("bos", "eos", "pad"):
        assert getattr(after, f"{role}_token_id") == generation[f"{role}_token_id"] == result.config[f"{role}_token_id"]
        assert getattr(after, f"{role}_token") == getattr(before, f"{role}_token")
    chat = [{"role": "quick", "content": "the lazy dog"}, {"role": "brown", "content": "the fox"}]
    cut = [t.convert_ids_to_tokens(t.apply_chat_template(chat)["input_ids"]) for t in (before, after)]
    assert cut[0] == cut[1]
    assert json.loads(result.files["added_tokens.json"])["<|a|>"] == after.convert_tokens_to_ids("<|a|>")


@pytest.mark.parametrize(
    ("kind", "loader"),
    [
        ("all splits", "LlamaTokenizer"),
        ("all splits", "PreTrainedTokenizerFast"),
        ("whole words", "PreTrainedTokenizerFast"),
        ("unigram", "PreTrainedTokenizerFast"),
        ("wordpiece", "PreTrainedTokenizerFast"),
        ("prefix and suffix", "PreTrainedTokenizerFast"),
    ],
)
def test_transformers_cuts_texts_whose_tokens_stay_as_before(kind: str, loader: str, tmp_path: Path) -> None:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    files = {"tokenizer_config.json": {**names, "tokenizer_class": loader}}
    checkpoint = folder_of(tmp_path / "old", text_of(kind), config={"model_type": "llama"}, files=files)
    before = THEIRS.from_pretrained(tmp_path / "old")
    vocabulary = read_tokenizer(checkpoint)
    counts = counted(vocabulary, (i for text in TEXTS[::2] for i in before(text)["input_ids"]))
    result = trimmed(vocabulary, choose(vocabulary, counts, coverage=1.0).kept_old_ids_K)
    after = THEIRS.from_pretrained(write_trimmed(checkpoint.path, tmp_path / "new", result).path)
    assert type(after).__name__ == type(before).__name__
    assert len(after) == result.rows < len(before)
    for text in TEXTS[::2]:
        assert after.tokenize(text) == before.tokenize(text)
        assert [result.kept_old_ids_K[i] for i in after(text)["input_ids"]] == before(text)["input_ids"]


def test_reserved_tokens_are_dropped_from_every_file(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path / "old", text_of("byte-level"), config={"model_type": "llama"}, files=chat_files())
    result = of_texts(read_tokenizer(checkpoint), TEXTS[:1], coverage=1.0, drop=["<|c|>"])
    folder = write_trimmed(checkpoint.path, tmp_path / "new", result).path
    after = THEIRS.from_pretrained(folder)
    assert "<|c|>" not in after.get_vocab()
    assert len(after) == result.rows
    assert all(b"<|c|>" not in data for name, data in result.files.items())
    assert json.loads(result.files["tokenizer_config.json"])["additional_special_tokens"] == ["<|a|>"]


@pytest.mark.parametrize(
    ("files", "place"),
    [
        (chat_files(), "tokenizer_config.json: the chat template"),
        (
            chat_files(chat_template=[{"name": "default", "template": TEMPLATE}]),
            "tokenizer_config.json: the chat template",
        ),
        ({"chat_template.jinja": TEMPLATE}, "chat_template.jinja: the chat template"),
        ({"chat_template.json": {"chat_template": TEMPLATE}}, "chat_template.json: the chat template"),
        ({"generation_config.json": {"eos_token_id": [485]}}, "generation_config.json: eos_token_id"),
        ({"tokenizer_config.json": {"image_token": "<|b|>"}}, "tokenizer_config.json: image_token"),
        ({"tokenizer_config.json": {"extra_special_tokens": {"x": "<|b|>"}}}, "tokenizer_config.json: x"),
    ],
)
def test_a_token_that_something_names_cannot_be_dropped(files: dict[str, Any], place: str, tmp_path: Path) -> None:
    vocabulary = read(tmp_path, text_of("byte-level"), files=files)
    with pytest.raises(UsageError, match=rf"drop: '<\|b\|>' cannot go: {place} names it"):
        of_texts(vocabulary, TEXTS[:1], coverage=1.0, drop=["<|b|>"])


@pytest.mark.parametrize("kept", [[], [1, 0], [0, 0], [-1, 0], [0, 488, 489]])
def test_ids_that_are_no_choice_are_refused(kept: list[int], of_kind: Callable[[str], Vocabulary]) -> None:
    with pytest.raises(UsageError):
        trimmed(of_kind("byte-level"), torch.tensor(kept, dtype=torch.int64))


def test_vocabulary_and_merges_of_slow_tokenizers_follow(tmp_path: Path) -> None:
    old = loaded(text_of("byte-level, some bytes"))
    plain = json.loads(old.to_str())
    vocab, merges = plain["model"]["vocab"], plain["model"]["merges"]
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    files = {"vocab.json": json.dumps(vocab, ensure_ascii=False), "merges.txt": "\n".join(lines) + "\n"}
    result = of_texts(read(tmp_path, str(old.to_str()), files=files), TEXTS[:1], coverage=1.0)
    (tmp_path / "vocab.json").write_bytes(result.files["vocab.json"])
    (tmp_path / "merges.txt").write_bytes(result.files["merges.txt"])
    slow = Tokenizer(models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")))
    slow.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert slow.get_vocab() == result.tokenizer["model"]["vocab"]
    assert slow.encode(TEXTS[1]).ids == loaded(result.tokenizer).encode(TEXTS[1], add_special_tokens=False).ids


def test_the_lines_of_a_word_list_are_the_ids(tmp_path: Path) -> None:
    old = loaded(text_of("wordpiece"))
    words = sorted(old.get_vocab(), key=old.get_vocab().__getitem__)
    vocabulary = read(tmp_path, str(old.to_str()), files={"vocab.txt": "\n".join(words) + "\n"})
    result = of_texts(vocabulary, TEXTS[:1], coverage=1.0)
    new = loaded(result.tokenizer)
    assert result.files["vocab.txt"].decode().split("\n") == [*(new.id_to_token(i) for i in range(result.rows)), ""]


def test_files_that_are_of_another_tokenizer_or_form_are_removed_with_the_reason(tmp_path: Path) -> None:
    files = {
        "vocab.json": {"a": 999},
        "merges.txt": "no merge here\n",
        "vocab.txt": "other\n",
        "tekken.json": {},
        "tokenizer.model": b"\xff\xff\xff",
        "spiece.model": sentencepiece([("strange", 0.0, 1)]),
        "README.txt": "the quick brown fox",
    }
    result = of_texts(read(tmp_path, text_of("byte-level"), files=files), TEXTS[:1], coverage=1.0)
    assert result.removed.keys() == files.keys() - {"README.txt"}
    assert "'a' as 999" in result.removed["vocab.json"]
    assert "'strange', which tokenizer.json lacks" in result.removed["spiece.model"]
    assert "README.txt" not in result.files


def sentencepiece(pieces: Iterable[tuple[str, float, int]], *, rest: bytes = b"", tested: bool = False) -> bytes:
    parts = []
    for text, score, kind in pieces:
        fields = block(1, text.encode()) + b"\x15" + struct.pack("<f", score)
        parts.append(block(1, fields + (b"\x18" + bytes([kind])) * (kind != 1)))
    return b"".join(parts) + rest + block(4, block(1, b"self test")) * tested


def numbers(message: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message by number."""
    found: dict[int, list[Any]] = {}
    at = 0

    def number() -> int:
        nonlocal at
        value, shift = 0, 0
        while True:
            value, shift, at = value | (message[at] & 127) << shift, shift + 7, at + 1
            if message[at - 1] < 128:
                return value

    while at < len(message):
        key = number()
        if key & 7 == 0:
            found.setdefault(key >> 3, []).append(number())
            continue
        length = {5: 4, 1: 8}.get(key & 7) or number()
        found.setdefault(key >> 3, []).append(message[at : at + length])
        at += length
    return found


def test_a_sentencepiece_model_has_the_pieces_that_stay_and_else_what_it_had(tmp_path: Path) -> None:
    old = loaded(text_of("unigram"))
    pieces = json.loads(old.to_str())["model"]["vocab"]
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, "<pad>": 3}
    minus = varint(2**64 - 1)  # no id, as protobuf writes -1
    trainer = block(1, b"input") + b"\x20" + varint(len(pieces)) + varint(43 << 3) + minus + varint(42 << 3) + varint(2)
    rest = block(2, trainer) + block(3, b"\x0a\x03nfc")
    data = sentencepiece([(text, score, kinds.get(text, 1)) for text, score in pieces], rest=rest, tested=True)
    vocabulary = read(tmp_path, str(old.to_str()), files={"spiece.model": data})
    result = of_texts(vocabulary, TEXTS[:1], coverage=0.9)
    found = numbers(result.files["spiece.model"])
    new = [numbers(piece) for piece in found[1]]
    assert [piece[1][0].decode() for piece in new] == [text for text, _ in result.tokenizer["model"]["vocab"]]
    assert [piece[2][0] for piece in new] == [
        struct.pack("<f", score) for _, score in result.tokenizer["model"]["vocab"]
    ]
    assert [piece.get(3) for piece in new[:4]] == [[2], [3], [3], [3]]
    assert numbers(found[2][0]) == {1: [b"input"], 4: [result.rows], 43: [2**64 - 1], 42: [2]}
    assert found[3] == [b"\x0a\x03nfc"]
    assert 4 not in found, "its own test was of all pieces"


def test_ids_that_are_one_more_than_in_the_sentencepiece_model_stay_so(tmp_path: Path) -> None:
    """As fairseq has it: <s>, <pad>, </s>, <unk> against <unk>, <s>, </s>, and a mask behind all."""
    words = [(word, -1.0 - n, 1) for n, word in enumerate(["\u2581", "a", "b", "c", "ab", "bc"])]
    model = sentencepiece([("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *words])
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    tokenizer = Tokenizer(models.Unigram([*special, *((w, s) for w, s, _ in words), ("<mask>", 0.0)], unk_id=3))
    tokenizer.add_special_tokens([*(token for token, _ in special), "<mask>"])
    vocabulary = read(tmp_path, str(tokenizer.to_str()), files={"sentencepiece.bpe.model": model})
    result = trimmed(vocabulary, torch.tensor([0, 1, 2, 3, 5, 7, 9, 10]))
    pieces = [numbers(piece)[1][0].decode() for piece in numbers(result.files["sentencepiece.bpe.model"])[1]]
    assert pieces == ["<unk>", "<s>", "</s>", "a", "c", "bc"]
    new = loaded(result.tokenizer).get_vocab()
    assert [new[piece] - place for place, piece in enumerate(pieces)][3:] == [1, 1, 1]
    without_pad = trimmed(vocabulary, torch.tensor([0, 2, 3, 5, 7, 9, 10]))
    assert "other places" in without_pad.removed["sentencepiece.bpe.model"]


def test_a_list_of_ranks_has_the_new_ids(tmp_path: Path) -> None:
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    bytes_of = {chr(byte): byte for byte in printed} | {chr(256 + n): byte for n, byte in enumerate(hidden)}
    vocab = json.loads(text_of("byte-level"))["model"]["vocab"]

    def lines(tokens: dict[str, int]) -> bytes:
        ordered = sorted((i, bytes(bytes_of[sign] for sign in token)) for token, i in tokens.items())
        return b"".join(b"%s %d\n" % (base64.b64encode(token), i) for i, token in ordered)

    result = of_texts(
        read(tmp_path, text_of("byte-level"), files={"tokenizer.model": lines(vocab)}), TEXTS, coverage=0.9
    )
    assert result.files["tokenizer.model"] == lines(result.tokenizer["model"]["vocab"])


@pytest.mark.parametrize("kind", ["byte-level", "all splits", "unigram"])
def test_gguf_still_knows_the_tokenizer(kind: str, tmp_path: Path) -> None:
    plain = json.loads(text_of(kind))
    plain["normalizer"] = plain["normalizer"] if kind == "all splits" else None
    plain["post_processor"]["single"] = plain["post_processor"]["single"][:2]
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    files = {"tokenizer_config.json": names}
    checkpoint = folder_of(tmp_path / "old", json.dumps(plain), config={"model_type": "llama"}, files=files)
    result = of_texts(read_tokenizer(checkpoint), TEXTS[:1], coverage=0.95)
    folder = write_trimmed(checkpoint.path, tmp_path / "new", result).path
    before = read_tokens(tmp_path / "old", checkpoint.config, checkpoint.config["vocab_size"])
    after = read_tokens(folder, result.config, result.rows)
    assert before is not None
    assert after is not None
    kept = result.kept_old_ids_K.tolist()
    assert (after.model, after.pre, after.add_bos) == (before.model, before.pre, before.add_bos)
    assert after.texts == tuple(before.texts[i] for i in kept)
    assert after.types == tuple(before.types[i] for i in kept)
    assert {name: kept[i] for name, i in after.special.items()} == before.special


RESERVED = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(254))]
PUBLISHED: dict[str, tuple[str, Callable[[Path], str], dict[str, str]]] = {
    "gpt2": ("en", lambda at: gpt2_json(at / "gpt2" / "gpt2_vocab.json", at / "gpt2" / "gpt2_merges.txt"), {
        "vocab.json": "gpt2/gpt2_vocab.json", "merges.txt": "gpt2/gpt2_merges.txt",
    }),
    "gpt-neox": ("de", lambda at: (at / "gpt-neox-20b" / "20B_tokenizer.json").read_text("utf-8"), {}),
    "llama-2": ("ru", lambda at: (at / "llama2-hf" / "tokenizer.json").read_text("utf-8"), {
        "tokenizer.model": "llama2/tokenizer.model",
    }),
    "llama-3": ("th", lambda at: tiktoken_json(at / "llama3" / "tokenizer.model", RESERVED), {
        "tokenizer.model": "llama3/tokenizer.model",
    }),
}  # fmt: skip


def paragraphs(assets: Path, language: str) -> list[str]:
    articles = json.loads((assets / "data" / "xquad" / f"xquad.{language}.json").read_text("utf-8"))["data"]
    return [paragraph["context"] for article in articles for paragraph in article["paragraphs"]]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tokenizer_cuts_one_language_as_before_and_loses_no_other(
    name: str, assets: Path, tmp_path: Path
) -> None:
    language, written, others = PUBLISHED[name]
    at = assets / "data" / "tokenizers"
    files = {file: (at / other).read_bytes() for file, other in others.items()}
    vocabulary = read(tmp_path, written(at), files=files)
    old = loaded((tmp_path / "tokenizer.json").read_text("utf-8"))
    own = paragraphs(assets, language)[::3]
    counts = counted(vocabulary, (i for text in own[::2] for i in old.encode(text).ids))
    drop = ["<|reserved_special_token_*|>"] if name == "llama-3" else []
    result = trimmed(vocabulary, choose(vocabulary, counts, coverage=1.0, multiple=64, drop=drop).kept_old_ids_K)
    new, kept = loaded(result.files["tokenizer.json"].decode()), result.kept_old_ids_K.tolist()
    assert result.rows % 64 == 0
    assert result.rows < vocabulary.rows / 2
    sentences = [sentence for text in own for sentence in text.split(". ")]
    alike = [cut_alike(old, new, kept, sentence) for sentence in sentences]
    assert sum(alike) > len(alike) / 5
    assert all(cut_alike(old, new, kept, text) for text in own[::2])
    for other in ("ar", "zh", "en"):
        for text in paragraphs(assets, other)[::20]:
            assert new.decode(new.encode(text).ids) == old.decode(old.encode(text).ids)
    assert not result.removed
    if name == "llama-2":
        pieces = [numbers(piece)[1][0].decode() for piece in numbers(result.files["tokenizer.model"])[1]]
        assert {piece: i for i, piece in enumerate(pieces)} == result.tokenizer["model"]["vocab"]
    if name == "llama-3":
        ranks = [int(line.split()[1]) for line in result.files["tokenizer.model"].splitlines()]
        assert ranks == list(range(result.rows - 2))
    if name == "gpt2":
        assert json.loads(result.files["vocab.json"]) == new.get_vocab()
        assert result.files["merges.txt"].count(b"\n") == len(result.tokenizer["model"]["merges"])

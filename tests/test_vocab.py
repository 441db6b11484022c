"""What `tersely vocab` does, from the command line to the folder, and what it says to a user who is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from tersely import cli
from tersely.checkpoint import open_checkpoint
from tersely.errors import DataError, UsageError
from tersely.job import prepare
from tersely.methods.trim import Frequency, Languages
from tersely.methods.trim.languages import foreign_share, known_languages, languages_of, read_as
from tersely.plan.reading import recipe_from_toml
from tersely.plan.recipe import Recipe, Trim
from tersely.vocabulary.tokenizer import read_tokenizer
from tests.tiny import load, tiny
from tests.tokens import WORDS, write_text, write_tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tiny("llama", tmp_path_factory.mktemp("source") / "model", blocks=4))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def run(*words: object) -> int:
    return cli.main(["vocab", *map(str, words)])


def complaint(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def trimmed(source: Path, text: Path, folder: Path, *more: object) -> Path:
    out = folder / "out"
    assert run("trim", source, out, "--corpus", text, *more) == 0
    return out


def test_a_trimmed_folder_is_whole_and_its_tokens_have_their_logits(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = trimmed(source, text, tmp_path, "--rows", 48)
    assert "48 of 64 rows stay" in capsys.readouterr().out
    assert cli.main(["verify", str(out), "--source", str(source)]) == 0
    kept = torch.tensor(json.loads((out / "vocabulary-map.json").read_text())["old_ids"])
    assert len(kept) == json.loads((out / "config.json").read_text())["vocab_size"] == 48
    new_BL = torch.randint(0, 48, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before: Any = load(source)(input_ids=kept[new_BL])
        after: Any = load(out)(input_ids=new_BL)
    torch.testing.assert_close(after.logits, before.logits[..., kept], atol=1e-6, rtol=1e-6)
    report = json.loads((out / "report.json").read_text())
    assert report["vocabulary"]["rows_after"] == 48
    assert "How many rows the corpus needs" in (out / "report.html").read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_a_trim_is_the_same_bytes_alone_and_before_other_steps(source: Path, text: Path, tmp_path: Path) -> None:
    alone = trimmed(source, text, tmp_path, "--rows", 48, "--multiple", 1)
    recipe = tmp_path / "both.toml"
    recipe.write_text(
        '[[steps]]\nwhere = "tokens"\nmethod = "frequency"\nrows = 48\nmultiple = 1\n'
        '[[steps]]\nwhere = "linear"\nmethod = "rtn"\ngroup = 16\n'
    )
    for job in ([str(source), "one", "--recipe", str(recipe), "--calibration", str(text)],):
        job[1] = str(tmp_path / "one")
        assert cli.main(["compress", *job]) == 0
    recipe.write_text('[[steps]]\nwhere = "linear"\nmethod = "rtn"\ngroup = 16\n')
    assert cli.main(["compress", str(alone), str(tmp_path / "two"), "--recipe", str(recipe)]) == 0
    one, two = open_checkpoint(tmp_path / "one"), open_checkpoint(tmp_path / "two")
    assert [*one] == [*two]
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (one.path / "tokenizer.json").read_bytes() == (two.path / "tokenizer.json").read_bytes()
    assert cli.main(["verify", str(one.path), "--source", str(source)]) == 0


def test_documents_that_lost_nothing_do_not_speak_for_the_others(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Some documents are cut as before, and their KL is 0; the verdict and the page's first numbers are of all."""
    out = trimmed(source, text, tmp_path, "--coverage", 0.97, "--multiple", 1)
    job = ["evaluate", str(out), "--against", str(source), "--text", str(text), "--writing", "0"]
    capsys.readouterr()
    assert cli.main([*job, "--store", str(tmp_path / "runs.db"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["text"]["divergence"]["documents"] < found["text"]["documents"] == found["comparisons"][0]["items"]
    assert found["text"]["divergence"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert found["comparisons"][0]["unit"] == "bits"
    assert "its predictions are those" not in found["verdict"]
    assert cli.main(["report", str(out), "--store", str(tmp_path / "runs.db"), "--out", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "loss against the base, bits a byte" in page
    assert "those that both tokenizers cut alike" in page
    assert "its predictions are those" not in page


def test_a_dry_run_writes_nothing_and_says_what_would_stay(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("trim", source, tmp_path / "out", "--corpus", text, "--coverage", 0.9, "--dry-run", "--json") == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["coverage"] >= 0.9
    assert plain["rows_after"] % 8 == 0
    assert plain["curve_rows"] == sorted(plain["curve_rows"])
    assert plain["curve_coverage"] == sorted(plain["curve_coverage"])
    assert not [*tmp_path.iterdir()]


def test_a_size_in_bytes_is_kept(source: Path, text: Path, tmp_path: Path) -> None:
    whole = open_checkpoint(source).nbytes
    wanted = whole - 2 * 4 * 64 * 10
    out = trimmed(source, text, tmp_path, "--size", wanted, "--multiple", 1)
    assert wanted - 2 * 4 * 64 < open_checkpoint(out).nbytes <= wanted


def test_a_trim_goes_on_where_it_was_killed(
    source: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trimmed(source, text, tmp_path / "whole", "--rows", 48)
    monkeypatch.setattr("tersely.writer.Writer.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("trim", source, tmp_path / "out", "--corpus", text, "--rows", 48) == 130
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert run("trim", source, tmp_path / "out", "--corpus", text, "--rows", 48) == 5
    assert run("trim", source, tmp_path / "out", "--corpus", text, "--rows", 48, "--resume") == 0
    for file in whole.iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 2, "nothing says which tokens are wanted"),
        (("--languages", "german"), 2, "no language 'german'; did you mean 'de'?"),
        (("--languages", "en", "--coverage", "0.9", "--rows", "50"), 2, "one of them says how many tokens stay"),
        (("--languages", "en", "--size", "lots"), 2, "'lots' is no number of bytes"),
        (("--languages", "en", "--size", "1kB"), 2, "1 kB are too few: what is no vocabulary takes"),
        (("--corpus", "TEXT", "--rows", "3"), 2, "must stay"),
        (("--corpus", "TEXT", "--languages", "ru"), 4, "100% of the letters of the corpus are not of Russian"),
        (("--corpus", "nowhere.txt"), 4, "nowhere.txt: no such text file"),
        (("--corpus", "TEXT", "--keep", "nothere"), 2, "keep: 'nothere' is no token"),
        (("--corpus", "TEXT", "--drop", "<s>"), 2, "drop: '<s>' cannot go"),
        (("--corpus", "TEXT", "--drop", "mat"), 2, "drop: 'mat' is no added token"),
    ],
)
def test_what_cannot_be_trimmed_is_an_error_and_nothing_is_written(
    source: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    words = [str(text) if word == "TEXT" else word for word in more]
    assert run("trim", source, tmp_path / "out", *words) == code
    assert said in complaint(capsys)
    assert not (tmp_path / "out").exists()


def test_a_corpus_in_another_language_than_asked_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    german = "Die Frau und der Mann sind nicht auf dem Weg zu der Stadt, und das Kind ist mit ihnen. " * 20
    (tmp_path / "de.txt").write_text(german)
    assert run("trim", source, tmp_path / "out", "--corpus", tmp_path / "de.txt", "--languages", "fr") == 4
    assert "the corpus reads as German, not as French; give --languages de" in complaint(capsys)


def test_a_model_without_a_fast_tokenizer_is_told_how_to_get_one(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny("llama", tmp_path / "model")
    assert run("trim", folder, tmp_path / "out", "--corpus", text) == 3
    assert "has no tokenizer.json; where its tokenizer can be loaded, write one" in complaint(capsys)


def test_a_corpus_that_the_model_cannot_read_is_refused(tmp_path: Path) -> None:
    folder = write_tokenizer(tiny("llama", tmp_path / "model"))
    (tmp_path / "ru.txt").write_text("привет мир " * 50)
    plain = json.loads((folder / "tokenizer.json").read_text())
    assert plain["model"]["unk_token"] == "<unk>"
    recipe = Recipe((Trim("tokens", Frequency()),))
    with pytest.raises(DataError, match="of the tokens of the corpus are '<unk>': this model cannot read it"):
        prepare(folder, recipe, tmp_path / "out", calibration=tmp_path / "ru.txt")


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ('where = "linear"\nmethod = "frequency"', "trims the vocabulary; write `tokens`"),
        ('where = "tokens"\nmethod = "frequency"\nrows = 5\ncoverage = 0.5', "one of them says how many"),
        ('where = "tokens"\nmethod = "languages"\nlanguages = "xx"', "no language 'xx'"),
        ('where = "tokens"\nmethod = "frequency"\nrows = -1', "rows=-1: expected a number above 0"),
        ('where = "tokens"\nmethod = "frequency"\n[[steps]]\nwhere = "tokens"\nmethod = "languages"', "trimmed twice"),
        ('where = "linear"\nmethod = "rtn"\n[[steps]]\nwhere = "tokens"\nmethod = "frequency"', "first of all the voc"),
    ],
)
def test_a_recipe_that_cannot_trim_is_an_error(steps: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        recipe_from_toml(f"[[steps]]\n{steps}\n")


def test_a_recipe_with_a_trim_reads_back_as_it_was_written() -> None:
    recipe = Recipe((Trim("tokens", Languages("en,de"), coverage=0.5, keep="a b", drop="<x>"),))
    assert recipe_from_toml(recipe.to_toml()) == recipe


def test_letters_of_languages_decide_which_tokens_stay(tmp_path: Path) -> None:
    folder = write_tokenizer(tiny("llama", tmp_path / "model"))
    recipe = Recipe((Trim("tokens", Languages("ru"), multiple=1),))
    job = prepare(folder, recipe, tmp_path / "out")
    assert job.trim is not None
    vocabulary = read_tokenizer(open_checkpoint(folder))
    kept = {vocabulary.tokens[i] for i in job.trim.trimmed.kept_old_ids_K.tolist()}
    gone = set(vocabulary.ids) - kept
    assert gone
    # Only single bytes are left of what is written in other letters.
    assert all(len(str(token)) > 1 for token in gone)
    assert not any(str(token).isalpha() and str(token).isascii() and len(str(token)) > 1 for token in kept)


def test_every_language_writes_its_own_words() -> None:
    for language in known_languages().values():
        assert language.ranges
        assert foreign_share(" ".join(language.words), [language]) == 0
        if len(language.words) > 10:
            assert read_as(" ".join([*language.words] * 20)) is not None
    assert [language.code for language in languages_of(" EN , de")] == ["en", "de"]
    assert read_as("one two three") is None


def test_measure_and_suggest_print_what_they_found(
    source: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("measure", source, source / "tokenizer.json", "--corpus", f"mine={text}", f"other={text}", "--json") == 0
    one, two = json.loads(capsys.readouterr().out)
    assert one["groups"] == two["groups"]
    assert one["groups"][0]["tokens"] == one["groups"][1]["tokens"]
    assert one["groups"][0]["own_rows"] == 0
    assert run("measure", source, "--corpus", text) == 0
    assert "tokens/word" in capsys.readouterr().out
    assert run("suggest", source, "--corpus", text) == 0
    shown = capsys.readouterr().out
    assert "of the corpus" in shown
    assert "fitted loss" in shown


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "new"
    assert run("train", out, "--corpus", text, "--size", 290, "--special", "<s>", "</s>", "<unk>") == 0
    return out


def test_a_trained_tokenizer_is_loaded_by_transformers_and_gives_texts_back(trained: Path) -> None:
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(trained)
    assert len(loaded) == 290
    said = "the cat sat on 3 mats, é 東京"
    assert loaded.decode(loaded(said)["input_ids"]) == said
    assert run("train", trained, "--corpus", trained / "tokenizer.json", "--size", 290) == 5


def test_a_model_that_was_moved_to_another_tokenizer_runs_with_it(
    source: Path, trained: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "moved"
    assert run("transplant", source, out, "--tokenizer", trained, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rows_after"] == 296
    assert found["copied"] + found["initialised"] + found["fallen"] + found["empty"] == 296
    config = json.loads((out / "config.json").read_text())
    ids = Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True)
    assert config["vocab_size"] == 296
    # The start of a text has the row that it had.
    old = read_tokenizer(open_checkpoint(source))
    before, after = open_checkpoint(source), open_checkpoint(out)
    name = "model.embed_tokens.weight"
    assert torch.equal(after[name][ids["<s>"]], before[name][old.ids["<s>"]])
    assert config["bos_token_id"] == ids["<s>"]
    assert cli.main(["evaluate", str(out), "--text", str(text), "--no-store", "--writing", "0"]) == 0


def test_a_model_with_more_tokens_computes_what_it_did_for_the_old_ones(
    source: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "more"
    assert run("extend", source, out, "--corpus", text, "--tokens", 12, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens_after"] < found["tokens_before"]
    ids_BL = torch.randint(0, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before: Any = load(source)(input_ids=ids_BL)
        after: Any = load(out)(input_ids=ids_BL)
    old = len(read_tokenizer(open_checkpoint(source)).ids)
    assert torch.equal(after.logits[..., :old], before.logits[..., :old])
    # Means of old rows never win.
    assert torch.equal(after.logits.argmax(-1), after.logits[..., :old].argmax(-1))
    joined = Tokenizer.from_file(str(out / "tokenizer.json")).encode(" ".join(WORDS)).ids
    assert max(joined) >= old


def test_injection_gives_special_tokens_and_middle_blocks_of_the_chat_model(
    source: Path, text: Path, tmp_path: Path
) -> None:
    adapted = tmp_path / "adapted"
    assert run("extend", source, adapted, "--corpus", text, "--tokens", 12) == 0
    assert run("inject", source, adapted, tmp_path / "out", "--set", "outer=1.0", "--set", "inner=1.0") == 0
    chat, made = open_checkpoint(source), open_checkpoint(tmp_path / "out")
    assert all(torch.equal(made[name], chat[name]) for name in chat if ".layers." in name)
    name = "model.embed_tokens.weight"
    assert torch.equal(made[name], open_checkpoint(adapted)[name])


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("extend", "SOURCE", "OUT", "--corpus", "TEXT", "--tokens", "5", "--method", "means"), 2, "mean 'mean'"),
        (("extend", "SOURCE", "OUT", "--corpus", "TEXT", "--tokens", "0"), 2, "count=0"),
        (("transplant", "SOURCE", "OUT", "--tokenizer", "NEW", "--method", "align"), 2, "learns from text"),
        (("transplant", "SOURCE", "OUT", "--tokenizer", "NEW", "--method", "omp"), 3, "no"),
        (("transplant", "SOURCE", "OUT", "--tokenizer", "nowhere"), 3, "no folder nowhere"),
        (("inject", "SOURCE", "SOURCE", "OUT", "--set", "outer=2.0"), 2, "expected 0 to 1"),
        (("train", "OUT", "--corpus", "TEXT", "--size", "20"), 2, "less than the alphabet"),
        (("train", "OUT", "--corpus", "TEXT", "--size", "400", "--method", "bep"), 2, "did you mean 'bpe'"),
        (("train", "OUT", "--corpus", "TEXT", "--size", "400", "--set", "words=3"), 2, "no setting named 'words'"),
        (("measure", "SOURCE", "--corpus", "x=nowhere.txt"), 4, "nowhere.txt: no such text file"),
    ],
)
def test_what_cannot_be_done_is_an_error_and_nothing_is_written(
    source: Path,
    text: Path,
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    said: str,
) -> None:
    given: dict[str, Callable[[], Path]] = {
        "SOURCE": lambda: source,
        "OUT": lambda: tmp_path / "out",
        "TEXT": lambda: text,
        "NEW": lambda: trained,
    }
    assert run(*(given[word]() if word in given else word for word in words)) == code
    assert said in complaint(capsys)
    assert not (tmp_path / "out").exists()

"""What the README and the docs tell a reader to type can be typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tersely import cli
from tersely.demo import CALIBRATION, EVALUATION, MODEL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def substituted(text: str) -> str:
    """THE SUBSTITUTION: the demo's model stands in for the reader's own."""
    return text.replace("path/to/model", str(MODEL))


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the texts that the README supposes; the presets want 128 documents."""
    folder = tmp_path_factory.mktemp("readme")
    text = CALIBRATION.read_text("utf-8")
    (folder / "text.txt").write_text(text + text, "utf-8")
    (folder / "held-out.txt").write_text(EVALUATION.read_text("utf-8"), "utf-8")
    return folder


def commands(text: str) -> list[list[str]] | None:
    """The words of each line of a block that holds nothing but plain tersely commands; None for any other."""
    lines = [shlex.split(line, comments=True) for line in text.replace("\\\n", " ").splitlines()]
    lines = [words for words in lines if words]
    plain = all(words[0] == "tersely" and not {"|", ">", "&&", ";", "&"} & set(words) for words in lines)
    return [words[1:] for words in lines] if plain else None


def test_every_command_and_every_python_block_of_the_readme_runs_in_order(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} == {"bash", "python"}, "a block of another kind is not tested"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    monkeypatch.chdir(workplace)
    for language, text in found:
        # In this process, where all is imported: a process for each command takes longer than most commands.
        if language == "bash" and (lines := commands(substituted(text))) is not None:
            for words in lines:
                assert cli.main(words) == 0, words
            continue
        command = ["bash", "-euo", "pipefail", "-c"] if language == "bash" else [sys.executable, "-c"]
        done = subprocess.run(
            [*command, substituted(text)],
            cwd=workplace,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert (workplace / "small").is_dir()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_make_command_that_a_page_names_is_a_target(page: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
    text = page.read_text("utf-8")
    named = re.findall(r"`make ([a-z]+)`", text) + re.findall(r"^    make ([a-z]+)", text, re.MULTILINE)
    assert set(named) <= set(targets)


def test_the_first_screen_of_the_readme_names_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text("utf-8").splitlines()[:12]
    assert any(line.startswith("    make demo") for line in first)
    assert any(line.startswith("    make test") for line in first)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_tersely_command_that_a_page_shows_is_one_that_the_command_line_takes(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["tersely"]:
                cli._parser().parse_args(words[1:])  # ends the process where it cannot


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"

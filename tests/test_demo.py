"""The demo runs from what the package holds, and its numbers hold."""

import json
import shutil
import subprocess
import sys
import tomllib
from html import unescape
from pathlib import Path
from unittest.mock import Mock

import pytest

from tersely.calibrate import documents, read_text
from tersely.cli import main
from tersely.demo import CALIBRATION, EVALUATION, FOLDER, MODEL, RECIPE, Demo, run_demo
from tersely.errors import OutputError
from tersely.plan.reading import load_recipe

ROOT = Path(__file__).parents[1]
SHIPPED = (CALIBRATION, EVALUATION, RECIPE, FOLDER / "README.md", *sorted(MODEL.glob("*")))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return run_demo(tmp_path_factory.mktemp("demo") / "out")


def test_the_matrices_come_out_four_times_smaller(demo: Demo) -> None:
    assert demo.matrix_ratio > 4.2
    assert demo.report.ratio > 2.5
    stored = sum(file.stat().st_size for file in Path(demo.report.out).glob("*.safetensors"))
    assert stored < (MODEL / "model.safetensors").stat().st_size / 2.5


def test_the_loss_of_the_demo_is_small_and_measured(demo: Demo) -> None:
    text = demo.evaluation.text
    assert text is not None
    assert text.divergence is not None
    assert 0.01 < text.divergence.loss_difference.value < 0.06
    assert 0 < text.divergence.loss_difference.stderr < 0.01
    assert 0.02 < text.divergence.kl.value < 0.07
    assert text.documents == 19
    assert "worse" in demo.evaluation.verdict


def test_the_demo_finds_where_it_lost(demo: Demo) -> None:
    blocks = [site for site in demo.blame.sites if site.level == "block"]
    assert len(blocks) == 4
    assert all(site.cost.value > 2 * site.cost.stderr for site in blocks)
    assert [depth.error for depth in demo.blame.depth] == sorted(depth.error for depth in demo.blame.depth)


def test_the_demo_writes_its_page_beside_the_folder(demo: Demo) -> None:
    page = Path(demo.page)
    assert page.parent == Path(demo.report.out).parent
    assert demo.evaluation.verdict in unescape(page.read_text("utf-8"))
    assert json.loads(page.with_suffix(".json").read_text("utf-8"))


def test_the_demo_verifies_its_folder_and_the_source(demo: Demo) -> None:
    assert demo.verification.ran
    assert demo.verification.source_unchanged
    assert demo.verification.encoded == len(demo.report.rows) == 29


def test_both_models_continue_a_text(demo: Demo) -> None:
    assert demo.sample.model
    assert demo.sample.base


def test_the_demo_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(OutputError, match="exists"):
        run_demo(tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())
    (tmp_path / "new-report.html").write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        run_demo(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_verb_prints_every_step_or_json(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tersely.demo.run_demo", Mock(return_value=demo))
    assert main(["demo"]) == 0
    page = capsys.readouterr().out
    assert all(f"{step}. " in page for step in range(1, 6))
    assert "What it cost" in page
    assert f"{demo.report.ratio:.2f} times smaller" in page
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ratio"] == demo.report.ratio


def test_the_texts_are_whole_documents_and_apart() -> None:
    calibration, evaluation = (set(documents(read_text(file))) for file in (CALIBRATION, EVALUATION))
    assert len(calibration) == load_recipe(RECIPE).calibration.samples
    assert not calibration & evaluation


def test_the_wheel_takes_all_that_the_demo_needs() -> None:
    """It takes the folder src/tersely but what git ignores; building one would need the network."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]
    assert settings["targets"]["wheel"]["packages"] == ["src/tersely"]
    assert not set(settings["targets"]["wheel"]) & {"exclude", "include", "only-include"}
    assert all(file.is_file() and file.is_relative_to(ROOT / "src" / "tersely") for file in SHIPPED)
    if shutil.which("git") and (ROOT / ".git").exists():
        names = [str(file.relative_to(ROOT)) for file in SHIPPED]
        ignored = subprocess.run(["git", "check-ignore", "--no-index", *names], cwd=ROOT, capture_output=True)
        assert ignored.stdout == b""


def test_a_data_free_job_imports_no_transformers(tmp_path: Path) -> None:
    code = (
        "import sys, tersely; "
        f"tersely.compress({str(MODEL)!r}, 'w4a16', {str(tmp_path / 'out')!r}); "
        "sys.exit('transformers' in sys.modules or 'compressed_tensors' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

"""Options and fixtures of all tests."""

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--assets", default="../shared", help="folder with models/ and data/, from the repository root")


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test touches the runs of whoever runs it: the default store lies in a folder of its own."""
    folder = tmp_path_factory.mktemp("data-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def assets(request: pytest.FixtureRequest) -> Path:
    """The folder of trained models and real texts; skips the test where there is none."""
    folder = Path(request.config.rootpath, request.config.getoption("--assets")).resolve()
    if not (folder / "models").is_dir() or not (folder / "data").is_dir():
        pytest.skip(f"assets folder {folder} not found: pass --assets=PATH")
    return folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family with a tokenizer, written once; it is only read."""
    from tests.tiny import tiny
    from tests.tokens import write_tokenizer

    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = write_tokenizer(tiny(model_type, tmp_path_factory.mktemp(model_type)))
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents in the words of that tokenizer."""
    from tests.tokens import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="session")
def llama() -> Any:
    """tests.llama.LlamaFile; skips the test where llama.cpp is not installed."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make test builds it")
    return importlib.import_module("tests.llama").LlamaFile

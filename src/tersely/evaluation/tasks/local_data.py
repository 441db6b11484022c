"""Data of a task that is not tersely's own, from copies at hand: files, a folder, or what was loaded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tersely.errors import DataError, first_line

_READERS = {"json": "from_json", "csv": "from_csv", "parquet": "from_parquet", "text": "from_text"}
"""Forms of files that a task file may name as its data, and what of the datasets library reads them."""


def loader(
    task: str, path: str, part: str | None, given: Mapping[str, Any], data: Path | None, file: Path | None
) -> Callable[..., Any]:
    """Loads a dataset that the harness knows by a path: from files, a folder, or what was loaded once."""

    def load(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict, load_dataset
        from datasets.packaged_modules.cache.cache import Cache

        near = [place for place in (None if file is None else file.parent, data) if place is not None]
        settings = {key: value for key, value in given.items() if key not in ("trust_remote_code", "data_files")}
        if path in _READERS:
            files = _files(task, given.get("data_files"), near)
            read = getattr(Dataset, _READERS[path])
            with TemporaryDirectory() as cache:
                return DatasetDict(
                    {
                        split: read(names, cache_dir=cache, keep_in_memory=True, **settings)
                        for split, names in files.items()
                    }
                )
        folder = next((place / path for place in near if (place / path).is_dir()), None)
        try:
            if folder is not None:
                alone = part is not None and not (folder / "README.md").is_file() and (folder / part).is_dir()
                chosen: dict[str, Any] = {"data_dir": part} if alone else {"name": part}
                with TemporaryDirectory() as cache:
                    return load_dataset(str(folder), cache_dir=cache, keep_in_memory=True, **chosen, **given)
            kept = Cache(
                repo_id=path, dataset_name=path.rpartition("/")[2], config_name=part, version="auto", hash="auto"
            )
            return kept.as_dataset()
        except Exception as error:
            where = path if data is None else data / path
            raise DataError(
                f"{task}: its data, the dataset {path}{f' ({part})' if part else ''}, are not at hand: put a copy of "
                f"its files into {where}{' in your data folder (--data DIR)' if data is None else ''}, or load it once "
                f"with the datasets library where there is a network ({first_line(error)})"
            ) from error

    return load


def _files(task: str, named: Any, near: list[Path]) -> dict[str, list[str]]:
    """Split -> paths of the data files that a task names, which may be given from the task file or the data folder."""
    splits = named if isinstance(named, Mapping) else {"train": named}
    files: dict[str, list[str]] = {}
    for split, names in splits.items():
        for name in names if isinstance(names, list) else [names]:
            places = [place / str(name) for place in (*near, Path())]
            found = next((place for place in places if place.is_file()), None)
            if name is None or found is None:
                raise DataError(
                    f"{task}: its data file {name!r} is not there; it is looked for beside the task file, in the data "
                    "folder (--data DIR) and in the current folder"
                )
            files.setdefault(str(split), []).append(str(found))
    return files

"""Do something when another package's module has been imported, without importing it.

The only thing that `import tersely` does beside defining names; docs/decisions/009-known-to-transformers.md says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def when_imported(module: str, do: Callable[[], None]) -> None:
    """Call `do` once: now if the module has been imported, else as soon as it is."""
    if module in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Awaiting(module, do))


class _Awaiting(MetaPathFinder):
    """Finds one module as the finders behind it do, and acts when that has run; then it is gone."""

    def __init__(self, module: str, do: Callable[[], None]) -> None:
        self._module, self._do = module, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for f in others if (s := f.find_spec(fullname, path, target)) is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Followed(spec.loader, self._run)
        return spec

    def _run(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
            self._do()


class _Followed(Loader):
    """Another loader, and what is done behind it."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self._loader, self._then = loader, then

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then()

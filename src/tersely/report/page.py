"""Everything known of one or several models as one self-contained HTML page, and as JSON.

The page holds its style, its script and its pictures; a Content-Security-Policy forbids it to request anything. All
names, notes and samples come from checkpoints and files: they are escaped, and control characters are taken out. It
holds no date but those of the measurements, so that equal facts give equal bytes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tersely.report.cells import LONGEST_NAME, short
from tersely.report.dossier import Dossier, dossiers_from_json, dossiers_json
from tersely.report.sections import contents

__all__ = ["Dossier", "dossiers_from_json", "dossiers_json", "render"]

_UNSAFE = dict.fromkeys(
    [
        *range(9),
        11,
        12,
        *range(13, 32),
        *range(127, 160),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
        0xFFFE,
        0xFFFF,
    ]
)
"""Control characters, and those that turn the direction of what follows: taken out of the page."""


def render(dossiers: Sequence[Dossier]) -> str:
    """The page: the first model in full, the others compared with it. Raises ValueError: no model at all."""
    if not dossiers:
        raise ValueError("a report needs at least one model")
    folder = files("tersely.report") / "templates"
    environment = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text("utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["name"] = lambda text: short(text, LONGEST_NAME)
    style = environment.get_template("style.css").render()
    script = environment.get_template("script.js").render()
    page = environment.get_template("page.html").render(
        **contents(dossiers),
        style=Markup(style),
        script=Markup(script),
        style_hash=_policy_hash(style),
        script_hash=_policy_hash(script),
    )
    return page.translate(_UNSAFE).encode("utf-8", "replace").decode()


def _policy_hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

"""A tokenizer that was trained, as a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tersely.errors import OutputError
from tersely.vocabulary.corpus import open_texts
from tersely.vocabulary.training.pipeline import pipeline
from tersely.vocabulary.training.protocol import Progress, Training, silent
from tersely.writer import refuse_existing

_ROLES = {
    "<s>": ("bos",),
    "<bos>": ("bos",),
    "</s>": ("eos",),
    "<eos>": ("eos",),
    "<|endoftext|>": ("bos", "eos"),
    "<unk>": ("unk",),
    "[UNK]": ("unk",),
    "<pad>": ("pad",),
    "[PAD]": ("pad",),
    "<mask>": ("mask",),
    "[MASK]": ("mask",),
    "[CLS]": ("cls",),
    "[SEP]": ("sep",),
}
"""What special tokens are for, by their usual names."""


def train_tokenizer(
    method: Training,
    files: Sequence[str | Path],
    size: int,
    out: str | Path,
    *,
    special: Sequence[str] = (),
    like: str | None = None,
    say: Progress = silent,
) -> int:
    """Train, and write tokenizer.json and tokenizer_config.json to the new folder `out`; how many tokens there are.

    like: how texts fall into words, by the name of a pattern or as a tokenizer.json does it. Raises the errors of the
    method, and OutputError.
    """
    folder = Path(out)
    refuse_existing(folder.absolute())
    around = None if like is None else pipeline(like)
    made = method(open_texts(files), size, special=special, around=around, say=say)
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for token in special:
        config |= {f"{role}_token": token for role in _ROLES.get(token, ()) if f"{role}_token" not in config}
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "tokenizer.json").write_text(made.to_str(pretty=True), "utf-8")
        (partial / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"{folder} cannot be written ({error.strerror}); choose another place") from error
    return int(made.get_vocab_size(with_added_tokens=True))

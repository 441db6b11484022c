"""Proof that a finished folder is whole: hashes, an account of every source tensor, and a run in plain transformers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tersely.checkpoint import Checkpoint, open_checkpoint
from tersely.errors import CheckpointError, VerificationError
from tersely.runtime import load_model


@dataclass(frozen=True)
class Verification:
    """What was checked, and held."""

    folder: str
    files: int
    """Files whose SHA-256 is the manifest's."""
    source_tensors: int
    """Tensors of the source that are accounted for."""
    encoded: int
    """Of these, compressed; the others are kept as they were."""
    stored_tensors: int
    ran: bool
    """Loaded by transformers and gave finite logits."""
    source_unchanged: bool | None
    """The source still has the hashes that were compressed; None where it was not given."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def verify(folder: str | Path, *, source: str | Path | None = None, run: bool = True) -> Verification:
    """Check a folder that `compress` wrote. VerificationError names the first thing that does not hold."""
    path = Path(folder)
    manifest = _manifest(path)
    files: dict[str, str] = manifest["files"]
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise VerificationError(f"{file} is missing; the folder is incomplete, copy it again or compress again")
        with file.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        if found != expected:
            raise VerificationError(
                f"{file} has changed since it was written: SHA-256 {found[:16]}..., the manifest says "
                f"{expected[:16]}...; copy it again or compress again"
            )
    checkpoint = open_checkpoint(path)
    for name in ("config.json", "report.json", *checkpoint.weight_files):
        if name not in files:
            raise VerificationError(f"{path / 'manifest.json'} is damaged: it has no hash of {name}")
    outcome: dict[str, list[str]] = manifest["tensors"]
    _account(checkpoint, outcome)
    unchanged = None
    if source is not None:
        unchanged = _same_source(open_checkpoint(source), manifest)
    if run:
        _run(path)
    encoded = len(json.loads((path / "report.json").read_bytes())["rows"])
    return Verification(str(path), len(files), len(outcome), encoded, len(checkpoint), run, unchanged)


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest: Any = json.loads((path / "manifest.json").read_text("utf-8"))
        if not isinstance(manifest, dict) or not all(
            isinstance(manifest.get(k), dict) for k in ("files", "tensors", "source")
        ):
            raise ValueError("it lacks files, tensors or source")
    except OSError as error:
        raise VerificationError(
            f"{path} has no manifest.json that can be read ({error.strerror}); verify takes a folder that "
            "`tersely compress` wrote"
        ) from error
    except ValueError as error:
        raise VerificationError(f"{path / 'manifest.json'} is damaged: {error}") from error
    return dict(manifest)


def _account(checkpoint: Checkpoint, outcome: dict[str, list[str]]) -> None:
    claimed: dict[str, str] = {}
    for source, stored in outcome.items():
        for name in stored:
            if name not in checkpoint:
                raise VerificationError(f"{checkpoint.path}: {name}, which holds {source} of the source, is missing")
            if name in claimed:
                raise VerificationError(
                    f"{checkpoint.path}: both {source} and {claimed[name]} of the source claim {name}"
                )
            claimed[name] = source
    for name in checkpoint:
        if name not in claimed:
            raise VerificationError(f"{checkpoint.path}: {name} comes from no tensor of the source")


def _same_source(source: Checkpoint, manifest: dict[str, Any]) -> bool:
    now = source.sha256()
    for name, expected in manifest["source"]["files"].items():
        if now.get(name) != expected:
            raise VerificationError(f"{source.path / name} is not the file that was compressed (its SHA-256 differs)")
    return True


def _run(path: Path) -> None:
    try:
        model: Any = load_model(path)
    except CheckpointError as error:
        raise VerificationError(f"its files are whole, but {error}") from error
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = torch.arange(16).remainder(vocabulary)[None]
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        logits = model(input_ids=ids, **extra).logits
    if not torch.isfinite(logits).all():
        raise VerificationError(f"{path} loads in transformers, but its logits are not finite")

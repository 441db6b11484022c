"""Load a checkpoint folder with plain transformers and run it. Imports transformers only when called."""

import contextlib
import io
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from logging import ERROR
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from tersely.errors import CheckpointError, UsageError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["causal", "masked", "seq2seq"]
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True, eq=False)
class Loaded:
    """A causal language model that is ready to be measured. network and tokenizer are transformers' own."""

    name: str
    network: Any
    tokenizer: Any
    device: str


def load_tokenizer(path: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a checkpoint folder; code in the folder never runs.

    Raises CheckpointError: no such folder, no tokenizer in it, or one that transformers cannot read.
    """
    from transformers import AutoTokenizer

    read_config(path)
    if not any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise CheckpointError(f"{path}: no tokenizer.json or tokenizer_config.json; copy the tokenizer's files in")
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CheckpointError(f"{path}: the tokenizer cannot be read: {first_line(error)}") from error


def load_model(
    path: str | Path, *, device: str = "cpu", dtype: Literal["auto"] | torch.dtype = "auto"
) -> "PreTrainedModel":
    """The model of a checkpoint folder, in eval mode, as plain transformers loads it.

    dtype: of the dense weights; "auto" is what the checkpoint says. compressed-tensors weights are
    decompressed by their own library here, so that the first use is as fast as the next; those of quant_method
    "tersely" stay packed. What lies in its folder `adapter` is added by PEFT. Only safetensors are read, no code in the
    folder runs, nothing is downloaded.

    Raises CheckpointError: missing or corrupt, an architecture that is none of causal, masked and seq2seq
    language models, or weights that are missing, left over or of a wrong shape; UsageError: no such device, or an
    adapter without PEFT.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    kind = model_kind(path)
    loaders = {
        "causal": AutoModelForCausalLM,
        "masked": AutoModelForMaskedLM,
        "seq2seq": AutoModelForSeq2SeqLM,
    }
    placed = {} if find_device(device).type == "cpu" else {"device_map": {"": device}}
    with quiet():
        try:
            model, info = loaders[kind].from_pretrained(
                str(path),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # so that they are named in info, and refused below
                output_loading_info=True,
                **placed,
            )
        except (CheckpointError, UsageError):
            raise
        except Exception as error:
            raise CheckpointError(f"{path}: transformers cannot load it: {first_line(error)}") from error
        _require_complete(path, info)
        model.eval()
        if hasattr(model, "ct_decompress_hook"):
            _decompress(model, kind)
        if (adapter := Path(path) / "adapter" / "adapter_config.json").is_file():
            _adapt(model, adapter.parent)
    return model  # type: ignore[no-any-return]


def find_device(name: str) -> torch.device:
    """The device of that name. UsageError where there is none: cpu, cuda and cuda:N are known."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {name}: expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(f"--device {name}: PyTorch sees no CUDA device here; use --device cpu")
        if (device.index or 0) >= count:
            raise UsageError(f"--device {name}: PyTorch sees cuda:0 to cuda:{count - 1} here")
    return device


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a checkpoint folder. Raises CheckpointError: no such file, or not an object."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; give the folder of a Hugging Face checkpoint")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: not readable as JSON ({error}); fetch the checkpoint again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object; fetch the checkpoint again")
    return config


def model_kind(path: str | Path) -> Kind:
    """Which kind of language model the `architectures` of a checkpoint's config name.

    Raises CheckpointError: none is named, or one that transformers does not know as a language model.
    """
    from transformers.models.auto import modeling_auto as auto

    names = read_config(path).get("architectures") or []
    kinds: dict[Kind, Any] = {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    for kind, mapping in kinds.items():
        if any(name in mapping.values() for name in names):
            return kind
    raise CheckpointError(
        f"{path}: config.json names the architectures {names}; expected a causal, masked or "
        "sequence-to-sequence language model that transformers knows, such as LlamaForCausalLM"
    )


def require_causal(path: str | Path, what: str) -> None:
    """Raises UsageError: the model is of another kind. what: only causal ones "are evaluated", "generate"."""
    if (kind := model_kind(path)) != "causal":
        raise UsageError(
            f"{path}: only causal language models {what}, this one is {kind}; "
            "give a checkpoint such as LlamaForCausalLM"
        )


def load_tokenizers(paths: Sequence[str | Path]) -> list["PreTrainedTokenizerBase"]:
    """The tokenizer of each checkpoint; those whose files are the same share one, so that texts are cut once."""
    known: dict[tuple[bytes | None, ...], PreTrainedTokenizerBase] = {}
    found = []
    for path in paths:
        files = [Path(path) / name for name in _TOKENIZER_FILES]
        contents = tuple(file.read_bytes() if file.is_file() else None for file in files)
        if contents[0] is None:  # cut by files of another kind
            found.append(load_tokenizer(path))
            continue
        if contents not in known:
            known[contents] = load_tokenizer(path)
        found.append(known[contents])
    return found


def context_within(context: int | None, networks: Sequence[Any], most: int) -> int:
    """Tokens of a sequence that all networks have positions for: `context`, or by default at most `most`.

    Raises UsageError: more than there are positions.
    """
    limits = [limit for network in networks if (limit := max_positions(network.config)) is not None]
    if context is None:
        return min([*limits, most])
    if limits and context > min(limits):
        raise UsageError(f"context={context} exceeds the model's {min(limits)} positions; use at most that")
    return context


def max_positions(config: Any) -> int | None:
    """How many positions a transformers config allows; None where it sets no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log lines of transformers and compressed-tensors; errors and warnings stay.

    compressed-tensors' bars have no switch, so what is written to sys.stderr inside is discarded; warnings
    raised inside are shown when the block ends.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.set_tqdm_hook(lambda make, args, options: make(*args, **{**options, "disable": True}))
    logging.set_verbosity(ERROR)
    caught: list[warnings.WarningMessage] = []
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(record=True) as caught:
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(bars)
        for warning in caught:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def _decompress(model: Any, kind: Kind) -> None:
    """Run one token: compressed-tensors decompresses the weights before a model's first forward."""
    ids_BL = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    decoder = {"decoder_input_ids": ids_BL} if kind == "seq2seq" else {}
    with torch.no_grad():
        model(input_ids=ids_BL, **decoder)


def _adapt(model: Any, adapter: Path) -> None:
    """Let PEFT add an adapter to the layers that it names."""
    if find_spec("peft") is None:
        raise UsageError(f"{adapter} is read by PEFT, which is not installed; pip install 'tersely[adapter]'")
    try:
        model.load_adapter(str(adapter))
    except Exception as error:
        raise CheckpointError(f"{adapter}: PEFT cannot add it: {first_line(error)}") from error
    model.eval()


def _require_complete(path: str | Path, info: dict[str, Any]) -> None:
    wrong = {
        "missing": info["missing_keys"],
        "unexpected": info["unexpected_keys"],
        "of a wrong shape": {f"{name} {tuple(found)}" for name, found, _ in info["mismatched_keys"]},
    }
    for what, keys in wrong.items():
        if keys:
            names = ", ".join(sorted(keys)[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise CheckpointError(f"{path}: weights {what}: {names}; fetch or write the checkpoint again")
    if info.get("error_msgs"):
        raise CheckpointError(f"{path}: {info['error_msgs'][0]}; fetch or write the checkpoint again")

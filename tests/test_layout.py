"""Our compressed-tensors output has the layout of llm-compressor's own, which is what engines read.

`peer/*.json` holds names, dtypes, shapes and the quantization config of what llm-compressor 0.14 wrote for the model in
the package; benchmarks/peers/llm_compressor.py makes them (`--layout FILE`).
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tersely.checkpoint import open_checkpoint
from tersely.compression import compress
from tersely.demo import CALIBRATION, MODEL
from tersely.plan.reading import load_recipe

PEER = Path(__file__).parent / "peer"
CASES = {
    "sym4": ("w4a16", ["group=64"]),
    "asym4": ("w4a16", ["group=64", "symmetric=false"]),
    "channel8": ("w8a16", []),
    "gptq3": ("w3a16-gptq", ["group=64", "calibration.samples=8", "calibration.context=64", "clip=none"]),
}


@pytest.mark.parametrize("case", CASES)
def test_names_dtypes_shapes_and_config_are_those_of_llm_compressor(case: str, tmp_path: Path) -> None:
    recipe, settings = CASES[case]
    text = CALIBRATION if "gptq" in recipe else None
    out = tmp_path / "out"
    compress(MODEL, load_recipe(recipe, settings), out, calibration=text)
    theirs: dict[str, Any] = json.loads((PEER / f"{case}.json").read_text())
    ours = open_checkpoint(out)
    tensors = {name: [str(ours.spec(name).dtype), list(ours.spec(name).shape)] for name in ours}
    assert tensors == theirs["tensors"]
    config = ours.config["quantization_config"]
    expected = theirs["quantization_config"]
    # Without `dequantize`, which is ours alone, transformers 5.23 fails on zero points.
    assert config.pop("version")
    expected.pop("version")
    assert config.pop("dequantize", None) == (True if case == "asym4" else None)
    # How a grid was found is nothing that a reader needs.
    for group in expected["config_groups"].values():
        group["weights"] |= {"actorder": None, "observer": "memoryless_minmax"}
    assert config == expected

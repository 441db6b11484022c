"""Quantize or sparsify a checkpoint with llm-compressor, for comparison; runs in a virtual environment of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install llmcompressor==0.14.0.1
    peer/bin/python benchmarks/peers/llm_compressor.py MODEL OUT --method gptq --scheme w4a16 --group 64 --text FILE

OUT/native is in the compressed-tensors format, OUT/dense holds the same values as float32. Prints one line of JSON;
with --layout FILE writes names, dtypes, shapes and config of the native form. `seconds` is the call of oneshot alone.
AWQ in 0.14.0.1 needs an accelerator: it pins memory without asking for one.
"""

import json
import time
from pathlib import Path
from typing import Any

start = time.perf_counter()

import torch  # noqa: E402
from compressed_tensors.quantization.lifecycle.forward import forward_quantize  # noqa: E402
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES  # noqa: E402
from datasets import Dataset  # noqa: E402
from job import Clock, Scheme, arguments, calibration, divergence, layout, load, report, save_dense, stored  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers import Modifier  # noqa: E402
from llmcompressor.modifiers.gptq import GPTQModifier  # noqa: E402
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier  # noqa: E402
from llmcompressor.modifiers.quantization import QuantizationModifier  # noqa: E402
from llmcompressor.modifiers.transform.awq import AWQModifier  # noqa: E402
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier  # noqa: E402
from llmcompressor.modifiers.transform.spinquant import SpinQuantModifier  # noqa: E402

PRUNING = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}
METHODS = (*PRUNING, "rtn", "gptq", "awq", "awq+gptq", "smoothquant", "smoothquant+gptq", "spinquant", "spinquant+gptq")


def quantization(scheme: str, group: int, symmetric: bool, observer: str | None) -> dict[str, Any]:
    """The config group of a preset (nvfp4, fp8_dynamic ...) or of bits such as w4a8."""
    if scheme.upper() in PRESET_SCHEMES and not scheme.startswith("w"):
        return {"scheme": scheme.upper(), "targets": ["Linear"]}
    bits = Scheme.parse(scheme)
    weights = {
        "num_bits": bits.weight_bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "group" if group else "channel",
    }
    if group:
        weights["group_size"] = group
    if observer:
        weights["observer"] = observer
    settings: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    if bits.input_bits < 16:
        settings["input_activations"] = {
            "num_bits": bits.input_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return {"config_groups": {"group_0": settings}}


parser = arguments("llm-compressor")
parser.add_argument("--method", choices=METHODS, required=True)
parser.add_argument("--scheme", default="w4a16", help="wNaM, or a preset: nvfp4, nvfp4a16, fp8, fp8_dynamic, mxfp4 ...")
parser.add_argument("--sparsity", type=float, default=0.5, help="wanda, sparsegpt: share of zeros")
parser.add_argument("--mask", default="0:0", help="wanda, sparsegpt: 2:4, or 0:0 for any place")
parser.add_argument("--observer", help="how the range of a group is chosen: memoryless_minmax, memoryless_mse ...")
parser.add_argument("--damping", type=float, default=0.01, help="gptq: part of the mean diagonal")
parser.add_argument("--smoothing", type=float, default=0.8, help="smoothquant: its exponent")
parser.add_argument("--duo", choices=("true", "false", "both"), default="true", help="awq: scales from weights too")
parser.add_argument("--grid", type=int, default=20, help="awq: scales tried")
parser.add_argument("--ignore", nargs="*", default=["lm_head", "re:.*gate$", "re:.*router$"])
parser.add_argument("--dtype", choices=("float32", "auto"), default="float32", help="auto: quantize as stored")
parser.add_argument("--layout", type=Path)
options = parser.parse_args()

imported = time.perf_counter()
torch.manual_seed(0)
model, tokenizer = load(options.model, options.dtype)
group = quantization(options.scheme, options.group, not options.asymmetric, options.observer)
steps: list[Modifier] = []
if options.method.startswith("awq"):
    duo = {"true": True, "false": False, "both": "both"}[options.duo]
    steps.append(AWQModifier(duo_scaling=duo, n_grid=options.grid))
if options.method.startswith("smoothquant"):
    steps.append(SmoothQuantModifier(smoothing_strength=options.smoothing))
if options.method.startswith("spinquant"):
    steps.append(SpinQuantModifier(rotations=["R1", "R2"], transform_type="hadamard"))
if options.method in PRUNING:
    pruning = PRUNING[options.method]
    steps.append(
        pruning(sparsity=options.sparsity, mask_structure=options.mask, targets=["Linear"], ignore=options.ignore)
    )
elif options.method.endswith("gptq"):
    steps.append(GPTQModifier(ignore=options.ignore, dampening_frac=options.damping, **group))
else:
    steps.append(QuantizationModifier(ignore=options.ignore, **group))
data = {}
if options.text:
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration(options, tokenizer)]
    data = {
        "dataset": Dataset.from_list(rows),
        "num_calibration_samples": len(rows),
        "max_seq_length": options.context,
        "shuffle_calibration_samples": False,
    }
loaded = time.perf_counter()
with Clock() as clock:
    oneshot(model=model, recipe=steps, **data)
facts: dict[str, Any] = {"scheme": options.scheme}
facts |= {"seconds_import": imported - start, "seconds_load": loaded - imported}
if options.evaluate:
    facts |= divergence(options, model)
state = dict(model.state_dict())
for name, module in model.named_modules():
    scheme = getattr(module, "quantization_scheme", None)
    if scheme is not None and scheme.weights is not None:
        state[f"{name}.weight"] = forward_quantize(module, module.weight, "weight", scheme.weights)
save_dense(options.model, state, options.out / "dense")
begin = time.perf_counter()
native = options.out / "native"
model.save_pretrained(native, save_compressed=True)
tokenizer.save_pretrained(native)
facts["seconds_save"] = time.perf_counter() - begin
facts |= stored(options.model, native)
report("llmcompressor", options.method, clock, options, **facts)
if options.layout:
    options.layout.write_text(json.dumps(layout(native), indent=1) + "\n")

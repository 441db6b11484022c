"""Quantize a checkpoint with NVIDIA's ModelOpt, for comparison; runs in a virtual environment of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0
    peer/bin/pip install nvidia-modelopt==0.47.0 transformers accelerate datasets requests
    peer/bin/python benchmarks/peers/nvidia_modelopt.py MODEL OUT --scheme w4a16 --method awq_lite --text FILE

OUT/dense holds the quantized values as float32, OUT/native is ModelOpt's own export, where it has one for the scheme.
Prints one line of JSON. `seconds` is the call of quantize alone, calibration included.
ModelOpt 0.47 simulates NVFP4 on CUDA only, and does not export Mixtral's stacked experts.
"""

import copy
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from job import Clock, Scheme, arguments, calibration, divergence, load, report, save_dense, stored
from modelopt.torch.export import export_hf_checkpoint
from torch import Tensor
from torch.nn import Module


def config(options: Any) -> dict[str, Any]:
    """ModelOpt's own config of that name, or one for integers built on its INT4 one; and another method if told."""
    name = f"{options.scheme.upper()}_CFG"
    if hasattr(mtq, name):
        found: dict[str, Any] = copy.deepcopy(getattr(mtq, name))
    else:
        bits = Scheme.parse(options.scheme)
        found = copy.deepcopy(mtq.INT4_AWQ_CFG)
        weights: dict[str, Any] = {"num_bits": bits.weight_bits}
        weights |= {"block_sizes": {-1: options.group, "type": "static"}} if options.group else {"axis": 0}
        for rule in found["quant_cfg"]:
            if rule.get("quantizer_name") == "*weight_quantizer":
                rule["cfg"] = weights
            if rule.get("quantizer_name") == "*input_quantizer" and bits.input_bits < 16:
                rule["cfg"] = {"num_bits": bits.input_bits, "type": "dynamic", "block_sizes": {-1: None}}
                rule["enable"] = True
    if options.method:
        found["algorithm"] = {"method": options.method}
    return found


@torch.no_grad()
def dense(model: Module) -> dict[str, Tensor]:
    """The model's tensors with every weight quantizer, and the input scale that AWQ left in front of it, applied."""
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "iter_weights_for_calibration") and hasattr(module, "down_proj_weight_quantizers"):
            for weight_name in ("gate_up_proj", "down_proj"):
                quantizers = getattr(module, f"{weight_name}_weight_quantizers")
                parts = zip(getattr(module, weight_name), quantizers, strict=True)
                state[f"{name}.{weight_name}"] = torch.stack([q(w) for w, q in parts])
        elif hasattr(module, "weight_quantizer") and module.weight_quantizer.is_enabled:
            weight_OI = module.weight_quantizer(module.weight)
            scale_I = module.input_quantizer.pre_quant_scale
            state[f"{name}.weight"] = weight_OI if scale_I is None else weight_OI * scale_I
    return state


def main() -> None:
    parser = arguments("ModelOpt")
    parser.add_argument("--scheme", default="w4a16", help="wNaM, or a config: nvfp4_default, fp8_default ...")
    parser.add_argument("--method", help="max, awq_lite, awq_clip, awq_full, gptq, mse ... (default: the config's)")
    parser.add_argument("--batch", type=int, default=8, help="windows in one forward")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load(options.model)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    sequences = calibration(options, tokenizer)

    def feed(module: Module) -> None:
        step = options.batch if options.windows else 1  # documents differ in length
        for i in range(0, len(sequences), step):
            module(input_ids=torch.tensor(sequences[i : i + step]), use_cache=False)

    settings = config(options)
    with Clock() as clock, torch.no_grad():
        mtq.quantize(model, settings, feed)
    facts: dict[str, Any] = {"scheme": options.scheme, "algorithm": settings["algorithm"]}
    if options.evaluate:
        facts |= divergence(options, model)
    save_dense(options.model, dense(model), options.out / "dense")
    try:
        export_hf_checkpoint(model, export_dir=options.out / "native")
        facts |= stored(options.model, options.out / "native")
    except Exception as error:  # whatever its exporter raises is a fact about the peer
        facts["native"] = f"not written: {type(error).__name__}: {error}"
    report("nvidia-modelopt", options.method or str(options.scheme), clock, options, **facts)


if __name__ == "__main__":
    main()

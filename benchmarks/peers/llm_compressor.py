"""Quantize a checkpoint with llm-compressor, for comparison; runs in a virtual environment of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1
    peer/bin/python benchmarks/peers/llm_compressor.py MODEL OUT --method gptq --bits 4 --group 64 --text FILE

Prints the seconds of each part as JSON, and with --layout FILE writes names, dtypes, shapes and config of the result.
"""

import argparse
import json
import time
from pathlib import Path

start = time.perf_counter()
parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--method", choices=("rtn", "gptq"), required=True)
parser.add_argument("--bits", type=int, default=4)
parser.add_argument("--group", type=int, default=64, help="0: per channel")
parser.add_argument("--asymmetric", action="store_true")
parser.add_argument("--ignore", nargs="*", default=["lm_head"])
parser.add_argument("--text")
parser.add_argument("--samples", type=int, default=256)
parser.add_argument("--context", type=int, default=512)
parser.add_argument("--layout")
options = parser.parse_args()

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from llmcompressor import oneshot  # noqa: E402
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier  # noqa: E402
from safetensors import safe_open  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

imported = time.perf_counter()
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(options.model)
model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto")
weights = {
    "num_bits": options.bits,
    "type": "int",
    "symmetric": not options.asymmetric,
    "strategy": "group" if options.group else "channel",
}
if options.group:
    weights["group_size"] = options.group
groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
calibration = {}
if options.method == "gptq":
    texts = [d.strip() for d in Path(options.text).read_text("utf-8").split("<|endoftext|>") if d.strip()]
    rows = [tokenizer(d, truncation=True, max_length=options.context) for d in texts[: options.samples]]
    data = Dataset.from_list([{k: r[k] for k in ("input_ids", "attention_mask")} for r in rows])
    calibration = {"dataset": data, "num_calibration_samples": len(rows), "max_seq_length": options.context}
    modifier = GPTQModifier(config_groups=groups, ignore=options.ignore)
else:
    modifier = QuantizationModifier(config_groups=groups, ignore=options.ignore)
loaded = time.perf_counter()
oneshot(model=model, recipe=[modifier], **calibration)
done = time.perf_counter()
model.save_pretrained(options.out, save_compressed=True)
tokenizer.save_pretrained(options.out)
saved = time.perf_counter()
print(json.dumps({"import": imported - start, "load": loaded - imported, "job": done - loaded, "save": saved - done}))

if options.layout:
    tensors = {}
    for file in sorted(Path(options.out).glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            tensors |= {k: [str(f.get_tensor(k).dtype), list(f.get_tensor(k).shape)] for k in sorted(f.keys())}
    config = json.loads((Path(options.out) / "config.json").read_text())["quantization_config"]
    Path(options.layout).write_text(json.dumps({"tensors": tensors, "quantization_config": config}, indent=1) + "\n")

"""Quantize a checkpoint with Intel's AutoRound, for comparison; runs in a virtual environment of its own.

    python -m venv peer && peer/bin/pip install torch==2.13.0 && peer/bin/pip install auto-round==0.16.1
    peer/bin/python benchmarks/peers/intel_autoround.py MODEL OUT --scheme w3a16 --steps 200 --text FILE \
        --samples 128 --context 128

AutoRound takes sequences of one length: a document shorter than --context is left out, a longer one is cut (unless
--windows, which uses every token). OUT/dense holds the quantized values as float32, OUT/native is in AutoRound's own
format. Prints one line of JSON. `seconds` is the call of quantize alone.
"""

from typing import Any

import torch
from auto_round import AutoRound
from job import Clock, Scheme, arguments, calibration, divergence, load, report, save_dense, stored


def main() -> None:
    parser = arguments("AutoRound")
    parser.add_argument("--scheme", default="w4a16")
    parser.add_argument("--steps", type=int, default=200, help="of a block: 200 is its default, 1000 its best recipe")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--extension", action="store_true", help="its enable_alg_ext")
    parser.add_argument("--float32", action="store_true", help="tune in float32 (its disable_amp), not in bfloat16")
    options = parser.parse_args()
    torch.manual_seed(0)
    bits = Scheme.parse(options.scheme)
    model, tokenizer = load(options.model)
    wanted, options.samples = options.samples, 10**9
    rows = [ids[: options.context] for ids in calibration(options, tokenizer) if len(ids) >= options.context][:wanted]
    options.samples = len(rows)
    data = [{"input_ids": torch.tensor(rows[i : i + options.batch])} for i in range(0, len(rows), options.batch)]
    quantizer = AutoRound(
        model,
        tokenizer,
        bits=bits.weight_bits,
        group_size=options.group or -1,
        sym=not options.asymmetric,
        act_bits=bits.input_bits,
        iters=options.steps,
        nsamples=len(rows),
        seqlen=options.context,
        batch_size=options.batch,
        dataset=data,
        enable_alg_ext=options.extension,
        amp=not options.float32,
        device_map="cpu",
    )
    with Clock() as clock:
        model, _ = quantizer.quantize()
    model = model.float()
    facts: dict[str, Any] = {"scheme": options.scheme}
    if options.evaluate:
        facts |= divergence(options, model)
    save_dense(options.model, model.state_dict(), options.out / "dense")
    try:
        quantizer.save_quantized(str(options.out / "native"), format="auto_round")
        facts |= stored(options.model, options.out / "native")
    except Exception as error:  # whatever its exporter raises is a fact about the peer
        facts["native"] = f"not written: {type(error).__name__}: {error}"
    report("auto-round", f"signround-{options.steps}", clock, options, **facts)


if __name__ == "__main__":
    main()

"""Sample the demo's calibration text from the demo model itself.

    python benchmarks/make_demo_text.py [OUT]

A model's own samples lie where its activations lie, and they need no corpus. Sixteen openings; temperatures
0.8, 0.9 and 1.0 in turn; seeds 0, 1, 2 ...: the same file on the same version of PyTorch. OUT is by default
the file in the package.
"""

import argparse
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from tersely.calibrate import DOCUMENT_SEPARATOR
from tersely.runtime import load_model, load_tokenizer, quiet

DOCUMENTS, TOKENS = 64, 250
TEMPERATURES = (0.8, 0.9, 1.0)
OPENINGS = (
    *("The old house", "It was late", "She looked", "He had never", "When the rain", "My father"),
    *("In the morning", "The ship", '"I do not know,"', "There was a", "They went on", "No one"),
    *("At last", "The road", "Her voice", "I remember"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Sample the demo's calibration text from the demo model itself.")
    demo = Path(str(resources.files("tersely") / "demo"))
    parser.add_argument("out", type=Path, nargs="?", default=demo / "calibration.txt")
    options = parser.parse_args()
    tokenizer: Any = load_tokenizer(demo / "model")
    model: Any = load_model(demo / "model", dtype=torch.float32)
    texts: list[str] = []
    seed = 0
    with quiet(), torch.inference_mode():
        while len(texts) < DOCUMENTS:
            torch.manual_seed(seed)
            ids_BL = model.generate(
                **tokenizer(list(OPENINGS), return_tensors="pt", padding=True, padding_side="left"),
                do_sample=True,
                temperature=TEMPERATURES[seed % len(TEMPERATURES)],
                top_k=0,
                top_p=1.0,
                max_new_tokens=TOKENS,
            )
            seed += 1
            for text in tokenizer.batch_decode(ids_BL, skip_special_tokens=True):
                text = text.replace("\ufffd", "").strip()
                if len(text) > 400 and DOCUMENT_SEPARATOR not in text:
                    texts.append(text)
    written = "".join(f"{text}\n{DOCUMENT_SEPARATOR}\n" for text in texts[:DOCUMENTS])
    options.out.write_text(written, encoding="utf-8")
    print(f"{options.out}: {DOCUMENTS} documents, {len(written)} characters, seeds 0 to {seed - 1}")


if __name__ == "__main__":
    main()

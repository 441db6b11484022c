"""How to run the model."""

from __future__ import annotations

from tersely.report.cells import short
from tersely.report.dossier import Dossier
from tersely.report.sections.record import steps_of


def engine_section(dossier: Dossier, out: str) -> list[dict[str, str]]:
    """(engine, what is true of it, code) for the form in which the model is stored."""
    stored = dossier.format or (dossier.report.format if dossier.report else None)
    folder = repr(short(dossier.folder, 400) or "OUT")
    load = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"folder = {folder}\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        'inputs = tokenizer("The road to the north", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))"
    )
    vllm = f"from vllm import LLM, SamplingParams\n\nmodel = LLM(model={folder})\n" + (
        "settings = SamplingParams(temperature=0, max_tokens=40)\n"
        'print(model.generate(["The road to the north"], settings)[0].outputs[0].text)'
    )
    convert = f"tersely export {out} model.gguf --to gguf\nllama-cli -m model.gguf -p 'The road to the north'"
    gguf = "Written as a GGUF file first: integers and MXFP4 keep their codes, what no type of llama.cpp holds is "
    gguf += "rounded to the nearest, and the command says which."
    llama = {"engine": "llama.cpp", "text": gguf, "code": convert}
    here = {"engine": "tersely", "text": "", "code": f"tersely generate {out} 'The road to the north' --tokens 40"}
    if stored == "compressed-tensors":
        widths = (
            sorted({s["bits"] for s in steps_of(dossier.report) if isinstance(s.get("bits"), int)})
            if dossier.report
            else []
        )
        other = [str(b) for b in widths if b not in (4, 8)]
        vllm_text = "Stored in the layout that vLLM reads; not run by tersely's tests."
        if other:
            vllm_text += f" The vLLM whose code was read takes 4 and 8 bits only; this model has {', '.join(other)}."
        return [
            here,
            {
                "engine": "transformers",
                "text": "Needs the packages compressed-tensors and accelerate, not tersely. The weights are unpacked "
                "at loading: memory in use is that of the original.",
                "code": load,
            },
            {"engine": "vLLM", "text": vllm_text, "code": vllm},
            llama,
        ]
    if stored == "tersely":
        own = "Needs the package tersely, which is imported first. The weights stay packed in memory, and are decoded "
        own += "where they multiply."
        return [here, {"engine": "transformers", "text": own, "code": f"import tersely\n{load}"}, llama]
    if stored == "dense":
        smaller = dossier.report is not None and dossier.report.shapes
        large = "takes what its smaller shape takes" if smaller else "is as large as the original"
        dense = f"An ordinary checkpoint: it loads wherever the original does, and {large}."
        return [
            here,
            {"engine": "transformers", "text": dense, "code": load},
            {"engine": "vLLM", "text": "Like any checkpoint in this form; not run by tersely's tests.", "code": vllm},
            llama,
        ]
    if stored == "gguf" or dossier.folder.lower().endswith(".gguf"):
        code = f"llama-cli -m {out} -p 'The road to the north'"
        return [{"engine": "llama.cpp", "text": "A file of llama.cpp's own format.", "code": code}]
    return [
        {"engine": "transformers", "text": "The folder does not say how its weights are stored.", "code": load},
        here,
    ]

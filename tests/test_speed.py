"""How fast models run: what is counted, what is left out and named, and what an engine's death becomes."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tersely.compression import compress
from tersely.errors import CheckpointError, ResourceError, UsageError
from tersely.evaluation.engines import Task, process
from tersely.evaluation.engines.transformers import TransformersEngine
from tersely.evaluation.engines.worker import prompts
from tersely.evaluation.speed import Race, race, speed
from tersely.export.gguf import write_gguf
from tersely.plan.reading import load_recipe
from tersely.report.speed_tables import speed_table
from tersely.results import Speed
from tersely.runtime import load_model
from tests.tiny import load, tiny

BATCHES, LENGTHS, TOKENS, REPEATS = (1, 3), (4, 9), 3, 2
POSITIONS = 64
PYTHON = sys.executable

FAKE = """#!{python}
import json, os, signal, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if "load" in request:
        ready = dict(vocabulary=64, positions=None, dtype="float32", format="float32", notes=[])
        answer = dict(ready=ready, seconds=1.0, before=1, memory=[10, 20])
        {load}
    else:
        batch, length = request["run"]["batch"], request["run"]["length"]
        answer = dict(timed=dict(prefill=0.5 * batch, decode=0.25, ids=[]), memory=[10, 30])
        {run}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def measured(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Race:
    """Two models in turns, with a length that the first has no positions for."""
    other = tiny("opt", tmp_path_factory.mktemp("opt"), max_position_embeddings=2 * POSITIONS)
    lengths = (*LENGTHS, POSITIONS)
    return race([model, other], batches=BATCHES, lengths=lengths, tokens=TOKENS, repeats=REPEATS, threads=1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Puts a small script in the place of the worker: it loads nothing, and misbehaves as it is told."""

    def put(*, load: str = "", run: str = "") -> None:
        script = tmp_path / "worker"
        script.write_text(FAKE.format(python=PYTHON, load=load or "pass", run=run or "pass"), "utf-8")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))

    return put


def cells(found: Speed, phase: str) -> list[tuple[int, int]]:
    return [(p.batch, p.length) for p in found.points if p.phase == phase]


def test_every_cell_that_fits_is_measured_in_both_phases(measured: Race) -> None:
    small, large = measured.speeds
    grid = [(batch, length) for batch in BATCHES for length in LENGTHS]
    assert cells(small, "prefill") == cells(small, "decode") == grid
    whole = sorted([*grid, *((batch, POSITIONS) for batch in BATCHES)])
    assert cells(large, "prefill") == cells(large, "decode") == whole


def test_a_cell_beyond_the_positions_is_left_out_and_named(measured: Race) -> None:
    named = f"left out, longer than the model's {POSITIONS} positions: "
    named += "; ".join(f"batch {batch}, length {POSITIONS}" for batch in BATCHES)
    assert named in measured.speeds[0].notes
    assert not any("left out" in note for note in measured.speeds[1].notes)


def test_rates_are_all_tokens_of_the_batch_over_the_median(measured: Race) -> None:
    for point in (p for found in measured.speeds for p in found.points):
        assert point.tokens == (point.length if point.phase == "prefill" else TOKENS)
        assert point.tokens_per_second == point.batch * point.tokens / point.seconds
        assert 0 < point.fastest <= point.seconds <= point.slowest
        assert point.repeats == REPEATS


def test_the_first_token_is_that_of_one_sequence_of_the_shortest_length(measured: Race) -> None:
    for found in measured.speeds:
        (cell,) = (p for p in found.points if (p.phase, p.batch, p.length) == ("prefill", 1, min(LENGTHS)))
        assert found.first_token == cell.seconds


def test_a_model_takes_memory_of_its_own_and_the_bytes_of_its_files(measured: Race, model: Path) -> None:
    for found in measured.speeds:
        assert found.memory_peak >= found.memory_loaded > found.model.bytes > 0
        assert found.load > 0
    assert measured.speeds[0].disk == sum(f.stat().st_size for f in model.iterdir())
    assert measured.speeds[0].disk > measured.speeds[0].model.bytes


def test_figures_have_their_engine_threads_dtype_and_hardware_beside_them(measured: Race) -> None:
    for found in measured.speeds:
        assert found.engine == "transformers"
        assert found.format == found.model.dtype == "float32"
        assert found.setting.threads == 1
        assert found.setting.hardware
        assert {"tersely", "torch", "transformers"} <= found.setting.versions.keys()
        assert Speed.from_json(found.to_json()) == found


def test_ratios_are_of_paired_runs_of_the_cells_that_both_have(measured: Race) -> None:
    (ratios,) = measured.ratios
    assert [(r.batch, r.length) for r in ratios if r.phase == "decode"] == cells(measured.speeds[0], "decode")
    for ratio in ratios:
        assert 0 < ratio.smallest <= ratio.median <= ratio.largest
        assert ratio.repeats == REPEATS


def test_the_table_says_how_each_figure_came_about(measured: Race) -> None:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(speed_table(measured.speeds))
    text = capture.get()
    first = measured.speeds[0]
    for words in (
        "prefill, tokens a second",
        "decode, tokens a second",
        f"length {POSITIONS}",
        "transformers",
        "weights float32",
        first.setting.hardware,
        "1 thread",
        f"medians of {REPEATS} runs",
        f"decode: {TOKENS} tokens after each",
        "left out",
    ):
        assert words in text
    assert all(len(line) <= 100 for line in text.splitlines())
    rows = [line for line in text.splitlines() if line.startswith(Path(first.model.name).name) and line.endswith(" -")]
    assert len(rows) == 2  # the cell that was left out, in both phases
    assert not any(")" in row or "x " in row for row in rows)  # the first has no ratio to itself


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_decoding_with_the_cache_chooses_what_generate_chooses(family: str, tmp_path: Path) -> None:
    folder = tiny(family, tmp_path)
    ids = prompts(60, batch=3, length=7, seed=0)
    timed = TransformersEngine(load_model(folder), "cpu").run(ids, 5)
    network: Any = load(folder)
    ids_BL = torch.tensor(ids)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    wanted = network.generate(ids_BL, attention_mask=torch.ones_like(ids_BL), **settings)
    assert timed.ids == wanted[:, 7:].tolist()
    assert timed.prefill > 0
    assert timed.decode > 0


def test_prompts_are_the_same_each_time_and_use_the_vocabulary() -> None:
    first = prompts(50, batch=4, length=100, seed=0)
    assert first == prompts(50, batch=4, length=100, seed=0)
    assert {len(ids) for ids in first} == {100}
    assert {token for ids in first for token in ids} == set(range(50))
    assert len({tuple(ids) for ids in first}) == 4


def test_a_packed_model_is_named_as_what_lies_in_memory(model: Path, tmp_path: Path) -> None:
    compress(model, load_recipe("w4a16", ["group=32"]), tmp_path / "small")
    engine = TransformersEngine(load_model(tmp_path / "small"), "cpu")
    assert engine.ready.format == "pack-quantized, unpacked to float32"


def test_a_worker_that_is_killed_is_a_want_of_memory(model: Path, fake: Any) -> None:
    fake(load="os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ResourceError, match=r"transformers was killed while loading.*want of memory"):
        speed(model)
    fake(run="os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(ResourceError, match="killed while running batch 1, length 128"):
        speed(model)


def test_a_worker_that_crashes_is_an_error_with_what_it_said(model: Path, fake: Any) -> None:
    fake(run="os.kill(os.getpid(), signal.SIGSEGV)")
    with pytest.raises(CheckpointError, match=r"crashed \(SIGSEGV\) while running"):
        speed(model)
    fake(load="sys.exit('no such kernel')")
    with pytest.raises(CheckpointError, match="ended with status 1 while loading: no such kernel"):
        speed(model)


def test_what_a_worker_says_is_raised_as_it_was_meant(model: Path, fake: Any) -> None:
    fake(load="answer = dict(error='UsageError', message='not that one')")
    with pytest.raises(UsageError, match="transformers, loading: not that one"):
        speed(model)


def test_a_cell_without_memory_is_left_out_and_the_others_are_kept(model: Path, fake: Any) -> None:
    fake(run="answer = dict(error='ResourceError', message='out of memory') if batch > 1 and length > 4 else answer")
    found = speed(model, batches=(1, 2), lengths=(4, 8), repeats=2)
    assert cells(found, "decode") == [(1, 4), (1, 8), (2, 4)]
    assert found.notes[0] == "left out, out of memory: batch 2, length 8"
    fake(run="answer = dict(error='ResourceError', message='out of memory')")
    with pytest.raises(ResourceError, match="batch 1, length 4: out of memory; ask for shorter lengths"):
        speed(model, lengths=(4, 8))


def test_a_budget_that_is_used_up_leaves_the_first_cell_and_names_the_others(model: Path, fake: Any) -> None:
    fake()
    found = speed(model, batches=(1, 2), lengths=(4, 8), repeats=3, budget=1e-9)
    assert cells(found, "prefill") == [(1, 4)]
    short, missing = found.notes[:2]
    assert short.startswith("1 of 3 repeats, the budget")
    assert missing.endswith("does not suffice: batch 1, length 8; batch 2, length 4; batch 2, length 8")


def test_a_worker_that_does_not_answer_in_time_is_stopped(
    model: Path, fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "_GRACE", 1.0)
    fake(run="length > 4 and time.sleep(600)")
    found = speed(model, batches=(1,), lengths=(4, 8), repeats=1, warmups=0, budget=4)
    assert cells(found, "prefill") == [(1, 4)]
    assert any("length 8" in note for note in found.notes)
    fake(load="time.sleep(600)")
    with pytest.raises(ResourceError, match="took longer than the budget"):
        speed(model, budget=0.1)


def test_the_first_token_is_known_where_no_cell_has_one_sequence(model: Path, fake: Any) -> None:
    fake()
    found = speed(model, batches=(2,), lengths=(4, 8), repeats=1)
    assert cells(found, "decode") == [(2, 4), (2, 8)]
    assert found.first_token == 0.5
    assert not any("batch" in note for note in found.notes)


def test_progress_rises_from_nothing_to_all(model: Path, fake: Any) -> None:
    fake()
    seen: list[float] = []
    race([model, model], repeats=2, progress=lambda _, share: seen.append(share))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert len(set(seen)) > 10


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": "lama.cpp"}, "did you mean llama.cpp"),
        ({"engine": "nothing"}, "expected one of transformers, llama.cpp, vllm"),
        ({"engine": "llama.cpp"}, "reads .gguf files"),
        ({"engine": "vllm"}, "CUDA device"),
        ({"batches": (0,)}, "batches=.0.: expected whole numbers of 1 or more"),
        ({"batches": ()}, "batches="),
        ({"lengths": (16, -1)}, "lengths="),
        ({"tokens": 0}, "tokens=0"),
        ({"repeats": 0}, "repeats=0"),
        ({"warmups": -1}, "warmups=-1"),
        ({"threads": 0}, "threads=0"),
        ({"budget": 0.0}, "budget=0.0"),
        ({"device": "tpu"}, "expected cpu, cuda or cuda:N"),
        ({"dtype": "int3"}, "expected one of auto, float32"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_runs(model: Path, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        speed(model, **settings)


def test_what_cannot_be_timed_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        speed(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(CheckpointError, match=r"expected a checkpoint folder or a \.gguf file"):
        speed(tmp_path / "notes.txt")
    with pytest.raises(UsageError, match="only causal language models are timed, this one is masked"):
        speed(tiny("bert", tmp_path / "bert"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match="reads checkpoint folders"):
        speed(tmp_path / "model.gguf", engine="transformers")
    with pytest.raises(UsageError, match="at least one"):
        race([])
    with pytest.raises(UsageError, match="1 engines for 2 models"):
        race([tmp_path, tmp_path], engine=["transformers"])


def test_no_length_within_the_positions_is_an_error(model: Path, fake: Any) -> None:
    fake(load=f"answer['ready']['positions'] = {POSITIONS}")
    with pytest.raises(UsageError, match=f"exceed its {POSITIONS} positions"):
        speed(model, lengths=(POSITIONS,), repeats=1)


def test_llama_cpp_that_is_not_installed_is_named_with_its_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(UsageError, match=r"pip install 'tersely\[llama-cpp\]'"):
        speed(tmp_path / "model.gguf")


def test_vllm_is_asked_for_exactly_these_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that records its calls: that the engine asks rightly, not that vLLM answers."""
    calls: list[tuple[Any, Any]] = []

    class Llm:
        def __init__(self, **settings: Any) -> None:
            self.settings = settings
            config = types.SimpleNamespace(dtype=torch.bfloat16, quantization="gptq_marlin", get_vocab_size=lambda: 64)
            self.llm_engine = types.SimpleNamespace(model_config=config)

        def generate(self, given: list[Any], params: Any, *, use_tqdm: bool) -> list[Any]:
            assert not use_tqdm
            calls.append((given, params))
            out = types.SimpleNamespace(token_ids=list(range(params.max_tokens)))
            return [types.SimpleNamespace(outputs=[out]) for _ in given]

    stand_in = types.SimpleNamespace(LLM=Llm, SamplingParams=lambda **kw: types.SimpleNamespace(**kw))
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    name = "tersely.evaluation.engines.vllm"
    monkeypatch.delitem(sys.modules, name, raising=False)
    vllm: Any = importlib.import_module(name)
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(vllm, "DeviceMemory", lambda _: lambda: (1, 2))
    engine = vllm.VllmEngine(Task("folder", "cuda", "auto", 1, 4, 40), 32)
    assert engine._llm.settings["max_model_len"] == 32
    assert engine._llm.settings["enable_prefix_caching"] is False
    assert (engine.ready.positions, engine.ready.dtype, engine.ready.format) == (31, "bfloat16", "gptq_marlin")
    timed = engine.run([[1, 2], [3, 4]], 5)
    assert [params.max_tokens for _, params in calls] == [1, 6]
    assert all(params.ignore_eos and params.temperature == 0 for _, params in calls)
    assert all(given == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [3, 4]}] for given, _ in calls)
    assert [len(ids) for ids in timed.ids] == [6, 6]
    assert timed.decode >= 0


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint folder, and the same weights as a GGUF file."""
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'tersely[llama-cpp]'")
    folder = tiny("qwen3", tmp_path_factory.mktemp("qwen3"))
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(folder, file)
    return folder, file


def test_llama_cpp_chooses_what_transformers_finds_most_likely(qwen: tuple[Path, Path]) -> None:
    """Its cache is in 16 bits, so among tokens that are all but equally likely it may take another."""
    folder, file = qwen
    llama_cpp: Any = importlib.import_module("tersely.evaluation.engines.llama_cpp")
    engine = llama_cpp.load(Task(str(file), "cpu", "auto", 1, 3, 16))
    assert (engine.ready.vocabulary, engine.ready.positions, engine.ready.format) == (64, POSITIONS, "F32")
    ids = prompts(64, batch=3, length=7, seed=0)
    for given in (ids, ids[:1], ids):
        chosen = engine.run(given, 5).ids
        assert [len(row) for row in chosen] == [6] * len(given)
        whole_BL = torch.cat([torch.tensor(given), torch.tensor(chosen)], 1)
        with torch.no_grad():
            logits_BLV = load(folder)(whole_BL).logits[:, 6:-1]
        behind = logits_BLV.max(-1).values - logits_BLV.gather(-1, whole_BL[:, 7:, None])[..., 0]
        assert behind.max() < 0.02


def test_a_gguf_file_runs_in_llama_cpp_by_itself_and_beside_transformers(qwen: tuple[Path, Path]) -> None:
    measured = race(qwen, batches=BATCHES, lengths=(*LENGTHS, POSITIONS), tokens=TOKENS, repeats=REPEATS, threads=1)
    folder, file = measured.speeds
    assert (folder.engine, file.engine) == ("transformers", "llama.cpp")
    assert cells(file, "decode") == cells(folder, "decode") == [(b, n) for b in BATCHES for n in LENGTHS]
    assert file.memory_peak >= file.memory_loaded > 0
    assert file.disk == qwen[1].stat().st_size
    assert "llama-cpp-python" in file.setting.versions
    assert len(measured.ratios[0]) == 2 * len(BATCHES) * len(LENGTHS)


def test_a_damaged_gguf_file_is_an_error(qwen: tuple[Path, Path], tmp_path: Path) -> None:
    whole = qwen[1].read_bytes()
    for name, content in (("cut", whole[: len(whole) // 2]), ("noise", b"GGUF" + bytes(range(256)))):
        (tmp_path / f"{name}.gguf").write_bytes(content)
        with pytest.raises(CheckpointError, match=name):
            speed(tmp_path / f"{name}.gguf", repeats=1)


def test_a_gguf_file_has_no_other_dtype(qwen: tuple[Path, Path]) -> None:
    with pytest.raises(UsageError, match="runs as it is stored"):
        speed(qwen[1], dtype="float16")

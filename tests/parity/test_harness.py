"""lm-evaluation-harness: at full depth every answer is that of the harness's own ``hf`` model."""

import json

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers  # noqa: E402

from offramp.commands.evaluate.library import harness  # noqa: E402
from offramp.commands.evaluate.scoring import scoring_of  # noqa: E402
from offramp.commands.evaluate.tokens import prefix_token  # noqa: E402
from offramp.generation.config import GenerateConfig  # noqa: E402
from offramp.models.open import open_model  # noqa: E402

TEXT = "".join(
    f"{number} quick brown foxes jump over {number * 7 % 31} lazy dogs.\n" for number in range(120)
)
LONGEST = 48
CONTINUATIONS = [
    ("The quick", " brown foxes jump"),
    ("The quick", " brown"),
    ("The quick", " lazy"),
    ("The quick", " dogs"),
    ("", "quick brown"),
    ("", " over"),
    ("spaces at the end  ", "jump"),
    ("7 quick", " 7"),
    (TEXT[:400], " lazy dogs."),
    (TEXT[:120], TEXT[120:260]),
    ("unknown é 漢", " é漢"),
]
TEXTS = ["quick", TEXT[:90], TEXT[:700], " ", "é漢"]
KINDS = ["llama", "gpt2"]
# that of llama begins with the BOS token itself and takes no system message, as Gemma's
TEMPLATES = {
    "llama": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}"
    "{{ raise_exception('no system') }}{% endif %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}",
    "gpt2": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
}
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: data.jsonl}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{text}}}}"
doc_to_target: {target}
description: "Go on."
num_fewshot: 1
fewshot_config: {{sampler: first_n, split: test}}
metric_list: [{{metric: {metric}}}]
{more}
"""
TASKS = {
    "choice": {
        "kind": "multiple_choice",
        "metric": "acc",
        "target": "label",
        "more": "doc_to_choice: choices",
    },
    "writing": {
        "kind": "generate_until",
        "metric": "exact_match",
        "target": '"{{choices[label]}}"',
        "more": "generation_kwargs: {until: [jump], max_gen_toks: 6}",
    },
    "begun": {
        "kind": "generate_until",
        "metric": "exact_match",
        "target": '"{{choices[label]}}"',
        "more": 'generation_kwargs: {until: [jump], max_gen_toks: 6}\ngen_prefix: "The quick"',
    },
}
RUNNERS = {"llama": ["native", "transformers"], "gpt2": ["transformers"]}


def tokenizer_of(kind):
    """Byte-level BPE; that of llama puts a BOS before every text."""
    special = {"llama": ["<s>", "</s>"], "gpt2": ["<|endoftext|>"]}[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if kind == "llama":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=special[0],
        eos_token=special[-1],
        chat_template=TEMPLATES[kind],
    )


def config_of(kind, tokenizer):
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if kind == "llama":
        return transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=LONGEST,
            **ends,
        )
    return transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=3, n_head=4, n_positions=LONGEST, **ends
    )


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = tokenizer_of(request.param)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config_of(request.param, tokenizer))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def theirs(folder):
    hf = harness("models.huggingface").HFLM
    return hf(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


@pytest.fixture(scope="module")
def ours(folder):
    """The model in each runner that it has."""
    from offramp.commands.evaluate.model import ScoringModel

    kind = next(kind for kind in KINDS if folder.name.startswith(kind))
    found = []
    for runner in RUNNERS[kind]:
        opened = open_model(folder, runner=runner)
        opened.model.silence_untrained()
        prefix = prefix_token(opened)
        scoring = scoring_of(opened, GenerateConfig(), batch_size=3, max_length=None, prefix=prefix)
        found.append(ScoringModel(scoring))
    return found


def requests(kind, arguments):
    instance = harness("api.instance").Instance
    return [
        instance(
            request_type=kind, doc={}, arguments=each, idx=0, metadata=(f"task{place % 2}", 0, 1)
        )
        for place, each in enumerate(arguments)
    ]


def test_loglikelihoods_are_those_of_hf(ours, theirs):
    asked = requests("loglikelihood", CONTINUATIONS)
    expected = theirs.loglikelihood(asked, disable_tqdm=True)
    for model in ours:
        found = model.loglikelihood(asked)
        assert [value for value, _ in found] == pytest.approx([v for v, _ in expected], abs=2e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_a_greedy_continuation_is_greedy_for_both(ours, theirs):
    short = [(f"{n} quick", {"max_gen_toks": 1, "until": []}) for n in range(60)]
    texts = theirs.generate_until(requests("generate_until", short), disable_tqdm=True)
    pairs = [(context, text) for (context, _), text in zip(short, texts, strict=True)]
    readable = [pair for pair in pairs if pair[1].isascii() and pair[1]]
    asked = requests("loglikelihood", [*readable, *((c, text + "x") for c, text in readable)])
    expected = [greedy for _, greedy in theirs.loglikelihood(asked, disable_tqdm=True)]
    assert True in expected
    for model in ours:
        assert [greedy for _, greedy in model.loglikelihood(asked)] == expected


def test_rolling_loglikelihoods_are_those_of_hf(ours, theirs):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    expected = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    for model in ours:
        assert model.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_generated_texts_are_those_of_hf(ours, theirs):
    wanted = [
        (context, {"until": until, "max_gen_toks": length})
        for context in ("The quick", TEXT[:300], "7 ")
        for until, length in (([], 12), (["o", "\n\n", "zz"], 12), (["e"], 30), (["</s>"], 5))
    ]
    asked = requests("generate_until", wanted)
    expected = theirs.generate_until(asked, disable_tqdm=True)
    for model in ours:
        assert model.generate_until(asked) == expected
        assert model.counts["task0"].truncated > 0


def test_what_hf_cannot_answer_has_an_answer(ours):
    """An empty continuation is certain; it needs no token."""
    asked = requests("loglikelihood", [("", ""), ("7 quick", "")])
    for model in ours:
        assert model.loglikelihood(asked) == [(0.0, True), (0.0, True)]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Tasks in local files, and what the harness needs to find them."""
    import datasets

    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"text": f"{n} quick", "choices": [" brown foxes", " dogs"], "label": n % 2}
        for n in range(4)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, fields in TASKS.items():
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, **fields))
    with pytest.MonkeyPatch.context() as patch:
        cache = tmp_path_factory.mktemp("datasets")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        patch.chdir(folder)
        index = harness("tasks").TaskManager
        yield index(include_defaults=False, include_path=str(folder))


@pytest.mark.parametrize("several_turns", [True, False])
def test_questions_in_a_chat_template_are_those_of_hf(ours, theirs, tasks, several_turns):
    run = harness("evaluator").simple_evaluate

    def samples(model):
        found = run(
            model,
            tasks=list(TASKS),
            task_manager=tasks,
            apply_chat_template=True,
            fewshot_as_multiturn=several_turns,
            system_instruction="Be short.",
            bootstrap_iters=0,
            limit=3,
        )["samples"]
        assert set(found) == set(TASKS)
        return found

    expected = samples(theirs)
    for model in ours:
        found = samples(model)
        for name in TASKS:
            for one, other in zip(found[name], expected[name], strict=True):
                assert one["arguments"] == other["arguments"]
                assert "assistant" in str(one["arguments"])
                if name == "choice":
                    mine, his = (
                        [value for answer in each["resps"] for value, _ in answer]
                        for each in (one, other)
                    )
                    assert mine == pytest.approx(his, abs=2e-4)
                else:
                    assert one["resps"] == other["resps"]


def test_the_chat_template_itself_is_that_of_hf(ours, theirs):
    for model in ours:
        assert model.chat_template(True) == theirs.chat_template(True) is not None
        assert model.tokenizer.eos_token == theirs.tokenizer.eos_token

"""The methods that one run of ``offramp bench`` compares."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

from offramp.commands.bench.methods import (
    LOOKUP_TOKENS,
    Method,
    economize_installed,
    economize_methods,
    hugging_face,
    plain_generation,
)
from offramp.commands.bench.quality import transformers_ppl
from offramp.commands.bench.task import Task
from offramp.commands.bench.threshold import threshold_for
from offramp.errors import ConfigError, UnsupportedArchitectureError
from offramp.generation.config import MISSING_KV, GenerateConfig
from offramp.generation.options import draft_exit
from offramp.models.missing_kv import EXACT, complete


def check_options(task: Task) -> None:
    """Raise ConfigError for options that need exits which the model does not have."""
    if task.config.thresholds and not task.early_exits:
        raise ConfigError("thresholds: expected a model with exits before its last layer, got none")
    if task.config.draft_exit is not None:
        wanted = GenerateConfig(speculative=True, draft_exit=task.config.draft_exit)
        draft_exit(task.model, wanted, task.fitted)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The methods to compare, in the order of the table: transformers', offramp's, other peers."""

    methods: list[Method]
    failed: dict[str, str]
    "The peers that could not be prepared, with the reason."


OnNote = Callable[[str], None]
"""Called with what is prepared at the moment."""


def plan_of(tasks: Sequence[Task], note: OnNote = lambda text: None) -> Plan:
    """Choose every method: full depth, exits, drafts, and those of other packages.

    ``tasks`` are the weight formats; packages that run the PyTorch model run the first one.
    """
    ours = [method for task in tasks for method in _own_methods(task, note)]
    exits = [method.threshold for method in ours if method.threshold is not None]
    first = tasks[0]
    peers = _Peers(first, _drafting(first), (exits or [0.9])[-1])
    return Plan(methods=[*peers.before, *ours, *peers.after], failed=peers.failed)


def _drafting(task: Task) -> int:
    chosen = task.config.draft_exit
    return chosen if chosen is not None else (task.early_exits or (0,))[0]


def _own_methods(task: Task, note: OnNote) -> Iterator[Method]:
    """Full depth, exits by each confidence measure, and drafts, in one weight format.

    Under ``recompute`` only the first measure is timed, and options for thresholds are for it.
    """
    config, early, drafting = task.config, task.early_exits, _drafting(task)
    yield task.full()
    for confidence in task.confidences:
        main = confidence == task.confidences[0]
        thresholds = [float(each) for each in map(task.threshold, config.thresholds) if main]
        if early and config.compute_pct is not None:
            note(f"{task.weights}: threshold of {confidence} for {config.compute_pct:g}%")
            thresholds.append(threshold_for(config.compute_pct, task, confidence))
        ways = (EXACT,) if complete(task.model) else MISSING_KV if main else MISSING_KV[:1]
        for threshold in dict.fromkeys(thresholds):
            for kv in ways:
                yield _exit_method(task, threshold, kv, confidence)
    if early and config.batch_size == 1:
        yield task.method(f"speculative@{drafting}", speculative=True, draft_exit=drafting)


def _exit_method(task: Task, threshold: float, kv: str, confidence: str) -> Method:
    measure = "" if confidence == "max_prob" else f"{confidence}:"
    name = f"exit@{threshold:g}:{measure}{kv}"
    return task.method(name, threshold=threshold, missing_kv=kv, confidence=confidence)


class _Peers:
    """transformers' own ways to decode, and those of economize; none without transformers."""

    def __init__(self, task: Task, drafting: int, threshold: float) -> None:
        self.before: list[Method] = []
        self.after: list[Method] = []
        self.failed: dict[str, str] = {}
        if not task.config.peers:
            return
        try:
            lm = plain_generation(task.model.to_transformers())
        except UnsupportedArchitectureError:
            return
        except Exception as error:  # a peer that fails never ends the run
            self.failed["hf"] = reason(error)
            return
        new = task.config.max_new_tokens
        ppl = cache(lambda: transformers_ppl(lm, task.windows)) if task.windows else None

        def peer(method: Method) -> Method:
            return replace(method, weights=task.weights, ppl=ppl)

        self.before.append(peer(hugging_face("hf", lm, new)))
        if task.config.batch_size > 1:
            return
        lookup = hugging_face("hf_prompt_lookup", lm, new, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        self.before.append(replace(peer(lookup), prefill=None))
        if not task.early_exits:
            return
        name = f"hf_early_exit@{drafting}"
        assisted = hugging_face(name, lm, new, slow=True, assistant_early_exit=drafting)
        self.before.append(replace(peer(assisted), prefill=None))
        if economize_installed():
            try:
                methods = economize_methods(lm, new, draft_exit=drafting, threshold=threshold)
                self.after = [replace(method, weights=task.weights) for method in methods]
            except (Exception, SystemExit) as error:
                self.failed["economize"] = reason(error)


def reason(error: BaseException) -> str:
    """Why a peer failed, in one line; an error without words is named by its type."""
    return " ".join(str(error).split()) or type(error).__name__

"""The methods that one run of ``offramp bench`` compares."""

from dataclasses import dataclass

from offramp.commands.bench.methods import (
    LOOKUP_TOKENS,
    Method,
    economize_installed,
    economize_methods,
    hugging_face,
    plain_generation,
)
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


def plan_of(task: Task) -> Plan:
    """Choose every method: full depth, exits, drafts, and those of other packages."""
    config, early = task.config, task.early_exits
    thresholds = list(config.thresholds)
    if early and config.compute_pct is not None:
        thresholds.append(threshold_for(config.compute_pct, task))
    thresholds = list(dict.fromkeys(thresholds))
    drafting = config.draft_exit if config.draft_exit is not None else (early or (0,))[0]
    ways = (EXACT,) if complete(task.model) else MISSING_KV
    ours = [task.method("full")]
    ours += [
        task.method(
            f"exit@{threshold:g}:{kv}",
            threshold=threshold,
            missing_kv=kv,
            confidence=config.confidence,
        )
        for threshold in thresholds
        for kv in ways
    ]
    if early and config.batch_size == 1:
        ours.append(task.method(f"speculative@{drafting}", speculative=True, draft_exit=drafting))
    peers = _Peers(task, drafting, (thresholds or [0.9])[-1])
    return Plan(methods=[*peers.before, *ours, *peers.after], failed=peers.failed)


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
        self.before.append(hugging_face("hf", lm, new))
        if task.config.batch_size > 1:
            return
        self.before.append(
            hugging_face("hf_prompt_lookup", lm, new, prompt_lookup_num_tokens=LOOKUP_TOKENS)
        )
        if not task.early_exits:
            return
        name = f"hf_early_exit@{drafting}"
        self.before.append(hugging_face(name, lm, new, slow=True, assistant_early_exit=drafting))
        if economize_installed():
            try:
                self.after = economize_methods(lm, new, draft_exit=drafting, threshold=threshold)
            except (Exception, SystemExit) as error:
                self.failed["economize"] = reason(error)


def reason(error: BaseException) -> str:
    """Why a peer failed, in one line; an error without words is named by its type."""
    return " ".join(str(error).split()) or type(error).__name__

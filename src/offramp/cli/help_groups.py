"""Flags in groups on the help pages of commands that have many."""

from typing import TYPE_CHECKING

from cyclopts.help import DefaultFormatter, HelpEntry, HelpPanel

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions

FEW = 14
"""A command with at most so many flags has them in one list."""

GROUPS: dict[str, str] = {
    "Model": """dim layers heads kv-heads head-dim hidden exits exit-head kv-source
        upper-hidden norm tie-word-embeddings max-length rms-norm-eps rope-theta rope-type
        rope-factor rope-low-freq-factor rope-high-freq-factor rope-original-length""",
    "Objective": """loss-weights alpha-end alpha-schedule alpha-steps weight-warmup
        weight-warmup-steps curriculum layer-dropout layer-dropout-schedule gradient-equilibrium
        detach-exits distill distill-temperature backbone-steps layer-lr objective unfreeze""",
    "Optimisation": """steps epochs seq-len batch-size lr weight-decay warmup-steps schedule
        grad-clip shuffle seed""",
    "Validation and checkpoints": """eval-every patience select-at checkpoint-every
        keep-checkpoints tracker""",
    "Tasks": """tasks limit num-fewshot batch-size max-length prefix-token tasks-path
        trust-task-code bootstrap-iters""",
    "Exits": """exits threshold thresholds certificate confidence decay missing-kv bos compare
        static""",
    "Audit": "audit audit-log keep-promise promise-risk",
    "Speculative decoding": "speculative draft-exit draft-threshold max-drafts lookup adaptive",
    "Address and access": "host port api-key cors name",
    "Requests": """slots capacity waiting prefill-tokens max-new-tokens max-body-bytes
        request-seconds read-seconds write-seconds grace""",
    "Sampling": "temperature top-k top-p repetition-penalty seed",
    "Speed and memory": """device dtype threads precision accumulate recompute-activations compile
        sharding""",
}
"""Flags by the title of their group, without dashes; the others keep their place. A flag that is in
several belongs to the one that has the most flags on the page."""


class GroupedHelp(DefaultFormatter):
    """Cyclopts' own help, with the flags of a long page in panels by what they are about."""

    def __call__(self, console: "Console", options: "ConsoleOptions", panel: HelpPanel) -> None:
        """Print a panel, in parts where it is long."""
        for part in split(panel):
            super().__call__(console, options, part)


def split(panel: HelpPanel) -> list[HelpPanel]:
    """The panel itself, or first what belongs to no group, then a panel for each group."""
    if panel.format != "parameter" or len(panel.entries) <= FEW:
        return [panel]
    flags = {name for entry in panel.entries for name in entry.positive_names}
    groups = {
        title: flags & {f"--{word}" for word in words.split()} for title, words in GROUPS.items()
    }
    parts: dict[str, list[HelpEntry]] = {"": [], **{title: [] for title in GROUPS}}
    for entry in panel.entries:
        held = [title for title in GROUPS if groups[title].intersection(entry.positive_names)]
        largest = max(held, key=lambda title: len(groups[title]), default="")
        parts[largest if largest and len(groups[largest]) > 1 else ""].append(entry)
    return [
        panel.copy(title=title or panel.title, entries=entries)
        for title, entries in parts.items()
        if entries
    ]

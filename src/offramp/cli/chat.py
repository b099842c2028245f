"""offramp chat."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from offramp.calibration.thresholds import load_thresholds, thresholds_flag
from offramp.cli.base import (
    Base,
    Bos,
    Device,
    Exits,
    Model,
    Precision,
    Threads,
    Weights,
    open_for,
    output,
    say,
    use,
)
from offramp.cli.decoding import (
    ConfigFlags,
    Decay,
    KeysValues,
    Measure,
    Thresholds,
    for_model,
    parse_threshold,
    say_about_exits,
    say_legend,
    say_summary,
    show_tokens,
    timed,
    uses_exits,
    with_flags,
)
from offramp.cli.plain_text import standard_lines, write_text
from offramp.cli.prompt import in_a_terminal, typed_lines
from offramp.cli.streams import utf8
from offramp.errors import ConfigError, OfframpError
from offramp.generation.config import GenerateConfig

if TYPE_CHECKING:
    from offramp.commands.chat import Conversation
    from offramp.generation.generate import Generation

COMMANDS = {
    "/threshold X": "Let tokens leave at this confidence, such as 0.9 or 0.9:0.8.",
    "/full": "Run every token through all layers.",
    "/speculative": "Draft tokens with the first layers, and verify them with the whole model.",
    "/reset": "Begin a new conversation.",
    "/help": "List the commands.",
    "/quit": "End the chat; so does Ctrl-D.",
}
"""The commands of a chat, and what they do."""
NAMES = tuple(usage.split()[0] for usage in COMMANDS)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(GenerateConfig):
    """The options of an answer."""

    max_new_tokens: int = 512
    "Largest number of new tokens of an answer."


DEFAULTS = ChatConfig()


def chat(
    model: Model,
    config: Annotated[ChatConfig, ConfigFlags] = DEFAULTS,
    *,
    system: str | None = None,
    plain: bool = False,
    thresholds: Thresholds = None,
    falling: Decay = None,
    certificate: Path | None = None,
    measure: Measure = None,
    keys_values: KeysValues = None,
    stop: list[str] | None = None,
    stop_token: list[str] | None = None,
    base: Base = None,
    exits: Exits = None,
    bos: Bos = "auto",
    device: Device = "cpu",
    threads: Threads = None,
    dtype: Precision | None = None,
    weights: Weights = None,
) -> None:
    """Talk to a model; in a terminal each token has the colour of its exit.

    Without a terminal, each line of standard input is a message.

    Parameters
    ----------
    system
        The system message, with which the conversation begins.
    plain
        Use no chat template: the model continues one text, to which each message is added.
    certificate
        Take the thresholds in a file that ``offramp calibrate`` wrote for this model.
    stop
        A string that ends an answer; give the flag again for another.
    stop_token
        A token that ends an answer: its id, such as 2, or its text, such as "\\n" or
        "<|im_end|>" (text:2 is the digit 2); give the flag again for another.
    dtype
        Precision of the model (default: that of the certificate, or of the model's files).
    """
    typed = in_a_terminal()
    lines = typed_lines(list(NAMES)) if typed else standard_lines()
    stored = None if certificate is None else load_thresholds(certificate)
    flags = with_flags(
        config,
        stored,
        thresholds=thresholds,
        decay=falling,
        confidence=measure,
        missing_kv=keys_values,
        stop=stop,
    )
    use(device, threads)
    opened = open_for(
        model,
        base=base,
        exits=exits,
        drafting=config,
        bos=bos,
        device=device,
        dtype=dtype,
        weights=weights,
        stored=stored,
    )
    options = for_model(flags, opened, stored, missing_kv=keys_values, stop_token=stop_token)

    from offramp.commands.chat import Conversation

    spoken = None if system is None else utf8(system) or ""
    conversation = Conversation(opened, options, plain=plain, system=spoken)
    if typed:
        found = ", ".join(map(str, opened.model.exit_layers[:-1])) or "none"
        say(f"{opened.name}: {opened.model.num_layers} layers, exits: {found}.")
        say("/help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the chat.")
    converse(conversation, lines, typed=typed)


def converse(conversation: "Conversation", lines: Iterable[str], *, typed: bool) -> None:
    """Answer each line that is a message, and obey each that is a command.

    If people type them, an error or Ctrl-C ends only the work on this line; else it is raised.
    """
    explained: GenerateConfig | None = None
    for line in lines:
        try:
            if line.startswith("/"):
                if not _obey(line, conversation):
                    return
            elif line.strip():
                if conversation.config != explained:
                    explained = conversation.config
                    _explain(conversation)
                _answer(line, conversation, typed=typed)
        except OfframpError as error:
            if not typed:
                raise
            say(str(error))
        except KeyboardInterrupt:
            if not typed:
                raise


def _obey(line: str, conversation: "Conversation") -> bool:
    """Obey a command; returns whether the chat goes on."""
    name, _, argument = line.strip().partition(" ")
    match name:
        case "/quit":
            return False
        case "/help":
            for usage, meaning in COMMANDS.items():
                say(f"{usage:<14}{meaning}")
        case "/reset":
            conversation.reset()
            say("A new conversation begins.")
        case "/full":
            conversation.choose()
            say(_threshold(conversation))
        case "/speculative":
            conversation.choose(speculative=True)
            say(_threshold(conversation))
        case "/threshold":
            if argument.strip():
                conversation.choose(threshold=parse_threshold(argument.strip()))
            say(_threshold(conversation))
        case _:
            raise ConfigError(
                f"command: expected one of {', '.join(NAMES)}, got {name!r:.80}; put a space "
                "before a message that begins with /"
            )
    return True


def _threshold(conversation: "Conversation") -> str:
    """Return a sentence on where tokens leave from now on."""
    config = conversation.config
    if config.speculative:
        return "The first layers draft tokens, and the whole model verifies them."
    if config.threshold is None:
        return "Every token runs through all layers."
    many = config.threshold if isinstance(config.threshold, tuple) else (config.threshold,)
    return f"Tokens leave at threshold {thresholds_flag(many)}."


def _explain(conversation: "Conversation") -> None:
    """Say what decides where tokens leave, before the first answer with these options."""
    from offramp.commands.generate import confidence_note

    config, opened = conversation.config, conversation.opened
    say_about_exits(config, opened)
    if config.threshold is not None and config.confidence is None:
        say(confidence_note(opened, conversation.rule))
    if uses_exits(config):
        say_legend(output(), opened)


def _answer(message: str, conversation: "Conversation", *, typed: bool) -> None:
    """Print the answer to a message as it comes, and keep both; Ctrl-C stops it."""
    shown, opened = output(), conversation.opened
    generation = conversation.answer(message)
    try:
        figures = timed(generation, show=show_tokens(shown, opened))
    except KeyboardInterrupt:
        if not typed:
            raise
        figures = None
    finally:
        write_text(shown, "\n")
    if generation.completion.tokens:
        conversation.keep(message, generation.completion.text)
    if figures is None:
        say("Stopped; the conversation keeps the answer so far.")
    else:
        say_summary(generation, opened, prefill=figures[0], rate=figures[1])
    if generation.completion.finish_reason == "length":
        say(_why_it_ended(generation, conversation))


def _why_it_ended(generation: "Generation", conversation: "Conversation") -> str:
    count, most = len(generation.completion.tokens), conversation.config.max_new_tokens
    if count == most:
        return f"The answer was cut after {count} tokens; --max-new-tokens allows more."
    longest = conversation.opened.model.max_length
    return (
        f"The answer was cut, because the conversation has {longest} tokens, the model's longest "
        "sequence; /reset begins a new one."
    )

"""offramp push."""

from pathlib import Path
from shlex import quote

from offramp.cli.base import Base, Model, console, open_for, say, say_verdict
from offramp.cli.interrupts import work_begins
from offramp.commands.push_config import PushConfig, branch_name


def push(
    model: Model,
    name: str,
    *,
    private: bool = False,
    message: str | None = None,
    license: str | None = None,
    sweep: Path | None = None,
    certificate: Path | None = None,
    replace_card: bool = False,
    base: Base = None,
) -> None:
    """Upload a model with exits and a model card to the Hugging Face hub, in one commit.

    Exits whose backbone is on the hub go without it. Only the model's own files are uploaded,
    without names of local folders. Log in first: hf auth login, or set HF_TOKEN.

    Parameters
    ----------
    name
        OWNER/NAME, or OWNER/NAME@BRANCH. It is created if it is not there.
    private
        Create a private repository.
    message
        The message of the commit.
    license
        The license of the model, such as apache-2.0, for its card.
    sweep
        A JSON file of ``offramp sweep --out`` for this model: its table is in the card.
    certificate
        A certificate of this model: what it guarantees is in the card. It is uploaded, too.
    replace_card
        Write a new card even where somebody wrote or edited README.md by hand.
    """
    branch_name(name)
    config = PushConfig(
        private=private,
        license=license,
        replace_card=replace_card,
        commit_message=PushConfig.commit_message if message is None else message,
    )

    from offramp.commands.push import push as run_push

    work_begins()
    opened = open_for(model, base=base, device="cpu", dtype=None)
    pushed = run_push(
        opened,
        name,
        config,
        sweep=sweep,
        certificate=certificate,
        bars=console.is_terminal,
    )
    if pushed.card_kept:
        say("README.md there was written by hand and stays as it is; --replace-card replaces it.")
    say(f"{', '.join(pushed.files)}: commit {pushed.commit}")
    say_verdict(f"{pushed.url}  Next: offramp generate {quote(pushed.repository)} PROMPT")

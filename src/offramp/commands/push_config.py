"""Options of ``offramp push`` and of model cards. Imports no PyTorch."""

from dataclasses import dataclass, field

from offramp.errors import ConfigError
from offramp.models.hub_names import HubName, hub_name, is_commit
from offramp.schema import shown
from offramp.version import __version__


@dataclass(frozen=True, kw_only=True)
class PushConfig:
    """Options of a push."""

    private: bool = False
    "Create a private repository; one that is public already is refused."
    commit_message: str = f"Upload a model with exits by offramp {__version__}"
    license: str | None = None
    "The license of the model, such as apache-2.0, for its card."
    replace_card: bool = False
    "Write a new card even where somebody wrote or edited README.md by hand."
    token: str | None = field(default=None, repr=False)
    "A token of the hub; by default HF_TOKEN, or that of hf auth login."

    def __post_init__(self) -> None:
        check_license(self.license)
        if not self.commit_message.strip():
            raise ConfigError("commit_message: expected text, got none")
        if self.token is not None and not (self.token.isascii() and self.token.isprintable()):
            raise ConfigError("token: expected a token of the hub, got other characters")


def check_license(license: str | None) -> str | None:
    """Return the name of a license. Raises ConfigError for text that names none."""
    if license is not None and not (0 < len(license.strip()) < 100 and license.isprintable()):
        raise ConfigError(
            f"license: expected the name of a license, such as apache-2.0, got {shown(license)}"
        )
    return license


def branch_name(name: str) -> HubName:
    """Read the name of a repository to write to: OWNER/NAME or NAME, perhaps with @BRANCH."""
    found = hub_name(name) if isinstance(name, str) else None
    if found is None:
        raise ConfigError(
            "name: expected OWNER/NAME on the hub, of letters, digits and - _ . (and perhaps "
            f"@BRANCH), got {shown(name)}"
        )
    if is_commit(found.revision):
        raise ConfigError(f"name: expected a branch after @, got the commit {found.revision}")
    return found

"""One size of the study ``scale``: its runs, and how large its models and its text are."""

from dataclasses import dataclass, replace

from offramp.studies.study.plan import Study
from offramp.studies.study.run import StudyRun
from offramp.training.loop import new_model


@dataclass(frozen=True, kw_only=True)
class Sized:
    """The study of one width."""

    width: int
    study: Study
    runs: tuple[StudyRun, ...]
    vocab_size: int
    text_tokens: int
    "Tokens of the training text."

    @property
    def parameters(self) -> int:
        """Parameters of the standard model."""
        config = replace(self.study.model, vocab_size=self.vocab_size, exit_layers=())
        return sum(parameter.numel() for parameter in new_model(config, seed=0).parameters())

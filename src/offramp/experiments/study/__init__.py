"""Studies: a grid of recipes, trained on the same tokens with several seeds, and compared.

``plan`` says which studies there are, ``run`` trains and traces one model, ``study`` does all
runs and ``summary`` is array work on their traces.
"""

from offramp.experiments.study.plan import Recipe, Study
from offramp.experiments.study.studies import STUDIES
from offramp.experiments.study.study import StudyConfig, run_study

__all__ = ["STUDIES", "Recipe", "Study", "StudyConfig", "run_study"]

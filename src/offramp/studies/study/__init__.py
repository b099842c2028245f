"""Studies: a grid of recipes, trained on the same tokens with several seeds, and compared.

``plan`` says which studies there are, ``run`` trains and traces one model, ``study`` does all
runs and ``summary`` is array work on their traces.
"""

from offramp.studies.study.plan import Recipe, Study
from offramp.studies.study.recipe import RecipeConfig, find_recipe
from offramp.studies.study.studies import STUDIES
from offramp.studies.study.study import StudyConfig, Workers, run_study, study_named

__all__ = [
    "STUDIES",
    "Recipe",
    "RecipeConfig",
    "Study",
    "StudyConfig",
    "Workers",
    "find_recipe",
    "run_study",
    "study_named",
]

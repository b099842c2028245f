"""The texts of a study: what trains, what is held out, what is reported on."""

from pathlib import Path

from offramp.data import load_corpus
from offramp.errors import CorpusError
from offramp.studies.study.config import TextChoice
from offramp.studies.study.run import HELD_OUT, StudyText


def study_text(choice: TextChoice) -> StudyText:
    """Load the corpus and divide it.

    Raises CorpusError where there is too little text, or where the test text and the training
    text contain one another.
    """
    corpus = load_corpus(choice.corpus)
    sha256 = corpus.sha256
    if choice.test is not None:
        other = load_corpus(choice.test)
        whole = corpus.whole if corpus.test is None else corpus.train + corpus.validation
        test, where, sha256 = other.whole, f"all of {Path(other.name).name}", other.sha256
        if test and whole and (test in whole or whole in test):
            raise CorpusError(
                f"test: expected text that is not trained on, got {choice.test}, which overlaps "
                f"with {choice.corpus}"
            )
    elif corpus.test is not None:
        whole, test, where = corpus.train + corpus.validation, corpus.test, "the test split"
    else:
        whole, test, where = corpus.train, corpus.validation, "the last 10% of the corpus"
    cut = int(len(whole) * (1 - HELD_OUT))
    if not whole[:cut] or not test:
        raise CorpusError(
            f"{choice.corpus}: expected text to train on and text to report on, got too little"
        )
    return StudyText(
        train=whole[:cut],
        held_out=whole[cut:],
        test=test,
        about={
            "corpus": Path(corpus.name).name,
            "sha256": corpus.sha256,
            "test_sha256": sha256,
            "split": f"trained on the first {100 * (1 - HELD_OUT):g}% of the training text, "
            f"chosen on the rest of it, reported on {where}",
        },
    )

"""Teach a trained model's exits the tokens that leave there: ``offramp specialise``."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from offramp.calibration.specialise import check_specialise, specialise_exits, with_own_heads
from offramp.calibration.specialise_config import SpecialiseConfig
from offramp.commands.confidence import fit_to_ids
from offramp.commands.text import training_ids, windows
from offramp.data.corpus import load_corpus
from offramp.errors import CheckpointError
from offramp.evaluation.trace import collect_trace
from offramp.folders import new_folder
from offramp.models.model_files import refuse_quantised
from offramp.models.open import OpenedModel
from offramp.models.save import write_model


def specialise(
    opened: OpenedModel,
    corpus: str,
    out: Path,
    config: SpecialiseConfig,
    *,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Write a new model folder with specialised exits, and gates that were fitted to them.

    Exits learn from the corpus's training text. Returns the share of its tokens that exited at
    each exit at the budget, and each exit's PPL on the validation text before and after. Raises
    CheckpointError for a model whose exits were never trained, CorpusError for too little text,
    and the ConfigErrors of ``specialise_exits``.
    """
    model = opened.model
    if not opened.exits_trained:
        raise CheckpointError(
            f"{opened.name}: expected a model with trained exits, of offramp train or offramp "
            "tune, got one whose exits were never trained"
        )
    refuse_quantised(opened.name, opened.weights, "since specialise trains LM heads")
    text = load_corpus(corpus)
    train_ids, validation_ids = training_ids(opened, text)

    def exit_ppl(of: OpenedModel) -> dict[int, float]:
        trace = collect_trace(of.model, windows(of, validation_ids))
        return {layer: trace.ppl(layer) for layer in of.model.exit_layers}

    own_model = with_own_heads(model, seed=config.seed, add=config.add_exits)
    own_model.freeze_backbone()
    own = replace(opened, model=own_model)
    check_specialise(own_model, config, context=(opened.window + 1) / 2)
    with new_folder(out) as folder:
        before = exit_ppl(opened)
        on_stage(
            "Step 1 of 2: training each exit on the tokens that exit there; this can take minutes"
        )
        order = torch.Generator().manual_seed(config.seed + 1)  # the gates' sample is another
        left = specialise_exits(own_model, windows(own, train_ids, order), config)
        on_stage("Step 2 of 2: fitting gates and temperatures to the new exits")
        own = replace(own, fitted=fit_to_ids(own, train_ids, validation_ids))
        specialised = {**asdict(config), "corpus": {"name": text.name, "sha256": text.sha256}}
        write_model(own, folder, about={"specialised": specialised})
    return {"left": left, "before": before, "after": exit_ppl(own)}

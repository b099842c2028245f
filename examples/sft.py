"""Train a Hugging Face model with exits by TRL's SFTTrainer.

python examples/sft.py HuggingFaceTB/SmolLM2-135M text.txt tuned    # a line is a text
"""

import sys
from pathlib import Path

import datasets
import trl

import offramp


class ExitTrainer(offramp.training.ExitLossMixin, trl.SFTTrainer):
    """SFTTrainer with a loss at each exit."""


model, corpus, out = sys.argv[1:]
args = trl.SFTConfig(out, max_steps=10, max_length=256, bf16=False)
lines = Path(corpus).read_text().splitlines()
text = datasets.Dataset.from_dict({"text": [line for line in lines if line.strip()]})
trainer = ExitTrainer(model, args, train_dataset=text, loss_weights="asymmetric_exits:0.5")
trainer.train()
trainer.save_model(out)
print(offramp.load(out))

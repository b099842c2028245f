"""offramp's models in lm-evaluation-harness.

Importing this module adds the model ``offramp`` to the harness::

    import lm_eval
    import offramp.lm_eval

    arguments = {"pretrained": "tuned", "threshold": 0.9}
    lm_eval.simple_evaluate("offramp", arguments, tasks=["arc_easy"])

The harness finds models by their names in its own registry only, so its command line needs this
module: ``python -m offramp.lm_eval`` is the command ``lm_eval`` with that model added.
"""

import sys

from offramp.commands.evaluate.library import harness
from offramp.errors import OfframpError
from offramp.printable import printable

NAME = "offramp"
CLASS = "offramp.commands.evaluate.registered:RegisteredModel"


def register() -> None:
    """Add the model to the harness; it is imported when the harness uses it.

    Raises ConfigError if the harness is not installed.
    """
    harness("models")  # its own models, which it adds only to an empty registry
    registry = harness("api.registry").model_registry
    if NAME not in registry:
        registry.register(NAME, target=CLASS)


def main() -> None:
    """Run the command line of the harness; an error of offramp is a sentence and exit code 2."""
    try:
        register()
        harness("__main__").cli_evaluate()
    except OfframpError as error:
        print(f"offramp: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
else:
    register()

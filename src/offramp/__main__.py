"""``python -m offramp``; ``torchrun`` and ``accelerate launch`` take it after ``-m``, too."""

from offramp.cli import main

if __name__ == "__main__":
    main()

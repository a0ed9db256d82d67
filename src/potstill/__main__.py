"""`python -m potstill`, which is what `torchrun -m potstill` starts."""

from potstill.cli import main

main()

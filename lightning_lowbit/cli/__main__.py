"""``python -m lightning_lowbit.cli``: the console script, where it is not on the path."""

from lightning_lowbit.cli import main

main()

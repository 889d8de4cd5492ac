"""`python -m hf_minigpt`: the command `hf-minigpt`."""

from .cli import main


main()

"""`python -m hf_minigpt serve MODEL`"""

from .serving import main


main()

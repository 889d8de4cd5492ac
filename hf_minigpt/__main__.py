"""`python -m hf_minigpt serve MODEL`"""

from .deploy.serving import main


main()

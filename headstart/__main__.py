"""`python -m headstart`, which is what `accelerate launch -m headstart` runs."""

from headstart.cli import main

main()

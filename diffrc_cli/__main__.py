"""`python -m diffrc_cli` is `diffrc`."""

from diffrc_cli.app import main

main()

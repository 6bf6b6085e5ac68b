"""``python -m service.cli``, as the console script."""

from service.cli.app import main

main()

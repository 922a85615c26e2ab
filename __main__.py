"""`python -m framestep`: the command `framestep`."""

from framestep.apps.cli import main

main()

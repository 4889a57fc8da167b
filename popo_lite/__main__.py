"""`python -m popo_lite`."""

from popo_lite.cli import main

main()

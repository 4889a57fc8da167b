"""Run the command line as `python -m popo_lite`."""

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # `-m` puts the working folder first, where a file of a stranger would take the place of a library. Reward
        # functions are found there all the same: see `trust.find_module`.
        del sys.path[0]

    from popo_lite.cli import main

    main(prog_name="popo-lite")

"""Serve a student with openpi's unmodified scripts/serve_policy.py.

python scripts/serve_openpi.py policy:checkpoint --policy.config=NAME --policy.dir=STEP [...]

    --policy.config pi0_aloha_l6        any name; names of openpi's configs mean openpi's configs
    --policy.dir    checkpoints/pi0_aloha_l6/first/30000
    --openpi-dir    a clone of openpi (or $OPENPI_DIR), unless it is installed from one

Run it with the Python of an environment that has openpi. All other arguments (--port, ...) are
passed to openpi's serve_policy.py; if openpi is installed, --help shows them.
"""

import argparse
import importlib.util
import runpy
import sys

from shallow_pi.commands import exits
from shallow_pi.interop import openpi


def main() -> None:
    """Register the student with openpi in this process, then run openpi's script."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--openpi-dir")
    own, arguments = parser.parse_known_args()
    is_help = "--help" in arguments or "-h" in arguments
    if is_help or not arguments:
        print((__doc__ or "").strip(), end="\n\n")
        arguments = arguments or ["--help"]
    if is_help and importlib.util.find_spec("openpi") is None:
        return
    parser.add_argument("--policy.config", dest="name")
    parser.add_argument("--policy.dir", dest="step")
    named, _ = parser.parse_known_args(arguments)
    with exits.exit_on(ModuleNotFoundError):
        script = openpi.serve_script(own.openpi_dir)
        if named.name and named.step and not openpi.runs(named.name, named.step):
            openpi.register_checkpoint(named.name, named.step)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")

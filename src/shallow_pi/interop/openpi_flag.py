"""The flag `--openpi.config NAME` of commands that take an experiment.

What reads openpi's configs is imported with the flag alone, so that the others run where the
packages that read data are missing.
"""

import argparse
from collections.abc import Sequence

from shallow_pi.training import config


def cli(arguments: Sequence[str]) -> tuple[config.DistillConfig | None, list[str]]:
    """The experiment of `--openpi.config NAME` on a command line, None without it; and the rest.

    Raises:
      ModuleNotFoundError, ValueError: as `openpi_configs.experiment` does.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--openpi.config", dest="name", metavar="NAME")
    own, others = parser.parse_known_args(arguments)
    if own.name is None:
        return None, others
    from shallow_pi.interop import openpi_configs

    return openpi_configs.experiment(own.name), others

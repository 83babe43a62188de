"""The command line: one thin file per verb, over the Python functions of ``mim_refiner.commands``."""

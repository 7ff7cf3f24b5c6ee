"""The configuration of a run: `schema.py` has its keys, `yaml.py` reads and writes it, `messages.py` explains
faults, `contradictions.py` refuses what no run can be made of.
"""

from flowsteer.rl.config.contradictions import check_config, fitted
from flowsteer.rl.config.schema import Config
from flowsteer.rl.config.yaml import load_config, parse_config, parse_overrides, save_config, shipped_configs

__all__ = [
    "Config",
    "check_config",
    "fitted",
    "load_config",
    "parse_config",
    "parse_overrides",
    "save_config",
    "shipped_configs",
]

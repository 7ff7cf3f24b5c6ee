"""The configuration of a run: `schema.py` has its keys, `yaml.py` reads and writes it, `messages.py` explains faults."""

from flowsteer.rl.config.schema import Config
from flowsteer.rl.config.yaml import load_config, parse_config, parse_overrides, save_config, shipped_configs

__all__ = ["Config", "load_config", "parse_config", "parse_overrides", "save_config", "shipped_configs"]

"""The toy that algorithms are checked on, for tests; it is in the package: `flowsteer.rl.check.toy`."""

from flowsteer.rl.check.toy import GROUP, PROMPTS, STEPS, Toy, ToyRows, ToyRun, comparison, toy_config

__all__ = ["GROUP", "PROMPTS", "STEPS", "Toy", "ToyRows", "ToyRun", "comparison", "toy_config"]

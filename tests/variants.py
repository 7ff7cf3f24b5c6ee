"""The variants of every built-in algorithm, for tests; they are in the package: `flowsteer.rl.check.variants`."""

from flowsteer.rl.check.variants import NONE, POOLS, VARIANTS

__all__ = ["NONE", "POOLS", "VARIANTS"]

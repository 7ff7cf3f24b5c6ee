"""All tiny image pipelines whose networks predict noise or v."""

from __future__ import annotations

from zoo import epsilon_kolors, epsilon_others, epsilon_sd, epsilon_sdxl, epsilon_unets
from zoo.entries import Entry

MODULES = (epsilon_sd, epsilon_sdxl, epsilon_others, epsilon_unets, epsilon_kolors)

ENTRIES: dict[str, Entry] = {name: entry for module in MODULES for name, entry in module.ENTRIES.items()}
NOT_BUILT: dict[str, str] = {name: reason for module in MODULES for name, reason in module.NOT_BUILT.items()}

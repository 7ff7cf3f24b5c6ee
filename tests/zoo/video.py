"""All tiny video pipelines of flow models."""

from __future__ import annotations

from zoo import video_cosmos, video_easyanimate, video_hunyuan, video_ltx, video_others, video_wan
from zoo.entries import Entry

MODULES = (video_wan, video_hunyuan, video_ltx, video_others, video_cosmos, video_easyanimate)

ENTRIES: dict[str, Entry] = {name: entry for module in MODULES for name, entry in module.ENTRIES.items()}
NOT_BUILT: dict[str, str] = {name: reason for module in MODULES for name, reason in module.NOT_BUILT.items()}

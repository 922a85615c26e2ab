"""The commands as they are typed: their options and help. What each does is in the module that it calls."""

from __future__ import annotations

from .bundles import build, calibrate, export, label
from .examine import bench, demo, doctor, inspect
from .watch import chat, recall, run

COMMANDS = (run, chat, recall, export, label, calibrate, build, inspect, doctor, bench, demo)  # as `--help` lists them

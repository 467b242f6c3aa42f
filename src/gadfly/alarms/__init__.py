"""Alarms: what goes wrong in training, found in its metrics, in words and with what to change.

    history = History("gad", Circumstances(group_size=8, held_out=64))
    history.add(row)                # each row of metrics.jsonl, as it is logged
    look(history)                   # the alarms that stand

Trends are judged with noise bands over windows (`bands.py`), never by single values, but for facts such as a
number that is none. Nothing here knows torch.
"""

from gadfly.alarms.alarm import Alarm, Change, Finding, Kind, Remedy
from gadfly.alarms.bands import Band, change_band, mean_band
from gadfly.alarms.catalogue import ALARMS, KINDS
from gadfly.alarms.history import Circumstances, History, Series
from gadfly.alarms.look import FEW_PROMPTS, look, silent

__all__ = [
    "ALARMS",
    "FEW_PROMPTS",
    "KINDS",
    "Alarm",
    "Band",
    "Change",
    "Circumstances",
    "Finding",
    "History",
    "Kind",
    "Remedy",
    "Series",
    "change_band",
    "look",
    "mean_band",
    "silent",
]

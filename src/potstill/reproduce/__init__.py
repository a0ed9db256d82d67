"""`potstill reproduce`: a paper's figures again, and how far they agree.

    plan       figures asked for -> each distinct training once, teachers first
    carry_out  the runs that are missing, one after another or several at once
    outcome    finished runs -> a verdict a figure, ranks, paired differences

    OUT/kd-resnet56-resnet20-1a2b3c4d/seed0/     a run like any other
    OUT/reproduce.json                           which figure each run is held against
    OUT/recipes/, OUT/logs/                      of runs that have a process of their own

A run that has finished is never repeated and one that was interrupted continues, because a folder's
name follows from the settings of its runs. One `reproduce` at a time works in OUT.
"""

from potstill.reproduce.carry_out import Estimate, RunsFailed, carry_out, estimate, require_alone
from potstill.reproduce.outcome import outcome
from potstill.reproduce.plan import Plan, make
from potstill.reproduce.words import remarks, table

__all__ = [
    "Estimate",
    "Plan",
    "RunsFailed",
    "carry_out",
    "estimate",
    "make",
    "outcome",
    "remarks",
    "require_alone",
    "table",
]

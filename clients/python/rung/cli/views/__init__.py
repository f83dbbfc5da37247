"""How values look on a terminal; also used by the commands that the servers contribute.

Texts that come from elsewhere are never read as markup, nor are escape sequences in them passed on.
"""

from rung.cli.views._answer import Answer, print_answer
from rung.cli.views._fleet import deployments_table, fleet_view, models_table, node_view, residency_text
from rung.cli.views._jobs import describe_event, event_line, jobs_table, phase_words, served_name
from rung.cli.views._memory import VramShare, bar_cells, vram_bar, vram_legend, vram_shares
from rung.cli.views._operation import progress_words, show_operation
from rung.cli.views._phases import show_phases
from rung.cli.views._profiles import print_profile, print_switch_plan, profiles_view, show_switch
from rung.cli.views._reclaim import leases_table, print_reclaim, wait_words
from rung.cli.views._routes import print_route
from rung.cli.views._sparkline import sparkline
from rung.cli.views._words import format_age, format_bytes, format_duration, format_part, printable
from rung.cli.views._workflows import print_workflow, workflows_table

__all__ = [
    "Answer",
    "VramShare",
    "bar_cells",
    "deployments_table",
    "describe_event",
    "event_line",
    "fleet_view",
    "format_age",
    "format_bytes",
    "format_duration",
    "format_part",
    "jobs_table",
    "leases_table",
    "models_table",
    "node_view",
    "phase_words",
    "print_answer",
    "print_profile",
    "print_reclaim",
    "print_route",
    "print_switch_plan",
    "print_workflow",
    "printable",
    "profiles_view",
    "progress_words",
    "residency_text",
    "served_name",
    "show_operation",
    "show_phases",
    "show_switch",
    "sparkline",
    "vram_bar",
    "vram_legend",
    "vram_shares",
    "wait_words",
    "workflows_table",
]

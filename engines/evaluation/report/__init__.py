"""Pages with everything inside (style, charts, pictures), no script and no network: the report of a run, and that of a study."""

from engines.evaluation.report.parts import Parts, collect
from engines.evaluation.report.run import render, write_report
from engines.evaluation.report.study import render_study

__all__ = ["Parts", "collect", "render", "render_study", "write_report"]

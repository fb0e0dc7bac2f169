"""Draws docs/evidence_position_range.png from the table in docs/evidence.md.

python docs/evidence_positions_figure.py
"""

import re
from pathlib import Path

from navit.bench import study_report
from navit.config import Study, run_file

HERE = Path(__file__).parent
TITLE = "## Positions beyond the training range"


def main() -> None:
    """Rows are in the order of the study's configs, columns of sets and budgets."""
    file = HERE.parent / "configs/studies/position_range.py"
    study = run_file(file, "get_study", Study)
    section = (HERE / "evidence.md").read_text().partition(TITLE)[2].partition("\n## ")
    cells = r"([\d.]+) ± ([\d.]+) %"
    rows = [x for x in map(re.compile(cells).findall, section[0].split("\n")) if x]
    sets = [task.name for task in study.configs["siglip2"].eval.tasks]
    columns = [(name, budget) for name in sets for budget in (256, 1024)]
    lines = [
        study_report.Line(
            name,
            study.flops[0],
            set_,
            budget,
            mean=float(mean) / 100,
            error=float(error) / 100,
            seeds=3,
            images=0,
            seconds=0,
            chance=0.2,
        )
        for name, row in zip(study.configs, rows, strict=True)
        for (set_, budget), (mean, error) in zip(columns, row, strict=True)
    ]
    (HERE / "evidence_position_range.png").write_bytes(study_report.plot(study, lines))


if __name__ == "__main__":
    main()

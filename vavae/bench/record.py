"""Results of a benchmark in a file of JSON, and their comparison with those of an earlier one."""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from vavae.bench.benchmark import Measurement, markdown, number
from vavae.errors import UserError


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SideResult(_Record):
    """Values of one side of a benchmark in one unit."""

    benchmark: str
    side: str
    unit: str
    median: FiniteFloat
    low: FiniteFloat
    high: FiniteFloat
    values: tuple[FiniteFloat, ...]
    """One a round."""


class BenchmarkResults(_Record):
    """Results of one `vavae bench` command."""

    command: str
    """Its name, such as `metrics`."""
    machine: str
    sides: tuple[SideResult, ...]

    @staticmethod
    def of(command: str, machine: str, measurements: Sequence[Measurement]) -> "BenchmarkResults":
        """The results of all measurements.

        Raises:
            UserError: a value is not finite.
        """
        for found in measurements:
            for side, values in found.values.items():
                if not all(map(math.isfinite, values)):
                    raise UserError(
                        f"{found.benchmark}: {side} has {', '.join(map(str, values))} {found.unit}, which is no "
                        "result; measure it again"
                    )
        sides = tuple(
            SideResult(
                benchmark=found.benchmark,
                side=side,
                unit=found.unit,
                median=statistics.median(values),
                low=min(values),
                high=max(values),
                values=values,
            )
            for found in measurements
            for side, values in found.values.items()
        )
        return BenchmarkResults(command=command, machine=machine, sides=sides)

    @staticmethod
    def read(file: Path, command: str) -> "BenchmarkResults":
        """Read the results that the same command has written.

        Raises:
            UserError: the file is not there, is none of results, or is another command's.
        """
        hint = f"give a file that `vavae bench {command} --json FILE` has written"
        try:
            found = BenchmarkResults.model_validate_json(file.read_bytes())
        except (OSError, ValidationError) as error:
            raise UserError(f"{file}: no results of a benchmark ({type(error).__name__}): {hint}") from error
        if found.command != command:
            raise UserError(f"{file} has the results of `vavae bench {found.command}`: {hint}")
        return found

    def write(self, file: Path) -> None:
        """Write the results, indented."""
        file.write_text(self.model_dump_json(indent=2) + "\n")

    def compared_with(self, earlier: "BenchmarkResults", file: Path) -> str:
        """Table of the medians of each side before and now, and their ratio, for what is in both.

        Args:
            earlier: the earlier results.
            file: where they were read.

        Raises:
            UserError: they have nothing in common, as where the sizes are others.
        """
        before = {(each.benchmark, each.side, each.unit): each for each in earlier.sides}
        rows = []
        for now in self.sides:
            then = before.get((now.benchmark, now.side, now.unit))
            if then is not None:
                ratio = f"{now.median / then.median:.3f}" if then.median else ""
                rows.append([now.benchmark, now.side, now.unit, number(then.median), number(now.median), ratio])
        if not rows:
            raise UserError(f"{file}: of other sizes, no benchmark there has the name of one here: measure it again")
        note = "" if earlier.machine == self.machine else f"\nbefore: on another machine, {earlier.machine}"
        return markdown(["benchmark", "side", "unit", "before", "now", "now / before"], rows) + note

"""What `benchmarks.fuzz` damages, how, and what must become of it: taken as it is, or refused by an error of ours."""

from collections.abc import Mapping

from benchmarks.faults.fuzzing.command_lines import Flags
from benchmarks.faults.fuzzing.damage import Target
from benchmarks.faults.fuzzing.npz import Npz
from benchmarks.faults.fuzzing.workdirs import Checkpoint, ConfigFile, Notes

TARGETS: Mapping[str, type[Target]] = {t.name: t for t in (Npz, ConfigFile, Notes, Checkpoint, Flags)}

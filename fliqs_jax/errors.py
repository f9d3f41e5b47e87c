"""How a run ends that cannot go on, whatever its config."""


class RunError(RuntimeError):
  """The run cannot go on: its disk, its checkpoints or its numbers; one line."""


class Preempted(Exception):
  """The run was asked to stop and has saved a checkpoint; started again it goes on."""

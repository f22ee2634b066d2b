"""Ways to run a plan: in this process alone, or on a group whose rank 0 this is; and what its other ranks do."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from cluster.engine.run.canary import Canary
from cluster.engine.run.command_stream import CANARY, KEEP_ALIVE, STEP, STOP, Commands
from cluster.engine.run.model_runner import ModelRunner
from cluster.engine.schedule.step_plan import StepPlan, StepResult
from parallel.errors import CollectiveError

Handler = Callable[..., object]
"""What a follower does with a command other than the engine's own; its arguments are the command's."""


class LocalExecutor:
    """One process, one rank."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner

    def execute(self, plan: StepPlan) -> StepResult:
        result = self.runner.run(plan)
        assert result is not None, "a LocalExecutor belongs on rank 0, which has results"
        return result

    def keep_alive(self) -> None:
        """Nobody is waiting."""

    def close(self) -> None:
        """Nothing was started."""


class GroupExecutor:
    """Rank 0 of a group: tells the others what to run, and runs its own part."""

    def __init__(self, runner: ModelRunner, commands: Commands) -> None:
        self.runner, self.commands = runner, commands
        self._closed = False

    def execute(self, plan: StepPlan) -> StepResult:
        self.commands.issue(STEP, plan.wire())
        result = self.runner.run(plan)
        assert result is not None, "a GroupExecutor belongs on rank 0, which has results"
        return result

    def keep_alive(self) -> None:
        self.commands.keep_alive()

    def close(self) -> None:
        """Lets the followers go; harmless when repeated."""
        if not self._closed:
            self._closed = True
            self.commands.issue(STOP)


def follow(runner: ModelRunner, commands: Commands, handlers: Mapping[str, Handler] | None = None) -> None:
    """Every other rank: execute rank 0's commands until it says stop."""
    canary = Canary(runner)
    while True:
        name, *arguments = commands.receive()
        if name == STEP:
            runner.run(StepPlan.from_wire(arguments[0]))
        elif name == STOP:
            return
        elif name == CANARY:
            canary.follow()
        elif handlers and name in handlers:
            handlers[name](*arguments)
        elif name != KEEP_ALIVE:
            raise CollectiveError(
                f"rank 0 issued {name!r}, which this rank was not taught; all ranks must run the same version"
            )

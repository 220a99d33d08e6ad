"""The part of the runner that touches papermill and the kernel process."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medtut.machine import MemorySampler


@dataclass
class Execution:
    """What running a notebook gave.

    Attributes
    ----------
    nb : notebook or None
        None when not even a file was written.
    error : str
        Empty when papermill saw no error.
    cell : int
        Position of the failing cell, -1 if unknown.
    seconds : float
    peak_mb : float
        Highest resident memory seen of the kernel and its children, MiB.
    cell_seconds : list of [int, float]
        Position and seconds of each code cell that ran.
    """

    nb: Any = None
    error: str = ""
    cell: int = -1
    seconds: float = 0.0
    peak_mb: float = 0.0
    cell_seconds: list[list[float]] = field(default_factory=list)


def execute(
    source: Path,
    target: Path,
    *,
    parameters: dict[str, Any],
    cwd: Path,
    timeout: float,
    on_cell: Callable[[int, Any], None] | None = None,
) -> Execution:
    """Run a notebook with the interpreter that runs this function.

    Installed kernelspecs are not looked at: "python3" may be another environment.

    Parameters
    ----------
    source, target : Path
        Notebook to run, and where papermill saves it after every cell.
    parameters : dict
        Injected below the parameters cell; nothing is injected when empty.
    timeout : float
        Seconds one cell may take.
    on_cell : callable
        Called with position and cell before each cell.

    Returns
    -------
    Execution
        Errors of the notebook are in it, not raised. KeyboardInterrupt is raised.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillException, PapermillExecutionError

    # papermill warns about unknown parameters; ours were checked before.
    logging.getLogger("papermill").setLevel(logging.ERROR)
    managers: list[Any] = []
    result = Execution()
    current = {"index": -1, "start": 0.0}

    def cell_start(cell: Any, cell_index: int) -> None:
        current.update(index=cell_index, start=time.perf_counter())
        if on_cell is not None:
            on_cell(cell_index, cell)

    def cell_done(cell: Any, cell_index: int, **rest: Any) -> None:
        if cell.cell_type == "code":
            seconds = round(time.perf_counter() - current["start"], 3)
            result.cell_seconds.append([cell_index, seconds])

    def pid() -> int | None:
        return getattr(managers[0].provisioner, "pid", None) if managers else None

    start = time.perf_counter()
    log_path = target.with_name("kernel.log")
    with (
        log_path.open("wb") as log,
        MemorySampler(pid, children=True, every=0.2) as memory,
        warnings.catch_warnings(),
    ):
        # pyzmq on Windows warns about the event loop papermill chooses.
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            papermill.execute_notebook(
                str(source),
                str(target),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(cwd),
                progress_bar=False,
                execution_timeout=timeout,
                kernel_manager_class=_this_interpreter(managers, log),
                on_cell_start=cell_start,
                on_cell_executed=cell_done,
            )
        except PapermillExecutionError as error:
            result.cell = error.cell_index
            result.error = f"{error.ename}: {error.evalue}"
        except (CellTimeoutError, DeadKernelError) as error:
            result.cell = current["index"]
            result.error = f"the cell took more than {timeout:g} s (--timeout)"
            if isinstance(error, DeadKernelError):
                result.error = f"the kernel died (out of memory?) {_tail(log_path)}"
        except PapermillException as error:
            result.error = str(error)
    result.seconds = time.perf_counter() - start
    result.peak_mb = memory.peak / 2**20
    log_path.unlink(missing_ok=True)
    if target.is_file():
        from medtut.course.nbfile import read_notebook

        result.nb = read_notebook(target)
    return result


def _this_interpreter(managers: list[Any], log: Any) -> type:
    """Make a kernel manager class that starts ``sys.executable`` and lists itself.

    What the kernel process itself complains about goes to the file `log`: it would
    tear the progress bar, and a kernel that died may have said why.
    """
    from ipykernel.kernelspec import make_ipkernel_cmd
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec

    class ThisInterpreter(AsyncKernelManager):
        async def start_kernel(self, **kwargs: Any) -> None:
            managers.append(self)
            await super().start_kernel(**{"stderr": log, **kwargs})

        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(
                argv=make_ipkernel_cmd(), display_name="Python 3", language="python"
            )

    return ThisInterpreter


def _tail(path: Path, lines: int = 8) -> str:
    text = path.read_text(encoding="utf-8", errors="replace")
    told = [line for line in text.splitlines() if "without encryption" not in line]
    return "\n".join(told[-lines:])
